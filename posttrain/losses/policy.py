"""Policy losses of reinforcement learning, one pure function each. All are minimised.

Notation: A the advantage, rho_t = pi(o_t) / pi_prox(o_t) with pi_prox the policy before the first
update on this batch (``logps.proximal_T``), T the trained tokens, S the completions. Every function
returns items and an aggregation; the step divides. No function couples completions: groups were
compared when the advantages were made (``posttrain.rl.algorithms``).

``objective`` puts around any of them what all have in common: the weight of the mismatch between
sampler and trainer, the KL to the reference, and an entropy bonus.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import torch

from posttrain.types import Aggregation, Logps, Loss, LossOutput, LossTerm, as_loss, loss

if TYPE_CHECKING:
    from torch import Tensor

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Estimator = Literal["k1", "k2", "k3", "k3_corrected"]


def objective(
    function: Callable[..., LossOutput],
    *,
    beta: float = 0.0,
    kl_estimator: Estimator = "k3",
    correction: Correction = "none",
    correction_cap: float = 2.0,
    entropy_weight: float = 0.0,
) -> Loss:
    """correction * loss + beta KL(pi || pi_ref) - entropy_weight H(pi): once, around any loss.

    ``correction`` weighs the items by pi_prox / pi_sampler where the two differ (a server in
    another precision, segments of older policies): ``importance_weights``. ``beta`` adds
    ``kl_penalty`` by token, aggregated as the loss's own tokens. ``entropy_weight`` adds
    ``entropy_bonus``, its metric too. ValueError for a correction by token of a loss whose items
    are completions.
    """
    inner = as_loss(function)

    def total(logps: Logps) -> LossOutput:
        output = inner(logps)
        terms, metrics = list(output.terms), dict(output.metrics)
        if correction != "none":
            weight_T = importance_weights(logps, correction=correction, cap=correction_cap)
            terms = [_weighted(term, weight_T, logps, correction) for term in terms]
            metrics["importance_weight"] = weight_T
        like = output.terms[0]
        if like.unit != "token":
            like = replace(like, unit="token", aggregation="sequence_sum", constant=None)
        if beta:
            kl_T = kl_penalty(logps, estimator=kl_estimator)
            terms.append(replace(like, items=kl_T, weight=beta))
        if entropy_weight:
            bonus = entropy_bonus(logps)
            terms.append(replace(like, items=bonus.terms[0].items, weight=entropy_weight))
            metrics.update(bonus.metrics)
        metrics["surprise_nats"] = -logps.logps_T.detach()
        if "sampler_logps" in logps:
            gap_T = (logps.proximal_T.detach() - logps.by_token("sampler_logps")).abs()
            metrics["sampler_mismatch_nats"] = gap_T
            metrics["sampler_ratio_above_2"] = (gap_T > math.log(2.0)).to(gap_T.dtype)
        if logps.reference_T is not None:
            metrics["kl_reference_nats"] = kl_penalty(logps, estimator="k3").detach()
        return LossOutput(terms=terms, metrics=metrics)

    total.__name__ = total.__qualname__ = inner.name
    more = ("entropy",) if entropy_weight else ()
    return replace(
        inner,
        function=total,
        options={},
        reference=inner.reference or beta > 0,
        outputs=tuple(dict.fromkeys((*inner.outputs, *more))),
    )


def _weighted(term: LossTerm, weight_T: Tensor, logps: Logps, correction: Correction) -> LossTerm:
    if term.unit == "token":
        return replace(term, items=term.items * weight_T)
    if term.unit != "completion" or correction.startswith("token"):
        raise ValueError(
            f"correction={correction!r} weighs tokens, but the items of this loss belong to each "
            f"{term.unit}. Use sequence_truncate, sequence_mask or none."
        )
    # every token of a completion has the completion's weight
    return replace(term, items=term.items * _mean_S(weight_T, logps))


def _tokens(
    items_T: Tensor,
    aggregation: Aggregation,
    constant: float,
    metrics: dict[str, Tensor] | None = None,
) -> LossOutput:
    term = LossTerm(items=items_T, aggregation=aggregation, constant=constant or None)
    return LossOutput(terms=[term], metrics=metrics)


def _by_sign(where: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """``yes`` or ``no`` in the dtype of ``like``: torch.where of two numbers would be float32."""
    return torch.where(where, like.new_tensor(yes), like.new_tensor(no))


def _mean_S(values_T: Tensor, logps: Logps) -> Tensor:
    """[S] means over the trained tokens of each completion; 0 where there are none."""
    return logps.sum_by_sequence(values_T) / logps.num_tokens_S.clamp(min=1)


@loss(reference=False, couples_completions=False)
def clipped(
    logps: Logps,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ceiling: float = 0.0,
    aggregation: Aggregation = "sequence_mean",
    constant: float = 0.0,
) -> LossOutput:
    """-min(rho A, clip(rho, 1 - epsilon_low, 1 + epsilon_high) A) by token: PPO's surrogate, and
    with it GRPO's.

    Schulman et al. 2017, arXiv:1707.06347 eq. 7; Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300
    eq. 3 (aggregation sequence_mean: 1/G sum 1/|o_i| sum_t); Yu et al. 2025 (DAPO),
    arXiv:2503.14476 eq. 8 (token_mean, epsilon_high 0.28); Liu et al. 2025 (Dr. GRPO),
    arXiv:2503.20783 (constant = the generation budget). ``ceiling`` > 0 bounds rho from above also
    where A < 0 (Ye et al. 2020, arXiv:1912.09729 eq. 5; INTELLECT-2 takes 4). DeepSeek-R1's epsilon
    is 10: the lower bound is never reached.
    """
    if epsilon_low < 0 or epsilon_high < 0 or (ceiling and ceiling <= 1):
        raise ValueError(
            f"epsilons are >= 0 and a ceiling > 1 (0: none); got {epsilon_low}, "
            f"{epsilon_high}, {ceiling}."
        )
    advantage_T = logps.by_token("advantage")
    ratio_T = torch.exp(logps.logps_T - logps.proximal_T)
    bounded_T = ratio_T.clamp(max=ceiling) if ceiling else ratio_T
    clipped_T = ratio_T.clamp(1 - epsilon_low, 1 + epsilon_high)
    items_T = -torch.minimum(bounded_T * advantage_T, clipped_T * advantage_T)
    low_T = (ratio_T < 1 - epsilon_low) & (advantage_T < 0)
    high_T = (ratio_T > 1 + epsilon_high) & (advantage_T > 0)
    metrics = {"clipped_low": low_T.to(ratio_T.dtype), "clipped_high": high_T.to(ratio_T.dtype)}
    return _tokens(items_T, aggregation, constant, metrics)


@loss(reference=False, couples_completions=False)
def reinforce(
    logps: Logps,
    *,
    aggregation: Aggregation = "sequence_sum",
    constant: float = 0.0,
) -> LossOutput:
    """-rho A by token, without clipping: its gradient at the sampling policy is REINFORCE's, -A d
    log pi(o).

    Williams 1992; RLOO, Ahmadian et al. 2024, arXiv:2402.14740 eq. 6 with the leave-one-out
    advantage. For a later update on the same batch rho is the token's ratio.
    """
    items_T = -torch.exp(logps.logps_T - logps.proximal_T) * logps.by_token("advantage")
    return _tokens(items_T, aggregation, constant)


@loss(reference=False, couples_completions=False)
def cispo(
    logps: Logps,
    *,
    cap: float = 5.0,
    aggregation: Aggregation = "token_mean",
    constant: float = 0.0,
) -> LossOutput:
    """-sg[min(rho, cap)] A log pi by token: the ratio is clipped as a weight, so no token loses its
    gradient.

    MiniMax-M1 2025, arXiv:2506.13585 eq. 4 and 5; ``cap`` is the absolute bound (1 + epsilon_high).
    5 as ScaleRL (arXiv:2510.13786).
    """
    if not cap > 0:
        raise ValueError(f"cap bounds a ratio of probabilities and must be > 0; got {cap}.")
    ratio_T = torch.exp(logps.logps_T.detach() - logps.proximal_T)
    items_T = -ratio_T.clamp(max=cap) * logps.by_token("advantage") * logps.logps_T
    metrics = {"clipped_high": (ratio_T > cap).to(ratio_T.dtype)}
    return _tokens(items_T, aggregation, constant, metrics)


@loss(reference=False, couples_completions=False)
def gspo(
    logps: Logps,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> LossOutput:
    """-min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A) by completion, s = (pi(o) /
    pi_prox(o))^(1/|o|).

    Zheng et al. 2025, arXiv:2507.18071 eq. 5 to 7. Written by token with s shared, so that a
    correction by token can weigh its tokens; the mean over a completion's tokens is the
    completion's item.
    """
    s_S = torch.exp(_mean_S(logps.logps_T - logps.proximal_T, logps))
    advantage_S = _mean_S(logps.by_token("advantage"), logps)
    items_S = -torch.minimum(
        s_S * advantage_S, s_S.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage_S
    )
    outside_S = ((s_S < 1 - epsilon_low) & (advantage_S < 0)) | (
        (s_S > 1 + epsilon_high) & (advantage_S > 0)
    )
    metrics = {"clipped": outside_S.to(s_S.dtype)}
    return _tokens(items_S[logps.sequence_T], "sequence_mean", 0.0, metrics)


@loss(reference=False, couples_completions=False)
def mirror_descent(logps: Logps, *, tau: float = 1.0) -> LossOutput:
    """(r - r_bar - tau log(pi(y) / pi_i(y)))^2 / (2 tau) by completion; log pi sums the whole
    completion, pi_i is ``proximal_T``.

    Kimi k1.5, arXiv:2501.12599 section 2.3.2: the surrogate of eq. 2 over 2 tau, with gradient
    minus eq. 3 (the report ascends). ``advantage`` holds r - r_bar, or r - tau log Z. At pi = pi_i
    it is REINFORCE with that baseline. Tokens outside of the loss mask (segments of earlier
    iterations) are in neither the gradient nor the log-ratio.
    """
    if not tau > 0:
        raise ValueError(f"tau weighs the KL to the iteration's start and must be > 0; got {tau}.")
    logratio_S = logps.sum_by_sequence(logps.logps_T - logps.proximal_T)
    items_S = (logps.by_completion("advantage") - tau * logratio_S) ** 2 / (2 * tau)
    return LossOutput(
        items=items_S, unit="completion", metrics={"logratio_nats": logratio_S.detach()}
    )


@loss(reference=False, couples_completions=False)
def gmpo(logps: Logps, *, epsilon: float = 0.4) -> LossOutput:
    """-A exp(1/|o| sum_t c_t) by completion, c_t = sign(A) min(sign(A) log rho_t, epsilon): PPO's
    surrogate on the geometric mean of a completion's ratios.

    Zhao et al. 2025 (GMPO), arXiv:2507.20673 eq. 4: each ratio is bounded in (e^-0.4, e^0.4) on the
    side where the surrogate would gain.
    """
    advantage_S = _mean_S(logps.by_token("advantage"), logps)
    sign_T = torch.where(advantage_S > 0, 1.0, -1.0).to(advantage_S)[logps.sequence_T]
    log_ratio_T = logps.logps_T - logps.proximal_T
    bounded_T = sign_T * (sign_T * log_ratio_T).clamp(max=epsilon)
    items_S = -advantage_S * _mean_S(bounded_T, logps).exp()
    clipped_T = (sign_T * log_ratio_T > epsilon).to(log_ratio_T.dtype)
    return LossOutput(items=items_S, unit="completion", metrics={"clipped": clipped_T})


@loss(reference=False, couples_completions=False)
def sapo(logps: Logps, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> LossOutput:
    """-(4 / tau) sigmoid(tau (rho - 1)) A by token, mean over a completion's tokens: a soft gate in
    place of clipping, with slope 1 at rho = 1.

    Gao et al. 2025 (SAPO), arXiv:2511.20347 eq. 5 and 6; tau is larger where A <= 0, so that those
    gradients decay faster.
    """
    if not (tau_positive > 0 and tau_negative > 0):
        raise ValueError(f"sapo's taus are > 0; got {tau_positive} and {tau_negative}.")
    advantage_T = logps.by_token("advantage")
    tau_T = _by_sign(advantage_T > 0, tau_positive, tau_negative, advantage_T)
    ratio_T = torch.exp(logps.logps_T - logps.proximal_T)
    gate_T = torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
    return _tokens(-gate_T * advantage_T, "sequence_mean", 0.0)


@loss(reference=False, couples_completions=False)
def vespo(
    logps: Logps,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> LossOutput:
    """-sg[phi(w)] A log pi by token, phi(w) = w^k e^{lambda (1 - w)}, w = pi(o) / pi_prox(o) of the
    whole completion: phi(1) = 1, and both tails lose their gradient.

    Shen et al. 2026 (VESPO), arXiv:2602.10693; k and lambda by the sign of A (>= 0 is positive), as
    in the authors' code. TRL multiplies the trainer-sampler ratio into w; here the algorithm's
    ``correction`` weighs the items instead, as for every loss.
    """
    advantage_T = logps.by_token("advantage")
    log_ratio_T = (logps.logps_T - logps.proximal_T).detach().clamp(-20, 20)
    log_w_T = logps.sum_by_sequence(log_ratio_T).clamp(math.log(1e-8), 20)[logps.sequence_T]
    k_T = _by_sign(advantage_T >= 0, k_positive, k_negative, advantage_T)
    lambda_T = _by_sign(advantage_T >= 0, lambda_positive, lambda_negative, advantage_T)
    phi_T = torch.exp(lambda_T + k_T * log_w_T - lambda_T * log_w_T.exp())
    return _tokens(-phi_T * advantage_T * logps.logps_T, "token_mean", 0.0, {"phi": phi_T})


@loss(reference=False, couples_completions=False)
def clip_cov(logps: Logps, *, epsilon_low: float = 0.2, epsilon_high: float = 0.2) -> LossOutput:
    """``clipped`` (mean over tokens), and no gradient from the tokens that ``covariant_tokens``
    chose: those whose log-prob and advantage move together and cost entropy.

    Cui et al. 2025 (Clip-Cov), arXiv:2505.22617 eq. 10.
    """
    output = clipped.function(
        logps, epsilon_low=epsilon_low, epsilon_high=epsilon_high, aggregation="token_mean"
    )
    (term,) = output.terms
    chosen_T = logps.by_token("covariant")
    items_T = torch.where(chosen_T > 0, term.items.detach() * 0, term.items)
    return LossOutput(
        terms=[replace(term, items=items_T)], metrics={**output.metrics, "covariant": chosen_T}
    )


@loss(reference=False, couples_completions=False)
def kl_cov(logps: Logps, *, kl_weight: float = 1.0) -> LossOutput:
    """-rho A by token, plus kl_weight |log rho| for the tokens that ``covariant_tokens`` chose.

    Cui et al. 2025 (KL-Cov), arXiv:2505.22617 eq. 11; the paper writes KL(pi_old || pi), its code
    and verl's |log rho|, which is what is computed here.
    """
    log_ratio_T = logps.logps_T - logps.proximal_T
    chosen_T = logps.by_token("covariant")
    items_T = -log_ratio_T.exp() * logps.by_token("advantage")
    items_T = items_T + kl_weight * torch.where(chosen_T > 0, log_ratio_T.abs(), 0.0)
    return _tokens(items_T, "token_mean", 0.0, {"covariant": chosen_T})


@loss(reference=False, couples_completions=False, outputs=("entropy",))
def entropy_bonus(
    logps: Logps, *, aggregation: Aggregation = "token_mean", constant: float = 0.0
) -> LossOutput:
    """-H(pi(. | o_<t)) by token, exact over the vocabulary: with a weight > 0 in a sum it keeps the
    policy from collapsing. Williams and Peng 1991; Mnih et al. 2016 (A3C), arXiv:1602.01783."""
    entropy_T = logps["entropy"]
    return _tokens(-entropy_T, aggregation, constant, {"entropy_nats": entropy_T.detach()})


def kl_penalty(logps: Logps, *, estimator: Estimator = "k3") -> Tensor:
    """[T] estimates of KL(pi || pi_ref) from the sampled token; d = log pi_ref - log pi.

    Schulman 2020 (joschu.net/blog/kl-approx.html): k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1
    (DeepSeekMath eq. 4). As an on-policy loss k2 has the gradient of KL(pi || pi_ref), k3 that of
    KL(pi_ref || pi), k1 none; ``k3_corrected`` is rho k3, with the gradient of KL(pi || pi_ref)
    again (DeepSeek-V3.2 2025, arXiv:2512.02556 eq. 7).
    """
    if logps.reference_T is None:
        raise ValueError("A KL penalty needs reference log-probs, but the run has no reference.")
    d_T = logps.reference_T - logps.logps_T
    if estimator == "k1":
        return -d_T
    if estimator == "k2":
        return d_T**2 / 2
    k3_T = torch.expm1(d_T) - d_T
    if estimator == "k3":
        return k3_T
    if estimator == "k3_corrected":
        return torch.exp(logps.logps_T - logps.proximal_T) * k3_T
    raise ValueError(
        f"A KL estimator is one of {', '.join(get_args(Estimator))}; got {estimator!r}."
    )


def importance_weights(logps: Logps, *, correction: Correction, cap: float) -> Tensor:
    """[T] constants w = pi_prox / pi_sampler, by token or of the whole completion: min(w, cap), or
    w where w <= cap and else 0.

    Yao et al. 2025 (fengyao.notion.site/off-policy-rl): truncated importance sampling between the
    trainer's and the sampler's log-probs of the same weights.
    """
    if correction not in get_args(Correction) or not cap > 0:
        raise ValueError(
            f"correction is one of {', '.join(get_args(Correction))} with a cap > 0; "
            f"got {correction!r}, {cap}."
        )
    log_w_T = logps.proximal_T - logps["sampler_logps"]
    if correction.startswith("sequence"):
        log_w_T = logps.sum_by_sequence(log_w_T)[logps.sequence_T]
    w_T = torch.exp(log_w_T)
    return w_T.clamp(max=cap) if correction.endswith("truncate") else w_T * (w_T <= cap)
