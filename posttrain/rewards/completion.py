"""What a reward function gets: a completion as text that knows how it was drawn, and how much time
is left to score it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

_deadline = math.inf


class CompletionText(str):
    """The completion's text without special tokens; a plain ``str`` to whoever needs no more.

    ``num_tokens``: tokens drawn, the stop token included. ``finish_reason``: stop, length, repeat
    (see ``rollout.engine.FinishReason``).
    """

    num_tokens: int
    finish_reason: str
    in_thought: bool
    """Whether the prompt ends in ``<think>``: the completion begins inside the thought."""

    def __new__(
        cls,
        text: str,
        *,
        num_tokens: int | None = None,
        finish_reason: str = "stop",
        in_thought: bool = False,
    ) -> CompletionText:
        """``num_tokens`` None: the number of words, for texts that no model drew."""
        self = super().__new__(cls, text)
        self.num_tokens = len(text.split()) if num_tokens is None else num_tokens
        self.finish_reason, self.in_thought = finish_reason, in_thought
        return self


def lengths(completions: Sequence[str]) -> list[int]:
    """Tokens of each."""
    return [c.num_tokens if isinstance(c, CompletionText) else len(c.split()) for c in completions]


def start_clock(timeout_s: float) -> None:
    """Called by a worker process before each call of a reward function."""
    global _deadline
    _deadline = time.monotonic() + timeout_s


def time_left() -> float:
    """Seconds until the worker process is killed for this call; infinite outside of one."""
    return _deadline - time.monotonic()
