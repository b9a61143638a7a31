"""Splits the global batch of a step into token-budget micro-batches, balanced over ranks.

Every rank computes the whole plan from the same groups and runs its own part of it, so the plan
needs no communication and its counts are the denominators of the step. The gradient does not depend
on the plan; only time and memory do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.packing.batch import GroupPart, PackingMode
from posttrain.resolve import settings
from posttrain.types import Counts, PromptGroup


@settings
class PackingConfig:
    """How groups become micro-batches."""

    max_tokens: int = 4096
    """Token budget: tokens of one packed row, i.e. of one forward on one device. Sets the memory,
    never the gradient."""
    mode: Literal["auto", "shared", "packed", "single"] = "auto"
    """shared: the prompt once per group; packed: one segment per completion; single: one sequence
    per forward; auto: the first that is exact for the model."""
    backend: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention: sdpa everywhere, flex (FlexAttention) on CUDA; auto takes flex on CUDA when
    nothing speaks against it."""
    logits_chunk: int = 512
    """Trained tokens whose logits are held at once (tokens); the LM head recomputes them chunk by
    chunk in the backward."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "logits_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"packing.{name} is a number of tokens >= 1; got {getattr(self, name)}."
                )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward of one rank."""

    parts: tuple[GroupPart, ...]
    num_tokens: int
    """Tokens of its row."""
    is_dummy: bool = False
    """Real tokens with weight 0, so that every rank runs the same number of forwards and
    collectives match."""
    coupled_group: int | None = None
    """Set when this is one of several parts of a group whose loss couples its completions (gradient
    caching)."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Micro-batches of every rank, the same number for each, and the denominators of the step."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    counts: Counts


def count_units(groups: Sequence[PromptGroup]) -> Counts:
    """Trained tokens, completions with a trained token, groups with such a completion, pair
    weights, groups with a pair."""
    tokens = completions = trained_groups = paired_groups = 0
    pairs = 0.0
    for group in groups:
        num_trained = [c.num_trained for c in group.completions]
        k = sum(n > 0 for n in num_trained)
        weights = [pair.weight for pair in group.trained_pairs]
        tokens += sum(num_trained)
        completions += k
        trained_groups += k > 0
        pairs += sum(weights)
        paired_groups += len(weights) > 0
    return Counts(
        tokens=tokens,
        completions=completions,
        groups=trained_groups,
        pairs=pairs,
        paired_groups=paired_groups,
    )


class _Cost:
    """Row tokens of any subset of a group's completions; the masks are read once."""

    def __init__(self, group: PromptGroup, mode: PackingMode) -> None:
        self.prompt = len(group.prompt_ids)
        self.shared = mode == "shared"
        self.inputs = {k: c.num_inputs for k, c in enumerate(group.completions) if c.num_trained}

    def tokens(self, completions: Sequence[int]) -> int:
        prompts = min(len(completions), 1) if self.shared else len(completions)
        return prompts * self.prompt + sum(self.inputs[k] for k in completions)


def row_tokens(group: PromptGroup, *, mode: PackingMode) -> int:
    """Tokens that a whole group takes in a row."""
    cost = _Cost(group, mode)
    return cost.tokens(list(cost.inputs))


def _split_group(
    group: PromptGroup,
    index: int,
    cost: _Cost,
    *,
    max_tokens: int,
    mode: PackingMode,
    length_limit: int | None,
) -> list[tuple[bool, MicroBatch]]:
    """The group whole if it fits the budget; else cut between completions, the prompt repeated in
    each part.

    Each part comes with whether its sequences are longer than ``length_limit``.
    """
    by_class: dict[bool, list[int]] = {}
    for k in cost.inputs:
        is_long = length_limit is not None and cost.tokens([k]) > length_limit
        by_class.setdefault(is_long, []).append(k)
    parts: list[tuple[bool, MicroBatch]] = []
    for is_long, members in by_class.items():
        part: list[int] = []
        for k in members:
            if cost.tokens([k]) > max_tokens:
                raise ValueError(
                    "One completion with its prompt must fit into packing.max_tokens; got "
                    f"{cost.tokens([k])} tokens in {group.where}, budget {max_tokens}. Raise "
                    "--packing.max_tokens or lower --data.max_length."
                )
            if part and (mode == "single" or cost.tokens([*part, k]) > max_tokens):
                parts.append((is_long, _part(index, part, cost)))
                part = []
            part.append(k)
        parts.append((is_long, _part(index, part, cost)))
    return parts


