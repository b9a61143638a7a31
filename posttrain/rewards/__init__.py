"""Rewards: functions ``(completion, sample) -> float | None``, plain or async.

``completion`` is a ``CompletionText``, ``sample`` the row. None: cannot be scored (never 0). What
else there is to know about a function, ``@reward(...)`` above it says. Functions that can be
imported by name run in worker processes under a hard time limit, all others in threads of this
process, where a call that hangs is given up but goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


RIGHT = 1.0
"""The value of a verifier from which on an answer is right. Less is partial credit, such as the
share of the tests that a program passes."""


@dataclass(frozen=True, kw_only=True)
class reward:
    """Decorator that declares how a function scores: ``@reward(batched=True)``. The function itself
    stays as it is."""

    batched: bool = False
    """``(completions, samples) -> list``: one call for all completions. It has
    ``rewards.timeout_s`` for each of them, and 120 s more for what it loads."""
    grouped: bool = False
    """``(completions, sample, scores) -> list``: one call for the completions of a prompt;
    ``scores`` holds what the functions before gave, by name."""
    on_timeout: float | None = None
    """Its value where it runs out of time or memory; None: cannot be scored."""
    imports: tuple[str, ...] = ()
    """Modules that it imports when it is called: a worker loads them before its time starts."""
    verifies: bool = False
    """It tells right (1 or more) from wrong: accuracy, pass@k and the success rates of prompts are
    its."""
    reads_answers: bool = False
    """It gives None for samples whose own answer it cannot read, and may compare answers for
    votes."""

    def __post_init__(self) -> None:
        if self.batched and self.grouped:
            raise ValueError("A reward is batched or grouped, not both.")

    def __call__(self, function: F) -> F:
        function.declared = self  # type: ignore[attr-defined]
        return function

    @staticmethod
    def of(function: Callable[..., Any]) -> reward:
        """What the function declares. ValueError for attributes set by hand, which nothing
        reads."""
        by_hand = [f.name for f in fields(reward) if hasattr(function, f.name)]
        if by_hand:
            raise ValueError(
                f"The reward {getattr(function, '__name__', function)!r} has an attribute "
                f"{by_hand[0]!r}, which is not read. Write @reward({by_hand[0]}=...) above it."
            )
        return getattr(function, "declared", reward())


class CompletionText(str):
    """The completion's text without special tokens; a plain ``str`` to whoever needs no more.

    ``num_tokens``: tokens drawn, the stop token included. ``finish_reason``: stop, length, repeat
    (see ``rollout.engine.FinishReason``). ``in_thought``: the prompt ends in ``<think>``, so the
    completion begins inside the thought. ``kept_ids``: for each token the ids that top-k, top-p or
    min-p left to draw it from; None without truncation.
    """

    num_tokens: int
    finish_reason: str
    in_thought: bool
    kept_ids: Sequence[Sequence[int]] | None

    def __new__(
        cls,
        text: str,
        *,
        num_tokens: int | None = None,
        finish_reason: str = "stop",
        in_thought: bool = False,
        kept_ids: Sequence[Sequence[int]] | None = None,
    ) -> CompletionText:
        """``num_tokens`` None: the number of words, for texts that no model drew."""
        self = super().__new__(cls, text)
        self.num_tokens = len(text.split()) if num_tokens is None else num_tokens
        self.finish_reason, self.in_thought = finish_reason, in_thought
        self.kept_ids = kept_ids
        return self


def lengths(completions: Sequence[str]) -> list[int]:
    """Tokens of each."""
    return [c.num_tokens if isinstance(c, CompletionText) else len(c.split()) for c in completions]


_deadline = math.inf


def start_clock(timeout_s: float) -> None:
    """Called by a worker process before each call of a reward function."""
    global _deadline
    _deadline = time.monotonic() + timeout_s


def time_left() -> float:
    """Seconds until the worker process is killed for this call; infinite outside of one."""
    return _deadline - time.monotonic()
