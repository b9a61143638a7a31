"""The memory of one run: said at its start, compared with what was measured at its end."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from posttrain.plan.job import job_of
from posttrain.plan.price import MemoryPlan, memory_plan, with_rows_of
from posttrain.plan.report import gigabytes, listed, one_line, verdict
from posttrain.plan.trace import Method
from posttrain.precision import PrecisionPlan
from posttrain.training.config import UserFacingError
from posttrain.training.sharding import kind, offloads


@dataclass(kw_only=True)
class MemoryCheck:
    """``start`` before the weights are loaded, ``finish`` when the run is done."""

    plan: MemoryPlan | None
    """None where the step of this model cannot be traced."""
    is_main: bool

    @classmethod
    def start(
        cls, config: Any, method: Method, accelerator: Any, precision: PrecisionPlan, **known: Any
    ) -> MemoryCheck:
        """Prints the plan in one line; ``known`` as in ``job_of``. Raises UserFacingError if it
        cannot fit and ``train.force`` is off."""
        device = "cuda" if accelerator.device.type == "cuda" else "cpu"
        job = job_of(config, method, precision=precision, device=device, **known)  # type: ignore[arg-type]
        job = replace(job, offload=job.offload | offloads(accelerator))
        job = job.sharded(kind(accelerator), accelerator.num_processes)
        try:
            plan = memory_plan(job)
        except Exception as error:  # whatever a model's code raises on fake tensors: it may train
            if accelerator.is_main_process:
                why = str(error).partition("\n")[0]
                print(f"memory: not planned ({type(error).__name__}: {why})")
            return cls(plan=None, is_main=accelerator.is_main_process)
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limit = device_bytes(accelerator.device, processes=processes)
        if accelerator.is_main_process:
            print(one_line(plan, limit))
        if limit is not None and plan.peak_bytes > limit and not config.train.force:
            raise UserFacingError(
                f"This run needs {gigabytes(plan.peak_bytes)} per process (GB = 1e9 bytes) and "
                f"{gigabytes(limit)} are there. It {verdict(plan, limit)}. See `posttrain plan`; "
                "--train.force true starts it all the same."
            )
        if not config.train.force:
            _check_host(plan, processes)
        return cls(plan=plan, is_main=accelerator.is_main_process)

    def planned(self) -> dict[str, Any]:
        """What a run's about.json says of it: bytes by phase and item."""
        return {} if self.plan is None else {"planned_bytes": self.plan.phases}

    def finish(self, accelerator: Any, *, longest_row: int) -> dict[str, Any]:
        """Predicted against measured, in one line; where no row filled its budget, for the longest
        one too, if that could make a twentieth. Returns what was measured, for about.json."""
        if not self.is_main or self.plan is None:
            return {}
        on_cuda, budget = accelerator.device.type == "cuda", self.plan.job.max_tokens
        measured, name = (
            (torch.cuda.max_memory_reserved(accelerator.device), "reserved by the CUDA allocator")
            if on_cuda
            else (peak_rss_bytes(), "peak resident")
        )

        def against(plan: MemoryPlan) -> tuple[str, str]:
            predicted = plan.peak_bytes - (plan.phases[plan.worst]["libraries"] if on_cuda else 0)
            return gigabytes(predicted), f"{100 * (predicted / measured - 1):+.0f} %"

        predicted, error = against(self.plan)
        line = f"memory: predicted {predicted}, measured {gigabytes(measured)} {name} ({error})"
        update = self.plan.phases["update"]
        of_rows = sum(update.get(name, 0) for name in ("activations", "logits"))
        if 0 < longest_row < budget and 20 * of_rows > measured:  # else the same to 5 %
            predicted, error = against(with_rows_of(self.plan, longest_row))
            line += (
                f"; the longest row had {longest_row} of {budget} tokens, predicted {predicted} "
                f"({error})"
            )
        print(line)
        return {"measured_bytes": measured, "measured": name, "longest_row": longest_row}


def _check_host(plan: MemoryPlan, processes: int) -> None:
    """What is offloaded must fit into main memory."""
    needed, here = processes * sum(plan.host.values()), available_bytes()
    if needed > here:
        raise UserFacingError(
            f"This run keeps {gigabytes(needed)} (GB = 1e9 bytes) in main memory for {processes} "
            f"processes ({listed(plan.host)} each), and {gigabytes(here)} are there. Offload less, "
            "or use fewer processes on this machine; --train.force true starts it all the same."
        )


def device_bytes(device: torch.device | str, *, processes: int = 1) -> float | None:
    """What one process may take: its GPU, or its share of this machine's available memory. None
    where there is no such GPU."""
    if torch.device(device).type == "cpu":
        return available_bytes() / processes
    if not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(device).total_memory)


def peak_rss_bytes() -> int:
    """Most memory that was resident in this process since it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes(*, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process could have in all: free memory and what it already has, or the limit of its
    cgroup if less."""
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return min([free, *_cgroup_limits(cgroup)])


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of this process's cgroup and of those above it: memory.max, and in version 1
    memory.limit_in_bytes."""
    own = Path("/proc/self/cgroup")
    lines = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    limits = []
    for top, file, controller in (
        (root, "memory.max", ""),
        (root / "memory", "memory.limit_in_bytes", "memory"),
    ):
        path = next((p for _, c, p in lines if controller in c.split(",")), "/")
        folder = top / path.lstrip("/")
        while folder != top.parent:
            if (folder / file).exists() and (text := (folder / file).read_text().strip()) != "max":
                limits.append(int(text))
            folder = folder.parent
    return limits
