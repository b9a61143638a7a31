"""One optimizer step's gradient: the only place that divides by a denominator, and the only caller
of ``backward``.

    plan -> for every micro-batch of this rank: forward, loss terms, share of the global mean,
    backward
         -> one reduction of the metrics -> finite check -> clip

accelerate, DDP and FSDP each have an idea of averaging (over accumulation steps, over ranks).
Accumulation is set to 1 everywhere, the shares are multiplied by the world size because DDP and
FSDP average over ranks, and what is left is the plain sum over the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.losses.reduce import reduce_term
from posttrain.models.sharding import local
from posttrain.packing.batch import GroupPart, PackedBatch, PackingMode, pack
from posttrain.packing.plan import MicroBatch, StepPlan
from posttrain.training.config import UserFacingError
from posttrain.training.sharding import (
    gather_object,
    is_deepspeed,
    kind,
    local_gradients,
    shards_weights,
)
from posttrain.types import Counts, Forward, Logps, Loss, PromptGroup, as_loss

Reference = Callable[[Sequence[PromptGroup], PackedBatch], Tensor]
"""(groups of the global batch, a micro-batch of them) -> [T] log-probs of its trained tokens under
the reference model."""


class NonFiniteError(UserFacingError):
    """A loss or gradient became inf or NaN; raised before the optimizer steps, so the weights are
    still good."""


@dataclass(kw_only=True)
class StepResult:
    """What a step's forwards and backwards produced; the same on every rank."""

    loss: float
    metrics: dict[str, float]
    batches: list[tuple[PackedBatch, Tensor]] = field(default_factory=list)
    """[micro-batch, its detached sums of log-probs by completion]: read when something is not
    finite."""


def widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(kw_only=True)
class Totals:
    """Sums of a step or an evaluation on this rank, reduced over ranks once at its end."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device) -> Totals:
        """Nothing yet."""
        return cls(loss=torch.zeros((), dtype=widest(device), device=device))

    def add(self, share: Tensor, metrics: dict[str, Tensor]) -> None:
        """What ``loss_share`` gave."""
        self.loss += share.detach()
        for name, values in metrics.items():
            values = values.detach().to(self.loss.dtype)
            self.sums[name] = self.sums.get(name, self.loss.new_zeros(())) + values.sum()
            self.sizes[name] = self.sizes.get(name, 0) + values.numel()

    def over_ranks(self, accelerator: Any) -> tuple[float, dict[str, float]]:
        """(sum of the shares, means of the metrics), in one collective. A rank with only dummies
        has no metrics, so names come from all ranks."""
        names = sorted(set().union(*gather_object(accelerator, list(self.sums))))
        zero = self.loss.new_zeros(())
        sums = [self.sums.get(name, zero) for name in names]
        sizes = [zero + self.sizes.get(name, 0) for name in names]
        reduced = accelerator.reduce(
            torch.stack([self.loss, *sums, *sizes]), reduction="sum"
        ).tolist()
        return reduced[0], {
            name: reduced[1 + i] / max(reduced[1 + len(names) + i], 1.0)
            for i, name in enumerate(names)
        }


@dataclass(kw_only=True)
class _Step:
    """What every forward of one step reads, and the totals it writes."""

    accelerator: Any
    policy: nn.Module
    groups: Sequence[PromptGroup]
    plan: StepPlan
    loss: Loss
    mode: PackingMode
    reference: Reference | None
    batch_mean: Tensor | None
    totals: Totals

    def pack(self, parts: Sequence[GroupPart]) -> PackedBatch:
        """A micro-batch on this rank's device."""
        return pack(self.groups, parts, mode=self.mode).to(self.accelerator.device)

    def reference_logps(self, batch: PackedBatch) -> Tensor | None:
        """[T] without gradient; None where the loss needs none."""
        if self.reference is None:
            return None
        with torch.no_grad(), self.accelerator.autocast():
            return self.reference(self.groups, batch)

    def others_read_the_reference(self, index: int) -> bool:
        """A forward of sharded weights is a collective: all ranks make it if one needs it."""
        return shards_weights(self.accelerator) and any(
            rank[index].coupled_group is None for rank in self.plan.ranks
        )

    def forward(self, batch: PackedBatch) -> Forward:
        """Log-probs, and what else the loss reads."""
        return self.policy(batch, self.loss.outputs) if self.loss.outputs else self.policy(batch)

    def share(self, batch: PackedBatch, forward: Forward, reference_T: Tensor | None) -> Tensor:
        """This micro-batch's part of the loss of the global batch; it and the metrics go into the
        totals."""
        logps = batch.with_logps(forward, reference_T=reference_T, batch_mean=self.batch_mean)
        share, metrics = loss_share(self.loss, logps, self.plan.counts)
        self.totals.add(share, metrics)
        return share


