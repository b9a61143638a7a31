"""The memory of a run before it starts: what each phase holds on a rank, and what would fit.

All figures are bytes of one rank, the largest; GB is 1e9 bytes. Out of it: memory of other
processes, data on disk, a vLLM server.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

from posttrain.models.dropout import base_model
from posttrain.packing.plan import PackingConfig
from posttrain.plan.job import Job, Scoring
from posttrain.plan.states import (
    Parameter,
    communication_bytes,
    frozen_bytes,
    host_items,
    parameters_of,
    run_states,
    sent_bytes,
)
from posttrain.plan.trace import CATEGORIES, Device, Setting, cached_elements, trace, twin_of
from posttrain.precision import bytes_per_element, torch_dtype
from posttrain.rollout.local import SamplingLinear, SamplingWeights
from posttrain.training.sharding import ZERO3_WHOLE_BELOW, Kind

Phase = Literal["load", "rollout", "score", "update", "optimizer step", "save", "resume"]
LIBRARIES_BYTES: dict[Device, int] = {"cpu": 660_000_000, "cuda": 500_000_000}
"""Resident before a model is loaded: Python, torch, transformers, peft, datasets, and the code and
scratch of kernels; on CUDA the context and its kernels."""
ALLOCATOR_FACTOR: dict[Device, float] = {"cpu": 1.28, "cuda": 1.06}
"""What a process holds for its live tensors, which is more than they are: freed blocks, holes
between blocks, blocks rounded up."""
SOLVER_MARGIN = 0.02
"""Of a limit, what a token budget leaves free for the plan's own error."""
MOST_TOKENS = 2**20
"""Of a row that the solver considers."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by phase and item of the largest rank."""

    job: Job
    phases: Mapping[Phase, Mapping[str, int]]
    """On the device that computes."""
    host: Mapping[str, int]
    """Offloaded."""
    moment: str
    """Where in a micro-batch the update peaks."""
    is_estimate: bool
    """Its activations are extrapolated (``trace.trace``)."""

    def total(self, phase: Phase) -> int:
        """Bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def worst(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak_bytes(self) -> int:
        """Bytes of that phase: what the device must have."""
        return self.total(self.worst)

    @property
    def live_bytes(self) -> int:
        """Peak of live tensors in the update alone, without libraries and allocator."""
        update = self.phases["update"]
        return self.total("update") - update["libraries"] - update["allocator"]

    def sent_bytes(self, micro_batches: int = 1) -> float:
        """What this rank sends per optimizer step."""
        return sent_bytes(
            self.job.parameters,
            precision=self.job.precision,
            sharding=self.job.sharding,
            num_devices=self.job.num_devices,
            micro_batches=micro_batches,
        )


def memory_plan(job: Job) -> MemoryPlan:
    """Prices every phase of a run.

    load: weights as they arrive; rollout: the sampler's copy, keys and values; score: a learned
    reward; update: the worst moment of a micro-batch; optimizer step: after the backward; save:
    what is gathered.
    """
    states, adapters = _states(job, job.parameters), _states(job, job.adapters)
    if adapters:
        states |= {"weights": states["weights"] - adapters["weights"], "LoRA": adapters["weights"]}
    away = host_items(job.offload, job.zero_stage) if job.device == "cuda" else ()
    held = {name: n for name, n in states.items() if name not in away}
    gradients = {"gradients": held.pop("gradients", 0)}
    compute = job.precision.weight if job.reference_moves else job.precision.compute
    shards = job.num_devices if job.zero_stage == 3 else 1
    held["reference"] = frozen_bytes(job.reference, compute=compute, num_devices=shards)
    if job.scoring is not None:
        held["reward model"] = sum(p.num_bytes for p in parameters_of(job.scoring.model))
    sampler = _sampler_bytes(job)
    held["rollout copy"] = sampler.pop("rollout copy", 0)
    stored = sum(p.num_bytes for p in job.parameters)
    # shards of a GPU are cut from a model in the host's memory; a CPU holds the whole one first
    cut = shards > 1 and job.device == "cuda"
    arriving = held["weights"] if cut else stored - sum(p.num_bytes for p in job.adapters)
    kept = {name: held.get(name, 0) for name in ("LoRA", "reference")}
    phases: dict[Phase, dict[str, int]] = {"load": {"weights": arriving, **kept}}
    if sampler:
        phases["rollout"] = held | sampler
    elif job.merges_adapters:
        phases["rollout"] = held | {"rollout copy": stored}
    if job.scoring is not None:
        phases["score"] = held | {"activations": _scoring_bytes(job.scoring, job.device)}
    buckets = communication_bytes(
        job.parameters,
        precision=job.precision,
        sharding=job.sharding,
        num_devices=job.num_devices,
    )
    trained = held | gradients | {"communication": buckets}
    traced = job.trace()
    phases["update"] = trained | traced.items
    phases["optimizer step"] = trained | {"temporaries": _optimizer_temporaries(job)}
    gathered, to_host = _gathered_to_save(job)
    phases["save"] = held | {"gathered weights": gathered}
    phases["resume"] = held
    host = {name: n for name, n in states.items() if name in away} | {"gathered weights": to_host}
    return MemoryPlan(
        job=job,
        phases={name: _with_overheads(items, job.device) for name, items in phases.items()},
        host={name: n for name, n in host.items() if n},
        moment=traced.moment,
        is_estimate=traced.is_estimate,
    )


def with_rows_of(plan: MemoryPlan, tokens: int) -> MemoryPlan:
    """The plan of a run whose rows have at most so many tokens: another update."""
    update, traced = plan.phases["update"], plan.job.with_tokens(tokens).trace()
    kept = {n: b for n, b in update.items() if n not in (*CATEGORIES[2:], "libraries", "allocator")}
    priced = _with_overheads(kept | traced.items, plan.job.device)
    return replace(plan, phases={**plan.phases, "update": priced})


def _states(job: Job, parameters: Sequence[Parameter]) -> dict[str, int]:
    return dict(
        run_states(
            parameters,
            precision=job.precision,
            optimizer=job.optimizer,
            sharding=job.sharding,
            num_devices=job.num_devices,
            whole_below=ZERO3_WHOLE_BELOW * _embedding_shape(job)[1],
        )
    )


def _embedding_shape(job: Job) -> tuple[int, int]:
    vocabulary, hidden = job.model.get_input_embeddings().weight.shape  # type: ignore[operator]
    return vocabulary, hidden


def _with_overheads(items: Mapping[str, int], device: Device) -> dict[str, int]:
    live = sum(items.values())
    return {
        **{name: n for name, n in items.items() if n},
        "libraries": LIBRARIES_BYTES[device],
        "allocator": int((ALLOCATOR_FACTOR[device] - 1) * live),
    }


def _sampler_bytes(job: Job) -> dict[str, int]:
    """Sampling in this process: a copy of what autocast casts, keys and values of the running
    completions and of a row of prompts, and the forward of that row or a step's logits."""
    if job.rollout is None:
        return {}
    size = bytes_per_element(job.precision.compute)
    stand_in: Any = SimpleNamespace(base=base_model(twin_of(job.model, device="meta")))
    sampled = SamplingWeights(stand_in, compute=torch_dtype(job.precision.compute)).model
    layers: Iterator[Any] = (m for m in sampled.modules() if isinstance(m, SamplingLinear))
    copies = [layer.weight.numel() for layer in layers]
    token = size * cached_elements(job.model)
    each = job.rollout.capacity * token
    rows = max(1, min(job.rollout.max_rows, int(job.rollout.kv_cache_bytes // each)))
    setting = Setting(
        method="sft",
        packing=job.packing,
        precision=job.precision,
        device=job.device,
        trains=False,
    )
    prompts = trace(job.model, setting)
    prefill = prompts.total - (prompts.items.get("casts", 0) if copies else 0)
    return {
        "rollout copy": size * sum(copies),
        "KV cache": rows * each + token * job.max_tokens,
        "activations": max(prefill, 3 * 4 * rows * _embedding_shape(job)[0]),
    }


def _scoring_bytes(scoring: Scoring, device: Device) -> int:
    """The forward of a learned reward over a full row."""
    setting = Setting(
        method="reward",
        packing=PackingConfig(max_tokens=scoring.max_tokens),
        precision=scoring.precision,
        completions=scoring.completions,
        device=device,
        trains=False,
    )
    return trace(scoring.model, setting).total


def _optimizer_temporaries(job: Job) -> int:
    """adafactor divides each gradient by its factors out of place; bitsandbytes' 8-bit AdamW on a
    CPU unpacks both moments (5 of a parameter's float32 size were measured); the others, and it on
    CUDA, update in place."""
    largest = max((p.num_bytes for p in job.parameters if p.trainable), default=0)
    unpacks = job.optimizer == "adamw_8bit" and job.device == "cpu"
    return 3 * largest if job.optimizer == "adafactor" else 5 * largest if unpacks else 0


def _gathered_to_save(job: Job) -> tuple[int, int]:
    """(bytes on the device, on its host) of a sharded model that the main process writes: gathered
    tensor by tensor into main memory; of adapters only these."""
    if job.zero_stage != 3:
        return 0, 0
    written = [p for p in job.parameters if p.trainable or not job.is_lora]
    largest, whole = max(p.num_bytes for p in written), sum(p.num_bytes for p in written)
    return (largest + whole, 0) if job.device == "cpu" else (largest, whole)


# ---- the questions asked the other way


def fits(job: Job, limit_bytes: float) -> bool:
    """Whether such a run starts and every phase stays within the limit of a device."""
    return job.refused is None and memory_plan(job).peak_bytes <= limit_bytes


def max_tokens(job: Job, limit_bytes: float) -> int:
    """The largest ``packing.max_tokens`` that fits, to 16 tokens; 0 if none does.

    Bytes are nearly a straight line in tokens: each step tries where the line through the two
    bounds crosses the limit, and the middle where that hardly moved a bound.
    """

    def left(blocks: int) -> float:
        return limit_bytes - memory_plan(job.with_tokens(16 * blocks)).peak_bytes

    if job.refused is not None or (low_left := left(1)) < 0:
        return 0
    low, high = 1, max(2, job.max_tokens // 16)
    while (high_left := left(high)) >= 0:
        low, low_left = high, high_left
        high *= 2
        if 16 * high > MOST_TOKENS:
            return 16 * low
    halve = False
    while high - low > 1:
        width = high - low
        guess = low + (width // 2 if halve else int(width * low_left / (low_left - high_left)))
        guess = min(max(guess, low + 1), high - 1)
        found = left(guess)
        if found >= 0:
            low, low_left = guess, found
        else:
            high, high_left = guess, found
        halve = not halve and high - low > width // 2
    return 16 * low


def min_devices(job: Job, limit_bytes: float, *, sharding: Kind) -> int | None:
    """The fewest devices on which a kind of sharding fits; None if no number up to 65536 does."""

    def ok(n: int) -> bool:
        return fits(job.sharded(sharding, n), limit_bytes)

    high = next((n for n in (2**k for k in range(17)) if ok(n)), None)
    if high is None:
        return None
    return bisect_left(range(high // 2 + 1, high), True, key=ok) + high // 2 + 1


def cheapest_zero(job: Job, limit_bytes: float, *, num_devices: int) -> Kind | None:
    """The first kind of sharding that fits on so many devices: the least communication. None if
    none does."""
    kinds: Sequence[Kind] = ("whole", "zero1", "zero2", "fsdp2") if num_devices > 1 else ("whole",)
    return next((k for k in kinds if fits(job.sharded(k, num_devices), limit_bytes)), None)


def advice(job: Job, limit_bytes: float, *, shortest: int = 64) -> str | None:
    """The one change that would make a run fit: a setting, a smaller token budget, or more devices;
    None if it fits.

    ``shortest``: tokens that the longest sequence needs.
    """
    if fits(job, limit_bytes):
        return None
    for option, change in _changes(job):
        if fits(change(), limit_bytes):
            return option
    tokens = max_tokens(job, limit_bytes)
    if tokens >= shortest:
        return f"--packing.max_tokens {tokens}"
    both = replace(job, checkpointing=True)
    tokens = max_tokens(both, limit_bytes)
    if tokens >= shortest and not job.checkpointing:
        return f"--model.gradient_checkpointing true --packing.max_tokens {tokens}"
    kind, launch = ("zero2", "zero2") if job.method == "rl" else ("fsdp2", "fsdp")
    devices = min_devices(both.with_tokens(shortest), limit_bytes, sharding=kind)  # type: ignore[arg-type]
    if devices is not None:
        return (
            f"launch/{launch}.yaml on {max(devices, 2)} devices, with "
            "--model.gradient_checkpointing true"
        )
    return "a smaller model, or --model.lora.rank 16"


def _changes(job: Job) -> list[tuple[str, Callable[[], Job]]]:
    """(option of the command line, the job with it), the one that costs least first."""
    possible: list[tuple[str, Callable[[], Job]]] = []
    if job.reference and job.method == "dpo" and not job.reference_moves:
        possible.append(("--reference.cache true", lambda: replace(job, reference=())))
    if not job.checkpointing:
        option = "--model.gradient_checkpointing true"
        possible.append((option, lambda: replace(job, checkpointing=True)))
    if job.rollout is not None:
        less = replace(job.rollout, kv_cache_bytes=job.rollout.kv_cache_bytes / 4)
        option = f"--local.kv_cache_gb {less.kv_cache_bytes / 1e9:g}"
        possible.append((option, lambda: replace(job, rollout=less)))
    launches: tuple[tuple[str, Kind], ...] = (
        ("launch/zero2.yaml with zero_stage: 1", "zero1"),
        ("launch/zero2.yaml", "zero2"),
        ("launch/fsdp.yaml", "fsdp2"),
    )
    for option, kind in launches[job.zero_stage :] if job.num_devices > 1 else ():
        possible.append((option, lambda kind=kind: job.sharded(kind, job.num_devices)))  # type: ignore[misc]
    if job.optimizer == "adamw" and job.sharding == "whole" and job.device == "cuda":
        eight_bit, offloaded = "--optimizer.name adamw_8bit", "--optimizer.offload true"
        possible.append((eight_bit, lambda: replace(job, optimizer="adamw_8bit")))
        possible.append((offloaded, lambda: replace(job, offload=frozenset({"optimizer"}))))
    return possible
