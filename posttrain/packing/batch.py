"""A packed row: groups laid end to end, with the indices that a forward and a loss need.

    row       [ prompt 1 | completion 1a | completion 1b ][ prompt 2 | completion 2a ] ...
    position    0 .. P-1    P .. P+Ca-1     P .. P+Cb-1      0 ..

A completion continues the positions of its prompt and sees its prompt and itself, never a sibling
or another group. Tokens that no trained token depends on (what follows the last trained token, and
that token itself, which is only ever a target) are not part of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from posttrain.types import Completion, PairLogps, PromptGroup, Targets

if TYPE_CHECKING:
    from torch import Tensor

PackingMode = Literal["shared", "packed", "single"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Segments of a row, in order. Segment i sees itself causally and all of segment
    ``prefixes[i]`` (-1: nothing)."""

    lengths: tuple[int, ...]
    """Tokens of each segment; they add up to L."""
    prefixes: tuple[int, ...]
    """Segment that each one continues, or -1."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Masks made for this layout, by backend and window: every layer asks for the same ones."""

    def length_with_prefix(self, segment: int) -> int:
        """Keys that the last token of the segment sees."""
        prefix = self.prefixes[segment]
        return self.lengths[segment] + (self.lengths[prefix] if prefix >= 0 else 0)


@dataclass(frozen=True, kw_only=True)
class GroupPart:
    """Some completions of one group of the global batch; all of them unless the group is over the
    token budget."""

    group: int
    """Index in the global batch."""
    completions: tuple[int, ...]
    """Indices in the group."""


@dataclass(frozen=True, kw_only=True)
class KeptIds:
    """For each trained token the ids it was drawn from: all of them in one tensor, with where each
    token's end."""

    ids: Tensor
    """[sum of sizes]"""
    ends_T: Tensor
    """[T] end of each token's ids in ``ids``; a token with none was drawn from the whole
    vocabulary."""

    def to(self, device: torch.device) -> KeptIds:
        """The same on ``device``."""
        return KeptIds(ids=self.ids.to(device), ends_T=self.ends_T.to(device))


@dataclass(frozen=True, kw_only=True)
class PackedBatch(Targets):
    """One micro-batch as the model sees it, with its targets. Shapes: see the legend in
    ``posttrain.types``."""

    input_ids_L: Tensor
    """[L] token ids of the row."""
    position_ids_L: Tensor
    """[L] position of each token in its own sequence."""
    layout: Layout
    """Which stretch of the row sees which."""
    predictor_T: Tensor
    """[T] row index whose hidden state predicts the trained token; a prompt's last token serves all
    its completions."""
    kept_ids: KeptIds | None
    """The vocabulary that each trained token was drawn from, where it was cut."""
    refs: tuple[tuple[int, int], ...]
    """[S] (index of the group in the global batch, index of the completion in the group)."""

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with every tensor on ``device``."""
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, (torch.Tensor, KeptIds))
        }
        return replace(self, **moved)

    def with_logps(
        self,
        logps_T: Tensor,
        *,
        reference_T: Tensor | None = None,
        batch_mean: Tensor | None = None,
    ) -> PairLogps:
        """What the loss gets: the forward's result and where each entry belongs."""
        targets: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Targets)}
        for name, value in targets.items():
            if value is not None and value.is_floating_point():
                targets[name] = value.to(logps_T.dtype)
        return PairLogps(logps_T=logps_T, reference_T=reference_T, batch_mean=batch_mean, **targets)


def trained_positions(loss_mask: Sequence[bool | int]) -> list[int]:
    """Indices of the trained tokens of a completion."""
    return [i for i, m in enumerate(loss_mask) if m]


def num_input_tokens(loss_mask: Sequence[bool | int]) -> int:
    """Tokens of a completion that must be computed: those before its last trained token (0 if none
    is trained)."""
    trained = trained_positions(loss_mask)
    return trained[-1] if trained else 0


class Segments:
    """Grows a row segment by segment."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.lengths: list[int] = []
        self.prefixes: list[int] = []

    def add_segment(self, ids: Sequence[int], *, first_position: int, prefix: int) -> int:
        """Row index of its first token. Without ids there is no segment."""
        start = len(self.ids)
        if len(ids):
            self.ids.extend(ids)
            self.positions.extend(range(first_position, first_position + len(ids)))
            self.lengths.append(len(ids))
            self.prefixes.append(prefix)
        return start

    @property
    def layout(self) -> Layout:
        """Which stretch of the row sees which."""
        return Layout(lengths=tuple(self.lengths), prefixes=tuple(self.prefixes))


class _Row(Segments):
    """With its trained tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor: list[int] = []
        self.targets: list[int] = []
        self.sequence: list[int] = []
        self.num_tokens: list[int] = []
        self.refs: list[tuple[int, int]] = []

    def add_targets(
        self, group: PromptGroup, completion: int, ref: tuple[int, int], *, last: int, start: int
    ) -> None:
        """``last``: row index of the prompt's last token; ``start``: row index of the completion's
        first token."""
        c = group.completions[completion]
        trained = trained_positions(c.loss_mask)
        self.predictor.extend(last if i == 0 else start + i - 1 for i in trained)
        self.targets.extend(int(c.token_ids[i]) for i in trained)
        self.sequence.extend([len(self.refs)] * len(trained))
        self.num_tokens.append(len(trained))
        self.refs.append(ref)

    def add_shared(self, group: PromptGroup, part: GroupPart) -> None:
        """[prompt | c1 | c2 | ...]: the prompt once."""
        n = len(group.prompt_ids)
        start = self.add_segment(group.prompt_ids, first_position=0, prefix=-1)
        prompt_segment = len(self.lengths) - 1
        for k in part.completions:
            c = group.completions[k]
            inputs = c.token_ids[: num_input_tokens(c.loss_mask)]
            c_start = self.add_segment(inputs, first_position=n, prefix=prompt_segment)
            self.add_targets(group, k, (part.group, k), last=start + n - 1, start=c_start)

    def add_separate(self, group: PromptGroup, part: GroupPart) -> None:
        """[prompt c1][prompt c2]...: one segment per completion."""
        n = len(group.prompt_ids)
        for k in part.completions:
            c = group.completions[k]
            start = len(self.ids)
            if c.num_trained:
                ids = [*group.prompt_ids, *c.token_ids[: num_input_tokens(c.loss_mask)]]
                self.add_segment(ids, first_position=0, prefix=-1)
            self.add_targets(group, k, (part.group, k), last=start + n - 1, start=start + n)


