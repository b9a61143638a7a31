"""Forwards without gradient over many groups: held-out evaluation, the reference cache, statistics
of a global batch.

They go through the same plan and the same packed rows as training, so they cost what its forward
costs.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.policy import in_eval_mode
from posttrain.packing.batch import GroupPart, PackedBatch, PackingMode, pack
from posttrain.packing.plan import StepPlan, plan_step
from posttrain.training.sharding import exchange, gather_object
from posttrain.training.step import Reference, Totals, loss_share, widest
from posttrain.types import Completion, Counts, Forward, Logps, Loss, PromptGroup

GROUPS_PER_PLAN = 256
Ref = tuple[int, int]
"""(index of the group, index of the completion in it)."""


@dataclass(frozen=True, kw_only=True)
class ForwardPlan:
    """How groups become rows: the same for training, evaluation and the reference."""

    accelerator: Any
    mode: PackingMode
    max_tokens: int
    length_limit: int | None = None

    def split(self, groups: Sequence[PromptGroup], *, coupled: bool = True) -> StepPlan:
        """The micro-batches of every rank; ``coupled`` keeps the parts of a group over the budget
        on one rank."""
        return plan_step(
            groups,
            world_size=self.accelerator.num_processes,
            max_tokens=self.max_tokens,
            mode=self.mode,
            coupled=coupled,
            length_limit=self.length_limit,
        )

    def deliver(
        self, groups: Sequence[PromptGroup], *, coupled: bool = True, everything: bool = False
    ) -> list[PromptGroup]:
        """The groups with the tokens of all that this rank computes of them, from the ranks that
        hold them; ``everything``: of all. A collective, unless there is one process."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return list(groups)
        here = {
            (i, k): c
            for i, g in enumerate(groups)
            for k, c in enumerate(g.completions)
            if c.is_here
        }
        addressed: list[dict[Ref, Completion]] = []
        for rows in self.split(groups, coupled=coupled).ranks:
            wanted = {(part.group, k) for m in rows for part in m.parts for k in part.completions}
            addressed.append({ref: c for ref, c in here.items() if everything or ref in wanted})
        found = ChainMap(*exchange(accelerator, addressed))
        return [
            replace(g, completions=[found.get((i, k), c) for k, c in enumerate(g.completions)])
            for i, g in enumerate(groups)
        ]

    def micro_batches(self, groups: Sequence[PromptGroup]) -> Iterator[tuple[PackedBatch, bool]]:
        """(row, is_dummy) of this rank."""
        for micro_batch in self.split(groups).ranks[self.accelerator.process_index]:
            batch = pack(groups, micro_batch.parts, mode=self.mode)
            yield batch.to(self.accelerator.device), micro_batch.is_dummy


Compute = Callable[[Sequence[PromptGroup], PackedBatch], Forward]
"""(groups, a row of them) -> what a model computes of it."""


@torch.no_grad()
def forward_values(
    plan: ForwardPlan, groups: Sequence[PromptGroup], computes: Sequence[Compute]
) -> list[dict[Ref, Forward]]:
    """For each of ``computes``: {(group, completion): its tokens' values} of the completions that
    this rank computes. All ranks call it."""
    values: list[dict[Ref, Forward]] = [{} for _ in computes]
    for batch, is_dummy in plan.micro_batches(groups):
        for compute, kept in zip(computes, values, strict=True):
            with plan.accelerator.autocast():
                forward = compute(groups, batch)
            if not is_dummy:
                for s, ref in enumerate(batch.refs):
                    here = batch.sequence_T == s
                    kept[ref] = forward.map(lambda value, here=here: value[here])  # type: ignore[misc]
        batch.layout.cache.clear()
    return values


def joined(
    plan: ForwardPlan, groups: Sequence[PromptGroup], values: dict[Ref, Forward]
) -> tuple[PackedBatch, Forward]:
    """The completions in ``values`` as one batch (no forward is made of it), and their values in
    its order."""
    by_group: dict[int, list[int]] = {}
    for group, completion in sorted(values):
        by_group.setdefault(group, []).append(completion)
    parts = [GroupPart(group=g, completions=tuple(ks)) for g, ks in by_group.items()]
    batch = pack(groups, parts, mode=plan.mode).to(plan.accelerator.device)
    return batch, Forward.join([values[ref] for ref in batch.refs])


