"""Frozen records that cross module borders, and the one legend of shape suffixes.

    T  trained tokens (positions whose log-prob enters a loss)      S  completions (sequences)
    P  prompts (groups)    B  pairs    V  vocabulary    L  tokens of a packed row    H  hidden size

A tensor ``logps_T`` has one entry per trained token, ``advantage_S`` one per completion. Nothing is
padded: what belongs together is said by an index beside it (``sequence_T``: which completion a
token belongs to).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import WRAPPER_ASSIGNMENTS, cached_property
from inspect import Parameter, signature
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np

from posttrain.resolve import check_options

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["token", "completion", "pair", "group"]
Aggregation = Literal[
    "token_mean", "sequence_mean", "sequence_sum", "pair_mean", "group_mean", "constant"
]

SCORE_SLOT = 0
"""Token id that follows every completion a reward model scores: a target without meaning, never an
input. What is 'predicted' there is read from the hidden state of the last real token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ragged:
    """A column of lists, one for each token: ``values`` end to end, ``ends[i]`` where token i's
    list ends. Arrays of numpy in a ``Completion``, tensors in a packed batch."""

    values: Any
    ends: Any

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """From one list for each token."""
        ends = np.cumsum([len(x) for x in lists], dtype=np.int64)
        return cls(values=np.asarray([i for x in lists for i in x], np.int64), ends=ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ragged) and all(
            np.array_equal(a, b) for a, b in ((self.values, other.values), (self.ends, other.ends))
        )

    def tolist(self) -> list[list[int]]:
        """The list of each token."""
        return [ids.tolist() for ids in self.take(np.ones(len(self), bool))]

    def take(self, mask: Any) -> list[Any]:
        """The lists of the tokens where ``mask`` is true."""
        return [x for x, m in zip(np.split(self.values, self.ends[:-1]), mask, strict=True) if m]

    def to(self, device: Any) -> Ragged:
        """The same tensors on ``device``."""
        return Ragged(values=self.values.to(device), ends=self.ends.to(device))


ELSEWHERE = -1
"""Stands for each token id of a completion that another process holds."""

