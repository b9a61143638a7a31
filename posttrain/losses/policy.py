"""Policy losses of reinforcement learning, one pure function each. All are minimised.

Notation: A the advantage, rho_t = pi(o_t) / pi_prox(o_t) with pi_prox the policy before the first
update on this batch (``logps.proximal_T``), T the trained tokens, S the completions. Every function
returns items and an aggregation; the step divides. No function couples completions: groups were
compared when the advantages were made (``algorithms.py``).

``correction`` weighs tokens by pi_prox / pi_sampler where the two differ (a server in another
precision, segments of older policies): see ``importance_weights``. ``kl_weight`` adds the KL
penalty to the reference: see ``kl_penalty``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from posttrain.types import Aggregation, LossOutput, LossTerm, TokenLogps

if TYPE_CHECKING:
    from torch import Tensor

Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Estimator = Literal["k1", "k2", "k3", "k3_corrected"]


def clipped(
    logps: TokenLogps,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ceiling: float = 0.0,
    aggregation: Aggregation = "sequence_mean",
    constant: float = 0.0,
    kl_weight: float = 0.0,
    kl_estimator: Estimator = "k3",
    correction: Correction = "none",
    correction_cap: float = 2.0,
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
    advantage_T = _advantage_T(logps)
    ratio_T = torch.exp(logps.logps_T - logps.proximal_T)
    bounded_T = ratio_T.clamp(max=ceiling) if ceiling else ratio_T
    clipped_T = ratio_T.clamp(1 - epsilon_low, 1 + epsilon_high)
    items_T = -torch.minimum(bounded_T * advantage_T, clipped_T * advantage_T)
    low_T = (ratio_T < 1 - epsilon_low) & (advantage_T < 0)
    high_T = (ratio_T > 1 + epsilon_high) & (advantage_T > 0)
    metrics = {"clipped_low": low_T.to(ratio_T.dtype), "clipped_high": high_T.to(ratio_T.dtype)}
    return _with_kl(
        logps,
        items_T,
        metrics,
        aggregation=aggregation,
        constant=constant,
        kl_weight=kl_weight,
        kl_estimator=kl_estimator,
        correction=correction,
        correction_cap=correction_cap,
    )


def reinforce(
    logps: TokenLogps,
    *,
    aggregation: Aggregation = "sequence_sum",
    constant: float = 0.0,
    kl_weight: float = 0.0,
    kl_estimator: Estimator = "k3",
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> LossOutput:
    """-rho A by token, without clipping: its gradient at the sampling policy is REINFORCE's, -A d
    log pi(o).

    Williams 1992; RLOO, Ahmadian et al. 2024, arXiv:2402.14740 eq. 6 with the leave-one-out
    advantage. For a later update on the same batch rho is the token's ratio.
    """
    items_T = -torch.exp(logps.logps_T - logps.proximal_T) * _advantage_T(logps)
    return _with_kl(
        logps,
        items_T,
        {},
        aggregation=aggregation,
        constant=constant,
        kl_weight=kl_weight,
        kl_estimator=kl_estimator,
        correction=correction,
        correction_cap=correction_cap,
    )


def cispo(
    logps: TokenLogps,
    *,
    cap: float = 5.0,
    aggregation: Aggregation = "token_mean",
    constant: float = 0.0,
    kl_weight: float = 0.0,
    kl_estimator: Estimator = "k3",
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> LossOutput:
    """-sg[min(rho, cap)] A log pi by token: the ratio is clipped as a weight, so no token loses its
    gradient.

    MiniMax-M1 2025, arXiv:2506.13585 eq. 4 and 5; ``cap`` is the absolute bound (1 + epsilon_high).
    5 as ScaleRL (arXiv:2510.13786).
    """
    if not cap > 0:
        raise ValueError(f"cap bounds a ratio of probabilities and must be > 0; got {cap}.")
    ratio_T = torch.exp(logps.logps_T.detach() - logps.proximal_T)
    items_T = -ratio_T.clamp(max=cap) * _advantage_T(logps) * logps.logps_T
    return _with_kl(
        logps,
        items_T,
        {"clipped_high": (ratio_T > cap).to(ratio_T.dtype)},
        aggregation=aggregation,
        constant=constant,
        kl_weight=kl_weight,
        kl_estimator=kl_estimator,
        correction=correction,
        correction_cap=correction_cap,
    )


def gspo(
    logps: TokenLogps,
    *,
    epsilon_low: float = 3e-4,
    epsilon_high: float = 4e-4,
    kl_weight: float = 0.0,
    kl_estimator: Estimator = "k3",
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> LossOutput:
    """-min(s A, clip(s, 1 - epsilon_low, 1 + epsilon_high) A) by completion, s = (pi(o) /
    pi_prox(o))^(1/|o|).

    Zheng et al. 2025, arXiv:2507.18071 eq. 5 to 7. Written by token with s shared, so that a
    correction by token can weigh its tokens; the mean over a completion's tokens is the
    completion's item.
    """
    length_S = logps.num_tokens_S.clamp(min=1)
    s_S = torch.exp(logps.sum_by_sequence(logps.logps_T - logps.proximal_T) / length_S)
    advantage_S = logps.sum_by_sequence(_advantage_T(logps)) / length_S
    items_S = -torch.minimum(
        s_S * advantage_S, s_S.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage_S
    )
    outside_S = ((s_S < 1 - epsilon_low) & (advantage_S < 0)) | (
        (s_S > 1 + epsilon_high) & (advantage_S > 0)
    )
    return _with_kl(
        logps,
        items_S[logps.sequence_T],
        {"clipped": outside_S.to(s_S.dtype)},
        aggregation="sequence_mean",
        constant=0.0,
        kl_weight=kl_weight,
        kl_estimator=kl_estimator,
        correction=correction,
        correction_cap=correction_cap,
    )


def mirror_descent(
    logps: TokenLogps,
    *,
    tau: float = 1.0,
    correction: Correction = "none",
    correction_cap: float = 2.0,
) -> LossOutput:
    """(r - r_bar - tau log(pi(y) / pi_i(y)))^2 / (2 tau) by completion; log pi sums the whole
    completion, pi_i is ``proximal_T``.

    Kimi k1.5, arXiv:2501.12599 section 2.3.2: the surrogate of eq. 2 over 2 tau, with gradient
    minus eq. 3 (the report ascends). ``advantage`` holds r - r_bar, or r - tau log Z. At pi = pi_i
    it is REINFORCE with that baseline. Tokens outside of the loss mask (segments of earlier
    iterations) are in neither the gradient nor the log-ratio. The report has no ``correction``; its
    square belongs to a completion, and so does the weight (sequence_truncate, sequence_mask).
    """
    if correction.startswith("token"):
        raise ValueError(
            "mirror_descent's items are completions: correction is sequence_... or "
            f"none; got {correction!r}."
        )
    if not tau > 0:
        raise ValueError(f"tau weighs the KL to the iteration's start and must be > 0; got {tau}.")
    if logps.advantage_S is None:
        raise ValueError(
            "This loss reads advantages; its groups have none. Set Completion.advantage."
        )
    logratio_S = logps.sum_by_sequence(logps.logps_T - logps.proximal_T)
    items_S = (logps.advantage_S - tau * logratio_S) ** 2 / (2 * tau)
    items_T = (items_S / logps.num_tokens_S.clamp(min=1))[logps.sequence_T]
    return _with_kl(
        logps,
        items_T,
        {"logratio_nats": logratio_S.detach()},
        aggregation="sequence_sum",
        constant=0.0,
        kl_weight=0.0,
        kl_estimator="k3",
        correction=correction,
        correction_cap=correction_cap,
    )


def kl_penalty(logps: TokenLogps, *, estimator: Estimator = "k3") -> Tensor:
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


def importance_weights(logps: TokenLogps, *, correction: Correction, cap: float) -> Tensor:
    """[T] constants w = pi_prox / pi_sampler, by token or of the whole completion: min(w, cap), or
    w where w <= cap and else 0.

    Yao et al. 2025 (fengyao.notion.site/off-policy-rl): truncated importance sampling between the
    trainer's and the sampler's log-probs of the same weights.
    """
    if logps.sampler_T is None:
        raise ValueError(
            f"correction={correction!r} needs the sampler's log-probs; the completions have none."
        )
    if correction not in get_args(Correction) or not cap > 0:
        raise ValueError(
            f"correction is one of {', '.join(get_args(Correction))} with a cap > 0; "
            f"got {correction!r}, {cap}."
        )
    log_w_T = logps.proximal_T - logps.sampler_T
    if correction.startswith("sequence"):
        log_w_T = logps.sum_by_sequence(log_w_T)[logps.sequence_T]
    w_T = torch.exp(log_w_T)
    return w_T.clamp(max=cap) if correction.endswith("truncate") else w_T * (w_T <= cap)


def _with_kl(
    logps: TokenLogps,
    items_T: Tensor,
    metrics: dict[str, Tensor],
    *,
    aggregation: Aggregation,
    constant: float,
    kl_weight: float,
    kl_estimator: Estimator,
    correction: Correction,
    correction_cap: float,
) -> LossOutput:
    """correction * items + kl_weight * KL, one item per token."""
    if correction != "none":
        weight_T = importance_weights(logps, correction=correction, cap=correction_cap)
        items_T = items_T * weight_T
        metrics = {**metrics, "importance_weight": weight_T}
    if kl_weight:
        items_T = items_T + kl_weight * kl_penalty(logps, estimator=kl_estimator)
    term = LossTerm(items=items_T, unit="token", aggregation=aggregation, constant=constant or None)
    return LossOutput(terms=[term], metrics={**metrics, **_policy_metrics(logps)})


def _policy_metrics(logps: TokenLogps) -> dict[str, Tensor]:
    """Surprise of the sampled tokens (an estimate of the entropy), and the KL to the reference
    where there is one."""
    metrics = {"surprise_nats": -logps.logps_T.detach()}
    if logps.reference_T is not None:
        metrics["kl_reference_nats"] = kl_penalty(logps, estimator="k3").detach()
    return metrics


def _advantage_T(logps: TokenLogps) -> Any:
    if logps.advantage_T is None:
        raise ValueError(
            "This loss reads advantages; its groups have none. Set Completion.advantage."
        )
    return logps.advantage_T


_losses: tuple[Any, ...] = (clipped, reinforce, cispo, gspo, mirror_descent)
for _loss in _losses:
    _loss.couples_completions = False
