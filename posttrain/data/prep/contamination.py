"""Training rows that repeat what a model will be evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from posttrain.data.prep.duplicates import words


class EvaluationSet:
    """n-grams of words of evaluation texts, hashed; a text shorter than n words counts as a
    whole."""

    def __init__(self, rows: Iterable[Any], *, n: int) -> None:
        self._n = n
        self._grams: set[str] = set()
        self._short: dict[int, set[str]] = {}
        for row in rows:
            for text in _texts(row):
                found = words(text)
                if len(found) >= n:
                    self._grams.update(_ngrams(found, n))
                elif len(found) > 2:  # a short answer such as "42" would match everything
                    self._short.setdefault(len(found), set()).add(" ".join(found))

    def overlaps(self, text: str) -> bool:
        """Whether a text shares an n-gram with an evaluation text, or is a short one of them as a
        whole."""
        found = words(text)
        if any(gram in self._grams for gram in _ngrams(found, self._n)):
            return True
        return " ".join(found) in self._short.get(len(found), ())


def _ngrams(found: list[str], n: int) -> Iterator[str]:
    return (" ".join(found[i : i + n]) for i in range(len(found) - n + 1))


def _texts(value: Any) -> Iterator[str]:
    """Every string in a row, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
