"""Completions in a test of rewards."""

from __future__ import annotations

from posttrain.rewards import CompletionText


def texts(*values: str) -> list[CompletionText]:
    return [CompletionText(v) for v in values]
