"""Texts that repeat others: near-duplicate prompts, and rows that repeat what a model will be
evaluated on."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

NUM_PERMUTATIONS = 64
SHINGLE_WORDS = 5
_TEXTS_AT_ONCE = 512
_COMPARED_AT_ONCE = 100_000
_BANDS = 16
"""Of 4 rows: two prompts of similarity 0.8 meet in some band with probability 1 - (1 - 0.8^4)^16 >
0.9997."""
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese: written without spaces between
words."""
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Lower-case words, punctuation left out; of scripts without spaces between words, every
    character is one."""
    return _WORD.findall(text.lower())


def _ngrams(found: list[str], n: int) -> Iterator[str]:
    return (" ".join(found[i : i + n]) for i in range(len(found) - n + 1))


class EvaluationSet:
    """n-grams of words of evaluation texts; a text shorter than n words counts as a whole."""

    def __init__(self, rows: Iterable[Any], *, n: int) -> None:
        self._n = n
        self._grams: set[str] = set()
        self._short: set[str] = set()
        for text in _texts(list(rows)):
            found = words(text)
            if len(found) >= n:
                self._grams.update(_ngrams(found, n))
            elif len(found) > 2:  # a short answer such as "42" would match everything
                self._short.add(" ".join(found))

    def overlaps(self, text: str) -> bool:
        """Whether a text shares an n-gram with an evaluation text, or is a short one of them as a
        whole."""
        found = words(text)
        if " ".join(found) in self._short:
            return True
        return not self._grams.isdisjoint(_ngrams(found, self._n))


def _texts(value: Any) -> Iterator[str]:
    """Every string in a row, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def signatures(texts: list[str]) -> np.ndarray[Any, Any]:
    """[texts, NUM_PERMUTATIONS] MinHash values of each text's shingles."""
    from datasketch import MinHash

    empty: Any = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
    found = np.empty((len(texts), NUM_PERMUTATIONS), np.uint32)
    for i, text in enumerate(texts):
        said = words(text)
        shingles = _ngrams(said, min(SHINGLE_WORDS, len(said)) or 1)
        minhash = empty.copy()
        minhash.update_batch(list({shingle.encode() for shingle in shingles} or {b""}))
        found[i] = minhash.hashvalues
    return found


def near_duplicates(
    prompts: Iterable[tuple[str, str]], threshold: float, *, imap: Callable[..., Any] = map
) -> dict[str, str]:
    """{prompt id: id of the first prompt of its cluster} of (id, text), for prompts that are not
    their own: MinHash signatures of word 5-grams (Broder 1997), banded, joined by union-find.

    ``imap`` may be a pool's, which reads prompts on while processes make signatures. Memory is 4
    bytes per permutation and prompt plus one band at a time: 270 MB for a million prompts.
    """
    ids: dict[str, None] = {}

    def new_texts() -> Iterator[str]:
        for prompt, text in prompts:
            if prompt not in ids:
                ids[prompt] = None
                yield text

    texts = new_texts()
    chunks = iter(lambda: list(itertools.islice(texts, _TEXTS_AT_ONCE)), [])
    prints = np.concatenate([*imap(signatures, chunks), signatures([])])
    parent = np.arange(len(prints))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for band in np.split(prints, _BANDS, axis=1):
        keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * 4))).ravel()
        order = np.argsort(keys, kind="stable")
        starts = np.append(True, keys[order][1:] != keys[order][:-1])[: len(keys)]
        first = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]  # of those with the same key
        meeting = np.flatnonzero(~starts)
        for part in np.array_split(meeting, 1 + len(meeting) // _COMPARED_AT_ONCE):
            alike = (prints[first[part]] == prints[order[part]]).mean(axis=1) >= threshold
            for one, other in zip(first[part[alike]], order[part[alike]], strict=True):
                a, b = root(int(one)), root(int(other))
                parent[max(a, b)] = min(a, b)
    names = list(ids)
    return {names[i]: names[r] for i in range(len(parent)) if (r := root(i)) != i}