def step_gradient(
    accelerator: Any,
    policy: nn.Module,
    groups: Sequence[PromptGroup],
    plan: StepPlan,
    loss: Loss,
    *,
    mode: PackingMode,
    reference: Reference | None = None,
    batch_mean: Tensor | None = None,
) -> StepResult:
    """Adds d(loss of the global batch)/d(parameters) to ``.grad``; the value does not depend on how
    ``plan`` splits the batch.

    ``policy(batch) -> Forward`` is the wrapped module; ``groups`` the global batch, the same on
    every rank; ``batch_mean`` what ``training.forward.batch_mean`` gives for a loss that declares a
    statistic. The dtype of the result is float32 or wider. Raises ValueError for a loss that
    returns reduced items.
    """
    micro_batches = plan.ranks[accelerator.process_index]
    totals = Totals.on(accelerator.device)
    step = _Step(
        accelerator=accelerator,
        policy=policy,
        groups=groups,
        plan=plan,
        loss=as_loss(loss),
        mode=mode,
        reference=reference,
        batch_mean=batch_mean,
        totals=totals,
    )
    cache = _GradientCache(step)
    result = StepResult(loss=0.0, metrics={})
    for i, micro_batch in enumerate(micro_batches):
        batch = step.pack(micro_batch.parts)
        cached = micro_batch.coupled_group is not None
        reference_T = (
            step.reference_logps(batch) if not cached or step.others_read_the_reference(i) else None
        )
        is_last = i == len(micro_batches) - 1
        # Autocast ends with each micro-batch: weights cast in an earlier one would keep the
        # gradients of all casts alive until the end of the backward, because autograd runs the
        # oldest nodes last. Not around the gradient cache: weights cast without gradient would be
        # reused, and the gradient lost.
        with (
            accelerator.autocast(),
            _no_sync(accelerator, policy, skip=not is_last),
            cache.rng_of(i),
        ):
            forward = step.forward(batch)
            share = _zero(forward)  # a pair loss has no item where a group has one completion
            if cached:
                gradients = cache.gradient_of(batch)
                share = share + sum(
                    (tensor * gradient).sum()
                    for tensor, gradient in zip(forward.tensors, gradients, strict=True)
                )
            elif not micro_batch.is_dummy:
                share = share + step.share(batch, forward, reference_T)
            _backward(accelerator, policy, share * accelerator.num_processes, is_last=is_last)
        batch.layout.cache.clear()  # the masks of this row; the batch itself is kept for messages
        if not micro_batch.is_dummy:
            result.batches.append((batch, batch.with_logps(forward.logps_T.detach()).logps_S))
    result.loss, result.metrics = totals.over_ranks(accelerator)
    return result


def _zero(forward: Forward) -> Tensor:
    """0 that depends on everything that was computed."""
    return torch.stack([0.0 * tensor.sum() for tensor in forward.tensors]).sum()


