"""Reward models: the loss, whose ``logps_S`` are the scores (each completion has one trained slot),
and held-out figures: is it right, is it as sure as it is right, does it only like length?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch.nn.functional import logsigmoid

from posttrain.types import Logps, LossOutput, loss

if TYPE_CHECKING:
    from torch import Tensor

NUM_BINS = 10


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


def pair_report(
    chosen_B: Tensor,
    rejected_B: Tensor,
    chosen_length_B: Tensor,
    rejected_length_B: Tensor,
    scores_S: Tensor,
    lengths_S: Tensor,
) -> dict[str, float]:
    """Figures over all held-out pairs (B) and completions (S); lengths in tokens.

    ``accuracy`` share of r_w > r_l; ``margin`` mean r_w - r_l; ``ece`` of sigmoid(r_w - r_l);
    ``score_mean``, ``score_std``; ``length_correlation`` Pearson's between length and score;
    ``longer_chosen`` share of pairs of unequal length whose longer side is the chosen one in the
    data, ``longer_preferred`` those whose longer side has the higher score (equal scores prefer
    neither). No pairs: all 0.
    """
    gap = chosen_B - rejected_B
    longer_by = chosen_length_B - rejected_length_B
    unequal = longer_by != 0
    return {
        "accuracy": _mean(gap > 0),
        "margin": _mean(gap),
        "ece": expected_calibration_error(gap),
        "score_mean": _mean(scores_S),
        "score_std": float(scores_S.std(correction=0)) if len(scores_S) else 0.0,
        "length_correlation": pearson(lengths_S, scores_S),
        "longer_chosen": _mean((longer_by > 0)[unequal]),
        "longer_preferred": _mean((longer_by.sign() == gap.sign())[unequal]),
    }


def expected_calibration_error(gap_B: Tensor) -> float:
    """sum over bins of (pairs in bin / pairs) * |share that is right - mean confidence|. Guo et al.
    2017, arXiv:1706.04599 eq. 3.

    The model predicts the side with the higher score with confidence sigmoid(|gap|) in [0.5, 1],
    cut into 10 bins of equal width; a prediction is right if the gap is > 0. Confidence 1 lies in
    the last bin. No pairs: 0.
    """
    if not len(gap_B):
        return 0.0
    confidence = torch.sigmoid(gap_B.abs().double())
    right = (gap_B > 0).double()
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    difference = confidence.new_zeros(NUM_BINS).index_add(0, bins, right - confidence)
    return float(difference.abs().sum() / len(gap_B))


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation in [-1, 1]; 0 where one side has no spread."""
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return 0.0  # also where rounding makes the mean of equal numbers another number
    return float(torch.corrcoef(torch.stack((x.double(), y.double())))[0, 1].nan_to_num())


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0
