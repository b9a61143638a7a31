"""Reinforcement-learning algorithms as values: how advantages are made of rewards, which loss, what
becomes of the reference.

    MINE = replace(GRPO, name="mine", loss_options={"epsilon_high": 0.4})

and on the command line ``--algorithm my_module.MINE``, or ``--algorithm grpo
--algorithm_options.epsilon_high 0.4``. Advantages are computed over the whole rollout batch, before
it is split into mini-batches.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from typing import Any, Literal

import numpy as np

from posttrain.losses import policy
from posttrain.resolve import did_you_mean, import_name
from posttrain.types import Loss, LossOutput, as_loss, wrap

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
    token_ids: Any = ()
    """The tokens that credit is given for: those of the present policy's segments."""
    text: str = ""
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
class Credit:
    """A function from an iteration's rollouts to columns, and what it needs first.

    ``function(rollouts, **options)`` gives for [group][completion] an advantage: a number, an array
    with one for each of ``Rollout.token_ids``, a mapping of several columns of either kind, or None
    (not trained). ``@credit(...)`` makes one; a plain function is given the rewards alone.
    """

    function: Callable[..., Any]
    of_rewards: bool = False
    """The function gets [group][completion] rewards in place of rollouts."""
    policy: bool | str = False
    """Whether it reads ``Rollout.logps``; a name: if that option is not 0."""
    reference: bool | str = False
    """Whether it reads ``Rollout.reference_logps``; a name: if that option is not 0."""

    def __post_init__(self) -> None:
        wrap(self, self.function)

    def __call__(self, rollouts: Any, **options: Any) -> Any:
        """The function itself."""
        return self.function(rollouts, **options)

    def columns(self, rollouts: Rollouts, **options: Any) -> list[list[dict[str, Any] | None]]:
        """[group][completion] columns; None: not trained."""
        given = [[r.reward for r in group] for group in rollouts] if self.of_rewards else rollouts
        return [
            [
                None if a is None else dict(a) if isinstance(a, Mapping) else {"advantage": a}
                for a in group
            ]
            for group in self.function(given, **options)
        ]

    def reads(self, what: Literal["policy", "reference"], options: Mapping[str, Any]) -> bool:
        """Whether the log-probs of ``what`` are needed with these options."""
        declared = getattr(self, what)
        if not isinstance(declared, str):
            return bool(declared)
        return bool(options.get(declared, signature(self.function).parameters[declared].default))


def credit(**declared: Any) -> Callable[[Callable[..., Any]], Credit]:
    """``@credit(policy=True, reference=True)`` above a function of rollouts; ``of_rewards=True``
    above one of rewards."""
    return lambda function: Credit(function=function, **declared)


@credit(of_rewards=True)
def group_normalised(
    scores: Scores,
    *,
    std: Literal["population", "sample", "none"] = "population",
    epsilon: float = 0.0,
) -> Advantages:
    """(r - mean) / (std + epsilon) within each group; "none": r - mean. Equal rewards give exactly
    0.

    Shao et al. 2024, arXiv:2402.03300 section 4.1.2, which leaves open whether the deviation is
    Bessel-corrected ("sample") and adds no epsilon; without division: Liu et al. 2025 (Dr. GRPO),
    arXiv:2503.20783.
    """
    if std not in ("population", "sample", "none"):
        raise ValueError(f"std is population, sample or none; got {std!r}.")
    return [_normalised(group, std, epsilon) for group in scores]


@credit(of_rewards=True)
def leave_one_out(scores: Scores) -> Advantages:
    """r_i - mean of the others in its group. Ahmadian et al. 2024 (RLOO), arXiv:2402.14740 eq. 7. 0
    for a completion alone."""
    result: Advantages = []
    for group in scores:
        known = [r for r in group if r is not None]
        k = len(known)
        mean = math.fsum(known) / max(k, 1)
        equal = all_equal(known)
        result.append(
            [
                None if r is None else 0.0 if k < 2 or equal else k / (k - 1) * (r - mean)
                for r in group
            ]
        )
    return result


@credit(policy="beta", reference="beta")
def leave_one_out_less_kl(rollouts: Rollouts, *, beta: float = 0.03) -> Advantages:
    """``leave_one_out`` of the rewards less beta times the completion's summed KL to the reference.
    Ahmadian et al. 2024 (RLOO), arXiv:2402.14740 section 3."""
    return leave_one_out(less_kl(rollouts, beta))