@torch.no_grad()
def batch_mean(
    plan: ForwardPlan,
    policy: nn.Module,
    reference: Reference | None,
    loss: Loss,
    groups: Sequence[PromptGroup],
) -> Tensor | None:
    """The statistic that a loss declares (``BatchStatistic``): its mean over the global batch and
    all ranks, 0 of no items; or None.

    A prompt with another's answer can be longer than any sequence of the data: such a row may
    exceed the token budget (it is only forwarded, which takes a fraction of the memory of a
    training row).
    """
    statistic = loss.statistic
    if statistic is None:
        return None
    device = plan.accelerator.device
    total = torch.zeros(2, dtype=widest(device), device=device)
    dtype = torch.float32
    made = list(statistic.groups(groups))
    longest = max(
        (len(g.prompt_ids) + c.num_inputs for g in made for c in g.completions),
        default=0,
    )
    plan = replace(plan, max_tokens=max(plan.max_tokens, longest))
    with in_eval_mode(policy):
        for _, logps in _scored(plan, policy, reference, made):
            items = statistic.items(logps)
            total += torch.stack([items.sum().to(total), torch.tensor(items.numel()).to(total)])
            dtype = logps.logps_T.dtype
    summed, count = plan.accelerator.reduce(total, reduction="sum")
    return (summed / count.clamp(min=1)).to(dtype)


def _scored(
    plan: ForwardPlan,
    policy: nn.Module,
    reference: Reference | None,
    groups: Sequence[PromptGroup],
    mean: Tensor | None = None,
    outputs: Sequence[Any] = (),
) -> Iterator[tuple[dict[Ref, float], Logps]]:
    """Chunk by chunk what a loss gets for this rank's groups, and the sum over tokens of every
    completion's values."""
    computes: list[Compute] = [lambda _, batch: policy(batch, outputs)]
    if reference is not None:
        computes.append(lambda groups, batch: Forward(reference(groups, batch)))
    for at in range(0, len(groups), GROUPS_PER_PLAN):
        part = groups[at : at + GROUPS_PER_PLAN]
        values, *rest = forward_values(plan, part, computes)
        if values:
            batch, forward = joined(plan, part, values)
            reference_T = joined(plan, part, rest[0])[1].logps_T if rest else None
            sums = {(at + g, k): float(v.logps_T.double().sum()) for (g, k), v in values.items()}
            yield sums, batch.with_logps(forward, reference_T=reference_T, batch_mean=mean)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What held-out figures are made of."""

    groups: Sequence[PromptGroup]
    sums: Mapping[Ref, float]
    """{(group, completion): the sum of its trained tokens' log-probs, or a reward model's score}"""


Report = Callable[[Evaluated], Mapping[str, float]]


@torch.no_grad()
def evaluate(
    plan: ForwardPlan,
    policy: nn.Module,
    groups: Sequence[PromptGroup],
    loss: Loss,
    *,
    reference: Reference | None = None,
    counts: Counts,
    reports: Sequence[Report] = (),
) -> dict[str, float]:
    """{"eval_loss", "eval_<metric>"}: the loss of ``groups`` taken as one batch, over all ranks, in
    eval mode.

    ``counts`` are the units of all ``groups``. A metric ``rewards_train/x`` is named
    ``rewards_eval/x``. Each report adds figures of its own.
    """
    mean = batch_mean(plan, policy, reference, loss, groups)
    totals = Totals.on(plan.accelerator.device)
    sums: dict[Ref, float] = {}
    with in_eval_mode(policy):
        for part_sums, logps in _scored(plan, policy, reference, groups, mean, loss.outputs):
            totals.add(*loss_share(loss, logps, counts))
            sums.update(part_sums)
    value, means = totals.over_ranks(plan.accelerator)
    named = {
        name.replace("_train/", "_eval/") if "_train/" in name else f"eval_{name}": mean
        for name, mean in means.items()
    }
    every = dict(ChainMap(*gather_object(plan.accelerator, sums)))
    figures = {"eval_loss": value, **named}
    for report in reports:
        for name, figure in report(Evaluated(groups=groups, sums=every)).items():
            figures[name if name.startswith("eval_") else f"eval_{name}"] = float(figure)
    return figures
