"""Which answers of a prompt are compared."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from posttrain.data.prep.options import Strategy
from posttrain.data.row import Answer

IndexPair = tuple[int, int]
"""(better, worse); of equal rank only where ties are kept."""

LONGER = 1.5
"""k1.5: a correct answer more than this many times as long as the shortest correct one is a
negative."""


def index_pairs(
    answers: list[Answer], strategy: Strategy, *, seed: str, keep_ties: bool
) -> list[IndexPair]:
    """Pairs of indices by ``strategy``; ``seed`` decides what `random` draws. Ties come out only
    with ``keep_ties``."""
    pairs = _STRATEGIES[strategy](answers, seed)
    if strategy == "long2short":
        return pairs
    return [
        (i, j)
        for i, j in pairs
        if answers[i].rank < answers[j].rank or (keep_ties and answers[i].rank == answers[j].rank)
    ]


def _by_rank(answers: list[Answer]) -> list[int]:
    return sorted(range(len(answers)), key=lambda i: answers[i].rank)


def _best_worst(answers: list[Answer], _: str) -> list[IndexPair]:
    if len(answers) < 2:
        return []
    order = _by_rank(answers)
    worst = max(answers[i].rank for i in order)
    last = next(i for i in order if answers[i].rank == worst and i != order[0])
    return [(order[0], last)]


def _all(answers: list[Answer], _: str) -> list[IndexPair]:
    return list(itertools.combinations(_by_rank(answers), 2))


def _adjacent(answers: list[Answer], _: str) -> list[IndexPair]:
    return list(itertools.pairwise(_by_rank(answers)))


def _random(answers: list[Answer], seed: str) -> list[IndexPair]:
    pairs = _all(answers, seed)
    different = [(i, j) for i, j in pairs if answers[i].rank < answers[j].rank]
    return [random.Random(seed).choice(different or pairs)] if pairs else []


def _long2short(answers: list[Answer], _: str) -> list[IndexPair]:
    """Kimi k1.5, arXiv:2501.12599 section 2.4: the shortest correct answer against wrong longer
    ones and against correct ones more than 1.5 times as long. Lengths in characters."""
    lengths = [len(a.text) for a in answers]
    correct = [i for i, a in enumerate(answers) if a.label]
    if not correct:
        return []
    best = min(correct, key=lambda i: lengths[i])
    wrong = [j for j, a in enumerate(answers) if a.label is False and lengths[j] > lengths[best]]
    wordy = [j for j in correct if lengths[j] > LONGER * lengths[best]]
    return [(best, j) for j in sorted(wrong + wordy)]


_STRATEGIES: dict[Strategy, Callable[[list[Answer], str], list[IndexPair]]] = {
    "best-worst": _best_worst,
    "all": _all,
    "adjacent": _adjacent,
    "random": _random,
    "long2short": _long2short,
}
