"""Frozen records that cross module borders, and the one legend of shape suffixes.

    T  trained tokens (positions whose log-prob enters a loss)      S  completions (sequences)
    P  prompts (groups)    B  pairs    V  vocabulary    L  tokens of a packed row    H  hidden size

A tensor ``logps_T`` has one entry per trained token, ``advantage_S`` one per completion. Nothing is padded: what belongs
together is said by an index beside it (``sequence_T``: which completion a token belongs to).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Unit = Literal["token", "completion", "pair", "group"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "pair_mean", "group_mean", "constant"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer to a prompt: token ids, and which of them are trained.

    ``loss_mask[i]`` says whether ``token_ids[i]`` is predicted by the loss. In a multi-turn conversation the user turns
    after the first trained token lie inside the completion with mask 0.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[bool | int]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.loss_mask):
            raise ValueError(
                f"Completion needs one loss_mask entry per token; got {len(self.token_ids)} token_ids and "
                f"{len(self.loss_mask)} loss_mask entries. Pad or cut the mask where the tokens are made."
            )
        if len(self.token_ids) == 0:
            raise ValueError("Completion needs at least one token; got none. Drop the sample and count it.")

    @property
    def num_trained(self) -> int:
        """Trained tokens of this completion."""
        return int(sum(bool(m) for m in self.loss_mask))


@dataclass(frozen=True, kw_only=True)
class PromptGroup:
    """One prompt and its K completions: the unit of every method (SFT: K = 1; DPO: K = 2; GRPO: K = G)."""

    prompt_ids: Sequence[int]
    completions: Sequence[Completion]
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Where it comes from: ``file``, ``row``; read by error messages and reward functions, never by the forward."""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ValueError(
                "PromptGroup needs at least one prompt token: the first completion token is predicted from the last prompt "
                f"token; got an empty prompt in {self.where}. Start the prompt with the BOS token."
            )
        if len(self.completions) == 0:
            raise ValueError(f"PromptGroup needs at least one completion; got none in {self.where}.")

    @property
    def where(self) -> str:
        """`file:row` for messages."""
        return f"{self.meta.get('file', '<memory>')}:{self.meta.get('row', '?')}"

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
    """How many units one *optimizer step* trains, over all ranks and micro-batches: the only denominators there are.

    Known before the first forward, because every rank knows the whole global batch.
    """

    tokens: int
    completions: int
    groups: int
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenLogps:
    """What a forward gives a loss: flat log-probs of the trained tokens and where they belong.

    ``logps_T`` [T] natural-log probabilities, at least float32, with gradient; ``targets_T`` [T] token ids;
    ``sequence_T`` [T] completion index in 0..S-1; ``group_S`` [S] group index in 0..P-1; ``num_tokens_S`` [S] trained
    tokens of each completion (0 possible); ``group_size_S`` [S] completions of the *whole* group that have a trained
    token, also when only a part of the group is in this micro-batch.
    """

    logps_T: Tensor
    targets_T: Tensor
    sequence_T: Tensor
    group_S: Tensor
    num_tokens_S: Tensor
    group_size_S: Tensor

    def sum_by_sequence(self, values_T: Tensor) -> Tensor:
        """values_S[s] = sum of values_T over the trained tokens of completion s; 0 for a completion without any."""
        zeros_S = values_T.new_zeros(self.group_S.shape[0])
        return zeros_S.index_add(0, self.sequence_T, values_T)


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """Unreduced items and how the step aggregates them: ``weight * sum(items) / denominator``. A loss never reduces."""

    items: Tensor
    unit: Unit = "token"
    """What an item belongs to. Pairs: all i < j of a group's trained completions, group by group."""
    aggregation: Aggregation | None = None
    """How items become one number (``losses/reduce.py``); None: the mean over the unit itself."""
    weight: float = 1.0
    constant: float | None = None
    """Only for ``aggregation="constant"``: L in sum(items) / (L * number of completions)."""


class LossOutput:
    """Result of a loss: ``LossOutput(items=..., metrics=...)`` for one term, ``LossOutput(terms=[...])`` for several.

    ``metrics`` maps a name to an unreduced detached tensor with the unit's length (averaged over the step) or a scalar.
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
        self.terms = tuple(terms) if terms else (LossTerm(items=items, unit=unit, aggregation=aggregation),)  # type: ignore[arg-type]
        self.metrics = dict(metrics or {})
