"""The plan's questions asked the other way: what fits, the largest token budget, the fewest
devices, the change that helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from posttrain.memory.job import Job
from posttrain.memory.plan import memory_plan

SOLVER_MARGIN = 0.02
"""Of a limit, what a token budget leaves free for the plan's own error."""


def fits(job: Job, limit_bytes: float) -> bool:
    """Whether such a run starts and every phase stays within the limit of a device."""
    return job.refused is None and memory_plan(job).peak_bytes <= limit_bytes


def max_tokens(job: Job, limit_bytes: float) -> int:
    """The largest ``packing.max_tokens`` that fits, to 16 tokens; 0 if none does."""
    low, high = 0, 16
    while high <= 2**24 and fits(replace(job, max_tokens=high), limit_bytes):
        low, high = high, 2 * high
    while high - low > 16:
        middle = (low + high) // 32 * 16
        low, high = (
            (middle, high) if fits(replace(job, max_tokens=middle), limit_bytes) else (low, middle)
        )
    return low


def min_devices(
    job: Job, limit_bytes: float, *, zero_stage: int, at_most: int = 65536
) -> int | None:
    """The fewest devices on which a ZeRO stage fits; None if no number does."""

    def ok(n: int) -> bool:
        return fits(job.sharded(zero_stage, n), limit_bytes)

    high = 1
    while not ok(high):
        high *= 2
        if high > at_most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ok(middle) else (middle, high)
    return high


def cheapest_zero(job: Job, limit_bytes: float, *, num_devices: int) -> int | None:
    """The lowest ZeRO stage that fits on so many devices: the least communication. None if none
    does."""
    stages = (0, 1, 2, 3) if num_devices > 1 else (0,)
    return next((s for s in stages if fits(job.sharded(s, num_devices), limit_bytes)), None)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change to a run's settings."""

    option: str
    """As on the command line."""
    apply: Callable[[Job], Job] = field(repr=False)


def changes(job: Job) -> list[Change]:
    """What could be changed, the one that costs least first."""
    possible = []
    if job.reference and job.method == "dpo" and not job.reference_moves:
        possible.append(
            Change(option="--reference.cache true", apply=lambda j: replace(j, reference=()))
        )
    if not job.checkpointing:
        possible.append(
            Change(
                option="--model.gradient_checkpointing true",
                apply=lambda j: replace(j, checkpointing=True),
            )
        )
    if job.rollout is not None:
        half = replace(job.rollout, kv_cache_bytes=job.rollout.kv_cache_bytes / 4)
        possible.append(
            Change(
                option=f"--local.kv_cache_gb {half.kv_cache_bytes / 1e9:g}",
                apply=lambda j: replace(j, rollout=half),
            )
        )
    for stage in range(job.zero_stage + 1, 4) if job.num_devices > 1 else ():
        name = {
            1: "launch/zero2.yaml with zero_stage: 1",
            2: "launch/zero2.yaml",
            3: "launch/fsdp.yaml",
        }[stage]
        possible.append(Change(option=name, apply=lambda j, s=stage: j.sharded(s, j.num_devices)))  # type: ignore[misc]
    if job.optimizer == "adamw" and job.engine == "plain" and job.device == "cuda":
        possible.append(
            Change(
                option="--optimizer.name adamw_8bit",
                apply=lambda j: replace(j, optimizer="adamw_8bit"),
            )
        )
        possible.append(
            Change(
                option="--optimizer.offload true",
                apply=lambda j: replace(j, offload=frozenset({"optimizer"})),
            )
        )
    return possible


def advice(job: Job, limit_bytes: float, *, shortest: int = 64) -> str | None:
    """The one change that would make a run fit: a setting, a smaller token budget, or more devices;
    None if it fits.

    ``shortest``: tokens that the longest sequence needs.
    """
    if fits(job, limit_bytes):
        return None
    for change in changes(job):
        if fits(change.apply(job), limit_bytes):
            return change.option
    tokens = max_tokens(job, limit_bytes)
    if tokens >= shortest:
        return f"--packing.max_tokens {tokens}"
    both = replace(job, checkpointing=True)
    tokens = max_tokens(both, limit_bytes)
    if tokens >= shortest and not job.checkpointing:
        return f"--model.gradient_checkpointing true --packing.max_tokens {tokens}"
    stage, launch = (2, "zero2") if job.method == "rl" else (3, "fsdp")
    devices = min_devices(replace(both, max_tokens=shortest), limit_bytes, zero_stage=stage)
    if devices is not None:
        return (
            f"launch/{launch}.yaml on {max(devices, 2)} devices, with "
            "--model.gradient_checkpointing true"
        )
    return "a smaller model, or --model.lora.rank 16"