def less_kl(rollouts: Rollouts, beta: float) -> list[list[float | None]]:
    """Rewards less beta times the KL to the reference, summed over the completion."""
    return [
        [
            None if r.reward is None else r.reward - (beta * math.fsum(r.kl) if beta else 0.0)
            for r in group
        ]
        for group in rollouts
    ]


@credit(policy="beta", reference="beta")
def token_returns(
    rollouts: Rollouts, *, beta: float = 0.001, epsilon: float = 1e-8
) -> list[list[Any]]:
    """By token r - beta sum of the KL from the token on, normalised over all tokens of the batch.
    With beta = 0 ``batch_normalised`` of the rewards.

    Hu et al. 2025 (REINFORCE++), arXiv:2501.03262 eq. 6 and 8, with discount 1.
    """
    if not beta:
        return batch_normalised([[r.reward for r in group] for group in rollouts], epsilon=epsilon)
    returns = [
        None
        if r.reward is None or not r.is_trained
        else r.reward - beta * np.cumsum(r.kl[::-1])[::-1]
        for group in rollouts
        for r in group
    ]
    flat = batch_normalised([[] if x is None else x.tolist() for x in returns], epsilon=epsilon)
    made = iter([None if x is None else np.asarray(a) for x, a in zip(returns, flat, strict=True)])
    return [[next(made) for _ in group] for group in rollouts]


@credit(of_rewards=True)
def mean_normalised(scores: Scores) -> Advantages:
    """(r - mean) / mean within each group; exactly 0 where no reward is above 0.

    Tajwar et al. 2026 (MaxRL), arXiv:2602.02710: for rewards 0 and 1 an estimate of the gradient of
    log P(right), to the order that a group's size allows, in place of P(right). ValueError for a
    negative reward: its mean is no success rate.
    """
    result: Advantages = []
    for group in scores:
        known = [r for r in group if r is not None]
        if known and min(known) < 0:
            raise ValueError(
                f"maxrl divides by the mean reward: rewards are >= 0; got {min(known)}."
            )
        mean = math.fsum(known) / max(len(known), 1)
        flat = not known or mean == 0 or all_equal(known)
        result.append([None if r is None else 0.0 if flat else (r - mean) / mean for r in group])
    return result


@credit()
def decoupled(rollouts: Rollouts, *, epsilon: float = 1e-4) -> Advantages:
    """sum_k w_k (r_k - mean_k) / (std_k + epsilon) within each group, each reward normalised on its
    own, then normalised over the batch: rewards of different scale keep their weight.

    Liu et al. 2026 (GDPO), arXiv:2601.05242 eq. 4 to 6; the deviation Bessel-corrected as in the
    authors' code and TRL. A part that could not be scored counts as 0 after normalisation.
    """
    sums: list[list[float | None]] = []
    for group in rollouts:
        total = [0.0] * len(group)
        for name, weight in (group[0].weights if group else {}).items():
            part = _normalised([r.parts.get(name) for r in group], "sample", epsilon)
            total = [t + weight * (a or 0.0) for t, a in zip(total, part, strict=True)]
        sums.append([None if r.reward is None else t for r, t in zip(group, total, strict=True)])
    return batch_normalised(sums, epsilon=epsilon)


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
    scores = [[r.reward if r.is_trained else None for r in group] for group in rollouts]
    advantages = group_normalised([[r.reward for r in group] for group in rollouts], std=std)
    trained = [
        (r.logps, a)
        for group, row, known in zip(rollouts, advantages, scores, strict=True)
        for r, a, score in zip(group, row, known, strict=True)
        if score is not None
    ]
    sizes = [len(logps) for logps, _ in trained]
    logps = np.concatenate([p for p, _ in trained]) if trained else np.zeros(0)
    by_token = np.repeat([a for _, a in trained], sizes) if trained else np.zeros(0)
    covariance = (logps - logps.mean()) * (by_token - by_token.mean()) if trained else logps
    count = max(1, int(share * len(covariance)))
    if pick == "largest":
        chosen = np.argsort(-covariance, kind="stable")[:count]
    else:
        inside = np.flatnonzero((covariance > low) & (covariance < high))
        chosen = np.random.default_rng([seed, len(covariance)]).permutation(inside)[:count]
    mask = np.zeros(len(covariance))
    mask[chosen] = 1.0
    parts = iter(np.split(mask, np.cumsum(sizes)[:-1]))
    return [
        [
            None if a is None else {"advantage": a, "covariant": 0.0 if s is None else next(parts)}
            for a, s in zip(row, known, strict=True)
        ]
        for row, known in zip(advantages, scores, strict=True)
    ]


