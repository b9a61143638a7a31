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
from typing import Any, Literal

from posttrain.losses import policy
from posttrain.resolve import did_you_mean, import_name
from posttrain.types import LossOutput

Scores = Sequence[Sequence[float | None]]
"""[group][completion] rewards; None: could not be scored. Such a completion is in no statistic and
is not trained."""
Advantages = list[list[float | None]]


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
    advantages: Callable[..., Advantages]
    """Scores -> advantages, with keyword options."""
    advantage_options: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[..., LossOutput]
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    beta: float = 0.0
    """Weight of the KL to the reference; 0: no reference, no forward of it."""
    kl_in: Literal["loss", "reward", "token_reward"] = "loss"
    """Where it goes: a term of the loss; off the completion's reward; off the reward of each token,
    whose return is the sum from it to the end (REINFORCE++)."""
    kl_estimator: policy.Estimator = "k3"
    reference_every: int = 0
    """Steps between replacing the reference by the policy; 0: never (the policy at the start of the
    run)."""
    fresh_optimizer: bool = False
    """The optimizer's state is forgotten at the start of each iteration."""
    skip_zero: Literal["always", "first_update", "never"] = "always"
    """When a group of which every advantage is exactly 0 has exactly no gradient, apart from a KL
    in the loss; such groups are not computed, and stay in the denominators."""
    dynamic_sampling: bool = False
    """Prompts are drawn until enough groups have rewards that differ."""

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.loss).parameters.values()
        takes_kl = any(p.name == "kl_weight" or p.kind is p.VAR_KEYWORD for p in parameters)
        if not self.beta >= 0:
            raise ValueError(
                f"Algorithm {self.name}: beta is the weight of a KL penalty and >= 0; "
                f"got {self.beta}."
            )
        if self.kl_in not in ("loss", "reward", "token_reward"):
            raise ValueError(
                f"Algorithm {self.name}: kl_in is loss, reward or token_reward; got {self.kl_in!r}."
            )
        by_group = self.advantages in (group_normalised, leave_one_out, mirror_baseline)
        by_group = by_group or self.advantage_options.get("baseline", "none") != "none"
        if self.beta and self.kl_in == "token_reward" and by_group:
            raise ValueError(
                f"Algorithm {self.name}: kl_in=token_reward gives each token a return of its own, "
                "normalised over the batch; a baseline of its group would take the reward away. "
                "Use kl_in=reward, or the advantages batch_normalised."
            )
        if self.beta and self.kl_in == "loss" and not takes_kl:
            name = getattr(self.loss, "__name__", self.loss)
            raise ValueError(
                f"Algorithm {self.name}: its loss {name} has no term for the KL to a reference, so "
                f"beta={self.beta:g} has no place in it. Set beta 0, or kl_in reward."
            )

    def skips(self, *, first_update: bool) -> bool:
        """Whether groups without a signal may be left out of this update."""
        if self.beta and self.kl_in == "loss":
            return False
        return self.skip_zero == "always" or (self.skip_zero == "first_update" and first_update)

    @property
    def needs_reference(self) -> bool:
        """Whether anything reads the reference."""
        return self.beta > 0


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
DR_GRPO = Algorithm(
    name="dr_grpo",
    advantages=group_normalised,
    advantage_options={"std": "none"},
    loss=policy.clipped,
    loss_options={"aggregation": "constant"},
)
"""arXiv:2503.20783; ``constant`` is set to sampling.max_tokens where it is not given."""
DAPO = Algorithm(
    name="dapo",
    advantages=group_normalised,
    loss=policy.clipped,
    dynamic_sampling=True,
    loss_options={"aggregation": "token_mean", "epsilon_low": 0.2, "epsilon_high": 0.28},
)
"""arXiv:2503.14476."""
GSPO = Algorithm(name="gspo", advantages=group_normalised, loss=policy.gspo)
"""arXiv:2507.18071."""
CISPO = Algorithm(name="cispo", advantages=group_normalised, loss=policy.cispo)
"""arXiv:2506.13585."""
RLOO = Algorithm(
    name="rloo",
    advantages=leave_one_out,
    loss=policy.reinforce,
    beta=0.03,
    kl_in="reward",
    kl_estimator="k1",
)
"""arXiv:2402.14740."""
REINFORCE_PP = Algorithm(
    name="reinforce_pp",
    advantages=batch_normalised,
    loss=policy.clipped,
    loss_options={"aggregation": "token_mean"},
    beta=0.001,
    kl_in="token_reward",
    kl_estimator="k1",
)
"""arXiv:2501.03262."""
REINFORCE_PP_BASELINE = replace(
    REINFORCE_PP,
    name="reinforce_pp_baseline",
    advantage_options={"baseline": "group"},
    kl_in="loss",
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

ALGORITHMS = {
    a.name: a
    for a in (
        GRPO,
        R1,
        DR_GRPO,
        DAPO,
        GSPO,
        CISPO,
        RLOO,
        REINFORCE_PP,
        REINFORCE_PP_BASELINE,
        KIMI_K15,
    )
}


def resolve_algorithm(name: str, options: Mapping[str, Any]) -> Algorithm:
    """A known name or the dotted path of an ``Algorithm``, with options of its advantages, its loss
    or itself replaced.

    An option goes to all of the three that have it (k1.5's tau); one that none has is an error,
    never ignored.
    """
    algorithm = ALGORITHMS.get(name) or _import_algorithm(name)
    of_loss, of_advantages = _keywords(algorithm.loss), _keywords(algorithm.advantages)
    own = {f.name for f in fields(Algorithm)} - {
        "name",
        "advantages",
        "loss",
        "loss_options",
        "advantage_options",
    }
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
    # the weight and the estimator of the KL are the algorithm's own fields
    names = {
        n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY
    }
    return names - {"kl_weight", "kl_estimator"}
