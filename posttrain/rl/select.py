"""Which of a problem's answers become training data: rejection sampling (DeepSeek-R1,
arXiv:2501.12948 section 2.3.3) and the data of long2short (Kimi k1.5, arXiv:2501.12599 section
2.4)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.rewards import CompletionText
from posttrain.rewards.text import language_consistency, repetition_penalty, think_answer_format

Answer = Mapping[str, Any]
"""A row that `posttrain sample` wrote."""
Take = Literal["correct", "shortest", "best", "pairs"]
LONGER = 1.5
"""A right answer is the worse one of a pair where it is more than this many times as long."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What an answer must be to be chosen; None and False: whatever it is."""

    ended: bool = False
    """It ended by itself."""
    format: bool = False
    """``think_answer_format`` gives 1."""
    language: str | None = None
    """Every word of its thought is of this language's script."""
    min_reward: float | None = None
    """Least value of the reward ``by``."""
    max_tokens: int | None = None
    """Longest."""
    max_paragraph: int | None = None
    """Most characters of a paragraph."""
    no_code: bool = False
    """No block of code."""
    max_repeated: float | None = None
    """Largest share of 3-grams of words that occurred before."""

    def reason(self, answer: Answer, by: str) -> str:
        """Why the answer is left out; empty where it is not."""
        text = CompletionText(answer["text"], num_tokens=num_tokens(answer))
        if broken := is_broken(answer):
            return broken
        longest = max(map(len, re.split(r"\n\s*\n", text)))
        value = value_of(answer, by)
        checks = {
            "did not end by itself": self.ended and answer["finish_reason"] != "stop",
            "other format": self.format and not think_answer_format(text, {}),
            "mixed languages": self.language is not None
            and language_consistency(text, {}, language=self.language) < 1,
            "too long": self.max_tokens is not None and num_tokens(answer) > self.max_tokens,
            "long paragraphs": self.max_paragraph is not None and longest > self.max_paragraph,
            "code blocks": self.no_code and "```" in text,
            "repeated": self.max_repeated is not None
            and -repetition_penalty(text, {}) > self.max_repeated,
            "low reward": self.min_reward is not None
            and (value is None or value < self.min_reward),
        }
        return next((why for why, holds in checks.items() if holds), "")


def is_broken(answer: Answer) -> str:
    """Why nobody should train on the answer, chosen or rejected; empty where nothing is wrong."""
    checks = {
        "empty": not answer["text"].strip(),
        "unreadable characters": "\ufffd" in answer["text"],
        "repeated": answer["finish_reason"] == "repeat",
    }
    return next((why for why, holds in checks.items() if holds), "")


def num_tokens(answer: Answer) -> int:
    """Of the answer, the stop token included."""
    return len(answer["token_ids"])


def value_of(answer: Answer, by: str) -> float | None:
    """The reward ``by``; the sum for an empty name. None: not scored. ValueError lists those that
    there are."""
    if not by:
        return answer["reward"]
    parts = {part["name"]: part["value"] for part in answer["parts"]}
    if by not in parts:
        raise ValueError(f"The answers have no reward {by!r}; they have {', '.join(parts)}.")
    return parts[by]


def select(
    answers: Sequence[Answer],
    take: Take,
    *,
    by: str = "",
    at_most: int = 0,
    filters: Filters,
    counts: Counter[str],
) -> list[Answer] | list[tuple[Answer, Answer]]:
    """The chosen of one problem's answers, or pairs (chosen, rejected); ``at_most``: 0 is all.
    ``counts``: where what was left out is counted, by reason.

    correct: right answers in the order in which they were drawn. shortest: the right answer with
    fewest tokens. best: the one with the highest reward ``by``, the first of several; right or not.
    pairs: the shortest right answer against every longer wrong one and every right one that is more
    than 1.5 times as long (k1.5's DPO for long2short). The filters hold for what is chosen, and
    not for what is rejected, which is only never broken.
    """
    if take == "pairs":
        return _pairs(answers, by, at_most, filters, counts)
    fit: list[Answer] = []
    for answer in answers:
        if take != "best" and not answer["correct"]:
            reason = "not judged" if answer["correct"] is None else "wrong"
        else:
            reason = filters.reason(answer, by)
        if not reason and take == "best" and value_of(answer, by) is None:
            reason = "not scored"
        if reason:
            counts[reason] += 1
        else:
            fit.append(answer)
    if take == "shortest":
        fit.sort(key=num_tokens)
    elif take == "best":
        fit.sort(key=lambda a: -(value_of(a, by) or 0.0))
    limit = at_most or (len(fit) if take == "correct" else 1)
    counts["another was taken"] += len(fit[limit:])
    return fit[:limit]


def _pairs(
    answers: Sequence[Answer], by: str, at_most: int, filters: Filters, counts: Counter[str]
) -> list[tuple[Answer, Answer]]:
    whole: list[Answer] = []
    for answer in answers:
        reason = "not judged" if answer["correct"] is None else is_broken(answer)
        if reason:
            counts[reason] += 1
        else:
            whole.append(answer)
    fit = [a for a in whole if a["correct"] and not filters.reason(a, by)]
    if not fit:
        counts["of a problem without a right answer that fits"] += len(whole)
        return []
    shortest = min(fit, key=num_tokens)
    length = num_tokens(shortest)
    longer = [a for a in whole if num_tokens(a) > (LONGER if a["correct"] else 1) * length]
    longer.sort(key=lambda a: bool(a["correct"]))
    counts["not longer than the shortest right one"] += len(whole) - 1 - len(longer)
    taken = longer[: at_most or None]
    counts["another was taken"] += len(longer) - len(taken)
    return [(shortest, a) for a in taken]