Column = float | Any
"""A number for the whole completion; an array or list with a number for each token; ``Ragged``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Completion:
    """One answer to a prompt: token ids, which of them are trained, and what else is known of it.

    ``loss_mask[i]`` says whether the loss predicts ``token_ids[i]``. In a multi-turn conversation
    the user turns after the first trained token lie inside the completion with mask 0.

    ``columns`` holds what losses read by name: a number, or one for each token (``Ragged`` for a
    list for each token). The names that posttrain itself writes:

        label             1 desirable, -1 undesirable, 0 not rated (KTO)
        advantage         how much better than its baseline the completion, or the token, was
        sampler_logps     log-prob of each token under the distribution that it was drawn from
        proximal_logps    log-prob of each token before the first update on this batch (pi_old)
        kept_ids          the token ids that top-k, top-p or min-p left to draw each token from
    """

    token_ids: Any
    loss_mask: Any
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids, mask = np.asarray(self.token_ids), np.asarray(self.loss_mask, dtype=bool)
        if len(ids) != len(mask):
            raise ValueError(
                f"Completion needs one loss_mask entry per token; got {len(ids)} token_ids and "
                f"{len(mask)} loss_mask entries. Pad or cut the mask where the tokens are made."
            )
        if len(ids) == 0:
            raise ValueError(
                "Completion needs at least one token; got none. Drop the sample and count it."
            )
        columns = {name: _as_column(value) for name, value in self.columns.items()}
        for name, column in columns.items():
            if not isinstance(column, float) and len(column) != len(ids):
                raise ValueError(
                    f"The column {name!r} of a Completion is one number, or one per token; got "
                    f"{len(column)} for {len(ids)} tokens."
                )
        vars(self).update(token_ids=ids, loss_mask=mask, columns=columns)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Completion)
            and np.array_equal(self.token_ids, other.token_ids)
            and np.array_equal(self.loss_mask, other.loss_mask)
            and self.columns.keys() == other.columns.keys()
            and all(_equal(v, other.columns[n]) for n, v in self.columns.items())
        )

    @property
    def is_here(self) -> bool:
        """False where another process holds it. The length, the mask and whether the advantage is 0
        are known even so, which is enough to plan a step."""
        return bool(self.token_ids[0] != ELSEWHERE)

    @cached_property
    def trained(self) -> Any:
        """Indices of the trained tokens."""
        return np.flatnonzero(self.loss_mask)

    @property
    def num_trained(self) -> int:
        """Trained tokens of this completion."""
        return len(self.trained)

    @property
    def num_inputs(self) -> int:
        """Tokens that must be computed: those before the last trained one (0 if none is)."""
        return int(self.trained[-1]) if len(self.trained) else 0

    def with_columns(self, **columns: Column) -> Completion:
        """The same completion with these columns too."""
        return replace(self, columns={**self.columns, **columns})


def _equal(a: Column, b: Column) -> bool:
    return a == b if isinstance(a, Ragged) else bool(np.array_equal(a, b))


def _as_column(value: Any) -> Column:
    if isinstance(value, Ragged):
        return value
    return np.asarray(value) if np.ndim(value) else float(value)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptGroup:
    """One prompt and its K completions: the unit of every method (SFT: K = 1; DPO: K = 2; GRPO: K =
    G)."""

    prompt_ids: Any
    completions: Sequence[Completion]
    pairs: Sequence[Pair] | None = None
    """Comparisons to train on. None: the completions are ranked, best first, and all C(K, 2) pairs
    count."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What else the model is called with, by keyword (``pixel_values``, ...): arrays whose first
    dimension is the prompt's own. Such groups run through the model's own forward, one sequence at
    a time; every cache key and digest has them."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: ``file``, ``row``; read by error messages and reward functions, never by
    the forward."""

    def __post_init__(self) -> None:
        vars(self).update(prompt_ids=np.asarray(self.prompt_ids))
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

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PromptGroup)
            and np.array_equal(self.prompt_ids, other.prompt_ids)
            and list(self.completions) == list(other.completions)
            and (self.pairs and list(self.pairs)) == (other.pairs and list(other.pairs))
            and self.inputs.keys() == other.inputs.keys()
            and all(np.array_equal(v, other.inputs[n]) for n, v in self.inputs.items())
            and dict(self.meta) == dict(other.meta)
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
    """The trained tokens of a micro-batch, flat: where they belong, and what is known of them.

    ``targets_T`` [T] token ids; ``sequence_T`` [T] completion index in 0..S-1; ``group_S`` [S]
    group index in 0..P-1; ``num_tokens_S`` [S] trained tokens of each completion (0 possible);
    ``group_size_S`` [S] completions of the *whole* group that have a trained token, also when only
    a part of the group is in this micro-batch; ``pairs_B2`` [B, 2] the chosen and the rejected
    completion of each pair that is in it (indices into S), ``margin_B`` and ``weight_B`` [B] its
    margin and weight. Columns of the completions by name: ``columns_S`` where each has one number,
    ``columns_T`` where one has a number for each token. Floating ones: float64 in a
    ``PackedBatch``, in the log-probs' dtype for a loss.
    """

    targets_T: Tensor
    sequence_T: Tensor
    group_S: Tensor
    num_tokens_S: Tensor
    group_size_S: Tensor
    pairs_B2: Tensor
    margin_B: Tensor
    weight_B: Tensor
    columns_S: Mapping[str, Tensor] = field(default_factory=dict)
    columns_T: Mapping[str, Any] = field(default_factory=dict)


class Forward(NamedTuple):
    """What a model's forward gives for the trained tokens of a packed batch."""

    logps_T: Tensor
    """[T] natural-log probabilities, at least float32."""
    outputs: dict[str, Tensor] = {}
    """What the loss asked for beside them (``Loss.outputs``), [T] or [T, ...] each."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Forward:
        """``function`` of each tensor."""
        outputs = {name: function(value) for name, value in self.outputs.items()}
        return Forward(function(self.logps_T), outputs)

    @classmethod
    def join(cls, parts: Sequence[Forward]) -> Forward:
        """Parts end to end."""
        import torch

        outputs = {n: torch.cat([part.outputs[n] for part in parts]) for n in parts[0].outputs}
        return cls(torch.cat([part.logps_T for part in parts]), outputs)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that a loss may differentiate."""
        return [self.logps_T, *self.outputs.values()]


