"""Which rows a step trains: a pure function of (seed, step), so that a resumed run goes on exactly
where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

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
