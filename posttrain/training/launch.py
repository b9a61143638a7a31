"""From the environment of `accelerate launch` to an Accelerator, or an error: never silently fewer
processes than asked for."""

from __future__ import annotations

import ctypes
import gc
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from posttrain.precision import PrecisionPlan, resolve_precision
from posttrain.training.config import UserFacingError

KEEP_THE_GROUP = ("torch.distributed.fsdp", "torch.distributed.optim", "deepspeed")
"""Imported once there is a process group (saving a model imports deepspeed), they keep it alive as
a default argument."""


MAPPED_BYTES = 32 * 2**20
"""On a CPU blocks of this size and more (logits, scores of eager attention) are mapped one by one
and leave no holes; from 1 MiB on, steps would take a third longer."""


def keep_freed_memory() -> None:
    """Tells glibc to keep smaller blocks when they are freed: each that went back to the system
    would cost its page faults again, a tenth of a CPU step."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, MAPPED_BYTES)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


class FreedMemory:
    """Gives kept memory back: with lengths that differ from step to step, the holes between blocks
    grow (by half in 24 steps of RL, whose two phases also leave each other holes)."""

    def __init__(self) -> None:
        self._checks, self._usual = 0, 0

    def check(self) -> None:
        """Between two steps: once it has grown by a twentieth over the first ones."""
        process = psutil.Process()
        self._checks += 1
        if self._checks <= 3:  # the first step makes the moments
            self._usual = process.memory_info().rss
        elif process.memory_info().rss > 1.05 * self._usual:
            self.give_back()
            self._usual = max(self._usual, process.memory_info().rss)  # what is in use has grown

    def give_back(self) -> None:
        """All of it, between phases of seconds: its page faults cost a hundredth of them."""
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def check_launch(environment: Mapping[str, str], num_processes: int) -> None:
    """Raises UserFacingError for a launch that asked for several processes and became one.

    accelerate's simple launcher (``--cpu --num_processes 2``, or ``distributed_type: MULTI_CPU``
    without mpirun) sets the rendezvous address for several processes and then starts a single one
    without WORLD_SIZE. Without a GPU and without ``ACCELERATE_USE_CPU`` the multi-process launcher
    starts independent one-process runs: ``num_processes`` shows it.
    """
    wanted = int(environment.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        problem = "accelerate was asked for several processes and started one (no mpirun)."
    elif num_processes != wanted:
        problem = f"The launcher started {wanted} processes, but they found only {num_processes}."
    else:
        return
    raise UserFacingError(
        f"{problem} Use `--config_file launch/cpu2.yaml` (distributed_type: MULTI_GPU with "
        "use_cpu: true), or torchrun --nproc_per_node."
    )


def make_accelerator(
    *, precision: str, trackers: Sequence[str] = (), project_dir: Path
) -> tuple[Any, PrecisionPlan]:
    """The Accelerator of a run and its precision. Accumulation is 1: ``training/step.py`` owns
    every denominator.

    Raises UserFacingError where the processes do not become what the launch configuration asks for.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env

    # CPU tensors in huge pages: a tenth less time per step. Read at the first allocation
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()
    if not torch.accelerator.is_available():  # deepspeed, which transformers imports, would warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    asked = (n for n in ("FSDP", "DEEPSPEED") if parse_flag_from_env(f"ACCELERATE_USE_{n}"))
    sharding = next(asked, "NO")
    state = _join_processes(sharding)
    check_launch(os.environ, state.num_processes)
    plan = resolve_precision(
        None if precision == "auto" else precision,
        state.device.type,
        deepspeed=sharding == "DEEPSPEED",
    )
    mixed_precision = plan.accelerate_mixed_precision
    if sharding == "FSDP":  # lowers by its own policy
        mixed_precision = "no"
    elif sharding == "DEEPSPEED":  # calls bfloat16 weights with a master copy bf16
        mixed_precision = "bf16" if plan.compute == "bfloat16" else "no"
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=state.num_processes > 1 and state.device.type == "cpu" and sharding != "DEEPSPEED",
        gradient_accumulation_steps=1,
        log_with=list(trackers) or None,
        project_dir=str(project_dir),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
        fsdp_plugin=_fsdp_plugin(plan) if sharding == "FSDP" else None,
    )
    if sharding != "NO" and accelerator.distributed_type != sharding:
        raise UserFacingError(
            f"The launch configuration asks for {sharding}, but the run became "
            f"{accelerator.distributed_type.value}, unsharded. Start several processes, as "
            "`accelerate launch --config_file launch/fsdp.yaml` does."
        )
    if sharding == "DEEPSPEED":
        _settle_deepspeed(accelerator)
    return accelerator, plan


