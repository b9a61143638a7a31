"""Frozen records that cross module borders, and the one legend of shape suffixes.

    T  trained tokens (positions whose log-prob enters a loss)      S  completions (sequences)
    P  prompts (groups)    B  pairs    V  vocabulary    L  tokens of a packed row    H  hidden size

A tensor ``logps_T`` has one entry per trained token, ``advantage_S`` one per completion. Nothing is
padded: what belongs together is said by an index beside it (``sequence_T``: which completion a
token belongs to).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["token", "completion", "pair", "group"]
Aggregation = Literal[
    "token_mean", "sequence_mean", "sequence_sum", "pair_mean", "group_mean", "constant"
]

SCORE_SLOT = 0
"""Token id that follows every completion a reward model scores: a target without meaning, never an
input. What is 'predicted' there is read from the hidden state of the last real token."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer to a prompt: token ids, and which of them are trained.

    ``loss_mask[i]`` says whether ``token_ids[i]`` is predicted by the loss. In a multi-turn
    conversation the user turns after the first trained token lie inside the completion with mask 0.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool | int]
    label: bool | None = None
    """Unpaired feedback (KTO): True desirable, False undesirable, None not rated."""
    advantage: float | None = None
    """Reinforcement learning: how much better than its baseline this completion was; None
    elsewhere."""
    token_advantages: Sequence[float] | None = None
    """One per token, where they differ along the completion (a KL penalty inside the reward); None:
    ``advantage`` everywhere."""
    sampler_logps: Sequence[float] | None = None
    """One per token: log-prob under the distribution it was drawn from, temperature and truncation
    included."""
    proximal_logps: Sequence[float] | None = None
    """One per token: log-prob under the policy as it was before the first update on these
    completions (PPO's pi_old, k1.5's pi_theta_i); None: that policy is the present one."""
    kept_ids: Sequence[Sequence[int]] | None = None
    """One per token: the token ids that top-k, top-p or min-p left to draw from, over which its
    log-probs are renormalised; None: the whole vocabulary."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError(
                f"Completion needs one loss_mask entry per token; got {len(self.token_ids)} "
                f"token_ids and {len(self.loss_mask)} loss_mask entries. Pad or cut the mask where "
                "the tokens are made."
            )
        if len(self.token_ids) == 0:
            raise ValueError(
                "Completion needs at least one token; got none. Drop the sample and count it."
            )
        for name in ("token_advantages", "sampler_logps", "proximal_logps", "kept_ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(
                    f"Completion.{name} needs one entry per token; got {len(values)} "
                    f"for {len(self.token_ids)}."
                )

    @property
    def num_trained(self) -> int:
        """Trained tokens of this completion."""
        return int(sum(bool(m) for m in self.loss_mask))


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison inside a group: completion ``chosen`` was preferred to completion ``rejected``
    (indices in the group)."""

    chosen: int
    rejected: int
    margin: float = 0.0
    """How much better, in the data's own units; read by losses that want it (Llama 2,
    arXiv:2307.09288 eq. 2)."""
    weight: float = 1.0
    """How often the pair counts: weight 2 trains as the same pair twice, 0 as leaving it out."""


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """One prompt and its K completions: the unit of every method (SFT: K = 1; DPO: K = 2; GRPO: K =
    G)."""

    prompt_ids: Sequence[int]
    completions: Sequence[Completion]
    pairs: Sequence[Pair] | None = None
    """Comparisons to train on. None: the completions are ranked, best first, and all C(K, 2) pairs
    count."""
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Where it comes from: ``file``, ``row``; read by error messages and reward functions, never by
    the forward."""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ValueError(
                "PromptGroup needs at least one prompt token: the first completion token is "
                f"predicted from the last prompt token; got an empty prompt in {self.where}. Start "
                "the prompt with the BOS token."
            )
        if len(self.completions) == 0:
            raise ValueError(
                f"PromptGroup needs at least one completion; got none in {self.where}."
            )
        for pair in self.pairs or ():
            if not (
                0 <= min(pair.chosen, pair.rejected)
                and max(pair.chosen, pair.rejected) < len(self.completions)
            ):
                raise ValueError(
                    f"{self.where}: {pair} names a completion that is not among the "
                    f"{len(self.completions)}."
                )
            if pair.chosen == pair.rejected or not 0 <= pair.weight < float("inf"):
                raise ValueError(
                    f"{self.where}: {pair} must compare two completions with a finite weight >= 0."
                )

    @property
    def where(self) -> str:
        """`file:row` for messages."""
        return f"{self.meta.get('file', '<memory>')}:{self.meta.get('row', '?')}"

    @property
    def trained_pairs(self) -> list[Pair]:
        """Pairs whose two completions have a trained token and whose weight is not 0."""
        trained = [c.num_trained > 0 for c in self.completions]
        if self.pairs is None:
            every = [Pair(chosen=i, rejected=j) for i, j in combinations(range(len(trained)), 2)]
        else:
            every = [pair for pair in self.pairs if pair.weight]
        return [pair for pair in every if trained[pair.chosen] and trained[pair.rejected]]

    @property
    def num_trained(self) -> int:
        """Trained tokens over all completions."""
        return sum(c.num_trained for c in self.completions)

    @property
    def num_tokens_shared(self) -> int:
        """Tokens computed when the prompt is computed once: P + sum of C_k."""
        return len(self.prompt_ids) + sum(len(c.token_ids) for c in self.completions)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many units one *optimizer step* trains, over all ranks and micro-batches: the only
    denominators there are.

    Known before the first forward, because every rank knows the whole global batch.
    """

    tokens: int
    completions: int
    groups: int
    pairs: float = 0.0
    """Sum of the pair weights; the number of pairs where none has a weight."""
    paired_groups: int = 0
    """Groups with at least one pair."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The trained tokens of a micro-batch, flat: where they belong, and what is known of them
    besides their log-probs.

    ``targets_T`` [T] token ids; ``sequence_T`` [T] completion index in 0..S-1; ``group_S`` [S]
    group index in 0..P-1; ``num_tokens_S`` [S] trained tokens of each completion (0 possible);
    ``group_size_S`` [S] completions of the *whole* group that have a trained token, also when only
    a part of the group is in this micro-batch; ``pairs_B2`` [B, 2] the chosen and the rejected
    completion of each pair that is in it (indices into S), ``margin_B`` and ``weight_B`` [B] its
    margin and weight; ``label_S`` [S] 1 desirable, -1 undesirable, 0 not rated. Floating ones:
    float64 in a ``PackedBatch``, in the log-probs' dtype for a loss.
    """

    targets_T: Tensor
    sequence_T: Tensor
    group_S: Tensor
    num_tokens_S: Tensor
    group_size_S: Tensor
    pairs_B2: Tensor
    margin_B: Tensor
    weight_B: Tensor
    label_S: Tensor
    advantage_S: Tensor | None = None
    """[S] ``Completion.advantage`` (0 where it is None); None outside of reinforcement learning."""
    advantage_T: Tensor | None = None
    """[T] ``Completion.token_advantages``, or the completion's ``advantage`` at each of its
    tokens."""
    sampler_T: Tensor | None = None
    """[T] ``Completion.sampler_logps``; None if a completion has none."""
    given_proximal_T: Tensor | None = None
    """[T] ``Completion.proximal_logps``; None if a completion has none."""