@credit(policy=True, reference=True)
def sampled_reverse_kl(rollouts: Rollouts, *, reward_weight: float = 0.0) -> list[list[Any]]:
    """By token log pi_teacher - log pi, the reference being the teacher: on-policy distillation
    from the sampled tokens alone. ``reward_weight`` adds ``group_normalised`` of the rewards.

    Agarwal et al. 2023 (GKD), arXiv:2306.13649, with reverse KL; as a policy gradient Lu 2025
    (thinkingmachines.ai/blog/on-policy-distillation). ``losses.distillation`` is exact over the
    vocabulary and has less variance.
    """
    rewards = group_normalised([[r.reward for r in group] for group in rollouts])
    return [
        [
            None if r.reward is None else reward_weight * (a or 0.0) - r.kl
            for r, a in zip(group, row, strict=True)
        ]
        for group, row in zip(rollouts, rewards, strict=True)
    ]


@credit(of_rewards=True)
def batch_normalised(
    scores: Scores, *, baseline: Literal["none", "group"] = "none", epsilon: float = 1e-8
) -> Advantages:
    """(r - mean) / std over the whole batch; with baseline "group" the group's mean is taken off
    first.

    Hu et al. 2025 (REINFORCE++ and REINFORCE++-baseline), arXiv:2501.03262.
    """
    centred = (
        [list(g) for g in scores] if baseline == "none" else group_normalised(scores, std="none")
    )
    known = [r for group in centred for r in group if r is not None]
    if not known:
        return [[None for _ in group] for group in centred]
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in known) / len(known))
    if all_equal(known):
        return [[None if r is None else 0.0 for r in group] for group in centred]
    return [
        [None if r is None else (r - mean) / (deviation + epsilon) for r in group]
        for group in centred
    ]


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
    if baseline == "mean":
        return group_normalised(scores, std="none")
    result: Advantages = []
    for group in scores:
        known = [r for r in group if r is not None]
        b = log_mean_exp(known, tau=tau) if known else 0.0
        result.append([None if r is None else 0.0 if all_equal(known) else r - b for r in group])
    return result


def log_mean_exp(values: Sequence[float], *, tau: float) -> float:
    """tau log((1/k) sum_j exp(r_j / tau)), without overflow."""
    top = max(values)
    return top + tau * math.log(math.fsum(math.exp((v - top) / tau) for v in values) / len(values))


def _normalised(group: Sequence[float | None], std: str, epsilon: float) -> list[float | None]:
    known = [r for r in group if r is not None]
    if not known or all_equal(known):
        return [None if r is None else 0.0 for r in group]
    mean = math.fsum(known) / len(known)
    scale = 1.0
    if std != "none":
        scale = (
            math.sqrt(math.fsum((r - mean) ** 2 for r in known) / (len(known) - (std == "sample")))
            + epsilon
        )
    return [None if r is None else (r - mean) / scale for r in group]


