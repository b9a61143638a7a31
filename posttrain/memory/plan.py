"""The memory of a run before it starts: what each phase holds on a rank.

``Job`` is everything that decides memory, in numbers; ``memory_plan`` prices it. What a run allocates comes from
``states.run_states`` and ``activations``, never from a paper's formula. All figures are bytes of one rank, the largest; GB is
1e9 bytes. Out of it: memory of other processes, data on disk, a vLLM server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.memory.activations import Setting, heap_blocks, step_activations, worst_row
from posttrain.memory.architecture import Architecture
from posttrain.memory.published import ring_bytes
from posttrain.memory.states import NF4, Engine, ModelStates, Offload, OptimizerName, Parameter, frozen_bytes, run_states
from posttrain.precision import DEEPSPEED_BF16, PRECISIONS, PrecisionPlan, bytes_per_element

Method = Literal["sft", "reward", "dpo", "rl"]
Phase = Literal["load", "rollout", "update", "optimizer step", "save", "resume"]
Device = Literal["cpu", "cuda"]

LIBRARIES_BYTES = {"cpu": 540_000_000, "cuda": 500_000_000}
"""Resident before a model is loaded: Python, torch, transformers, peft, datasets; on CUDA the context and its kernels."""
ALLOCATOR_BYTES = {"cpu": 130_000_000, "cuda": 0}
ALLOCATOR_SHARE = {
    "cuda": 0.06,
    "saved": 0.3,
    "saved in float32": 0.55,
    "in_layer": 2.1,
    "eager": 1.45,
    "gradients": 0.85,
    "KV cache": 0.7,
    "8-bit moments": 0.7,
}
"""What the allocator holds beyond live tensors: a constant (kernels' scratch and code) and shares, on CUDA of all tensors, on a
CPU of what lies in tensors under ``MAPPED_BYTES``, which leave holes (``activations.HeapBlocks``; fitted to runs on two machines:
benchmarks/RESULTS.md). bitsandbytes allocates 8-bit moments between what it unpacks."""
MAPPED_BYTES = 32 * 2**20
"""On a CPU blocks of this size and more are mapped one by one (``training/allocator.py``)."""
MAPPED = "mapped file"
"""A checkpoint that is read: resident, but the system drops its pages when memory is short, so it is no part of a total."""
DEEPSPEED_BUCKET = 50_000_000
"""Largest communication bucket that ``training/sharding.py`` lets DeepSpeed have (elements; its own 5e8 would take 2 GB)."""


ZERO3_WHOLE_BELOW = 10
"""Times the hidden size: parameters of at most so many elements (norms, biases, small adapters) are whole on each ZeRO-3 rank."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampling in the training process (``rollout.local``)."""

    max_rows: int
    kv_cache_bytes: float
    capacity: int
    """Most tokens of prompt and completion."""

    def cache_bytes(self, arch: Architecture, bytes_each: int) -> int:
        """One slot per running completion, as many as the budget holds."""
        return arch.kv_elements_per_token * self.capacity * bytes_each * self.slots(arch, bytes_each)

    def slots(self, arch: Architecture, bytes_each: int) -> int:
        """Completions that run at a time."""
        each = arch.kv_elements_per_token * self.capacity * bytes_each
        return max(1, min(self.max_rows, int(self.kv_cache_bytes // each)))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, as far as its memory goes."""

    method: Method
    arch: Architecture
    parameters: tuple[Parameter, ...]
    precision: PrecisionPlan
    max_tokens: int
    """Token budget of a row."""
    completions: int
    """Of one prompt in a full row."""
    device: Device = "cpu"
    shares_prompt: bool = True
    own_attention: bool = False
    checkpointing: bool = False
    logits_chunk: int = 512
    flex: bool = False
    divides_logits: bool = False
    optimizer: OptimizerName = "adamw"
    offload: frozenset[Offload] = frozenset()
    reference: tuple[Parameter, ...] = ()
    """A frozen model beside the policy; empty where there is none, it is cached, or it is the base under adapters."""
    reference_moves: bool = False
    """TR-DPO: kept as precise as the policy."""
    reward_model: tuple[Parameter, ...] = ()
    """A learned reward, held by the process that trains."""
    rollout: Rollout | None = None
    num_devices: int = 1
    zero_stage: int = 0
    engine: Engine = "plain"

    @property
    def is_lora(self) -> bool:
        """Adapters around a frozen model."""
        return any(not p.trainable for p in self.parameters)

    @property
    def in_4bit(self) -> bool:
        """QLoRA."""
        return any(p.dtype == NF4 for p in self.parameters)

    @property
    def num_params(self) -> int:
        """Of the policy, frozen ones included."""
        return sum(p.numel for p in self.parameters)

    @property
    def trainable_params(self) -> int:
        """Of the policy."""
        return sum(p.numel for p in self.parameters if p.trainable)

    def sharded(self, zero_stage: int, num_devices: int, *, engine: Engine | None = None) -> Job:
        """The same run on other hardware: stage 0 plain, 3 FSDP2 (or DeepSpeed if the run uses it), 1 and 2 DeepSpeed, which
        holds bf16 weights where the others hold fp32 ones and cast."""
        default: Engine = "fsdp2" if zero_stage == 3 and self.engine != "deepspeed" else "deepspeed"
        engine = "plain" if zero_stage == 0 else engine or default
        job = replace(self, zero_stage=zero_stage, num_devices=num_devices, engine=engine)
        if engine != "deepspeed" or self.precision != PRECISIONS["bf16"]:
            return job
        return replace(job, precision=DEEPSPEED_BF16, parameters=_in_bf16(self.parameters), reference=_in_bf16(self.reference))

    @property
    def refused(self) -> str | None:
        """Why no run of this kind starts, whatever its memory; None if it does."""
        if self.method == "rl" and self.zero_stage == 3:
            return "reinforcement learning samples from whole weights: DDP, ZeRO-1 or ZeRO-2"
        if self.engine != "plain" and self.optimizer != "adamw":
            return f"{self.optimizer} is for one process and DDP; sharded launches take adamw"
        if self.engine == "deepspeed" and self.precision.name not in ("fp32", "bf16"):
            return f"DeepSpeed updates an fp32 copy of the weights: {self.precision.name} does not exist there"
        if self.engine == "fsdp2" and self.offload:
            return "FSDP2 offloads nothing; DeepSpeed does (--deepspeed, offload_optimizer_device: cpu in the launch file)"
        return None


def _in_bf16(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    return tuple(replace(p, dtype="bfloat16") if p.dtype == "float32" else p for p in parameters)


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
        return sum(n for name, n in self.phases["update"].items() if name not in ("libraries", "allocator"))


def memory_plan(job: Job) -> MemoryPlan:
    """Prices every phase of a run.

    load: weights as they arrive; rollout: the sampler's copy, keys and values; update: the worst moment of a micro-batch;
    optimizer step: after the backward; save and resume: the states, twice where they are read from a checkpoint.
    """
    states = _states(job, job.parameters)
    adapters = [p for p in job.parameters if ".lora_" in p.name]
    on = dict(states.device)
    on["LoRA"] = _states(job, adapters).device["weights"] if adapters else 0
    on["weights"] -= on["LoRA"]
    shards = job.num_devices if job.zero_stage == 3 else 1
    held = {name: on.get(name, 0) for name in ("weights", "LoRA", "master", "moments", "counters")}
    held |= {"reference": _frozen(job.reference, job, shards), "reward model": frozen_bytes(job.reward_model, compute="float32")}
    sampler = _sampler_bytes(job)
    held["rollout copy"] = sampler.get("rollout copy", 0)
    setting = _setting(job)
    row = worst_row(job.max_tokens, completions=job.completions, shares_prompt=job.shares_prompt, scored=job.method == "reward")
    act = step_activations(job.arch, job.parameters, row, setting)
    gradients = {"gradients": on.get("gradients", 0)}
    buckets = {"communication": communication_bytes(job)}
    stored = sum(p.num_bytes for p in job.parameters)
    # shards of a GPU are cut from a model in the host's memory; a CPU holds the whole one first
    arriving = held["weights"] if shards > 1 and job.device == "cuda" else stored - sum(p.num_bytes for p in adapters)
    kept = {name: held[name] for name in ("LoRA", "reference")}
    phases: dict[Phase, dict[str, int]] = {"load": {"weights": arriving, **kept, MAPPED: stored}}
    if job.rollout is not None:
        phases["rollout"] = held | {n: b for n, b in sampler.items() if n != "rollout copy"}
    phases["update"] = held | gradients | buckets | dict(act.items)
    phases["optimizer step"] = held | gradients | buckets | {"temporaries": _update_temporaries(job)}
    phases["save"] = held
    phases["resume"] = held | {MAPPED: sum(held[n] for n in ("weights", "LoRA", "master", "moments", "counters"))}
    blocks = heap_blocks(job.arch, row, setting, below=MAPPED_BYTES)
    cache = sampler.get("KV cache", 0)
    in_heap = {
        "update": {
            "saved in float32" if setting.output == 4 else "saved": blocks.saved,
            "in_layer": blocks.in_layer,
            "eager": blocks.eager,
        },
        "rollout": {"KV cache": cache * (cache < 2 * len(job.arch.layers) * MAPPED_BYTES)},
    }
    return MemoryPlan(
        job=job,
        phases={name: _with_overheads(items, job, in_heap.get(name, {})) for name, items in phases.items()},
        host={n: b for n, b in states.host.items() if b},
        moment=act.moment,
        sent_bytes=sent_bytes(job),
    )


def _states(job: Job, parameters: Sequence[Parameter]) -> ModelStates:
    return run_states(
        parameters, plan=job.precision, optimizer=job.optimizer, engine=job.engine, zero_stage=job.zero_stage,
        num_devices=job.num_devices, offload=job.offload, whole_below=ZERO3_WHOLE_BELOW * job.arch.hidden,
    )  # fmt: skip


def _with_overheads(items: Mapping[str, int], job: Job, in_heap: Mapping[str, int]) -> dict[str, int]:
    if job.device == "cpu":
        small = sum(p.num_bytes for p in job.parameters if p.trainable and p.num_bytes < MAPPED_BYTES)
        blocks = {**in_heap, "gradients": min(small, items.get("gradients", 0))}
        blocks["8-bit moments"] = items.get("moments", 0) if job.optimizer == "adamw_8bit" else 0
        held = sum(ALLOCATOR_SHARE[name] * n for name, n in blocks.items())
    else:
        held = ALLOCATOR_SHARE["cuda"] * sum(n for name, n in items.items() if name != MAPPED)
    own = ALLOCATOR_BYTES[job.device] + int(held)
    return {**{n: b for n, b in items.items() if b}, "libraries": LIBRARIES_BYTES[job.device], "allocator": own}


def _frozen(parameters: Sequence[Parameter], job: Job, shards: int) -> int:
    compute = job.precision.weight if job.reference_moves else job.precision.compute
    return frozen_bytes(parameters, compute=compute, num_devices=shards)


def _setting(job: Job) -> Setting:
    plan = job.precision
    if job.engine != "plain":  # weights are gathered, or held, in the compute dtype: no autocast
        plan = replace(plan, weight=plan.compute)
    if job.in_4bit:  # peft holds everything else in float32
        plan = PRECISIONS["fp32"] if plan.weight == plan.compute else replace(plan, weight="float32")
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
    """Of sampling in this process: a copy of what autocast casts, keys and values, and one step's logits."""
    if job.rollout is None:
        return {}
    size, head = bytes_per_element(job.precision.compute), job.arch.vocab * job.arch.hidden
    casts = job.precision.compute != job.precision.weight
    copied = [p for p in job.parameters if p.in_linear and p.dtype == "float32" and (p.in_embedding or ".lora_" not in p.name)]
    rows = job.rollout.slots(job.arch, size)
    prompt = job.arch.kv_elements_per_token * job.max_tokens * bytes_per_element(job.precision.weight)
    work = 3 * 4 * rows * job.arch.vocab + 8 * job.arch.hidden * job.max_tokens * 4
    copy = size * sum(p.numel for p in copied) if casts else 0
    return {
        "rollout copy": copy,
        "KV cache": job.rollout.cache_bytes(job.arch, size) + prompt,
        "logits": work + (0 if copied or not casts else size * head),
    }


def _update_temporaries(job: Job) -> int:
    """adafactor divides each gradient by its factors out of place; bitsandbytes' 8-bit AdamW on a CPU unpacks both moments (5
    of a parameter's float32 size were measured); the others, and it on CUDA, update in place."""
    largest = max((p.num_bytes for p in job.parameters if p.trainable), default=0)
    unpacks = job.optimizer == "adamw_8bit" and job.device == "cpu"
    return 3 * largest if job.optimizer == "adafactor" else 5 * largest if unpacks else 0


def communication_bytes(job: Job) -> int:
    """Buffers for collectives: none of DDP's (gradients are views of its buckets); FSDP2 the root's weights and two layers, with
    a layer's gradient; ZeRO one reduce bucket, stage 3, which overlaps, two and the gathered weights."""
    if job.num_devices == 1 or job.engine == "plain":
        return 0
    size = bytes_per_element(job.precision.compute)
    in_layers = [p for p in job.parameters if ".layers." in f".{p.name}" or ".h." in f".{p.name}"]
    layer = sum(p.numel for p in in_layers) // max(len(job.arch.layers), 1)
    root = job.num_params - sum(p.numel for p in in_layers)
    if job.engine == "fsdp2":
        return size * (root + 2 * layer) + bytes_per_element(job.precision.gradient) * (layer + root)
    bucket = min(DEEPSPEED_BUCKET, job.trainable_params)
    return size * (2 * bucket + root + 2 * layer if job.zero_stage == 3 else bucket)


def sent_bytes(job: Job, *, micro_batches: int = 1) -> float:
    """What a rank sends per optimizer step over a ring: gradients in the dtype they are reduced in, weights in the compute dtype.

    In elements it is arXiv:1910.02054 section 7 (``published.zero_communication``). Frozen weights travel only in stage 3.
    """
    if job.num_devices == 1:
        return 0.0
    reduced = 4 if job.engine == "deepspeed" else bytes_per_element(job.precision.gradient)
    gathered = bytes_per_element(job.precision.compute)
    trained, times = job.trainable_params, micro_batches if job.zero_stage >= 2 else 1
    sent = {
        0: 2 * trained * reduced,
        3: times * (trained * reduced + 2 * job.num_params * gathered),
    }.get(job.zero_stage, trained * (times * reduced + gathered))
    return ring_bytes(sent, num_devices=job.num_devices, bytes_each=1)
