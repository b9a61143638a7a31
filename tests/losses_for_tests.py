"""Losses that the invariance tests use beside SFT, each with its reference over plain per-sequence
log-probs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import posttrain
from posttrain.losses import preference
from posttrain.losses.policy import clipped, mirror_descent, objective
from posttrain.losses.preference import kto
from posttrain.rl.algorithms import Algorithm
from posttrain.rl.credit import credit
from posttrain.types import Completion, Logps, LossOutput, LossTerm, PromptGroup, loss
from tests.helpers import plain_logps, plain_states

PREFERENCE = {
    name: found
    for name, found in vars(preference).items()
    if name in posttrain.__all__ and found.__module__ == preference.__name__
}
"""Every public loss on comparisons, by name."""


@credit(tokens=True, reference=True)
def said(rollouts):
    """Labels from the text, advantages from the token ids: every rank is sent those of all."""
    first = {r.text[:1] for group in rollouts for r in group}
    return [
        [
            {"label": 1.0 if r.text[:1] > min(first) else -1.0, "advantage": r.token_ids - r.kl}
            for r in group
        ]
        for group in rollouts
    ]


SAID = Algorithm(name="said", advantages=said, loss=kto, skip_zero="never")
"""Its loss has a statistic of the whole batch: the answers to other prompts."""


def all_pairs(logps: Logps) -> LossOutput:
    """-log sigmoid(l_i - l_j) over all i < j of a group, mean over pairs then groups; plus 0.1 *
    token-mean NLL.

    Couples the completions of a group: it needs the gradient cache when a group is over the token
    budget.
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
        pairs = [
            -torch.log(torch.sigmoid(sums[i] - sums[j]))
            for i in range(len(sums))
            for j in range(i + 1, len(sums))
        ]
        if pairs:
            total = total + sum(pairs) / len(pairs)
    tokens = torch.cat([lp for group in logps for lp in group])
    return total / len(logps) - 0.1 * tokens.sum() / tokens.numel()


@loss(reference=False, outputs=("entropy", "hidden"))
def surprising_pairs(logps: Logps) -> LossOutput:
    """sigmoid(s_i - s_j) over all i < j of a group, s the completion's sum of entropies plus 0.1
    log pi plus the sum of its squared hidden states: reads and couples all that a forward gives."""
    parts_T = logps["entropy"] + 0.1 * logps.logps_T + logps["hidden"].pow(2).sum(-1) / 100
    score_S = logps.sum_by_sequence(parts_T)
    items = []
    for p in range(int(logps.group_S.max()) + 1):
        mine = (logps.group_S == p) & (logps.num_tokens_S > 0)
        scores = score_S[mine]
        i, j = torch.triu_indices(len(scores), len(scores), 1)
        items.append(torch.sigmoid(scores[i] - scores[j]).sum() + 0 * score_S.sum())
    return LossOutput(items=torch.stack(items), unit="group")


def surprising_pairs_reference(model: nn.Module, groups: Sequence[PromptGroup]) -> Tensor:
    """The same, one sequence at a time."""
    total = 0.0
    for group in groups:
        scores = []
        for k, completion in enumerate(group.completions):
            if completion.num_trained:
                entropy, hidden = plain_states(model, group, k)
                logps = plain_logps(model, group, k)
                scores.append((entropy + 0.1 * logps + hidden.pow(2).sum(-1) / 100).sum())
        total = total + sum(
            torch.sigmoid(a - b) for n, a in enumerate(scores) for b in scores[n + 1 :]
        )
    return total / sum(group.num_trained > 0 for group in groups)


def as_rollouts(groups: Sequence[PromptGroup], *, seed: int) -> list[PromptGroup]:
    """The same tokens with advantages, the sampler's log-probs and those from before the first
    update."""
    rng = random.Random(seed)

    def rolled(c: Completion) -> Completion:
        old = [rng.uniform(-6, -3) for _ in c.token_ids]
        return c.with_columns(
            advantage=rng.gauss(0, 1),
            proximal_logps=old,
            sampler_logps=[p - rng.gauss(0, 0.5) for p in old],
        )

    return [replace(g, completions=[rolled(c) for c in g.completions], pairs=()) for g in groups]


policy_loss = objective(
    clipped.with_options(epsilon_high=0.4), correction="token_truncate", correction_cap=1.5
)
"""PPO's clipped surrogate, tokens weighed by min(pi_old / pi_sampler, 1.5)."""
k15_loss = mirror_descent.with_options(tau=0.5)
"""Kimi k1.5's, tau 0.5."""


def policy_reference(groups: Sequence[PromptGroup]) -> Callable[[list[list[Tensor]]], Tensor]:
    """The mean over completions of the mean over their trained tokens, in a loop."""

    def value(logps: list[list[Tensor]]) -> Tensor:
        items = []
        for lp, old, sampler, advantage in _by_completion(groups, logps):
            ratio, weight = torch.exp(lp - old), torch.exp(old - sampler).clamp(max=1.5)
            items.append(
                -(
                    weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.4) * advantage)
                ).mean()
            )
        return torch.stack(items).mean()

    return value


def k15_reference(groups: Sequence[PromptGroup]) -> Callable[[list[list[Tensor]]], Tensor]:
    """(A - tau log-ratio)^2 / (2 tau), mean over completions."""

    def value(logps: list[list[Tensor]]) -> Tensor:
        return torch.stack(
            [(a - 0.5 * (lp - old).sum()) ** 2 for lp, old, _, a in _by_completion(groups, logps)]
        ).mean()

    return value


def _by_completion(
    groups: Sequence[PromptGroup], logps: list[list[Tensor]]
) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    found = []
    for group, row in zip(groups, logps, strict=True):
        for c, lp in zip(group.completions, row, strict=True):
            old, sampler = (
                lp.new_tensor(c.columns[name][c.loss_mask])
                for name in ("proximal_logps", "sampler_logps")
            )
            found.append((lp, old, sampler, c.columns["advantage"]))
    return found