@dataclass(frozen=True, kw_only=True)
class Logps(Targets):
    """What a loss gets: log-probs of the trained tokens, by ``logps["name"]`` the columns of the
    completions and the outputs that the loss asked for, and all that ``Targets`` says of them.

    For a pair, w is the chosen and l the rejected completion.
    """

    logps_T: Tensor
    """[T] natural-log probabilities, at least float32, with gradient."""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the forward computed because the loss asks for it, with gradient."""
    reference_T: Tensor | None = None
    """[T] log-probs of the same tokens under the reference model, without gradient; None where the
    loss needs none."""
    batch_mean: Tensor | None = None
    """[] the loss's own statistic of the global batch (``BatchStatistic``), a constant."""

    def __contains__(self, name: str) -> bool:
        return name in self.outputs or name in self.columns_T or name in self.columns_S

    def __getitem__(self, name: str) -> Any:
        """A column, [S] or [T], or an output of the forward. ValueError names those that are
        there."""
        for there in (self.outputs, self.columns_T, self.columns_S):
            if name in there:
                return there[name]
        names = ", ".join([*self.columns_S, *self.columns_T, *self.outputs]) or "no column"
        raise ValueError(
            f"This loss reads {name!r}, which its batch does not have; it has {names}. Set the "
            "column where the completions are made (Completion.columns), or ask the forward for "
            "the output (Loss.outputs)."
        )

    def by_token(self, name: str) -> Tensor:
        """[T] a column or output; the one number of a completion stands at each of its tokens."""
        by_completion = self.columns_S.get(name)
        return self[name] if by_completion is None else by_completion[self.sequence_T]

    def by_completion(self, name: str) -> Tensor:
        """[S] a column with one number for each completion. ValueError where it has more."""
        if name not in self.columns_S and name in self:
            raise ValueError(
                f"This loss reads one {name} for each completion; its batch has one per token."
            )
        return self[name]

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
        return self["proximal_logps"] if "proximal_logps" in self else self.logps_T.detach()

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
                "reference=False from its declaration."
            )
        return self.sum_by_sequence(self.reference_T)

    @cached_property
    def logratio_S(self) -> Tensor:
        """[S] log pi(y | x) - log pi_ref(y | x), summed over trained tokens."""
        return self.logps_S - self.reference_S

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

    A loss declares it as ``@loss(statistic=BatchStatistic(...))``. The step computes it in
    a forward without gradient, reduces it over ranks and hands it in as the constant
    ``logps.batch_mean``.
    """

    groups: Callable[[Sequence[PromptGroup]], Sequence[PromptGroup]]
    """The sequences to forward, made from the groups of the global batch."""
    items: Callable[[Logps], Tensor]
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Declared:
    """A function with keyword options, called in its place; subclasses say what must be known of
    it."""

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword options of the function that are set."""

    def __post_init__(self) -> None:
        wrap(self, self.function)

    @property
    def name(self) -> str:
        """The function's name."""
        return str(vars(self)["__qualname__"])

    def __call__(self, given: Any, **options: Any) -> Any:
        """The function's result with its options, and with more that are given here."""
        return self.function(given, **{**self.options, **options})

    @property
    def accepts(self) -> set[str]:
        """Names of its keyword options."""
        return keyword_options(self.function)

    def with_options(self, **options: Any) -> Self:
        """The same with more options set. ValueError for one that it does not have."""
        check_options(self.name, options, self.accepts)
        return replace(self, options={**self.options, **options}) if options else self


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss(Declared):
    """A function ``logps -> LossOutput`` and what the step must know of it. ``@loss(...)`` makes
    one; a plain function is taken to need a reference and to couple the completions of a group,
    which is exact for every loss and only slower."""

    reference: bool = True
    """Whether it reads ``reference_T``."""
    couples_completions: bool = True
    """Whether an item depends on more than one completion. Groups over the token budget are cut
    between completions only for losses that do not."""
    outputs: tuple[Any, ...] = ()
    """What the forward computes beside log-probs: names (``entropy``) or ``Output`` objects."""
    statistic: BatchStatistic | None = None
    """What is averaged over the global batch before the first item."""
    implicit_beta: float | None = None
    """Scale of the rewards that are logged; None: the function's own ``beta``, else 0.1."""

    @property
    def beta(self) -> float:
        """What the logged rewards are scaled with."""
        if self.implicit_beta is not None:
            return self.implicit_beta
        parameter = signature(self.function).parameters.get("beta")
        return float(self.options.get("beta", 0.1 if parameter is None else parameter.default))


def keyword_options(function: Callable[..., Any]) -> set[str]:
    """Names of the arguments that can only be given by keyword."""
    found = signature(function).parameters.values()
    return {p.name for p in found if p.kind is Parameter.KEYWORD_ONLY}


def wrap(wrapper: Any, function: Callable[..., Any]) -> None:
    """Name, documentation and signature of ``function`` for an object that is called in its
    place."""
    vars(wrapper).update(__qualname__=repr(function), __wrapped__=function)
    for name in WRAPPER_ASSIGNMENTS:
        if hasattr(function, name):
            vars(wrapper)[name] = getattr(function, name)


def loss(**declared: Any) -> Callable[[Callable[..., LossOutput]], Loss]:
    """``@loss(reference=False, couples_completions=False)`` above a loss function."""
    return lambda function: Loss(function=function, **declared)


def as_loss(function: Callable[..., LossOutput]) -> Loss:
    """A ``Loss`` as it is; a plain function with the declarations that are right for any."""
    return function if isinstance(function, Loss) else Loss(function=function)


def is_held_out(name: str) -> bool:
    """Whether a metric is of an evaluation: eval_loss, rewards_eval/accuracies."""
    return name.startswith("eval_") or "_eval/" in name
