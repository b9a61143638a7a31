"""Losses over single labelled answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from posttrain.types import BatchStatistic, Logps, LossOutput, PromptGroup, loss


def mismatched_groups(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """Each group's prompt with the answers of the next group (cyclically) that has another prompt;
    [] where all have one."""
    every, count, made = list(groups), len(groups), []
    for i, group in enumerate(every):
        others = (every[(i + k) % count] for k in range(1, count))
        other = next(
            (o for o in others if not np.array_equal(o.prompt_ids, group.prompt_ids)), None
        )
        if other is not None:
            made.append(replace(group, completions=other.completions, pairs=()))
    return made


STATISTIC = BatchStatistic(
    groups=mismatched_groups, items=lambda logps: logps.logratio_S[logps.num_tokens_S > 0]
)


@loss(couples_completions=False, statistic=STATISTIC)
def kto(
    logps: Logps,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """lambda_D (1 - sigmoid(beta (r - z0))) for desirable answers, lambda_U (1 - sigmoid(beta (z0 -
    r))) for undesirable ones.

    Ethayarajh et al. 2024, arXiv:2402.01306 eq. 8, with r = log pi(y|x) - log pi_ref(y|x). z0 =
    max(0, mean of r over answers to *other* prompts of the global batch; 0 where it has one prompt
    only), a constant without gradient: an estimate of KL(pi || pi_ref). Items of answers without
    label are 0 (the mean still counts them). Choose lambda_D n_D / (lambda_U n_U) in [1, 3/2]
    (section 4.2). At pi = pi_ref, z0 = 0 and every item is lambda / 2.
    """
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(
            f"kto needs weights >= 0; got desirable_weight={desirable_weight}, "
            f"undesirable_weight={undesirable_weight}."
        )
    if not beta > 0 or logps.batch_mean is None:
        raise ValueError(
            "kto needs beta > 0 and the statistic z0 of the global batch; got "
            f"beta={beta}, z0={logps.batch_mean}."
        )
    r_S, z0 = logps.logratio_S, logps.batch_mean.detach().clamp(min=0)
    good = desirable_weight * torch.sigmoid(-beta * (r_S - z0))
    bad = undesirable_weight * torch.sigmoid(-beta * (z0 - r_S))
    label_S, zero = logps.by_completion("label"), torch.zeros_like(r_S)
    items = torch.where(label_S > 0, good, torch.where(label_S < 0, bad, zero))
    reward = (beta * r_S).detach()
    metrics = {
        "rewards_train/chosen": reward[label_S > 0],
        "rewards_train/rejected": reward[label_S < 0],
        "kl_estimate_nats": z0,
    }
    return LossOutput(items=items, unit="completion", metrics=metrics)