def all_equal(values: Sequence[float]) -> bool:
    """Whether rewards are the same but for rounding (weighted sums of equal rewards differ by 1e-16
    in another order)."""
    return len(values) <= 1 or math.isclose(min(values), max(values), rel_tol=1e-12, abs_tol=1e-12)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Everything that tells one algorithm from another."""

    name: str
    advantages: Callable[..., Any]
    """A ``Credit``: rollouts -> columns. A plain function is given the rewards alone."""
    advantage_options: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[..., LossOutput]
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    beta: float = 0.0
    """Weight of the KL to the reference in the loss; 0: none."""
    kl_estimator: policy.Estimator = "k3"
    """Its estimate (``losses.policy.kl_penalty``)."""
    correction: policy.Correction = "none"
    """Weight of the items by pi_prox / pi_sampler (``losses.policy.importance_weights``)."""
    correction_cap: float = 2.0
    """Its bound."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus in the loss."""
    reference_every: int = 0
    """Steps between replacing the reference by the policy; 0: never (the policy at the start of the
    run)."""
    fresh_optimizer: bool = False
    """The optimizer's state is forgotten at the start of each iteration."""
    skip_zero: Literal["always", "first_update", "never"] = "always"
    """When a group of which every advantage is exactly 0 has exactly no gradient, apart from the KL
    and the entropy bonus; such groups are not computed, and stay in the denominators."""
    dynamic_sampling: bool = False
    """Prompts are drawn until enough groups have rewards that differ."""

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise ValueError(
                f"Algorithm {self.name}: beta is the weight of a KL penalty and >= 0; got "
                f"{self.beta}."
            )
        if self.correction.startswith("token") and not self._items_are_tokens:
            raise ValueError(
                f"Algorithm {self.name}: the items of its loss are completions; correction is "
                f"sequence_truncate, sequence_mask or none; got {self.correction!r}."
            )
        if self.advantage_options.get("beta", 0.0) < 0:
            raise ValueError(
                f"Algorithm {self.name}: beta is the weight of a KL penalty and >= 0; got "
                f"{self.advantage_options['beta']}."
            )

    @property
    def _items_are_tokens(self) -> bool:
        return getattr(self.loss, "function", self.loss) not in (
            policy.mirror_descent.function,
            policy.gmpo.function,
        )

    @property
    def credit(self) -> Credit:
        """``advantages`` with what it needs."""
        given = self.advantages
        return given if isinstance(given, Credit) else Credit(function=given, of_rewards=True)

    def needs(self, what: Literal["policy", "reference"]) -> bool:
        """Whether credit reads the log-probs of ``what`` before the first update."""
        return self.credit.reads(what, self.advantage_options)

    def columns(self, rollouts: Rollouts) -> list[list[dict[str, Any] | None]]:
        """[group][completion] what the loss reads; None: not trained."""
        return self.credit.columns(rollouts, **self.advantage_options)

    @property
    def objective(self) -> Loss:
        """The loss with its options, the KL, the correction and the entropy bonus around it."""
        return policy.objective(
            as_loss(self.loss).with_options(**self.loss_options),
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            correction=self.correction,
            correction_cap=self.correction_cap,
            entropy_weight=self.entropy_weight,
        )

    def skips(self, *, first_update: bool) -> bool:
        """Whether groups without a signal may be left out of this update."""
        if self.beta or self.entropy_weight:
            return False
        return self.skip_zero == "always" or (self.skip_zero == "first_update" and first_update)

    @property
    def needs_reference(self) -> bool:
        """Whether anything reads the reference."""
        return self.beta > 0 or self.needs("reference")


