"""Batches for loss tests: what a forward would give, written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.packing.batch import GroupPart, pack
from posttrain.types import Completion, Logps, Pair, PromptGroup

LABELS = {True: 1, False: -1, None: 0}


def batch_of(
    sums: Sequence[Sequence[float | Tensor]],
    *,
    reference: Sequence[Sequence[float]] | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    labels: Sequence[Sequence[bool | None]] | None = None,
    pairs: Sequence[Pair] | None = None,
    mean: float | None = None,
) -> Logps:
    """Groups whose completions have the given sums of log-probs (spread evenly over their tokens),
    in float64."""
    lengths = lengths or [[1] * len(group) for group in sums]
    groups = [
        PromptGroup(
            prompt_ids=[1 + g],
            completions=[
                Completion(
                    token_ids=[5] * n,
                    loss_mask=[1] * n,
                    columns={"label": LABELS[labels[g][k]]} if labels else {},
                )
                for k, n in enumerate(lengths[g])
            ],
            pairs=pairs if pairs is not None else () if labels else None,
        )
        for g in range(len(sums))
    ]
    parts = [GroupPart(group=g, completions=tuple(range(len(s)))) for g, s in enumerate(sums)]

    def spread(values: Sequence[Sequence[float | Tensor]]) -> Tensor:
        tokens = []
        for group, counts in zip(values, lengths, strict=True):
            for value, n in zip(group, counts, strict=True):
                tokens.append((torch.as_tensor(value, dtype=torch.float64) / n).expand(n))
        return torch.cat(tokens)

    return pack(groups, parts, mode="shared").with_logps(
        spread(sums),
        reference_T=None if reference is None else spread(reference),
        batch_mean=None if mean is None else torch.tensor(mean, dtype=torch.float64),
    )


def one_pair(w: float, l: float, **lengths: int) -> Logps:
    """A pair with log-ratios w and l; log-probs -20 and -50; 10 and 20 tokens."""
    counts = [[lengths.get("chosen", 10), lengths.get("rejected", 20)]]
    return batch_of([[-20.0, -50.0]], reference=[[-20.0 - w, -50.0 - l]], lengths=counts)
