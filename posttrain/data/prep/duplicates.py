"""Near-duplicate prompts: MinHash signatures of word 5-grams, banded, joined by union-find.

Broder 1997. Memory is 4 bytes per permutation and prompt plus one band at a time: 270 MB for a
million prompts.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np

NUM_PERMUTATIONS = 64
SHINGLE_WORDS = 5
_TEXTS_AT_ONCE, _AHEAD = (
    512,
    16,
)  # of one message between processes, and messages before the reader waits
_COMPARED_AT_ONCE = 100_000
# of 4 rows: two prompts of similarity 0.8 meet in some band with probability 1 - (1 - 0.8^4)^16 >
# 0.9997
_BANDS = 16
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


def signatures(texts: list[str]) -> np.ndarray[Any, Any]:
    """[texts, NUM_PERMUTATIONS] MinHash values of each text's shingles."""
    from datasketch import MinHash

    empty: Any = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
    found = np.empty((len(texts), NUM_PERMUTATIONS), np.uint32)
    for i, text in enumerate(texts):
        said = words(text)
        count = max(1, len(said) - SHINGLE_WORDS + 1)
        minhash = empty.copy()
        minhash.update_batch(
            list({" ".join(said[k : k + SHINGLE_WORDS]).encode() for k in range(count)})
        )
        found[i] = minhash.hashvalues
    return found


class PromptIndex:
    """Collects signatures of prompts; ``representatives`` then says which are near-duplicates.
    ``pool``: where they are made while more prompts are read; default in this process."""

    def __init__(self, pool: Any = None) -> None:
        self._pool = pool
        self._ids: dict[str, None] = {}
        self._waiting: list[str] = []
        self._made: list[Any] = []

    def add(self, prompt_id: str, text: str) -> None:
        """The prompt, once for each id."""
        if prompt_id not in self._ids:
            self._ids[prompt_id] = None
            self._waiting.append(text)
            if len(self._waiting) == _TEXTS_AT_ONCE:
                self._flush()

    def _flush(self) -> None:
        texts, self._waiting = self._waiting, []
        self._made.append(
            signatures(texts)
            if self._pool is None
            else self._pool.apply_async(signatures, (texts,))
        )
        if self._pool is not None and len(self._made) > _AHEAD:
            self._made[-_AHEAD - 1] = self._made[-_AHEAD - 1].get()

    def representatives(self, threshold: float) -> dict[str, str]:
        """{prompt id: id of the first prompt of its cluster}, for prompts that are not their
        own."""
        if not self._ids:
            return {}
        self._flush()
        ids = list(self._ids)
        prints = np.concatenate(
            [made if isinstance(made, np.ndarray) else made.get() for made in self._made]
        )
        parent = np.arange(len(prints))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = int(parent[i])
            return i

        for band in np.split(prints, _BANDS, axis=1):
            keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * 4))).ravel()
            order = np.argsort(keys, kind="stable")
            starts = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])
            first = order[
                np.flatnonzero(starts)[np.cumsum(starts) - 1]
            ]  # of those with the same key
            meeting = np.flatnonzero(~starts)
            for part in np.array_split(meeting, 1 + len(meeting) // _COMPARED_AT_ONCE):
                alike = (prints[first[part]] == prints[order[part]]).mean(axis=1) >= threshold
                for one, other in zip(first[part[alike]], order[part[alike]], strict=True):
                    a, b = root(int(one)), root(int(other))
                    parent[max(a, b)] = min(a, b)
        return {ids[i]: ids[r] for i in range(len(parent)) if (r := root(i)) != i}