def loss_share(loss: Loss, logps: Logps, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """A part of the batch's share of a loss whose denominators are ``counts``, and its unreduced
    metrics. Never in 16 bit."""
    with torch.autocast(logps.logps_T.device.type, enabled=False):
        output = loss(logps)
        units = {term.unit for term in output.terms}
        if units & {"pair", "group"} and not loss.couples_completions:
            raise ValueError(
                "A loss with items of unit 'pair' or 'group' couples the completions of a group, "
                "but this one declares couples_completions=False, so a group over the token "
                "budget would be cut between them. Remove the declaration."
            )
        shares = [reduce_term(term, logps, counts) for term in output.terms]
        share = torch.stack(
            [s.to(torch.promote_types(s.dtype, torch.float32)) for s in shares]
        ).sum()
    return share, dict(output.metrics)


def _backward(accelerator: Any, policy: Any, loss: Tensor, *, is_last: bool) -> None:
    """DeepSpeed's engine is called here and not through accelerate, which would step as well."""
    if is_deepspeed(accelerator):
        policy.set_gradient_accumulation_boundary(
            is_last
        )  # ZeRO-1 reduces at the last, ZeRO-2 and 3 every time
        policy.backward(loss)
    else:
        accelerator.backward(loss)


def _no_sync(accelerator: Any, policy: nn.Module, *, skip: bool) -> Any:
    """Gradients of DDP are reduced once, with the last micro-batch. Sharded modules reduce every
    time."""
    is_ddp = isinstance(policy, torch.nn.parallel.DistributedDataParallel)
    return accelerator.no_sync(policy) if skip and is_ddp else nullcontext()


class _GradientCache:
    """d loss / d forward of groups that are over the token budget, for losses that couple the
    completions of a group.

    Gao et al. 2021, arXiv:2101.06983: a forward without gradient of every part, the loss of the
    whole group on the joined results, its gradient with respect to each of their tensors; each part
    then backpropagates its own slice. Same gradient as one forward of the whole group. The random
    state of each part is kept, so that dropout draws the same masks twice.
    """

    def __init__(self, step: _Step) -> None:
        self._step = step
        self._rng: dict[int, Any] = {}
        self._gradient: dict[tuple[int, int], list[Tensor]] = {}
        self._device = step.accelerator.device
        mine = list(enumerate(step.plan.ranks[step.accelerator.process_index]))
        coupled = [(i, m) for i, m in mine if m.coupled_group is not None]
        num_forwards = max(
            sum(m.coupled_group is not None for m in rank) for rank in step.plan.ranks
        )
        if num_forwards == 0:
            return
        forwards: dict[tuple[int, int], Forward] = {}
        reference: dict[tuple[int, int], Tensor] = {}
        for i, micro_batch in coupled:
            batch = step.pack(micro_batch.parts)
            reference_T = step.reference_logps(batch)
            self._rng[i] = _rng_state(self._device)
            with torch.no_grad():
                forward = step.forward(batch)
            for s, ref in enumerate(batch.refs):
                here = batch.sequence_T == s
                forwards[ref] = forward.map(lambda values, here=here: values[here])  # type: ignore[misc]
                if reference_T is not None:
                    reference[ref] = reference_T[here]
        self._run_spare_forwards(mine[0][1], num_forwards - len(coupled))
        for group in sorted({m.coupled_group for _, m in coupled if m.coupled_group is not None}):
            self._differentiate(group, forwards, reference)

    def _run_spare_forwards(self, any_batch: MicroBatch, count: int) -> None:
        """Sharded modules gather parameters in every forward: all ranks run the same number of
        them."""
        for _ in range(count):
            batch = self._step.pack(any_batch.parts)
            self._step.reference_logps(batch)
            with torch.no_grad():
                self._step.forward(batch)

    def _differentiate(
        self,
        group: int,
        forwards: dict[tuple[int, int], Forward],
        reference: dict[tuple[int, int], Tensor],
    ) -> None:
        trained = tuple(
            k for k, c in enumerate(self._step.groups[group].completions) if c.num_trained
        )
        whole = self._step.pack([GroupPart(group=group, completions=trained)])
        forward = Forward.join([forwards[ref] for ref in whole.refs])
        forward = forward.map(lambda values: values.requires_grad_())
        reference_T = torch.cat([reference[ref] for ref in whole.refs]) if reference else None
        with torch.enable_grad():
            share = self._step.share(whole, forward, reference_T) + _zero(forward)
            gradients = torch.autograd.grad(share, forward.tensors)
        for s, ref in enumerate(whole.refs):
            self._gradient[ref] = [values[whole.sequence_T == s] for values in gradients]

    def gradient_of(self, batch: PackedBatch) -> list[Tensor]:
        """d loss / d tensor for each tensor of the forward of a part."""
        by_tensor = zip(*(self._gradient[ref] for ref in batch.refs), strict=True)
        return [torch.cat(values) for values in by_tensor]

    def rng_of(self, index: int) -> Any:
        """Replays the random state of the forward without gradient; nothing for other
        micro-batches."""
        return _replay(self._rng[index], self._device) if index in self._rng else nullcontext()


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


@contextmanager
def _replay(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those of ``state``; outside, the stream goes on as if nothing had
    been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


def clip_and_check(
    accelerator: Any,
    policy: nn.Module,
    result: StepResult,
    groups: Sequence[PromptGroup],
    *,
    max_grad_norm: float,
    step: int,
) -> float:
    """Global L2 norm of the gradient, clipped to ``max_grad_norm`` (0: measured only). Raises
    NonFiniteError on all ranks together.

    Under loss scaling a non-finite gradient is not an error: the scaler skips the update and lowers
    the scale.
    """
    accelerator.unscale_gradients()
    grad_norm = _clip(accelerator, policy, max_grad_norm)
    if math.isfinite(result.loss) and (math.isfinite(grad_norm) or accelerator.scaler is not None):
        return grad_norm
    raise NonFiniteError(
        f"Step {step} stopped before the optimizer: loss={result.loss}, gradient norm={grad_norm}; "
        f"both must be finite. {_suspects(policy, result, groups)} Lower --optimizer.lr, use "
        "--train.precision fp32, or look at the named samples; the last checkpoint is intact."
    )


def _clip(accelerator: Any, policy: nn.Module, max_grad_norm: float) -> float:
    """Norm over all gradients, summed in at least float32, and torch's clipping g * min(1, max /
    (norm + 1e-6))."""
    gradients = local_gradients(accelerator, policy)
    wide = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in gradients
    ]
    norm = (
        torch.linalg.vector_norm(torch.stack(wide))
        if wide
        else torch.zeros((), device=accelerator.device)
    )
    if kind(accelerator) != "whole":  # disjoint parts
        square = norm.to(widest(accelerator.device)).square()
        norm = accelerator.reduce(square, reduction="sum").sqrt()
    if max_grad_norm > 0:
        factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(factor.to(g.dtype))
    return float(norm)


def _suspects(policy: nn.Module, result: StepResult, groups: Sequence[PromptGroup]) -> str:
    """Names samples with a non-finite log-prob, or the parameters with a non-finite gradient."""
    bad = [
        groups[batch.refs[s][0]].where
        for batch, sums_S in result.batches
        for s in (~torch.isfinite(sums_S)).nonzero().flatten().tolist()
    ]
    if bad:
        return f"Non-finite log-probs in {', '.join(dict.fromkeys(bad[:5]))}."
    named = [(n, local(p.grad)) for n, p in policy.named_parameters() if p.grad is not None]
    names = [n for n, gradient in named if not torch.isfinite(gradient).all()]
    where = ", ".join(
        dict.fromkeys(groups[batch.refs[0][0]].where for batch, _ in result.batches[:3])
    )
    parameters = ", ".join(names[:3]) or "no parameter of this rank"
    return f"Log-probs are finite; non-finite gradient in {parameters} (batch from {where})."