def _part(index: int, completions: list[int], cost: _Cost) -> MicroBatch:
    return MicroBatch(
        parts=(GroupPart(group=index, completions=tuple(completions)),),
        num_tokens=cost.tokens(completions),
    )


def plan_step(
    groups: Sequence[PromptGroup],
    *,
    world_size: int,
    max_tokens: int,
    mode: PackingMode,
    coupled: bool = False,
    length_limit: int | None = None,
) -> StepPlan:
    """Balanced micro-batches of at most ``max_tokens`` tokens for each of ``world_size`` ranks.

    ``coupled``: the loss mixes completions of a group, so the parts of a group over budget stay
    together on one rank. ``length_limit``: a row holds either only sequences up to this length or
    only longer ones (long RoPE picks its frequencies by the largest position of a row). Raises
    ValueError for a completion over budget, naming its row, and for a batch in which nothing is
    trained.
    """
    counts = count_units(groups)
    if counts.tokens == 0:
        raise ValueError(
            f"A step needs at least one trained token; got none in {len(groups)} groups (first: "
            f"{groups[0].where if groups else 'empty batch'}). Check the loss masks of the data."
        )
    loose: dict[bool, list[MicroBatch]] = {}
    chains: list[list[MicroBatch]] = []
    for index, group in enumerate(groups):
        cost = _Cost(group, mode)
        parts = _split_group(
            group, index, cost, max_tokens=max_tokens, mode=mode, length_limit=length_limit
        )
        if coupled and len(parts) > 1:
            chains.append([replace(part, coupled_group=index) for _, part in parts])
            continue
        for is_long, part in parts:
            loose.setdefault(is_long, []).append(part)
    for items in loose.values():
        bins = (
            items
            if mode == "single"
            else _fill_bins(items, capacity=max_tokens, multiple_of=world_size)
        )
        chains.extend([bin_] for bin_ in bins)
    return StepPlan(ranks=_deal(chains, world_size), counts=counts)


def _fill_bins(items: list[MicroBatch], *, capacity: int, multiple_of: int) -> list[MicroBatch]:
    """Bins of at most ``capacity`` tokens, as few as possible, then as even as possible.

    First-fit-decreasing gives the number of bins, rounded up to a multiple of the ranks;
    longest-first into the emptiest bin then evens them out. Where that does not fit, the first-fit
    bins stand.
    """
    ordered = sorted(
        items, key=lambda item: (-item.num_tokens, item.parts[0].group, item.parts[0].completions)
    )
    first_fit: list[list[MicroBatch]] = []
    loads: list[int] = []
    for item in ordered:
        home = next((i for i, load in enumerate(loads) if load + item.num_tokens <= capacity), None)
        if home is None:
            first_fit.append([item])
            loads.append(item.num_tokens)
        else:
            first_fit[home].append(item)
            loads[home] += item.num_tokens
    num_bins = min(-(-len(first_fit) // multiple_of) * multiple_of, len(ordered))
    even: list[list[MicroBatch]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for item in ordered:
        lightest = loads.index(min(loads))
        even[lightest].append(item)
        loads[lightest] += item.num_tokens
    return [_join(bin_) for bin_ in (even if max(loads) <= capacity else first_fit)]


def _join(items: list[MicroBatch]) -> MicroBatch:
    parts = sorted(
        (part for item in items for part in item.parts),
        key=lambda part: (part.group, part.completions),
    )
    return MicroBatch(parts=tuple(parts), num_tokens=sum(item.num_tokens for item in items))


def _deal(chains: list[list[MicroBatch]], world_size: int) -> tuple[tuple[MicroBatch, ...], ...]:
    """Longest chain first, each to the rank with the fewest micro-batches, then the fewest tokens;
    dummies fill up."""
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for chain in sorted(chains, key=lambda c: (-len(c), -sum(m.num_tokens for m in c))):
        rank = min(range(world_size), key=lambda r: (len(ranks[r]), loads[r], r))
        ranks[rank].extend(chain)
        loads[rank] += sum(m.num_tokens for m in chain)
    longest = max(len(rank) for rank in ranks)
    smallest = min((m for rank in ranks for m in rank), key=lambda m: m.num_tokens)
    dummy = replace(smallest, is_dummy=True, coupled_group=None)
    return tuple(tuple([*rank, *[dummy] * (longest - len(rank))]) for rank in ranks)
