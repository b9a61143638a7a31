"""Everything that decides the memory of a run, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.memory.activations import Setting, layer_bytes, worst_row
from posttrain.memory.architecture import Architecture
from posttrain.memory.states import NF4, Engine, Offload, OptimizerName, Parameter
from posttrain.precision import DEEPSPEED_BF16, PRECISIONS, PrecisionPlan

Method = Literal["sft", "reward", "dpo", "rl"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampling in the training process (``rollout.local``)."""

    max_rows: int
    kv_cache_bytes: float
    capacity: int
    """Most tokens of prompt and completion."""

    def cache_bytes(self, arch: Architecture, bytes_each: int) -> int:
        """One slot per running completion, as many as the budget holds."""
        return (
            arch.kv_elements_per_token * self.capacity * bytes_each * self.slots(arch, bytes_each)
        )

    def slots(self, arch: Architecture, bytes_each: int) -> int:
        """Completions that run at a time."""
        each = arch.kv_elements_per_token * self.capacity * bytes_each
        return max(1, min(self.max_rows, int(self.kv_cache_bytes // each)))


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A learned reward in the training process (``rewards.model``)."""

    arch: Architecture
    parameters: tuple[Parameter, ...]
    precision: PrecisionPlan
    max_tokens: int
    completions: int

    @property
    def forward_bytes(self) -> int:
        """Without gradients: the residual stream, before and after, and what a layer makes."""
        row = worst_row(self.max_tokens, completions=self.completions, scored=True)
        setting = Setting(plan=self.precision, has_head=False)
        widest = max(layer_bytes(layer, self.arch, row, setting) for layer in self.arch.layers)
        return widest + 2 * self.arch.hidden * setting.stored * row.tokens


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
    """Of one prompt in a full row, where they are in the data."""
    completion_tokens: int | None = None
    """Of the longest one, where they are sampled."""
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
    """A frozen model beside the policy; empty where there is none, it is cached, or it is the base
    under adapters."""
    reference_moves: bool = False
    """TR-DPO: kept as precise as the policy."""
    reward_model: Scoring | None = None
    """A learned reward, held by the process that trains."""
    merges_adapters: bool = False
    """A server samples: it is handed a merged copy of the model."""
    rollout: Rollout | None = None
    num_devices: int = 1
    zero_stage: int = 0
    engine: Engine = "plain"

    @property
    def row_completions(self) -> int:
        """Of one prompt in a full row: of sampled ones as many as fill it."""
        return (
            -(-self.max_tokens // self.completion_tokens)
            if self.completion_tokens
            else self.completions
        )

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
        """The same run on other hardware: stage 0 plain, 3 FSDP2 (or DeepSpeed if the run uses it),
        1 and 2 DeepSpeed, which holds bf16 weights where the others hold fp32 ones and cast."""
        default: Engine = "fsdp2" if zero_stage == 3 and self.engine != "deepspeed" else "deepspeed"
        engine = "plain" if zero_stage == 0 else engine or default
        job = replace(self, zero_stage=zero_stage, num_devices=num_devices, engine=engine)
        if engine != "deepspeed" or self.precision != PRECISIONS["bf16"]:
            return job
        return replace(
            job,
            precision=DEEPSPEED_BF16,
            parameters=_in_bf16(self.parameters),
            reference=_in_bf16(self.reference),
        )

    @property
    def traced(self) -> Job:
        """What a trace sees of it: the update alone, on one device with the kernels of a CPU."""
        return replace(
            self, device="cpu", flex=False, offload=frozenset(), rollout=None, reward_model=None
        )

    @property
    def refused(self) -> str | None:
        """Why no run of this kind starts, whatever its memory; None if it does."""
        if self.method == "rl" and self.zero_stage == 3:
            return "reinforcement learning samples from whole weights: DDP, ZeRO-1 or ZeRO-2"
        if self.engine != "plain" and self.optimizer != "adamw":
            return f"{self.optimizer} is for one process and DDP; sharded launches take adamw"
        if self.engine == "deepspeed" and self.precision.name not in ("fp32", "bf16"):
            return (
                f"DeepSpeed updates an fp32 copy of the weights: {self.precision.name} does not "
                "exist there"
            )
        if self.in_4bit and self.zero_stage == 3:
            return (
                "weights in 4 bit cannot be sharded: DDP, ZeRO-1 or ZeRO-2, or adapters on "
                "unquantised weights"
            )
        if self.engine == "fsdp2" and self.offload:
            return (
                "FSDP2 offloads nothing; DeepSpeed does (--deepspeed, "
                "offload_optimizer_device: cpu in the launch file)"
            )
        return None


def _in_bf16(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    return tuple(replace(p, dtype="bfloat16") if p.dtype == "float32" else p for p in parameters)