def pack(
    groups: Sequence[PromptGroup], parts: Sequence[GroupPart], *, mode: PackingMode
) -> PackedBatch:
    """Lays the given parts of the global batch ``groups`` end to end in one row.

    ``mode="shared"`` computes each prompt once per part; ``"packed"`` and ``"single"`` once per
    completion. Completions without a trained token keep their place in S with ``num_tokens_S = 0``
    and cost no token.
    """
    row = _Row()
    group_S: list[int] = []
    group_size_S: list[int] = []
    pairs: list[tuple[int, int]] = []
    margins: list[float] = []
    weights: list[float] = []
    for p, part in enumerate(parts):
        group = groups[part.group]
        at = {k: len(row.refs) + i for i, k in enumerate(part.completions)}
        if mode == "shared" and len(part.completions) > 1:
            row.add_shared(group, part)
        else:
            row.add_separate(group, part)
        group_S.extend([p] * len(part.completions))
        group_size_S.extend(
            [sum(c.num_trained > 0 for c in group.completions)] * len(part.completions)
        )
        here = [pair for pair in group.trained_pairs if pair.chosen in at and pair.rejected in at]
        pairs.extend((at[pair.chosen], at[pair.rejected]) for pair in here)
        margins.extend(pair.margin for pair in here)
        weights.extend(pair.weight for pair in here)

    def long(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long)

    labels = [groups[g].completions[k].label for g, k in row.refs]
    return PackedBatch(
        input_ids_L=long(row.ids),
        position_ids_L=long(row.positions),
        layout=row.layout,
        predictor_T=long(row.predictor),
        targets_T=long(row.targets),
        sequence_T=long(row.sequence),
        group_S=long(group_S),
        num_tokens_S=long(row.num_tokens),
        group_size_S=long(group_size_S),
        pairs_B2=long(pairs).reshape(-1, 2),
        margin_B=torch.tensor(margins, dtype=torch.float64),
        weight_B=torch.tensor(weights, dtype=torch.float64),
        label_S=long([0 if label is None else 1 if label else -1 for label in labels]),
        **_rollout_fields([groups[g].completions[k] for g, k in row.refs]),
        refs=tuple(row.refs),
    )


def _rollout_fields(completions: Sequence[Completion]) -> dict[str, Any]:
    """What reinforcement learning adds: advantages, log-probs of the sampler and of the proximal
    policy, kept ids."""
    trained = [trained_positions(c.loss_mask) for c in completions]

    def by_token(values_of: Callable[[Completion], Sequence[float] | None]) -> Tensor | None:
        columns = [values_of(c) for c in completions]
        if any(
            column is None and at for column, at in zip(columns, trained, strict=True)
        ) or not any(trained):
            return None
        flat = [
            column[i]
            for column, at in zip(columns, trained, strict=True)
            if column is not None
            for i in at
        ]
        return torch.tensor(flat, dtype=torch.float64)

    def advantages(c: Completion) -> Sequence[float] | None:
        if c.token_advantages is not None or c.advantage is None:
            return c.token_advantages
        return [c.advantage] * len(c.token_ids)

    kept = None
    if any(c.kept_ids is not None for c in completions):
        sets = [
            c.kept_ids[i] if c.kept_ids is not None else ()
            for c, at in zip(completions, trained, strict=True)
            for i in at
        ]
        ends = torch.tensor([len(ids) for ids in sets], dtype=torch.long).cumsum(0)
        kept = KeptIds(
            ids=torch.tensor([i for ids in sets for i in ids], dtype=torch.long), ends_T=ends
        )
    scalars = [c.advantage for c in completions]
    no_advantage = all(a is None for a in scalars)
    return {
        "advantage_S": None
        if no_advantage
        else torch.tensor([a or 0.0 for a in scalars], dtype=torch.float64),
        "advantage_T": by_token(advantages),
        "sampler_T": by_token(lambda c: c.sampler_logps),
        "given_proximal_T": by_token(lambda c: c.proximal_logps),
        "kept_ids": kept,
    }
