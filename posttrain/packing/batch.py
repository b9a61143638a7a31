"""A packed row: groups laid end to end, with the indices that a forward and a loss need.

    row       [ prompt 1 | completion 1a | completion 1b ][ prompt 2 | completion 2a ] ...
    position    0 .. P-1    P .. P+Ca-1     P .. P+Cb-1      0 ..

A completion continues the positions of its prompt and sees its prompt and itself, never a sibling
or another group. Tokens that no trained token depends on (what follows the last trained token, and
that token itself, which is only ever a target) are not part of the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from posttrain.types import Completion, Forward, Logps, PromptGroup, Ragged, Targets

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
    refs: tuple[tuple[int, int], ...]
    """[S] (index of the group in the global batch, index of the completion in the group)."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Further keyword arguments of the model (``PromptGroup.inputs``), one copy for each time that
    a prompt is in the row, joined along the first dimension."""

    @property
    def kept_ids(self) -> Ragged | None:
        """The ids that each trained token was drawn from, where a sampler left some out."""
        return self.columns_T.get("kept_ids")

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with every tensor on ``device``."""

        def moved(value: Any) -> Any:
            if isinstance(value, (torch.Tensor, Ragged)):
                return value.to(device)
            is_mapping = isinstance(value, Mapping)
            return {n: v.to(device) for n, v in value.items()} if is_mapping else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def with_logps(
        self,
        forward: Forward | Tensor,
        *,
        reference_T: Tensor | None = None,
        batch_mean: Tensor | None = None,
    ) -> Logps:
        """What the loss gets: the forward's result (or log-probs alone) and where each entry
        belongs."""
        if isinstance(forward, torch.Tensor):
            forward = Forward(forward)
        dtype = forward.logps_T.dtype

        def cast(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: cast(column) for name, column in value.items()}
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if is_float else value

        return Logps(
            **{f.name: cast(getattr(self, f.name)) for f in fields(Targets)},
            logps_T=forward.logps_T,
            outputs=forward.outputs,
            reference_T=reference_T,
            batch_mean=batch_mean,
        )


class Segments:
    """Grows a row segment by segment."""

    def __init__(self) -> None:
        self._ids: list[Any] = []
        self.lengths: list[int] = []
        self.prefixes: list[int] = []
        self._first_positions: list[int] = []

    def __len__(self) -> int:
        return sum(self.lengths)

    def add_segment(self, ids: Any, *, first_position: int, prefix: int) -> int:
        """Row index of its first token. Without ids there is no segment."""
        start = len(self)
        if len(ids):
            self._ids.append(ids)
            self._first_positions.append(first_position)
            self.lengths.append(len(ids))
            self.prefixes.append(prefix)
        return start

    @property
    def ids(self) -> Tensor:
        """[L] token ids."""
        return long(self._ids)

    @property
    def positions(self) -> Tensor:
        """[L] position of each token in its own sequence."""
        starts_and_lengths = zip(self._first_positions, self.lengths, strict=True)
        return long([np.arange(first, first + n) for first, n in starts_and_lengths])

    @property
    def layout(self) -> Layout:
        """Which stretch of the row sees which."""
        return Layout(lengths=tuple(self.lengths), prefixes=tuple(self.prefixes))


