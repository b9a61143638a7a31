"""From the environment of `accelerate launch` to an Accelerator, or an error: never silently fewer processes than asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.precision import PrecisionPlan, resolve_precision
from posttrain.training.allocator import keep_freed_memory
from posttrain.training.config import UserFacingError


def check_launch(environment: Mapping[str, str], num_processes: int | None = None) -> None:
    """Raises UserFacingError for a launch that asked for several processes and became one, or for sharding.

    accelerate's simple launcher (``--cpu --num_processes 2``, or ``distributed_type: MULTI_CPU`` without mpirun) sets the
    rendezvous address for several processes and then starts a single one without WORLD_SIZE. Without a GPU and without
    ``ACCELERATE_USE_CPU`` the multi-process launcher starts independent one-process runs: ``num_processes`` shows it.
    """
    advice = (
        "Use `--config_file launch/cpu2.yaml` (distributed_type: MULTI_GPU with use_cpu: true), or torchrun --nproc_per_node."
    )
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise UserFacingError(
            "accelerate was asked for several processes and started one (its MULTI_CPU launcher needs mpirun): the run would "
            f"train on one process without saying so. {advice}"
        )
    sharded = [name for name in ("FSDP", "DEEPSPEED") if environment.get(f"ACCELERATE_USE_{name}") == "true"]
    if sharded:
        raise UserFacingError(
            f"Sharded training is not supported yet; the launch configuration asks for {sharded[0]}. Use launch/ddp.yaml, with "
            "--model.lora.rank 16 or --model.gradient_checkpointing true if the model does not fit."
        )
    wanted = int(environment.get("WORLD_SIZE", "1"))
    if num_processes is not None and num_processes != wanted:
        raise UserFacingError(
            f"The launcher started {wanted} processes, but they found only {num_processes}: each would train on its own. {advice}"
        )


def make_accelerator(*, precision: str, trackers: Sequence[str] = (), project_dir: Path) -> tuple[Any, PrecisionPlan]:
    """The Accelerator of a run and its precision. Accumulation is 1: ``training/step.py`` owns every denominator."""
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    check_launch(os.environ)
    keep_freed_memory()
    several_on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
    if several_on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it every process believes to be alone
    state = PartialState(cpu=True) if several_on_cpu else PartialState()
    check_launch(os.environ, state.num_processes)
    plan = resolve_precision(None if precision == "auto" else precision, state.device.type)
    accelerator = Accelerator(
        mixed_precision=plan.accelerate_mixed_precision,
        cpu=several_on_cpu,
        gradient_accumulation_steps=1,
        log_with=list(trackers) or None,
        project_dir=str(project_dir),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    return accelerator, plan