@dataclass(frozen=True, kw_only=True)
class TokenLogps(Targets):
    """What a forward gives a loss: log-probs of the trained tokens, and all that ``Targets`` says
    of them."""

    logps_T: Tensor
    """[T] natural-log probabilities, at least float32, with gradient."""
    reference_T: Tensor | None = None
    """[T] log-probs of the same tokens under the reference model, without gradient; None where the
    loss needs none."""
    batch_mean: Tensor | None = None
    """[] the loss's own statistic of the global batch (``BatchStatistic``), a constant."""

    def sum_by_sequence(self, values_T: Tensor) -> Tensor:
        """values_S[s] = sum of values_T over the trained tokens of completion s; 0 for a completion
        without any."""
        zeros_S = values_T.new_zeros(self.group_S.shape[0])
        return zeros_S.index_add(0, self.sequence_T, values_T)

    @cached_property
    def proximal_T(self) -> Tensor:
        """[T] log-probs of the policy before the first update on this batch, a constant: the
        denominator of PPO's ratio.

        Where none were computed the present policy is that policy, and the ratio is exactly 1.
        """
        return self.logps_T.detach() if self.given_proximal_T is None else self.given_proximal_T

    @cached_property
    def logps_S(self) -> Tensor:
        """[S] log pi(y | x): the *sum* over the completion's trained tokens."""
        return self.sum_by_sequence(self.logps_T)

    @cached_property
    def reference_S(self) -> Tensor:
        """[S] log pi_ref(y | x). Raises ValueError without a reference."""
        if self.reference_T is None:
            raise ValueError(
                "This loss reads reference log-probs, but the run has no reference. Remove "
                "needs_reference = False from the loss."
            )
        return self.sum_by_sequence(self.reference_T)

    @cached_property
    def logratio_S(self) -> Tensor:
        """[S] log pi(y | x) - log pi_ref(y | x), summed over trained tokens."""
        return self.logps_S - self.reference_S


