"""DPO and its relatives: one short pure function each, items of unit "pair" (KTO: of unit
"completion").

For a pair, w = log pi(y_w|x) - log pi_ref(y_w|x), l the same of y_l, both *summed* over the trained
tokens of the completion, and h = w - l. |y| counts trained tokens. Losses without a reference say
``@loss(reference=False)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from posttrain.types import BatchStatistic, Logps, LossOutput, PromptGroup, loss

if TYPE_CHECKING:
    from torch import Tensor


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


# ---- single labelled answers


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


# ---- what the losses share

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
"""f-divergences in place of the reverse KL of DPO: f'(u) of the ratio u = pi / pi_ref instead of
log u. Wang et al. 2023, arXiv:2309.16240, table 1. With f' the implicit reward is beta * f'(u), and
the gap of a pair is f'(u_w) - f'(u_l). The constants of f' cancel in the gap, except where each
side is divided by its own length: all are such that f'(1) = 0, so a pair has gap 0 at pi = pi_ref
in either case."""


def f_prime(logratio: Tensor, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """f'(u), u = exp(logratio), with f'(1) = 0.

    reverse_kl: log u; forward_kl: 1 - 1 / u; js_divergence: log(2u / (1 + u)); alpha_divergence: (1
    - u^-alpha) / alpha, which tends to log u as alpha -> 0 and is forward_kl at alpha = 1. Raises
    ValueError for another name or alpha = 0.

    An exponent is cut at half of the dtype's range (40 nats in float32): beyond, 1 / u and its
    square would be infinite and the gradient of a saturated loss inf * 0. There f' is constant.
    """
    if divergence == "reverse_kl":
        return logratio
    if divergence == "forward_kl":
        return _one_minus_exp(-logratio)
    if divergence == "js_divergence":
        return torch.nn.functional.logsigmoid(logratio) + math.log(2)
    if divergence == "alpha_divergence" and alpha != 0:
        return _one_minus_exp(-alpha * logratio) / alpha
    raise ValueError(
        "f_divergence is reverse_kl, forward_kl, js_divergence or alpha_divergence (with alpha != "
        f"0: its limit is reverse_kl); got {divergence!r}, alpha={alpha}."
    )


def divergence_gap(logps: Logps, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """[B] f'(u_w) - f'(u_l); for reverse_kl the log-ratio gap h itself."""
    chosen = f_prime(logps.chosen_logratio_B, divergence, alpha=alpha)
    return chosen - f_prime(logps.rejected_logratio_B, divergence, alpha=alpha)


def mean_divergence_gap(logps: Logps, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """[B] f'(u_w) / |y_w| - f'(u_l) / |y_l|; for reverse_kl w / |y_w| - l / |y_l|."""
    chosen = f_prime(logps.chosen_logratio_B, divergence, alpha=alpha) / logps.chosen_length_B
    return (
        chosen
        - f_prime(logps.rejected_logratio_B, divergence, alpha=alpha) / logps.rejected_length_B
    )


def _one_minus_exp(x: Tensor) -> Tensor:
    return -torch.expm1(x.clamp(max=0.45 * math.log(torch.finfo(x.dtype).max)))


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


# ---- metrics


def preference_metrics(logps: Logps, *, beta: float) -> dict[str, Tensor]:
    """[B] each, detached: rewards_train/{chosen,rejected,accuracies,margins},
    logps_train/{chosen,rejected}.

    The implicit reward is beta (log pi - log pi_ref) (Rafailov et al. 2023, arXiv:2305.18290 eq.
    5), beta log pi without a reference. An accuracy is strict: 0 where the two rewards are equal,
    as at the start.
    """
    reward_S = (logps.logps_S if logps.reference_T is None else logps.logratio_S) * beta
    return {
        **reward_metrics(logps.of_chosen(reward_S), logps.of_rejected(reward_S)),
        "logps_train/chosen": logps.chosen_logps_B.detach(),
        "logps_train/rejected": logps.rejected_logps_B.detach(),
    }


def reward_metrics(chosen_B: Tensor, rejected_B: Tensor) -> dict[str, Tensor]:
    """The rewards under their names. A loss whose implicit reward is not beta (log pi - log pi_ref)
    gives its own."""
    chosen, rejected = chosen_B.detach(), rejected_B.detach()
    return {
        "rewards_train/chosen": chosen,
        "rewards_train/rejected": rejected,
        "rewards_train/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards_train/margins": chosen - rejected,
    }