def leave_processes() -> None:
    """Ends the process group, and with it its threads, while Python still runs.

    A thread of Gloo that frees a tensor while Python shuts down aborts a finished run (SIGABRT,
    pytorch issue 190489). It ends with the last reference to the group: DDP has one, and so has
    KEEP_THE_GROUP. FSDP and DeepSpeed keep theirs.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def _join_processes(sharding: str) -> Any:
    """accelerate's state; must be made before any Accelerator is built."""
    import torch
    from accelerate import DistributedType, PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState()
    for name in filter(find_spec, KEEP_THE_GROUP):
        import_module(name)
    if torch.cuda.is_available():
        return PartialState()
    if sharding == "DEEPSPEED":  # it looks at LOCAL_RANK only when it is not told to use the CPU
        os.environ["ACCELERATE_USE_CPU"] = "false"
        # Gloo does what its kernels for shared memory do. These are compiled at the first start: a
        # minute, a compiler, and where that start is killed a lock that the next one waits for.
        ops = import_module("deepspeed.ops")
        getattr(ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        return PartialState(backend="gloo")
    os.environ["ACCELERATE_USE_CPU"] = "true"  # without it every process believes to be alone
    state = PartialState(cpu=True)
    if sharding == "FSDP":  # accelerate promotes MULTI_GPU to FSDP, but not MULTI_CPU
        state.distributed_type = DistributedType.MULTI_GPU
        state.device = torch.device("cpu")
    return state


def _fsdp_plugin(plan: PrecisionPlan) -> Any:
    """FSDP2 that gathers weights in the compute dtype and reduces gradients in the dtype of the
    sharded weights.

    Not autocast, which would keep a cast copy of every gathered weight for the backward.
    """
    import torch
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if os.environ.get("FSDP_VERSION") != "2":
        raise UserFacingError("Only FSDP2 is supported: set fsdp_version: 2, as launch/fsdp.yaml.")
    lowers = plan.compute != plan.weight
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=getattr(torch, plan.compute) if lowers else None,
            reduce_dtype=getattr(torch, plan.gradient) if lowers else None,
            cast_forward_inputs=False,
        ),
        # every process loads the model on its CPU and keeps its shard
        cpu_ram_efficient_loading=False,
    )


def _settle_deepspeed(accelerator: Any) -> None:
    """The part of DeepSpeed's configuration that is not topology. Clipping and accumulation are
    ``training/step.py``'s."""
    from transformers.integrations import unset_hf_deepspeed_config

    its_calls = r".*torch\.distributed\.\w+_tensor. is deprecated"
    warnings.filterwarnings("ignore", its_calls, FutureWarning)
    # else from_pretrained would partition: models are loaded whole and partitioned by prepare
    unset_hf_deepspeed_config()
    config = accelerator.deepspeed_plugin.deepspeed_config
    ours = {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    given = {name: config.get(name) for name in ours}
    if any(value not in (None, "auto", ours[name]) for name, value in given.items()):
        raise UserFacingError(
            f"The launch configuration sets {given}, which would be ignored: micro-batches follow "
            "from --packing.max_tokens, and --optimizer.max_grad_norm clips. Leave both out of it."
        )
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise UserFacingError(
            f"zero_stage must be 1, 2 or 3; got {stage}. For whole copies use launch/ddp.yaml."
        )
    config |= ours | {
        "train_micro_batch_size_per_gpu": 1,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    # ZeRO-1 with bfloat16 weights: no gradient is held in both dtypes
    config["bf16"]["immediate_grad_update"] = True
