"""DPO and its relatives: one short pure function each, items of unit "pair" (KTO: of unit
"completion").

For a pair, w = log pi(y_w|x) - log pi_ref(y_w|x), l the same of y_l, both *summed* over the trained
tokens of the completion, and h = w - l. |y| counts trained tokens. Losses without a reference say
``@loss(reference=False)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid

from posttrain.losses.divergence import Divergence, divergence_gap, mean_divergence_gap
from posttrain.losses.preference_metrics import reward_metrics
from posttrain.losses.unpaired import kto
from posttrain.types import Logps, LossOutput, loss

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "apo_down",
    "apo_zero",
    "bco",
    "cdpo",
    "cpo",
    "discopop",
    "dpo",
    "dpo_norm",
    "dpop",
    "exo",
    "hinge",
    "ipo",
    "ipo_avg",
    "kto",
    "nca",
    "nll_chosen",
    "orpo",
    "r_dpo",
    "robust",
    "rpo",
    "simpo",
    "sppo",
]


def dpo(
    logps: Logps,
    *,
    beta: float = 0.1,
    reference_free: bool = False,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """-log sigmoid(beta h). Rafailov et al. 2023, arXiv:2305.18290 eq. 7.

    ``reference_free``: log pi_ref = 0 in the loss (the logged rewards still subtract the reference,
    as in the authors' code). ``f_divergence``: f'(u) in place of log u (Wang et al. 2023,
    arXiv:2309.16240). At pi = pi_ref exactly ln 2. Raises ValueError for both at once: without a
    reference there is no ratio to take f' of.
    """
    _check_beta(beta)
    if reference_free:
        if f_divergence != "reverse_kl":
            raise ValueError(
                f"reference_free=True has no ratio u; f_divergence={f_divergence!r} would be "
                "ignored. Use one of them."
            )
        return _pairs(-logsigmoid(beta * (logps.chosen_logps_B - logps.rejected_logps_B)))
    return _pairs(-logsigmoid(beta * divergence_gap(logps, f_divergence, alpha=alpha)))


def cdpo(
    logps: Logps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): labels are wrong with probability e.

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO". Stationary at beta
    h = ln((1 - e) / e).
    """
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    x = beta * divergence_gap(logps, f_divergence, alpha=alpha)
    return _pairs(-(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x))


def robust(
    logps: Logps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """[-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2e): unbiased under flips with
    probability e.

    Chowdhury et al. 2024, arXiv:2403.00409. Not bounded below where pairs are well separated.
    """
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    x = beta * divergence_gap(logps, f_divergence, alpha=alpha)
    e = label_smoothing
    return _pairs((-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e))


def ipo(
    logps: Logps,
    *,
    beta: float = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """(h - 1 / (2 beta))^2 with *summed* log-ratios. Azar et al. 2023, arXiv:2310.12036 eq. 17
    (beta is its tau)."""
    _check_beta(beta)
    return _pairs((divergence_gap(logps, f_divergence, alpha=alpha) - 1 / (2 * beta)) ** 2)


def ipo_avg(
    logps: Logps,
    *,
    beta: float = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """(w / |y_w| - l / |y_l| - 1 / (2 beta))^2: IPO on per-token means, TRL's reading of it
    ("confirmed with the authors")."""
    _check_beta(beta)
    items = (mean_divergence_gap(logps, f_divergence, alpha=alpha) - 1 / (2 * beta)) ** 2
    return _pairs(items, rewards=_mean_logratios(logps, beta))


def hinge(
    logps: Logps,
    *,
    beta: float = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """max(0, 1 - beta h). Liu et al. 2023 (RSO), arXiv:2309.06657 section 2.3; Zhao et al. 2023
    (SLiC), arXiv:2305.10425."""
    _check_beta(beta)
    return _pairs(torch.relu(1 - beta * divergence_gap(logps, f_divergence, alpha=alpha)))


def dpo_norm(
    logps: Logps,
    *,
    beta: float = 5.0,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """-log sigmoid(beta (w / |y_w| - l / |y_l|)). Lambert et al. 2024 (Tulu 3), arXiv:2411.15124,
    beta = 5.

    At pi = pi_ref exactly ln 2. One long and one short answer: the same log-ratio counts for less
    on the long one.
    """
    _check_beta(beta)
    items = -logsigmoid(beta * mean_divergence_gap(logps, f_divergence, alpha=alpha))
    return _pairs(items, rewards=_mean_logratios(logps, beta))


@loss(reference=False)
def simpo(logps: Logps, *, beta: float = 2.0, gamma: float = 1.0) -> LossOutput:
    """-log sigmoid(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma). Meng et al. 2024,
    arXiv:2405.14734 eq. 6."""
    _check_beta(beta)
    chosen, rejected = _mean_logps(logps)
    return _pairs(
        -logsigmoid(beta * (chosen - rejected) - gamma), rewards=(beta * chosen, beta * rejected)
    )


@loss(reference=False)
def orpo(logps: Logps, *, lambda_: float = 0.1) -> LossOutput:
    """-log pi(y_w)/|y_w| - lambda log sigmoid(log odds(y_w) - log odds(y_l)), odds = p / (1 - p), p
    = pi(y)^(1/|y|).

    Hong et al. 2024, arXiv:2403.07691 eq. 6 and 7. p -> 1 (a mean log-prob of 0) is cut at the
    dtype's resolution.
    """
    chosen, rejected = _mean_logps(logps)
    rewards = _log_odds(chosen), _log_odds(rejected)
    odds = -logsigmoid(rewards[0] - rewards[1])
    metrics = {**reward_metrics(*rewards), "log_odds_loss": odds.detach()}
    return LossOutput(items=-chosen + lambda_ * odds, unit="pair", metrics=metrics)


@loss(reference=False)
def cpo(logps: Logps, *, beta: float = 0.1, nll_weight: float = 1.0) -> LossOutput:
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))) - nll_weight log pi(y_w)/|y_w|. Xu et al.
    2024, arXiv:2401.08417.

    The paper writes the likelihood term as a sum; per token is what its code and TRL do.
    """
    _check_beta(beta)
    prefer = -logsigmoid(beta * (logps.chosen_logps_B - logps.rejected_logps_B))
    return _pairs(prefer - nll_weight * _mean_logps(logps)[0])


def bco(logps: Logps, *, beta: float = 0.1, delta: float = 0.0) -> LossOutput:
    """-log sigmoid(beta w - delta) - log sigmoid(-(beta l - delta)). Jung et al. 2024,
    arXiv:2404.04656.

    ``delta`` is the paper's reward shift; 0 as in TRL.
    """
    _check_beta(beta)
    w, l = logps.chosen_logratio_B, logps.rejected_logratio_B
    return _pairs(-logsigmoid(beta * w - delta) - logsigmoid(-(beta * l - delta)))


def apo_zero(logps: Logps, *, beta: float = 0.1) -> LossOutput:
    """1 - sigmoid(beta w) + sigmoid(beta l). D'Oosterlinck et al. 2024, arXiv:2408.06266 eq. 7:
    chosen up, rejected down."""
    _check_beta(beta)
    return _pairs(
        torch.sigmoid(-beta * logps.chosen_logratio_B)
        + torch.sigmoid(beta * logps.rejected_logratio_B)
    )


def apo_down(logps: Logps, *, beta: float = 0.1) -> LossOutput:
    """sigmoid(beta w) + 1 - sigmoid(beta h). D'Oosterlinck et al. 2024, arXiv:2408.06266 eq. 8:
    both down, rejected more."""
    _check_beta(beta)
    return _pairs(
        torch.sigmoid(beta * logps.chosen_logratio_B) + torch.sigmoid(-beta * logps.logratio_gap_B)
    )


def exo(
    logps: Logps,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """KL(q || p) over the pair, q = (sigmoid(beta h), sigmoid(-beta h)), p = (1 - e, e). Ji et al.
    2024, arXiv:2402.00856 eq. 16.

    e must be > 0: with certain labels the divergence is infinite.
    """
    _check_beta(beta)
    _check_smoothing(label_smoothing)
    if label_smoothing == 0:
        raise ValueError(
            "exo compares with labels of probability label_smoothing, which must be "
            "> 0; the paper takes 1e-3."
        )
    x = beta * divergence_gap(logps, f_divergence, alpha=alpha)
    up, down = logsigmoid(x), logsigmoid(-x)
    return _pairs(
        up.exp() * (up - math.log1p(-label_smoothing))
        + down.exp() * (down - math.log(label_smoothing))
    )


def nca(logps: Logps, *, beta: float = 0.1) -> LossOutput:
    """-log sigmoid(beta w) - 1/2 log sigmoid(-beta w) - 1/2 log sigmoid(-beta l). Chen et al. 2024,
    arXiv:2402.05369."""
    _check_beta(beta)
    w, l = beta * logps.chosen_logratio_B, beta * logps.rejected_logratio_B
    return _pairs(-logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l))


def sppo(logps: Logps, *, beta: float = 0.1) -> LossOutput:
    """(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2. Wu et al. 2024, arXiv:2405.00675 eq. 4.7, hard
    labels 1 and 0."""
    _check_beta(beta)
    target = 1 / (2 * beta)
    return _pairs(
        (logps.chosen_logratio_B - target) ** 2 + (logps.rejected_logratio_B + target) ** 2
    )


def rpo(logps: Logps, *, beta: float = 0.1, nll_weight: float = 1.0) -> LossOutput:
    """-log sigmoid(beta h) - nll_weight log pi(y_w)/|y_w|. Pang et al. 2024, arXiv:2404.19733 eq. 1
    (nll_weight is its alpha)."""
    _check_beta(beta)
    return _pairs(-logsigmoid(beta * logps.logratio_gap_B) - nll_weight * _mean_logps(logps)[0])


@loss(reference=False)
def nll_chosen(logps: Logps) -> LossOutput:
    """-log pi(y_w)/|y_w|: for weighted sums such as ``dpo + 0.2*nll_chosen``."""
    return _pairs(-_mean_logps(logps)[0])


def dpop(logps: Logps, *, beta: float = 0.1, lambda_: float = 50.0) -> LossOutput:
    """-log sigmoid(beta (h - lambda max(0, -w))): no gain from lowering the chosen. Pal et al.
    2024, arXiv:2402.13228."""
    _check_beta(beta)
    return _pairs(
        -logsigmoid(beta * (logps.logratio_gap_B - lambda_ * torch.relu(-logps.chosen_logratio_B)))
    )


def r_dpo(logps: Logps, *, beta: float = 0.1, length_weight: float = 0.01) -> LossOutput:
    """-log sigmoid(beta h + length_weight (|y_w| - |y_l|)): the policy that maximises r -
    length_weight |y| - beta KL.

    Park et al. 2024, arXiv:2403.19159 eq. 9: that policy has r = beta log(pi / pi_ref) +
    length_weight |y| + const. A longer chosen answer is explained by its length in part, so the
    policy learns less from it. length_weight = 0: ``dpo``.
    """
    _check_beta(beta)
    dtype = logps.logps_T.dtype
    chosen = beta * logps.chosen_logratio_B + length_weight * logps.chosen_length_B.to(dtype)
    rejected = beta * logps.rejected_logratio_B + length_weight * logps.rejected_length_B.to(dtype)
    return _pairs(-logsigmoid(chosen - rejected), rewards=(chosen, rejected))


def discopop(
    logps: Logps,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """(1 - s) (-log sigmoid(x)) + s exp(-x), x = beta h, s = sigmoid(x / tau): a logistic and an
    exponential loss, blended.

    Lu et al. 2024, arXiv:2406.08414 eq. 5 (log-ratio modulated loss). s exp(-x) is one exponential:
    for x -> -inf the factors alone are 0 and infinite.
    """
    _check_beta(beta)
    if not tau > 0:
        raise ValueError(
            "tau is the width of the blend in units of beta h and must be > 0; the "
            f"paper takes 0.05; got {tau}."
        )
    x = beta * divergence_gap(logps, f_divergence, alpha=alpha)
    return _pairs(-logsigmoid(x) * torch.sigmoid(-x / tau) + torch.exp(logsigmoid(x / tau) - x))


def _pairs(items_B: Tensor, *, rewards: tuple[Tensor, Tensor] | None = None) -> LossOutput:
    """``rewards``: of chosen and rejected, where the loss compares others than beta times the
    log-ratios (or log-probs)."""
    return LossOutput(
        items=items_B, unit="pair", metrics={} if rewards is None else reward_metrics(*rewards)
    )


def _mean_logratios(logps: Logps, beta: float) -> tuple[Tensor, Tensor]:
    """[B] beta w / |y_w| and beta l / |y_l|."""
    return (
        beta * logps.chosen_logratio_B / logps.chosen_length_B,
        beta * logps.rejected_logratio_B / logps.rejected_length_B,
    )


def _mean_logps(logps: Logps) -> tuple[Tensor, Tensor]:
    """[B] log pi(y)/|y| of chosen and rejected."""
    return (
        logps.chosen_logps_B / logps.chosen_length_B,
        logps.rejected_logps_B / logps.rejected_length_B,
    )


def _log_odds(mean_logp: Tensor) -> Tensor:
    """log p - log(1 - p) of log p < 0, exact near both ends."""
    tiny = torch.finfo(mean_logp.dtype).tiny
    return mean_logp - torch.log(-torch.expm1(mean_logp.clamp(max=-tiny)))


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta scales the implicit reward and must be > 0; got {beta}.")


def _check_smoothing(value: Any) -> None:
    if not 0 <= value < 0.5:
        raise ValueError(
            f"label_smoothing is the probability of a wrong label, in [0, 0.5); got {value}."
        )