GRPO = Algorithm(name="grpo", advantages=group_normalised, loss=policy.clipped, beta=0.04)
"""DeepSeekMath's settings, arXiv:2402.03300 section 4.2 (epsilon is not given there; 0.2 as
PPO)."""
R1 = replace(
    GRPO,
    name="r1",
    beta=0.001,
    reference_every=400,
    loss_options={"epsilon_low": 10.0, "epsilon_high": 10.0},
)
"""DeepSeek-R1 (Nature version), arXiv:2501.12948v2 section 2.1."""
DR_GRPO = replace(
    GRPO,
    name="dr_grpo",
    beta=0.0,
    advantage_options={"std": "none"},
    loss_options={"aggregation": "constant"},
)
"""arXiv:2503.20783; ``constant`` is set to sampling.max_tokens where it is not given."""
DAPO = replace(
    GRPO,
    name="dapo",
    beta=0.0,
    dynamic_sampling=True,
    loss_options={"aggregation": "token_mean", "epsilon_low": 0.2, "epsilon_high": 0.28},
)
"""arXiv:2503.14476."""
GSPO = Algorithm(name="gspo", advantages=group_normalised, loss=policy.gspo)
"""arXiv:2507.18071."""
CISPO = Algorithm(name="cispo", advantages=group_normalised, loss=policy.cispo)
"""arXiv:2506.13585."""
GMPO = Algorithm(name="gmpo", advantages=group_normalised, loss=policy.gmpo)
"""arXiv:2507.20673."""
SAPO = Algorithm(name="sapo", advantages=group_normalised, loss=policy.sapo)
"""arXiv:2511.20347."""
VESPO = Algorithm(name="vespo", advantages=group_normalised, loss=policy.vespo)
"""arXiv:2602.10693."""
MAXRL = Algorithm(name="maxrl", advantages=mean_normalised, loss=policy.reinforce)
"""arXiv:2602.02710."""
GDPO = Algorithm(name="gdpo", advantages=decoupled, loss=policy.clipped)
"""arXiv:2601.05242."""
CLIP_COV = Algorithm(name="clip_cov", advantages=covariant_tokens, loss=policy.clip_cov)
"""arXiv:2505.22617."""
KL_COV = Algorithm(
    name="kl_cov",
    advantages=covariant_tokens,
    advantage_options={"pick": "largest"},
    loss=policy.kl_cov,
    skip_zero="first_update",
)
"""arXiv:2505.22617."""
RLOO = Algorithm(
    name="rloo",
    advantages=leave_one_out_less_kl,
    advantage_options={"beta": 0.03},
    loss=policy.reinforce,
)
"""arXiv:2402.14740."""
REINFORCE_PP = Algorithm(
    name="reinforce_pp",
    advantages=token_returns,
    advantage_options={"beta": 0.001},
    loss=policy.clipped,
    loss_options={"aggregation": "token_mean"},
)
"""arXiv:2501.03262."""
REINFORCE_PP_BASELINE = Algorithm(
    name="reinforce_pp_baseline",
    advantages=batch_normalised,
    advantage_options={"baseline": "group"},
    loss=policy.clipped,
    loss_options={"aggregation": "token_mean"},
    beta=0.001,
    kl_estimator="k2",
)
"""arXiv:2501.03262: the group's mean as the baseline."""
KIMI_K15 = Algorithm(
    name="k15",
    advantages=mirror_baseline,
    loss=policy.mirror_descent,
    loss_options={"tau": 1.0},
    fresh_optimizer=True,
    skip_zero="first_update",
)
"""arXiv:2501.12599 section 2.3 (tau is not given there)."""
DISTILL = Algorithm(name="distill", advantages=sampled_reverse_kl, loss=policy.reinforce)
"""On-policy distillation from the sampled tokens: the reference is the teacher."""

ALGORITHMS = {value.name: value for value in list(vars().values()) if isinstance(value, Algorithm)}


def resolve_algorithm(name: str, options: Mapping[str, Any]) -> Algorithm:
    """A known name or the dotted path of an ``Algorithm``, with options of its advantages, its loss
    or itself replaced.

    An option goes to the advantages and the loss if they have it (k1.5's tau), to the algorithm
    itself if the advantages do not (beta: RLOO takes the KL off the reward, GRPO has it in the
    loss); one that none has is an error, never ignored.
    """
    algorithm = ALGORITHMS.get(name) or _import_algorithm(name)
    of_loss, of_advantages = as_loss(algorithm.loss).accepts, _keywords(algorithm.credit)
    fixed = {"name", "advantages", "loss", "loss_options", "advantage_options"}
    own = {f.name for f in fields(Algorithm)} - fixed - of_advantages
    known = of_loss | of_advantages | own
    unknown = sorted(set(options) - known)
    if unknown:
        hint = did_you_mean(unknown[0], sorted(known))
        raise ValueError(
            f"Algorithm {algorithm.name} has no option {unknown[0]!r}; it has "
            f"{', '.join(sorted(known))}.{hint}"
        )
    return replace(
        algorithm,
        loss_options={
            **algorithm.loss_options,
            **{k: v for k, v in options.items() if k in of_loss},
        },
        advantage_options={
            **algorithm.advantage_options,
            **{k: v for k, v in options.items() if k in of_advantages},
        },
        **{k: v for k, v in options.items() if k in own},
    )


def _import_algorithm(name: str) -> Algorithm:
    known = ", ".join(ALGORITHMS)
    found = import_name(
        name, wanted=f"--algorithm is one of {known}, or the dotted path of an Algorithm"
    )
    if not isinstance(found, Algorithm):
        raise ValueError(f"{name} is not an Algorithm but a {type(found).__name__}.")
    return found


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters
    return {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
