"""A run's memory from its settings: for ``posttrain plan``, and for the check at a run's start and
end."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from posttrain.memory.architecture import architecture_of
from posttrain.memory.job import Device, Job, Method, Rollout, Scoring
from posttrain.memory.limits import available_bytes, gigabytes, peak_rss_bytes
from posttrain.memory.plan import MemoryPlan, memory_plan
from posttrain.memory.report import one_line, verdict
from posttrain.memory.states import Parameter, parameters_of
from posttrain.models.load import ModelConfig, read_config, set_dropout, untrained_model
from posttrain.models.policy import choose_mode
from posttrain.precision import (
    PRECISIONS,
    PrecisionPlan,
    default_precision,
    resolve_precision,
    torch_dtype,
)
from posttrain.training.config import UserFacingError
from posttrain.training.sharding import kind, offloads


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


def plan_precision(name: str, device: Device, *, is_here: bool = True) -> PrecisionPlan:
    """The precision of a run; ``auto`` on a device that is not here is bf16."""
    if not is_here:
        return PRECISIONS["bf16" if name == "auto" else name]
    return resolve_precision(None if name == "auto" else name, device)


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
    """What decides the memory of a run on one device. ``model``: the loaded one, else it is built
    without weights. ``longest_prompt``: of the data, in tokens, where completions are sampled; None
    takes the most that it may have. ``reference_every``: steps after which the algorithm replaces
    its reference (R1)."""
    model = (
        model
        if model is not None
        else meta_model(config.model, precision, scores=method == "reward")
    )
    set_dropout(model, config.model, default=method == "sft")
    parameters = parameters_of(model)
    arch = architecture_of(model.config, parameters)
    mode = choose_mode(model, config.packing, device_type=device)
    job = Job(
        method=method,
        arch=arch,
        parameters=tuple(parameters),
        precision=precision,
        max_tokens=config.packing.max_tokens,
        completions=1 if method == "sft" else 2,
        device=device,
        shares_prompt=mode.mode == "shared",
        own_attention=mode.mode == "single",
        flex=mode.backend == "posttrain_flex",
        checkpointing=bool(getattr(model, "is_activation_checkpointing", False)),
        logits_chunk=config.packing.logits_chunk,
        optimizer=config.optimizer.name,
        offload=frozenset({"optimizer"}) if config.optimizer.offload else frozenset(),
        reference=_reference(config, precision, parameters) if wants_reference else (),
        reference_moves=wants_reference and bool(config.reference.sync_every or reference_every),
    )
    return _with_sampling(job, config, precision, longest_prompt) if method == "rl" else job


def _with_sampling(
    job: Job, config: Any, precision: PrecisionPlan, longest_prompt: int | None
) -> Job:
    rollout = None
    if config.engine == "local":
        prompt = config.data.max_prompt_length if longest_prompt is None else longest_prompt
        rollout = Rollout(
            max_rows=min(
                config.local.max_rows, config.train.batch_size * config.rollout.group_size
            ),
            kv_cache_bytes=config.local.kv_cache_gb * 1e9,
            capacity=prompt + config.sampling.max_tokens,
        )
    learned = config.rewards.options.get("reward_model", {}).get("model")
    scoring = None
    if learned:  # in the dtype that rewards/model.py loads it in
        is_here = job.device == "cpu" or torch.cuda.is_available()
        halves = not is_here or default_precision(job.device).compute == "bfloat16"
        held = PRECISIONS["bf16-pure" if halves else "fp32"]
        scorer = meta_model(ModelConfig(name=learned), held, scores=True)
        parameters = tuple(parameters_of(scorer))
        scoring = Scoring(
            arch=architecture_of(scorer.config, parameters),
            parameters=parameters,
            precision=held,
            max_tokens=config.rewards.options["reward_model"].get("max_length", 4096),
            completions=config.rollout.group_size,
        )
    return replace(
        job,
        completion_tokens=config.sampling.max_tokens,
        rollout=rollout,
        divides_logits=config.sampling.temperature != 1.0,
        reward_model=scoring,
        merges_adapters=rollout is None and job.is_lora,
    )


def _reference(
    config: Any, precision: PrecisionPlan, parameters: list[Parameter]
) -> tuple[Parameter, ...]:
    """Of the frozen model beside the policy; empty where its log-probs are cached, or where it is
    the base under adapters."""
    if config.reference.cache:
        return ()
    if config.reference.model is not None:
        return tuple(parameters_of(meta_model(ModelConfig(name=config.reference.model), precision)))
    return (
        ()
        if any(".lora_" in p.name for p in parameters)
        else tuple(replace(p, trainable=False) for p in parameters)
    )


@dataclass(kw_only=True)
class MemoryCheck:
    """The memory of one run: said at its start, compared with what was measured at its end."""

    plan: MemoryPlan
    limit_bytes: float | None
    is_main: bool

    @classmethod
    def start(
        cls,
        config: Any,
        method: Method,
        accelerator: Any,
        precision: PrecisionPlan,
        *,
        model: nn.Module | None = None,
        wants_reference: bool,
        longest_prompt: int | None = None,
        reference_every: int = 0,
    ) -> MemoryCheck:
        """Prints the plan in one line. Raises UserFacingError if it cannot fit and ``train.force``
        is off."""
        device: Device = "cuda" if accelerator.device.type == "cuda" else "cpu"
        job = job_of(
            config,
            method,
            precision=precision,
            device=device,
            model=model,
            wants_reference=wants_reference,
            longest_prompt=longest_prompt,
            reference_every=reference_every,
        )
        sharding = kind(accelerator)
        engine: Any
        stage, engine = {"whole": (0, "plain"), "fsdp2": (3, "fsdp2")}.get(sharding) or (
            int(sharding[-1]),
            "deepspeed",
        )
        job = replace(job, offload=job.offload | offloads(accelerator))
        plan = memory_plan(job.sharded(stage, accelerator.num_processes, engine=engine))
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limit = device_bytes(accelerator.device, processes=processes)
        check = cls(plan=plan, limit_bytes=limit, is_main=accelerator.is_main_process)
        if check.is_main:
            print(one_line(plan, limit))
        if limit is not None and plan.peak_bytes > limit and not config.train.force:
            raise UserFacingError(
                f"This run needs {gigabytes(plan.peak_bytes)} per process (GB = 1e9 bytes) and "
                f"{gigabytes(limit)} are there. It {verdict(plan, limit)}. See `posttrain plan`; "
                "--train.force true starts it all the same."
            )
        _check_host(plan, processes, force=config.train.force)
        return check

    def finish(self, accelerator: Any, *, longest_row: int) -> None:
        """Predicted against measured, in one line; where no row filled its budget, for the longest
        one too."""
        on_cuda, budget = accelerator.device.type == "cuda", self.plan.job.max_tokens
        if on_cuda:
            measured, name = (
                torch.cuda.max_memory_reserved(accelerator.device),
                "reserved by the CUDA allocator",
            )
        else:
            measured, name = peak_rss_bytes() or 0, "peak resident"

        def against(plan: MemoryPlan) -> tuple[str, str]:
            predicted = plan.peak_bytes - (plan.phases[plan.worst]["libraries"] if on_cuda else 0)
            return gigabytes(predicted), f"{100 * (predicted / measured - 1):+.0f} %"

        if self.is_main and measured:
            predicted, error = against(self.plan)
            line = f"memory: predicted {predicted}, measured {gigabytes(measured)} {name} ({error})"
            if 0 < longest_row < budget:
                update = memory_plan(replace(self.plan.job, max_tokens=longest_row)).phases[
                    "update"
                ]
                predicted, error = against(
                    replace(self.plan, phases={**self.plan.phases, "update": update})
                )
                line += (
                    f"; the longest row had {longest_row} of {budget} tokens, predicted "
                    f"{predicted} ({error})"
                )
            print(line)


def _check_host(plan: MemoryPlan, processes: int, *, force: bool) -> None:
    """What is offloaded must fit into main memory."""
    needed, here = processes * sum(plan.host.values()), available_bytes()
    if needed and here is not None and needed > here and not force:
        parts = ", ".join(f"{name} {gigabytes(n)}" for name, n in plan.host.items())
        raise UserFacingError(
            f"This run keeps {gigabytes(needed)} (GB = 1e9 bytes) in main memory for {processes} "
            f"processes ({parts} each), and {gigabytes(here)} are there. Offload less, or use "
            "fewer processes on this machine; --train.force true starts it all the same."
        )


def device_bytes(device: torch.device | str, *, processes: int = 1) -> float | None:
    """What one process may take: its GPU, or its share of this machine's available memory. None
    where it is not known."""
    if torch.device(device).type == "cuda":
        return (
            float(torch.cuda.get_device_properties(device).total_memory)
            if torch.cuda.is_available()
            else None
        )
    here = available_bytes()
    return None if here is None else here / processes
