"""Settings of a run -> what decides its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from posttrain.models.dropout import base_model
from posttrain.models.load import ModelConfig, read_config, set_dropout, untrained_model
from posttrain.packing.plan import PackingConfig
from posttrain.plan.states import NF4, ZERO_STAGE, OptimizerName, Parameter, parameters_of
from posttrain.plan.trace import Device, Method, Setting, Traced, trace, twin_of
from posttrain.precision import (
    DEEPSPEED_BF16,
    PRECISIONS,
    PrecisionPlan,
    default_precision,
    torch_dtype,
)
from posttrain.training.sharding import Kind, Offload


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Sampling in the training process (``rollout.local``)."""

    max_rows: int
    kv_cache_bytes: float
    capacity: int
    """Most tokens of prompt and completion."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A learned reward in the training process (``rewards.model``)."""

    model: nn.Module = field(repr=False)
    precision: PrecisionPlan
    max_tokens: int
    completions: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, as far as its memory goes."""

    method: Method
    model: nn.Module = field(repr=False)
    """On the meta device, as the run holds it on one device."""
    parameters: tuple[Parameter, ...] = field(repr=False)
    precision: PrecisionPlan
    packing: PackingConfig
    device: Device = "cpu"
    completions: int = 1
    """Of one prompt in a full row, where they are in the data; else of a step."""
    completion_tokens: int | None = None
    """Of the longest one, where they are sampled."""
    checkpointing: bool = False
    temperature: float = 1.0
    """Of sampling."""
    optimizer: OptimizerName = "adamw"
    offload: frozenset[Offload] = frozenset()
    reference: tuple[Parameter, ...] = field(default=(), repr=False)
    """A frozen model beside the policy; empty where there is none, it is cached, or it is the base
    under adapters."""
    teachers: tuple[nn.Module, ...] = field(default=(), repr=False)
    """Of a distillation, on the meta device; their parameters are in ``reference``."""
    reference_moves: bool = False
    """TR-DPO: kept as precise as the policy."""
    scoring: Scoring | None = None
    merges_adapters: bool = False
    """A server samples: it is handed a merged copy of the model."""
    rollout: Rollout | None = None
    num_devices: int = 1
    sharding: Kind = "whole"

    @property
    def zero_stage(self) -> int:
        """Of ZeRO; 3 for FSDP2."""
        return ZERO_STAGE[self.sharding]

    @property
    def max_tokens(self) -> int:
        """Token budget of a row."""
        return self.packing.max_tokens

    def with_tokens(self, max_tokens: int) -> Job:
        """The same run with another token budget."""
        return replace(self, packing=replace(self.packing, max_tokens=max_tokens))

    @property
    def is_lora(self) -> bool:
        """Adapters around a frozen model."""
        return any(not p.trainable for p in self.parameters)

    @property
    def num_params(self) -> int:
        """Of the policy, frozen ones included."""
        return sum(p.numel for p in self.parameters)

    @property
    def trainable_params(self) -> int:
        """Of the policy."""
        return sum(p.numel for p in self.parameters if p.trainable)

    @property
    def adapters(self) -> list[Parameter]:
        """LoRA's own parameters."""
        return [p for p in self.parameters if ".lora_" in p.name]

    def sharded(self, sharding: Kind, num_devices: int) -> Job:
        """The same run on other hardware. DeepSpeed holds bf16 weights where the others hold fp32
        ones and cast."""
        job = replace(self, sharding=sharding, num_devices=num_devices)
        if not sharding.startswith("zero") or self.precision != PRECISIONS["bf16"]:
            return job
        return replace(
            job,
            precision=DEEPSPEED_BF16,
            parameters=_in_bf16(self.parameters),
            reference=_in_bf16(self.reference),
        )

    def trace(self, *, every_layer: bool = False) -> Traced:
        """The worst moment of its update."""
        sampled = self.completion_tokens
        setting = Setting(
            method=self.method,
            packing=self.packing,
            precision=self.precision,
            completions=min(-(-self.max_tokens // sampled), self.completions)
            if sampled
            else self.completions,
            checkpointing=self.checkpointing,
            gathered=self.sharding != "whole",
            device=self.device,
            temperature=self.temperature,
            teachers=self.teachers,
            every_layer=every_layer,
        )
        return trace(self.model, setting)

    @property
    def refused(self) -> str | None:
        """Why no run of this kind starts, whatever its memory; None if it does."""
        is_deepspeed = self.sharding.startswith("zero")
        why = {
            "reinforcement learning samples from whole weights: DDP, ZeRO-1 or ZeRO-2": (
                self.method == "rl" and self.zero_stage == 3
            ),
            f"{self.optimizer} is for one process and DDP; sharded launches take adamw": (
                self.sharding != "whole" and self.optimizer != "adamw"
            ),
            "DeepSpeed updates an fp32 copy of the weights: "
            f"{self.precision.name} does not exist there": (
                is_deepspeed and self.precision.name not in ("fp32", "bf16")
            ),
            "weights in 4 bit cannot be sharded: DDP, ZeRO-1 or ZeRO-2, or adapters on unquantised "
            "weights": self.zero_stage == 3 and any(p.dtype == NF4 for p in self.parameters),
            "FSDP2 offloads nothing; DeepSpeed does (--deepspeed, offload_optimizer_device: cpu in "
            "the launch file)": self.sharding == "fsdp2" and bool(self.offload),
        }
        return next((reason for reason, holds in why.items() if holds), None)


def _in_bf16(parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    return tuple(replace(p, dtype="bfloat16") if p.dtype == "float32" else p for p in parameters)


def meta_model(config: ModelConfig, precision: PrecisionPlan, *, scores: bool = False) -> nn.Module:
    """The model as the run will hold it, without weights: shapes, dtypes and which parameters are
    trained."""
    known = read_config(config)  # may unpack an embedded model, which no meta device can
    with torch.device("meta"):
        return untrained_model(
            known,
            config,
            dtype=precision.load_dtype,
            compute=torch_dtype(precision.compute),
            scores=scores,
        )


def job_of(
    config: Any,
    method: Method,
    *,
    precision: PrecisionPlan,
    device: Device,
    wants_reference: bool,
    model: nn.Module | None = None,
    longest_prompt: int | None = None,
    reference_every: int = 0,
) -> Job:
    """What decides the memory of a run on one device. ``model``: a loaded one, else it is built
    without weights. ``longest_prompt``: of the data, in tokens, where completions are sampled; None
    takes the most that it may have. ``reference_every``: steps after which the algorithm replaces
    its reference (R1)."""
    model = (
        meta_model(config.model, precision, scores=method == "reward")
        if model is None
        else twin_of(model, device="meta")
    )
    set_dropout(model, config.model, default=method == "sft")
    parameters = tuple(parameters_of(model))
    reference: tuple[Parameter, ...] = ()
    if wants_reference and not config.reference.cache:
        if config.reference.model is not None:
            other = meta_model(ModelConfig(name=config.reference.model), precision)
            reference = tuple(parameters_of(other))
        elif not any(".lora_" in p.name for p in parameters):
            reference = parameters
    named = [ModelConfig(name=teacher.model) for teacher in getattr(config, "teachers", ())]
    teachers = tuple(meta_model(teacher, precision) for teacher in named)
    for teacher in teachers:  # frozen beside the student, as a reference is
        reference += tuple(parameters_of(teacher))
    job = Job(
        method=method,
        model=model,
        parameters=parameters,
        precision=precision,
        packing=config.packing,
        device=device,
        completions=1 if method == "sft" else 2,
        checkpointing=base_model(model).is_activation_checkpointing,
        optimizer=config.optimizer.name,
        offload=frozenset({"optimizer"}) if config.optimizer.offload else frozenset(),
        reference=reference,
        teachers=teachers,
        reference_moves=wants_reference and bool(config.reference.sync_every or reference_every),
    )
    return _with_sampling(job, config, longest_prompt) if method == "rl" else job


def _with_sampling(job: Job, config: Any, longest_prompt: int | None) -> Job:
    rollout = scoring = None
    if config.engine == "local":
        prompt = config.data.max_prompt_length if longest_prompt is None else longest_prompt
        rows = config.train.batch_size * config.rollout.group_size
        rollout = Rollout(
            max_rows=min(config.local.max_rows, rows),
            kv_cache_bytes=config.local.kv_cache_gb * 1e9,
            capacity=prompt + config.sampling.max_tokens,
        )
    learned = config.rewards.options.get("reward_model", {})
    if learned.get("model"):  # in the dtype that rewards/model.py loads it in
        is_here = job.device == "cpu" or torch.cuda.is_available()
        halves = not is_here or default_precision(job.device).compute == "bfloat16"
        held = PRECISIONS["bf16-pure" if halves else "fp32"]
        scoring = Scoring(
            model=meta_model(ModelConfig(name=learned["model"]), held, scores=True),
            precision=held,
            max_tokens=learned.get("max_length", 4096),
            completions=config.rollout.group_size,
        )
    return replace(
        job,
        completions=config.train.batch_size * config.rollout.group_size,
        completion_tokens=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        rollout=rollout,
        scoring=scoring,
        merges_adapters=rollout is None and job.is_lora,
    )