class _Row(Segments):
    """With its trained tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor: list[Any] = []
        self.targets: list[Any] = []
        self.num_tokens: list[int] = []
        self.refs: list[tuple[int, int]] = []

    def add_targets(
        self, group: PromptGroup, completion: int, ref: tuple[int, int], *, last: int, start: int
    ) -> None:
        """``last``: row index of the prompt's last token; ``start``: row index of the completion's
        first token."""
        c = group.completions[completion]
        self.predictor.append(np.where(c.trained > 0, start + c.trained - 1, last))
        self.targets.append(c.token_ids[c.trained])
        self.num_tokens.append(c.num_trained)
        self.refs.append(ref)

    def add_shared(self, group: PromptGroup, part: GroupPart) -> None:
        """[prompt | c1 | c2 | ...]: the prompt once."""
        n = len(group.prompt_ids)
        start = self.add_segment(group.prompt_ids, first_position=0, prefix=-1)
        prompt_segment = len(self.lengths) - 1
        for k in part.completions:
            c = group.completions[k]
            inputs = c.token_ids[: c.num_inputs]
            c_start = self.add_segment(inputs, first_position=n, prefix=prompt_segment)
            self.add_targets(group, k, (part.group, k), last=start + n - 1, start=c_start)

    def add_separate(self, group: PromptGroup, part: GroupPart) -> None:
        """[prompt c1][prompt c2]...: one segment per completion."""
        n = len(group.prompt_ids)
        for k in part.completions:
            c = group.completions[k]
            start = len(self)
            if c.num_trained:
                ids = np.concatenate([group.prompt_ids, c.token_ids[: c.num_inputs]])
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

    completions = [groups[g].completions[k] for g, k in row.refs]
    assert all(c.is_here for c in completions), "another rank has the tokens: ForwardPlan.deliver"
    columns_S, columns_T = _columns(completions, [groups[g].where for g, _ in row.refs])
    num_tokens_S = torch.tensor(row.num_tokens, dtype=torch.long)
    return PackedBatch(
        input_ids_L=row.ids,
        position_ids_L=row.positions,
        layout=row.layout,
        predictor_T=long(row.predictor),
        targets_T=long(row.targets),
        sequence_T=long([np.repeat(np.arange(len(row.num_tokens)), row.num_tokens)]),
        group_S=torch.tensor(group_S, dtype=torch.long),
        num_tokens_S=num_tokens_S,
        group_size_S=torch.tensor(group_size_S, dtype=torch.long),
        pairs_B2=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        margin_B=torch.tensor(margins, dtype=torch.float64),
        weight_B=torch.tensor(weights, dtype=torch.float64),
        columns_S=columns_S,
        columns_T=columns_T,
        refs=tuple(row.refs),
        inputs=_inputs(groups, parts, mode=mode),
    )


def long(arrays: Sequence[Any]) -> Tensor:
    """[sum of lengths] int64, on the CPU."""
    joined = np.concatenate(arrays) if len(arrays) else np.zeros(0)
    return torch.tensor(joined.astype(np.int64))


def _inputs(
    groups: Sequence[PromptGroup], parts: Sequence[GroupPart], *, mode: PackingMode
) -> dict[str, Tensor]:
    """The groups' own model inputs, one copy for each time that a prompt is in the row."""
    copies: list[Mapping[str, Any]] = []
    for part in parts:
        trained = sum(groups[part.group].completions[k].num_trained > 0 for k in part.completions)
        copies += [groups[part.group].inputs] * (1 if mode == "shared" else trained)
    names = dict.fromkeys(name for inputs in copies for name in inputs)
    return {n: torch.cat([torch.as_tensor(c[n]) for c in copies if n in c]) for n in names}


def _columns(
    completions: Sequence[Completion], places: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """([S], [T]) by name. A column is [S] where every completion has one number; else the numbers
    of the trained tokens, with one number of a completion at each of its tokens.

    A completion without trained tokens needs no column (0 stands for it). ValueError where another
    lacks one that its batch has.
    """
    by_completion: dict[str, Tensor] = {}
    by_token: dict[str, Any] = {}
    for name in dict.fromkeys(name for c in completions for name in c.columns):
        for c, where in zip(completions, places, strict=True):
            if name not in c.columns and c.num_trained:
                raise ValueError(
                    f"{where}: a completion without the column {name!r} is in one batch with "
                    f"others that have it; it has {', '.join(c.columns) or 'none'}. Give the "
                    "column to every completion that is trained."
                )
        given = [c.columns.get(name, 0.0) for c in completions]
        if all(isinstance(value, float) for value in given):
            by_completion[name] = torch.tensor(given, dtype=torch.float64)
        elif any(isinstance(value, Ragged) for value in given):
            by_token[name] = _ragged(given, completions)
        else:
            taken = [
                np.full(c.num_trained, value) if isinstance(value, float) else value[c.trained]
                for value, c in zip(given, completions, strict=True)
            ]
            by_token[name] = torch.tensor(np.concatenate(taken).astype(np.float64))
    return by_completion, by_token


def _ragged(given: Sequence[Any], completions: Sequence[Completion]) -> Ragged:
    """The lists of the trained tokens, as tensors."""
    lists = [
        ids
        for value, c in zip(given, completions, strict=True)
        if isinstance(value, Ragged)
        for ids in value.take(c.loss_mask)
    ]
    ends = torch.tensor([len(ids) for ids in lists], dtype=torch.long).cumsum(0)
    return Ragged(values=long(lists), ends=ends)
