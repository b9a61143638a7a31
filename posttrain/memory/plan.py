"""The memory of a run before it starts: what each phase holds on a rank.

``memory_plan`` prices a ``job.Job``. What a run allocates comes from ``states.run_states`` and
``activations``, never from a paper's formula. All figures are bytes of one rank, the largest; GB is
1e9 bytes. Out of it: memory of other processes, data on disk, a vLLM server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.memory.activations import Setting, heap_blocks, step_activations, worst_row
from posttrain.memory.communication import ZERO3_WHOLE_BELOW, communication_bytes, sent_bytes
from posttrain.memory.job import Job
from posttrain.memory.states import ModelStates, Parameter, frozen_bytes, run_states
from posttrain.precision import PRECISIONS, bytes_per_element

Phase = Literal["load", "rollout", "score", "update", "optimizer step", "save", "resume"]

LIBRARIES_BYTES = {"cpu": 540_000_000, "cuda": 500_000_000}
"""Resident before a model is loaded: Python, torch, transformers, peft, datasets; on CUDA the
context and its kernels."""
ALLOCATOR_BYTES = {"cpu": 120_000_000, "cpu, 16 bit": 150_000_000, "cuda": 0}
ALLOCATOR_SHARE = {
    "cuda": 0.06,
    "in_layer": 0.5,
    "eager": 1.0,
    "gradients": 0.2,
    "KV cache": 0.7,
    "8-bit moments": 0.7,
}
"""What the allocator holds beyond live tensors: a constant (kernels' scratch and code) and shares,
on CUDA of all tensors, on a CPU of what lies in tensors under ``MAPPED_BYTES`` and is made and
freed while no ``allocator.HeapGuard`` looks: within a part of a layer, in a backward that makes
gradients, in sampling, in an optimizer (bitsandbytes allocates 8-bit moments between what it
unpacks). Fitted to runs: benchmarks/RESULTS.md."""
HOLES_BYTES, HOLES_SHARE = 64_000_000, 0.1
"""Freed memory that a CPU's process may keep: a constant and a share of tensors under
``MAPPED_BYTES`` at the update's peak."""
MAPPED_BYTES = 32 * 2**20
"""On a CPU blocks of this size and more are mapped one by one (``memory/allocator.py``)."""
MAPPED = "mapped file"
"""A checkpoint that is read: resident, but the system drops its pages when memory is short, so it
is no part of a total."""


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
    sent_bytes: float
    """What this rank sends per optimizer step of one micro-batch."""
    holes_bytes: float = math.inf
    """Freed memory that the process may keep before it goes back (``allocator.HeapGuard``): part of
    every phase's allocator."""

    def total(self, phase: Phase) -> int:
        """Bytes of a phase that cannot be given back."""
        return sum(n for name, n in self.phases[phase].items() if name != MAPPED)

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
        return sum(
            n for name, n in self.phases["update"].items() if name not in ("libraries", "allocator")
        )


def memory_plan(job: Job) -> MemoryPlan:
    """Prices every phase of a run.

    load: weights as they arrive; rollout: the sampler's copy, keys and values; update: the worst
    moment of a micro-batch; optimizer step: after the backward; save and resume: the states, twice
    where they are read from a checkpoint.
    """
    states = _states(job, job.parameters)
    adapters = [p for p in job.parameters if ".lora_" in p.name]
    on, away = dict(states.device), dict(states.host)
    if job.device == "cpu":  # main memory is what it computes in
        on, away = on | away, {}
    on["LoRA"] = _states(job, adapters).device["weights"] if adapters else 0
    on["weights"] -= on["LoRA"]
    shards = job.num_devices if job.zero_stage == 3 else 1
    held = {name: on.get(name, 0) for name in ("weights", "LoRA", "master", "moments", "counters")}
    scoring = (
        frozen_bytes(job.reward_model.parameters, compute="float32") if job.reward_model else 0
    )
    held |= {"reference": _frozen(job.reference, job, shards), "reward model": scoring}
    sampler = _sampler_bytes(job)
    held["rollout copy"] = sampler.get("rollout copy", 0)
    setting = _setting(job)
    is_scored = job.method == "reward"
    row = worst_row(
        job.max_tokens,
        completions=job.row_completions,
        shares_prompt=job.shares_prompt,
        scored=is_scored,
    )
    act = step_activations(job.arch, job.parameters, row, setting)
    gradients = {"gradients": on.get("gradients", 0)}
    buckets = {"communication": communication_bytes(job)}
    stored = sum(p.num_bytes for p in job.parameters)
    # shards of a GPU are cut from a model in the host's memory; a CPU holds the whole one first
    arriving = (
        held["weights"]
        if shards > 1 and job.device == "cuda"
        else stored - sum(p.num_bytes for p in adapters)
    )
    kept = {name: held[name] for name in ("LoRA", "reference")}
    phases: dict[Phase, dict[str, int]] = {"load": {"weights": arriving, **kept, MAPPED: stored}}
    if job.rollout is not None:
        phases["rollout"] = held | {n: b for n, b in sampler.items() if n != "rollout copy"}
    elif job.merges_adapters:
        phases["rollout"] = held | {"rollout copy": stored}
    if job.reward_model is not None:
        phases["score"] = held | {"activations": job.reward_model.forward_bytes}
    phases["update"] = held | gradients | buckets | dict(act.items)
    phases["optimizer step"] = (
        held | gradients | buckets | {"temporaries": _update_temporaries(job)}
    )
    gathered, to_host = _gathered_to_save(job)
    phases["save"] = held | {"gathered weights": gathered}
    phases["resume"] = held | {
        MAPPED: sum(held[n] for n in ("weights", "LoRA", "master", "moments", "counters"))
    }
    blocks = heap_blocks(job.arch, row, setting, below=MAPPED_BYTES)
    small = sum(p.num_bytes for p in job.parameters if p.trainable and p.num_bytes < MAPPED_BYTES)
    small = min(small, on.get("gradients", 0))
    holes = HOLES_BYTES + HOLES_SHARE * (blocks.saved + small)
    share, cache = ALLOCATOR_SHARE, sampler.get("KV cache", 0)
    in_part = max(
        share["in_layer"] * blocks.in_layer, share["eager"] * blocks.eager
    )  # feed-forward, or attention
    unguarded = {
        "update": in_part + share["gradients"] * small,
        "rollout": share["KV cache"] * cache * (cache < 2 * len(job.arch.layers) * MAPPED_BYTES),
        "optimizer step": share["8-bit moments"]
        * held["moments"]
        * (job.optimizer == "adamw_8bit"),
    }
    return MemoryPlan(
        job=job,
        phases={
            name: _with_overheads(items, job, holes + unguarded.get(name, 0))
            for name, items in phases.items()
        },
        host={n: b for n, b in {**away, "gathered weights": to_host}.items() if b},
        moment=act.moment,
        sent_bytes=sent_bytes(job),
        holes_bytes=holes if job.device == "cpu" else math.inf,
    )


def _gathered_to_save(job: Job) -> tuple[int, int]:
    """(bytes on the device, on its host) of a sharded model that the main process writes: gathered
    tensor by tensor into main memory; of adapters only these."""
    if job.zero_stage != 3:
        return 0, 0
    written = [p for p in job.parameters if p.trainable or not job.is_lora]
    largest, whole = max(p.num_bytes for p in written), sum(p.num_bytes for p in written)
    return (largest + whole, 0) if job.device == "cpu" else (largest, whole)


def _states(job: Job, parameters: Sequence[Parameter]) -> ModelStates:
    return run_states(
        parameters,
        plan=job.precision,
        optimizer=job.optimizer,
        engine=job.engine,
        zero_stage=job.zero_stage,
        num_devices=job.num_devices,
        offload=job.offload,
        whole_below=ZERO3_WHOLE_BELOW * job.arch.hidden,
    )


def _with_overheads(items: Mapping[str, int], job: Job, in_heap: float) -> dict[str, int]:
    held = in_heap
    if job.device == "cuda":
        held = ALLOCATOR_SHARE["cuda"] * sum(n for name, n in items.items() if name != MAPPED)
    halves = job.device == "cpu" and bytes_per_element(job.precision.compute) == 2
    own = ALLOCATOR_BYTES["cpu, 16 bit" if halves else job.device] + int(held)
    return {
        **{n: b for n, b in items.items() if b},
        "libraries": LIBRARIES_BYTES[job.device],
        "allocator": own,
    }


def _frozen(parameters: Sequence[Parameter], job: Job, shards: int) -> int:
    compute = job.precision.weight if job.reference_moves else job.precision.compute
    return frozen_bytes(parameters, compute=compute, num_devices=shards)


def _setting(job: Job) -> Setting:
    plan = job.precision
    if job.engine != "plain":  # weights are gathered, or held, in the compute dtype: no autocast
        plan = replace(plan, weight=plan.compute)
    if job.in_4bit:  # peft holds everything else in float32
        plan = (
            PRECISIONS["fp32"] if plan.weight == plan.compute else replace(plan, weight="float32")
        )
    return Setting(
        plan=plan,
        device=job.device,
        checkpointing=job.checkpointing,
        logits_chunk=job.logits_chunk,
        flex=job.flex,
        own_attention=job.own_attention,
        trains_all=not job.is_lora,
        in_4bit=job.in_4bit,
        divides_logits=job.divides_logits,
        has_head=job.method != "reward",
    )


def _sampler_bytes(job: Job) -> dict[str, int]:
    """Of sampling in this process: a copy of what autocast casts, keys and values, and one step's
    logits."""
    if job.rollout is None:
        return {}
    size, head = bytes_per_element(job.precision.compute), job.arch.vocab * job.arch.hidden
    copied = _copied_to_sample(job)
    casts = bool(copied) or job.precision.compute != job.precision.weight
    rows = job.rollout.slots(job.arch, size)
    prompt = (
        job.arch.kv_elements_per_token * job.max_tokens * bytes_per_element(job.precision.weight)
    )
    work = 3 * 4 * rows * job.arch.vocab + 8 * job.arch.hidden * job.max_tokens * 4
    return {
        "rollout copy": size * sum(p.numel for p in copied),
        "KV cache": job.rollout.cache_bytes(job.arch, size) + prompt,
        "logits": work + (0 if copied or not casts else size * head),
    }


def _copied_to_sample(job: Job) -> list[Parameter]:
    """Weights of which ``rollout.weights`` makes a 16-bit copy, where anything in float32 is
    multiplied: of plain linear layers in float32, and of those with an adapter, which is merged
    into the copy."""
    if job.precision.compute not in ("bfloat16", "float16") or not any(
        p.in_linear and p.dtype == "float32" for p in job.parameters
    ):
        return []
    merged = {
        p.name.split(".base_layer.")[0]
        for p in job.parameters
        if p.in_linear and ".base_layer." in p.name
    }
    return [
        p
        for p in job.parameters
        if p.in_linear
        and p.name.split(".lora_")[0] not in merged
        and (p.dtype == "float32" or ".base_layer." in p.name)
    ]


def _update_temporaries(job: Job) -> int:
    """adafactor divides each gradient by its factors out of place; bitsandbytes' 8-bit AdamW on a
    CPU unpacks both moments (5 of a parameter's float32 size were measured); the others, and it on
    CUDA, update in place."""
    largest = max((p.num_bytes for p in job.parameters if p.trainable), default=0)
    unpacks = job.optimizer == "adamw_8bit" and job.device == "cpu"
    return 3 * largest if job.optimizer == "adafactor" else 5 * largest if unpacks else 0
