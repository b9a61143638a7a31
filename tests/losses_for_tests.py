"""Losses that the invariance tests use beside SFT, each with its reference over plain per-sequence log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.types import LossOutput, LossTerm, TokenLogps


def all_pairs(logps: TokenLogps) -> LossOutput:
    """-log sigmoid(l_i - l_j) over all i < j of a group, mean over pairs then groups; plus 0.1 * token-mean NLL.

    Couples the completions of a group: it needs the gradient cache when a group is over the token budget.
    """
    sum_S = logps.sum_by_sequence(logps.logps_T)
    items = []
    for p in range(int(logps.group_S.max()) + 1):
        members = (logps.group_S == p).nonzero().flatten()
        i, j = torch.triu_indices(len(members), len(members), 1, device=members.device)
        pairs = -torch.nn.functional.logsigmoid(sum_S[members[i]] - sum_S[members[j]])
        items.append(pairs.mean() if len(pairs) else sum_S[members].sum() * 0)
    group_items = torch.stack(items)
    return LossOutput(
        terms=[
            LossTerm(items=group_items, unit="group", aggregation="group_mean"),
            LossTerm(items=-logps.logps_T, unit="token", aggregation="token_mean", weight=0.1),
        ],
        metrics={"sum_logp": sum_S.detach()},
    )


def all_pairs_reference(logps: list[list[Tensor]]) -> Tensor:
    """The same written as a loop over groups and pairs."""
    total = torch.zeros((), dtype=logps[0][0].dtype)
    for group in logps:
        sums = [lp.sum() for lp in group]
        pairs = [-torch.log(torch.sigmoid(sums[i] - sums[j])) for i in range(len(sums)) for j in range(i + 1, len(sums))]
        if pairs:
            total = total + sum(pairs) / len(pairs)
    tokens = torch.cat([lp for group in logps for lp in group])
    return total / len(logps) - 0.1 * tokens.sum() / tokens.numel()
