"""Credit: from the rollouts of an iteration to the columns that losses read.

First the functions that give advantages, then ``trained_groups``, which gives them what they need
and makes prompt groups of scored trajectories.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from posttrain.models.policy import in_eval_mode
from posttrain.resolve import settings
from posttrain.training.forward import Compute, ForwardPlan, Ref, forward_values
from posttrain.training.sharding import exchange, gather_object
from posttrain.training.step import Reference
from posttrain.types import Completion, Declared, Forward, PromptGroup

if TYPE_CHECKING:
    from posttrain.rl.algorithms import Algorithm
    from posttrain.rl.trajectory import TrajectoryGroup

Scores = Sequence[Sequence[float | None]]
"""[group][completion] rewards; None: could not be scored. Such a completion is in no statistic and
is not trained."""
Advantages = list[list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A finished completion, as the functions that give credit see it."""

    reward: float | None
    """Weighted sum of the rewards; None: could not be scored."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """What each reward function gave."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each reward function."""
    token_ids: Any = None
    """The tokens that credit is given for, those of the present policy's segments, where
    ``Credit.tokens``."""
    text: Any = None
    """What the rewards read, where ``Credit.tokens``."""
    finish_reason: str = "stop"
    is_trained: bool = True
    """False for one that only counts in the others' baseline (rollout.mask_truncated)."""
    logps: Any = None
    """[tokens] log-probs under the policy before the first update, where ``Credit.policy``."""
    reference_logps: Any = None
    """[tokens] log-probs under the reference, where ``Credit.reference``."""

    @property
    def kl(self) -> Any:
        """[tokens] log pi - log pi_ref: k1, an unbiased estimate of KL(pi || pi_ref)."""
        return self.logps - self.reference_logps


