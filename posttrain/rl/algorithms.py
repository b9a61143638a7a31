"""Reinforcement-learning algorithms as values: how advantages are made of rewards, which loss, what
becomes of the reference.

    MINE = replace(GRPO, name="mine", loss_options={"epsilon_high": 0.4})

and on the command line ``--algorithm my_module.MINE``, or ``--algorithm grpo
--algorithm_options.epsilon_high 0.4``. Advantages are computed over the whole rollout batch, before
it is split into mini-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from posttrain.losses import policy
from posttrain.resolve import check_options, import_name
from posttrain.rl.credit import (
    Credit,
    batch_normalised,
    covariant_tokens,
    decoupled,
    group_normalised,
    leave_one_out_less_kl,
    mean_normalised,
    mirror_baseline,
    sampled_reverse_kl,
    token_returns,
)
from posttrain.types import Loss, LossOutput, as_loss


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
        for beta in (self.beta, self.advantage_options.get("beta", 0.0)):
            if not beta >= 0:
                raise ValueError(
                    f"Algorithm {self.name}: beta is the weight of a KL penalty and >= 0; got "
                    f"{beta}."
                )
        if self.correction.startswith("token") and not self._items_are_tokens:
            raise ValueError(
                f"Algorithm {self.name}: the items of its loss are completions; correction is "
                f"sequence_truncate, sequence_mask or none; got {self.correction!r}."
            )

    @property
    def _items_are_tokens(self) -> bool:
        return getattr(self.loss, "function", self.loss) not in (
            policy.mirror_descent.function,
            policy.gmpo.function,
        )

    @property
    def credit(self) -> Credit:
        """``advantages`` with its options; a plain function is given the rewards."""
        given = self.advantages
        declared = given if isinstance(given, Credit) else Credit(function=given, of_rewards=True)
        return declared.with_options(**self.advantage_options)

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
        return self.beta > 0 or self.credit.reads("reference")


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
    wanted = f"--algorithm is one of {', '.join(ALGORITHMS)}, or the dotted path of an Algorithm"
    algorithm = ALGORITHMS.get(name) or import_name(name, wanted=wanted)
    if not isinstance(algorithm, Algorithm):
        raise ValueError(f"{name} is not an Algorithm but a {type(algorithm).__name__}.")
    of_loss, of_advantages = as_loss(algorithm.loss).accepts, algorithm.credit.accepts
    fixed = {"name", "advantages", "loss", "loss_options", "advantage_options"}
    own = {f.name for f in fields(Algorithm)} - fixed - of_advantages
    check_options(f"Algorithm {algorithm.name}", options, of_loss | of_advantages | own)
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
