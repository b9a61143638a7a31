"""Near-duplicate prompts: MinHash signatures of word 5-grams, banded, joined by union-find.

Broder 1997. Memory is 4 bytes per permutation and prompt plus one band at a time: 270 MB for a million prompts.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np

NUM_PERMUTATIONS = 64
SHINGLE_WORDS = 5
_BANDS = 16  # of 4 rows: two prompts of similarity 0.8 meet in some band with probability 1 - (1 - 0.8^4)^16 > 0.9997
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words, punctuation left out."""
    return _WORD.findall(text.lower())


class PromptIndex:
    """Collects signatures of prompts; ``representatives`` then says which are near-duplicates."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._empty: Any = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, hashfunc=zlib.crc32)
        self._ids: list[str] = []
        self._signatures: list[np.ndarray[Any, Any]] = []
        self._seen: set[str] = set()

    def add(self, prompt_id: str, text: str) -> None:
        """The prompt, once for each id."""
        if prompt_id in self._seen:
            return
        self._seen.add(prompt_id)
        found = words(text)
        count = max(1, len(found) - SHINGLE_WORDS + 1)
        shingles = {" ".join(found[i : i + SHINGLE_WORDS]).encode() for i in range(count)}
        minhash = self._empty.copy()
        minhash.update_batch(sorted(shingles))
        self._ids.append(prompt_id)
        self._signatures.append(minhash.hashvalues.astype(np.uint32))

    def representatives(self, threshold: float) -> dict[str, str]:
        """{prompt id: id of the first prompt of its cluster}, for prompts that are not their own."""
        if not self._ids:
            return {}
        signatures = np.stack(self._signatures)
        parent = np.arange(len(signatures))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = int(parent[i])
            return i

        for band in np.split(signatures, _BANDS, axis=1):
            keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * 4))).ravel()
            order = np.argsort(keys, kind="stable")
            same = keys[order][1:] == keys[order][:-1]
            first = order[0]
            for at in range(1, len(order)):
                if not same[at - 1]:
                    first = order[at]
                elif (signatures[first] == signatures[order[at]]).mean() >= threshold:
                    a, b = root(int(first)), root(int(order[at]))
                    parent[max(a, b)] = min(a, b)
        return {self._ids[i]: self._ids[r] for i in range(len(parent)) if (r := root(i)) != i}