Rollouts = Sequence[Sequence[Rollout]]
"""[group][completion], all of an iteration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Credit(Declared):
    """A function from an iteration's rollouts to columns, and what it needs first.

    ``function(rollouts, **options)`` gives for [group][completion] an advantage: a number, an array
    with one for each token that counts (``Rollout.logps``), a mapping of several columns of either
    kind, or None (not trained). ``@credit(...)`` makes one; a plain function is given the rewards
    alone.
    """

    of_rewards: bool = False
    """The function gets [group][completion] rewards in place of rollouts."""
    policy: bool | str = False
    """Whether it reads ``Rollout.logps``; a name: if that option is not 0."""
    reference: bool | str = False
    """Whether it reads ``Rollout.reference_logps``; a name: if that option is not 0."""
    tokens: bool = False
    """Whether it reads ``Rollout.token_ids`` or ``text``: every rank is then sent those of all."""

    def columns(self, rollouts: Rollouts) -> list[list[dict[str, Any] | None]]:
        """[group][completion] columns; None: not trained."""
        return [
            [
                None if a is None else dict(a) if isinstance(a, Mapping) else {"advantage": a}
                for a in group
            ]
            for group in self(rewards_of(rollouts) if self.of_rewards else rollouts)
        ]

    def reads(self, what: Literal["policy", "reference", "tokens"]) -> bool:
        """Whether the tokens, or the log-probs of ``what`` before the first update, are needed with
        its options."""
        declared = getattr(self, what)
        if isinstance(declared, str):
            default = signature(self.function).parameters[declared].default
            declared = self.options.get(declared, default)
        return bool(declared)


def credit(**declared: Any) -> Callable[[Callable[..., Any]], Credit]:
    """``@credit(policy=True, reference=True)`` above a function of rollouts; ``of_rewards=True``
    above one of rewards."""
    return lambda function: Credit(function=function, **declared)


def rewards_of(rollouts: Rollouts) -> list[list[float | None]]:
    """[group][completion] rewards."""
    return [[r.reward for r in group] for group in rollouts]


def _of_known(
    scores: Sequence[float | None], advantages: Callable[[list[float]], list[float]]
) -> list[float | None]:
    """``advantages`` of the scores that are not None, which stay None; exactly 0 where they are all
    equal."""
    known = [r for r in scores if r is not None]
    found = iter([0.0] * len(known) if all_equal(known) else advantages(known))
    return [None if r is None else next(found) for r in scores]


def all_equal(values: Sequence[float]) -> bool:
    """Whether rewards are the same but for rounding (weighted sums of equal rewards differ by 1e-16
    in another order)."""
    return len(values) <= 1 or math.isclose(min(values), max(values), rel_tol=1e-12, abs_tol=1e-12)


def _normalised(scores: Sequence[float | None], std: str, std_epsilon: float) -> list[float | None]:
    def normalised(known: list[float]) -> list[float]:
        mean, scale = fmean(known), 1.0
        if std != "none":
            squares = math.fsum((r - mean) ** 2 for r in known)
            scale = math.sqrt(squares / (len(known) - (std == "sample"))) + std_epsilon
        return [(r - mean) / scale for r in known]

    return _of_known(scores, normalised)


@credit(of_rewards=True)
def group_normalised(
    scores: Scores,
    *,
    std: Literal["population", "sample", "none"] = "population",
    std_epsilon: float = 0.0,
) -> Advantages:
    """(r - mean) / (std + std_epsilon) within each group; "none": r - mean. Equal rewards give
    exactly 0.

    Shao et al. 2024, arXiv:2402.03300 section 4.1.2, which leaves open whether the deviation is
    Bessel-corrected ("sample") and adds nothing to it; without division: Liu et al. 2025
    (Dr. GRPO), arXiv:2503.20783.
    """
    if std not in ("population", "sample", "none"):
        raise ValueError(f"std is population, sample or none; got {std!r}.")
    return [_normalised(group, std, std_epsilon) for group in scores]


@credit(of_rewards=True)
def batch_normalised(
    scores: Scores, *, baseline: Literal["none", "group"] = "none", std_epsilon: float = 1e-8
) -> Advantages:
    """(r - mean) / std over the whole batch; with baseline "group" the group's mean is taken off
    first.

    Hu et al. 2025 (REINFORCE++ and REINFORCE++-baseline), arXiv:2501.03262.
    """
    centred = scores if baseline == "none" else group_normalised(scores, std="none")
    flat = iter(_normalised([r for group in centred for r in group], "population", std_epsilon))
    return [[next(flat) for _ in group] for group in centred]


@credit(of_rewards=True)
def leave_one_out(scores: Scores) -> Advantages:
    """r_i - mean of the others in its group. Ahmadian et al. 2024 (RLOO), arXiv:2402.14740 eq. 7. 0
    for a completion alone."""

    def less_others(known: list[float]) -> list[float]:
        k, mean = len(known), fmean(known)
        return [k / (k - 1) * (r - mean) for r in known]

    return [_of_known(group, less_others) for group in scores]


@credit(policy="beta", reference="beta")
def leave_one_out_less_kl(rollouts: Rollouts, *, beta: float = 0.03) -> Advantages:
    """``leave_one_out`` of the rewards less beta times the completion's summed KL to the reference.
    Ahmadian et al. 2024 (RLOO), arXiv:2402.14740 section 3."""
    return leave_one_out(
        [
            [
                None if r.reward is None else r.reward - (beta * math.fsum(r.kl) if beta else 0.0)
                for r in group
            ]
            for group in rollouts
        ]
    )


@credit(policy="beta", reference="beta")
def token_returns(
    rollouts: Rollouts, *, beta: float = 0.001, std_epsilon: float = 1e-8
) -> list[list[Any]]:
    """By token r - beta sum of the KL from the token on, normalised over all tokens of the batch.
    With beta = 0 ``batch_normalised`` of the rewards.

    Hu et al. 2025 (REINFORCE++), arXiv:2501.03262 eq. 6 and 8, with discount 1.
    """
    if not beta:
        return batch_normalised(rewards_of(rollouts), std_epsilon=std_epsilon)
    returns = [
        None
        if r.reward is None or not r.is_trained
        else r.reward - beta * np.cumsum(r.kl[::-1])[::-1]
        for group in rollouts
        for r in group
    ]
    flat = batch_normalised(
        [[] if x is None else x.tolist() for x in returns], std_epsilon=std_epsilon
    )
    made = iter([None if x is None else np.asarray(a) for x, a in zip(returns, flat, strict=True)])
    return [[next(made) for _ in group] for group in rollouts]


@credit(of_rewards=True)
def mean_normalised(scores: Scores) -> Advantages:
    """(r - mean) / mean within each group; exactly 0 where no reward is above 0.

    Tajwar et al. 2026 (MaxRL), arXiv:2602.02710: for rewards 0 and 1 an estimate of the gradient of
    log P(right), to the order that a group's size allows, in place of P(right). ValueError for a
    negative reward: its mean is no success rate.
    """
    least = min((r for group in scores for r in group if r is not None), default=0.0)
    if least < 0:
        raise ValueError(f"maxrl divides by the mean reward: rewards are >= 0; got {least}.")

    def relative(known: list[float]) -> list[float]:
        mean = fmean(known)
        return [(r - mean) / mean for r in known]

    return [_of_known(group, relative) for group in scores]


@credit(of_rewards=True)
def mirror_baseline(
    scores: Scores, *, baseline: Literal["mean", "log_mean_exp"] = "mean", tau: float = 1.0
) -> Advantages:
    """r - b within each group: b the mean reward, or tau log((1/k) sum exp(r / tau)), an estimate
    of tau log Z.

    Kimi k1.5, arXiv:2501.12599 section 2.3.2. The estimate goes to the mean for tau to infinity and
    to the maximum for tau to 0.
    """
    if baseline not in ("mean", "log_mean_exp") or not tau > 0:
        raise ValueError(
            f"baseline is mean or log_mean_exp, with tau > 0; got {baseline!r} and {tau}."
        )

    def less_baseline(known: list[float]) -> list[float]:
        b = fmean(known) if baseline == "mean" else log_mean_exp(known, tau=tau)
        return [r - b for r in known]

    return [_of_known(group, less_baseline) for group in scores]


def log_mean_exp(values: Sequence[float], *, tau: float) -> float:
    """tau log((1/k) sum_j exp(r_j / tau)), without overflow."""
    top = max(values)
    return top + tau * math.log(fmean(math.exp((v - top) / tau) for v in values))


@credit()
def decoupled(rollouts: Rollouts, *, std_epsilon: float = 1e-4) -> Advantages:
    """sum_k w_k (r_k - mean_k) / (std_k + std_epsilon) within each group, each reward normalised on
    its own, then normalised over the batch: rewards of different scale keep their weight.

    Liu et al. 2026 (GDPO), arXiv:2601.05242 eq. 4 to 6; the deviation Bessel-corrected as in the
    authors' code and TRL. A part that could not be scored counts as 0 after normalisation.
    """
    sums: list[list[float | None]] = []
    for group in rollouts:
        total = [0.0] * len(group)
        for name, weight in group[0].weights.items():
            part = _normalised([r.parts.get(name) for r in group], "sample", std_epsilon)
            total = [t + weight * (a or 0.0) for t, a in zip(total, part, strict=True)]
        sums.append([None if r.reward is None else t for r, t in zip(group, total, strict=True)])
    return batch_normalised(sums, std_epsilon=std_epsilon)


@credit(policy=True)
def covariant_tokens(
    rollouts: Rollouts,
    *,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    pick: Literal["random", "largest"] = "random",
    std: Literal["population", "sample", "none"] = "population",
    seed: int = 0,
) -> list[list[Any]]:
    """``group_normalised``, and a column ``covariant``: 1 at a share of all tokens whose covariance
    (log pi - mean)(A - mean), means over all tokens, lies in (low, high) ("random", Clip-Cov), or
    is the largest ("largest", KL-Cov).

    Cui et al. 2025, arXiv:2505.22617 eq. 9 to 11. The paper's code and verl take the covariance of
    each micro-batch under the weights of its update; here it is that of the whole iteration before
    its first update: the same for one update, and the same however the batch is split.
    """
    advantages = group_normalised(rewards_of(rollouts), std=std)
    pairs = [list(zip(*both, strict=True)) for both in zip(rollouts, advantages, strict=True)]
    trained = [
        (r.logps, np.full(len(r.logps), a))
        for group in pairs
        for r, a in group
        if a is not None and r.is_trained
    ]
    logps, by_token = map(np.concatenate, zip(*trained, strict=True))
    covariance = (logps - logps.mean()) * (by_token - by_token.mean())
    count = max(1, int(share * len(covariance)))
    if pick == "largest":
        chosen = np.argsort(-covariance, kind="stable")[:count]
    else:
        inside = np.flatnonzero((covariance > low) & (covariance < high))
        chosen = np.random.default_rng([seed, len(covariance)]).permutation(inside)[:count]
    mask = np.zeros(len(covariance))
    mask[chosen] = 1.0
    parts = iter(np.split(mask, np.cumsum([len(x) for x, _ in trained])[:-1]))
    return [
        [
            a if a is None else {"advantage": a, "covariant": next(parts) if r.is_trained else 0.0}
            for r, a in group
        ]
        for group in pairs
    ]


@credit(policy=True, reference=True)
def sampled_reverse_kl(rollouts: Rollouts, *, reward_weight: float = 0.0) -> list[list[Any]]:
    """By token log pi_teacher - log pi, the reference being the teacher: on-policy distillation
    from the sampled tokens alone. ``reward_weight`` adds ``group_normalised`` of the rewards.

    Agarwal et al. 2023 (GKD), arXiv:2306.13649, with reverse KL; as a policy gradient Lu 2025
    (thinkingmachines.ai/blog/on-policy-distillation). ``losses.distillation`` is exact over the
    vocabulary and has less variance.
    """
    rewards = group_normalised(rewards_of(rollouts))
    return [
        [None if a is None else reward_weight * a - r.kl for r, a in zip(*both, strict=True)]
        for both in zip(rollouts, rewards, strict=True)
    ]


@settings
class CreditConfig:
    """Which tokens are trained, and what is computed before the first update."""

    mask_truncated: bool = False
    """Completions that reached sampling.max_tokens are scored but not trained (DAPO's overlong
    filtering)."""
    keep_old_segments: bool = False
    """Partial rollouts: tokens drawn in earlier iterations are trained too; else they count as
    prompt, outside of the loss and of every log-ratio (Kimi k1.5). A completion that was finished
    earlier and waited for the others of its group is then only part of their baseline."""


def trained_groups(
    scored: Sequence[TrajectoryGroup],
    *,
    algorithm: Algorithm,
    config: CreditConfig,
    version: int,
    proximal: bool,
    policy: nn.Module,
    reference: Reference | None,
    plan: ForwardPlan,
) -> list[PromptGroup]:
    """One group for each, with the columns that the algorithm gives to the completions that this
    rank holds. ``proximal``: log-probs under the present policy are kept, because it will be
    updated more than once on them."""
    groups = [_group(s, config, version) for s in scored]
    if not any(group.num_trained for group in groups):
        return groups  # all unscored or cut: the iteration says so
    credit, measured = algorithm.credit, groups
    computes: dict[str, Compute] = {}
    if proximal or credit.reads("policy") or credit.reads("reference"):
        computes["logps"] = lambda _, batch: policy(batch)
    if credit.reads("reference"):
        assert reference is not None
        computes["reference_logps"] = lambda groups, batch: Forward(reference(groups, batch))
        # taken off the reward of what is scored and not trained, too
        measured = [_group(s, config, version, measured=True) for s in scored]
    with in_eval_mode(policy):
        known = _known(scored, measured, credit, computes, plan)
    rollouts = [
        [
            _rollout(s, k, measured[g].completions[k], c.num_trained > 0, known.get((g, k), {}))
            for k, c in enumerate(groups[g].completions)
        ]
        for g, s in enumerate(scored)
    ]
    columns = credit.columns(rollouts)

    def credited(g: int, k: int, completion: Completion) -> Completion:
        given = columns[g][k]
        if given is None:
            completion = replace(completion, loss_mask=np.zeros_like(completion.loss_mask))
        elif not completion.is_here:
            given = {"advantage": float(np.any(given.get("advantage", 0.0)))}  # has it a signal?
        elif proximal and completion.num_trained:
            given = {**given, "proximal_logps": known[g, k]["logps"]}
        counted = measured[g].completions[k].loss_mask
        return completion.with_columns(
            **{n: _spread(v, counted) for n, v in (given or {"advantage": 0.0}).items()}
        )

    return [
        replace(group, completions=[credited(g, k, c) for k, c in enumerate(group.completions)])
        for g, group in enumerate(groups)
    ]


def _group(
    scored: TrajectoryGroup, config: CreditConfig, version: int, *, measured: bool = False
) -> PromptGroup:
    """``measured``: completions that are scored but not trained have a loss mask too."""
    completions = []
    for trajectory in scored.trajectories:
        is_masked = config.mask_truncated and trajectory.finish_reason == "length" and not measured
        old = 0 if config.keep_old_segments else trajectory.tokens_before(version)
        mask = trajectory.trained & (np.arange(len(trajectory.token_ids)) >= old)
        given = {"sampler_logps": trajectory.logps, "kept_ids": trajectory.kept_ids}
        completions.append(
            Completion(
                token_ids=trajectory.token_ids,
                loss_mask=mask & (trajectory.reward is not None and not is_masked),
                # another rank may hold them
                columns={name: x for name, x in given.items() if x is not None and len(x)},
            )
        )
    file, _, row = str(scored.prompt.sample.get("_where", "")).rpartition(":")
    return PromptGroup(
        prompt_ids=scored.prompt.ids,
        completions=completions,
        pairs=(),
        meta={"file": file or "prompts", "row": row},
    )


def _rollout(
    scored: TrajectoryGroup, k: int, measured: Completion, is_trained: bool, known: dict[str, Any]
) -> Rollout:
    trajectory = scored.trajectories[k]
    none = np.zeros(0) if not measured.num_trained else None
    return Rollout(
        reward=trajectory.reward,
        parts=trajectory.parts,
        weights=scored.weights,
        finish_reason=str(trajectory.finish_reason),
        is_trained=is_trained,
        **{"logps": none, "reference_logps": none, **known},
    )


def _known(
    scored: Sequence[TrajectoryGroup],
    groups: Sequence[PromptGroup],
    credit: Credit,
    computes: Mapping[str, Compute],
    plan: ForwardPlan,
) -> dict[Ref, dict[str, Any]]:
    """{(group, completion): fields of its ``Rollout`` that have something for each token}. Of the
    completions of all ranks what the credit reads, of this rank's own what is kept of them."""
    accelerator = plan.accelerator
    ranks: list[dict[Ref, dict[str, Any]]] = []
    if computes:
        values = forward_values(plan, plan.deliver(groups), list(computes.values()))
        by_rank: list[dict[Ref, dict[str, Any]]] = [{} for _ in range(accelerator.num_processes)]
        for ref in values[0]:
            by_rank[scored[ref[0]].rank][ref] = {
                name: found[ref].logps_T.double().cpu().numpy()
                for name, found in zip(computes, values, strict=True)
            }
        if credit.reads("policy") or credit.reads("reference"):
            ranks += gather_object(accelerator, dict(ChainMap(*by_rank)))
        else:
            ranks += exchange(accelerator, by_rank)
    if credit.reads("tokens"):
        ranks += gather_object(accelerator, _said(scored, groups))
    known: dict[Ref, dict[str, Any]] = {}
    for found in ranks:
        for ref, value in found.items():
            known.setdefault(ref, {}).update(value)
    return known


def _said(
    scored: Sequence[TrajectoryGroup], groups: Sequence[PromptGroup]
) -> dict[Ref, dict[str, Any]]:
    """Token ids and text of the completions that this rank holds."""
    return {
        (g, k): {"token_ids": c.token_ids[c.trained], "text": str(scored[g].trajectories[k].text)}
        for g, group in enumerate(groups)
        for k, c in enumerate(group.completions)
        if c.is_here
    }


def _spread(values: Any, counted: Any) -> Any:
    """An array of the counted tokens at their places, 0 elsewhere; a number as it is."""
    if not np.ndim(values):
        return values
    spread = np.zeros(len(counted))
    spread[counted] = values
    return spread


def has_signal(group: PromptGroup) -> bool:
    """Whether an advantage is not exactly 0."""
    return any(np.any(c.columns.get("advantage", 0.0)) and c.num_trained for c in group.completions)
