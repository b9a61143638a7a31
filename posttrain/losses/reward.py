"""Reward-model losses. ``logps_S`` holds the score of each completion: one trained slot each, so
its 'sum' is the score."""

from __future__ import annotations

from typing import Literal

from torch.nn.functional import logsigmoid

from posttrain.types import Logps, LossOutput, loss


@loss(reference=False)
def bradley_terry(
    logps: Logps,
    *,
    margin_scale: float = 0.0,
    centering: float = 0.0,
    aggregation: Literal["group_mean", "pair_mean"] = "group_mean",
) -> LossOutput:
    """-log sigmoid(r_w - r_l - margin_scale m) + centering (r_w + r_l)^2.

    All C(K, 2) pairs of a prompt with weight 1 / C(K, 2) each (``group_mean``): Ouyang et al. 2022,
    arXiv:2203.02155 eq. 1. Margin m of the pair: Touvron et al. 2023, arXiv:2307.09288 eq. 2.
    Centering, because the first term knows only differences: Eisenstein et al. 2023,
    arXiv:2312.09244. Equal scores: ln 2. A constant added to all scores changes the centering
    alone. Raises ValueError for a negative scale: it would reward what it is meant to penalise.
    """
    if not (margin_scale >= 0 and centering >= 0):
        raise ValueError(
            "bradley_terry needs margin_scale >= 0 and centering >= 0; got "
            f"{margin_scale} and {centering}."
        )
    chosen, rejected = logps.of_chosen(logps.logps_S), logps.of_rejected(logps.logps_S)
    gap = chosen - rejected
    items = -logsigmoid(gap - margin_scale * logps.margin_B if margin_scale else gap)
    if centering:
        items = items + centering * (chosen + rejected) ** 2
    metrics = {
        "accuracy": (gap > 0).to(gap.dtype).detach(),
        "margin": gap.detach(),
        "chosen_score": chosen.detach(),
        "rejected_score": rejected.detach(),
    }
    return LossOutput(items=items, unit="pair", aggregation=aggregation, metrics=metrics)