class PairLogps(TokenLogps):
    """The view of preference losses: [B] tensors over the pairs; w is the chosen, l the rejected
    completion."""

    def of_chosen(self, values_S: Tensor) -> Tensor:
        """[B] a value of the chosen completion of each pair."""
        return values_S[self.pairs_B2[:, 0]]

    def of_rejected(self, values_S: Tensor) -> Tensor:
        """[B] a value of the rejected completion of each pair."""
        return values_S[self.pairs_B2[:, 1]]

    @property
    def chosen_logps_B(self) -> Tensor:
        """[B] log pi(y_w | x), summed."""
        return self.of_chosen(self.logps_S)

    @property
    def rejected_logps_B(self) -> Tensor:
        """[B] log pi(y_l | x), summed."""
        return self.of_rejected(self.logps_S)

    @property
    def chosen_logratio_B(self) -> Tensor:
        """[B] w = log pi(y_w | x) - log pi_ref(y_w | x)."""
        return self.of_chosen(self.logratio_S)

    @property
    def rejected_logratio_B(self) -> Tensor:
        """[B] l = log pi(y_l | x) - log pi_ref(y_l | x)."""
        return self.of_rejected(self.logratio_S)

    @property
    def logratio_gap_B(self) -> Tensor:
        """[B] h = w - l, the argument of every DPO loss (Rafailov et al. 2023, arXiv:2305.18290 eq.
        7, before beta)."""
        return self.chosen_logratio_B - self.rejected_logratio_B

    @property
    def chosen_length_B(self) -> Tensor:
        """[B] |y_w|, trained tokens."""
        return self.of_chosen(self.num_tokens_S)

    @property
    def rejected_length_B(self) -> Tensor:
        """[B] |y_l|, trained tokens."""
        return self.of_rejected(self.num_tokens_S)


@dataclass(frozen=True, kw_only=True)
class BatchStatistic:
    """A mean over the whole global batch under the present policy that a loss needs before its
    first item (KTO's z0).

    A loss declares it as ``my_loss.batch_statistic = BatchStatistic(...)``. The step computes it in
    a forward without gradient, reduces it over ranks and hands it in as the constant
    ``logps.batch_mean``.
    """

    groups: Callable[[Sequence[PromptGroup]], Sequence[PromptGroup]]
    """The sequences to forward, made from the groups of the global batch."""
    items: Callable[[TokenLogps], Tensor]
    """[S] one value per completion of those; the statistic is their mean."""


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """Unreduced items and how the step aggregates them: ``weight * sum(items) / denominator``. A
    loss never reduces."""

    items: Tensor
    unit: Unit = "token"
    """What an item belongs to. Pairs: the rows of ``pairs_B2``; the step multiplies each by its
    weight."""
    aggregation: Aggregation | None = None
    """How items become one number (``losses/reduce.py``); None: the mean over the unit itself."""
    weight: float = 1.0
    constant: float | None = None
    """Only for ``aggregation="constant"``: L in sum(items) / (L * number of completions)."""


class LossOutput:
    """Result of a loss: ``LossOutput(items=..., metrics=...)`` for one term,
    ``LossOutput(terms=[...])`` for several.

    ``metrics`` maps a name to an unreduced detached tensor with the unit's length (averaged over
    the step) or a scalar.
    """

    def __init__(
        self,
        items: Tensor | None = None,
        *,
        unit: Unit = "token",
        aggregation: Aggregation | None = None,
        terms: Sequence[LossTerm] = (),
        metrics: Mapping[str, Tensor] | None = None,
    ) -> None:
        if (items is None) == (not terms):
            raise ValueError(
                "LossOutput needs either items=... (one term) or terms=[LossTerm(...), ...]; got "
                + ("neither." if items is None else "both.")
            )
        one = [] if items is None else [LossTerm(items=items, unit=unit, aggregation=aggregation)]
        self.terms = (*terms, *one)
        self.metrics = dict(metrics or {})
