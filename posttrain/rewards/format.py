"""Rewards for the shape of a completion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

R1_TAGS = ("think", "answer")


def think_answer_format(
    completion: str, sample: Mapping[str, Any], *, opened: bool = False
) -> float:
    """1 if the completion is ``<think>...</think><answer>...</answer>`` and nothing else, each tag
    exactly once; else 0.

    DeepSeek-AI 2025, arXiv:2501.12948 section 2.2.2 and table 1. White space may stand around and
    between the blocks. ``opened``: the prompt's template already ends in ``<think>``, so the
    completion has no opening tag. Neither block may be empty.
    """
    text = f"<think>{completion}" if opened else completion
    if any(text.count(f"<{slash}{tag}>") != 1 for tag in R1_TAGS for slash in ("", "/")):
        return 0.0
    match = re.fullmatch(
        r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, flags=re.DOTALL
    )
    return 1.0 if match and all(part.strip() for part in match.groups()) else 0.0


def answer_block(completion: str) -> str | None:
    """What stands in the one ``<answer>`` block; None if there is no block or more than one."""
    found = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    once = completion.count("<answer>") == 1 and completion.count("</answer>") == 1
    return found[0].strip() if len(found) == 1 and once else None
