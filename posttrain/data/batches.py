"""Which rows a step trains: of data sets a pure function of (seed, step), so that a resumed run
goes on exactly where it stopped; of a stream (``datasets.IterableDataset``, a generator behind
``__iter__``) the next ones, read once and in order."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.chat import ChatEncoder
from posttrain.data.config import DataConfig, Purpose
from posttrain.data.readers import Row
from posttrain.data.tokenise import RowEncoder, digest_of_groups
from posttrain.types import PromptGroup

# first word of a random stream's key: order of an epoch, order inside a dataset
_EPOCH, _DATASET = 0, 1


def batch_indices(
    step: int,
    *,
    seed: int,
    batch_size: int,
    sizes: Sequence[int],
    weights: Sequence[float] | None = None,
) -> list[tuple[int, int]]:
    """The (dataset, row) pairs of optimizer step ``step`` (0-based): positions step * batch_size
    ... of an endless sequence.

    An epoch has sum(sizes) positions; a batch may span epochs. Without weights an epoch is a
    permutation of all rows: each exactly once. With weights, dataset d has round(N w_d / sum(w))
    positions of each epoch (largest remainder), shuffled together, and goes through permutations of
    its own rows: none comes twice before all came once.
    """
    epoch_size = sum(sizes)
    if step < 0 or batch_size < 1 or epoch_size == 0 or min(sizes) < 0:
        raise ValueError(
            "batch_indices needs step >= 0, batch_size >= 1 and rows to choose from; got "
            f"step={step}, batch_size={batch_size}, sizes={list(sizes)}."
        )
    counts = None if weights is None else _counts(tuple(sizes), tuple(float(w) for w in weights))
    out: list[tuple[int, int]] = []
    position = step * batch_size
    while len(out) < batch_size:
        epoch, start = divmod(position, epoch_size)
        datasets, rows = _epoch_order(seed, epoch, tuple(sizes), counts)
        take = slice(start, min(epoch_size, start + batch_size - len(out)))
        out += zip(datasets[take].tolist(), rows[take].tolist(), strict=True)
        position += take.stop - start
    return out


def _counts(sizes: tuple[int, ...], weights: tuple[float, ...]) -> tuple[int, ...]:
    """Positions of each dataset in an epoch of sum(sizes), by largest remainder; ties go to the
    first dataset."""
    if len(weights) != len(sizes) or min(weights) <= 0 or min(sizes) == 0:
        raise ValueError(
            "Mixing needs one weight > 0 and at least one row per dataset; got "
            f"weights={list(weights)}, sizes={list(sizes)}."
        )
    quotas = [sum(sizes) * w / sum(weights) for w in weights]
    counts = [int(q) for q in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda d: counts[d] - quotas[d])
    for d in by_remainder[: sum(sizes) - sum(counts)]:
        counts[d] += 1
    if 0 in counts:
        raise ValueError(
            f"The weights {list(weights)} give dataset {counts.index(0)} no row of an epoch of "
            f"{sum(sizes)} rows: it would never be trained. Raise its weight or remove it."
        )
    return tuple(counts)


@lru_cache(maxsize=4)
def _epoch_order(
    seed: int, epoch: int, sizes: tuple[int, ...], counts: tuple[int, ...] | None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Dataset and row of every position of an epoch."""
    order = _permutation(sum(sizes), seed, _EPOCH, epoch)
    if counts is None:
        ends = np.cumsum(sizes)
        datasets = np.searchsorted(ends, order, side="right")
        return datasets, order - (ends - np.asarray(sizes))[datasets]
    datasets = np.repeat(np.arange(len(sizes)), counts)
    rows = np.concatenate(
        [
            _draws(seed, d, epoch * n, n, size)
            for d, (n, size) in enumerate(zip(counts, sizes, strict=True))
        ]
    )
    return datasets[order], rows[order]


def _draws(seed: int, dataset: int, first: int, count: int, size: int) -> np.ndarray[Any, Any]:
    """Draws first ... first + count - 1 of a dataset's endless chain of permutations."""
    rounds = range(first // size, (first + count - 1) // size + 1)
    chain = np.concatenate([_permutation(size, seed, _DATASET, dataset, r) for r in rounds])
    start = first - rounds[0] * size
    return chain[start : start + count]


def mixed64(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The finaliser of splitmix64 (Steele et al. 2014): mixes all 64 bits of each number, on every
    machine the same."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _permutation(size: int, *key: int) -> np.ndarray[Any, Any]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(size)


class StreamedGroups:
    """Batches of a stream, one step after the other, tokenised as they come.

    Every rank reads the whole stream. At its end it begins anew (an epoch). ``check`` is called
    with every batch before it is trained. A resumed run reads again what was trained and compares
    it: a ValueError where the stream gives other rows.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        config: DataConfig,
        purpose: Purpose,
        batch_size: int,
        check: Callable[[list[PromptGroup]], None],
    ) -> None:
        self._rows, self._batch_size, self._check = rows, batch_size, check
        self._encode = RowEncoder(encoder=ChatEncoder(tokenizer), config=config, purpose=purpose)
        self._groups = self._read()
        self._step, self._batch = -1, list[PromptGroup]()
        self._digest = hashlib.sha256()
        self.dropped = 0

    def batch(self, step: int) -> list[PromptGroup]:
        """The groups of a step: the last one asked for, or the next."""
        if step != self._step:
            if step != self._step + 1:
                raise ValueError(
                    f"A stream goes forward: step {step} was asked for after step {self._step}."
                )
            self._batch = [next(self._groups) for _ in range(self._batch_size)]
            self._check(self._batch)
            self._digest.update(digest_of_groups(self._batch).encode())
            self._step = step
        return self._batch

    def _read(self) -> Iterator[PromptGroup]:
        epoch = 0
        while True:
            kept = 0
            for number, values in enumerate(self._rows, start=1):
                found = self._encode(Row(file="<stream>", row_number=number, values=values))
                if found.group is None:
                    self.dropped += 1
                    if self.dropped == 1:
                        warnings.warn(
                            f"Row {number} of the stream is left out: {found.reason}. Further ones "
                            "are left out without a word.",
                            stacklevel=2,
                        )
                    continue
                kept += 1
                yield found.group
            if not kept:
                again = (
                    " when it was read again: an iterator can be read only once" if epoch else ""
                )
                raise ValueError(f"The stream of training rows gave no row to train on{again}.")
            epoch += 1

    def write(self, folder: Path, *, is_main: bool) -> None:
        """How far the stream was read, and a digest of it, into a checkpoint."""
        if is_main:
            state = {"steps": self._step + 1, "digest": self._digest.hexdigest()[:16]}
            (folder / "stream.json").write_text(json.dumps(state), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Reads the stream up to where the checkpoint was."""
        state = json.loads((folder / "stream.json").read_bytes())
        for step in range(self._step + 1, state["steps"]):
            self.batch(step)
        if self._digest.hexdigest()[:16] != state["digest"]:
            raise ValueError(
                f"The stream gives other rows than those of the first {state['steps']} steps of "
                "this run. Give the same stream, or start anew: --train.resume restart."
            )
