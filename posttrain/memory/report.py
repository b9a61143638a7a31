"""A plan for people: a table of items and phases, a bar per ZeRO stage, one line; and for programs,
plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.memory.communication import sent_bytes
from posttrain.memory.limits import gigabytes
from posttrain.memory.plan import MemoryPlan, memory_plan
from posttrain.memory.solve import advice

COLOURS = {
    "weights": "blue",
    "LoRA": "bright_white",
    "gradients": "magenta",
    "master": "bright_blue",
    "moments": "cyan",
    "counters": "cyan",
    "reference": "green",
    "reward model": "bright_green",
    "rollout copy": "bright_cyan",
    "KV cache": "bright_magenta",
    "activations": "yellow",
    "recomputed": "bright_yellow",
    "attention masks": "bright_yellow",
    "casts": "bright_black",
    "logits": "red",
    "temporaries": "bright_red",
    "communication": "white",
    "mapped file": "bright_black",
    "libraries": "dim",
    "allocator": "dim",
}


def one_line(plan: MemoryPlan, limit_bytes: float | None) -> str:
    """Peak, phase, largest items and the limit; what starting a run prints."""
    items = sorted(plan.phases[plan.worst].items(), key=lambda item: -item[1])[:4]
    parts = ", ".join(f"{name} {gigabytes(n)}" for name, n in items)
    rest = "" if limit_bytes is None else f" of {gigabytes(limit_bytes)}"
    return (
        f"memory: at most {gigabytes(plan.peak_bytes)}{rest} per process, in the {plan.worst} "
        f"phase ({parts}; GB = 1e9 bytes)"
    )


def verdict(plan: MemoryPlan, limit_bytes: float, *, shortest: int = 64) -> str:
    """Fits or not, by how much, and the change that would make it fit."""
    if plan.job.refused:
        return f"is refused: {plan.job.refused}"
    margin = limit_bytes - plan.peak_bytes
    if margin >= 0:
        return f"fits: {gigabytes(margin)} to spare"
    return (
        f"does not fit: {gigabytes(-margin)} too much; would fit with "
        f"{advice(plan.job, limit_bytes, shortest=shortest)}"
    )


def update_by_checkpointing(plan: MemoryPlan) -> dict[str, int]:
    """Bytes of the update under both policies for activations."""
    return {
        name: memory_plan(replace(plan.job, checkpointing=policy)).total("update")
        for name, policy in (("off", False), ("on", True))
    }


def to_json(plan: MemoryPlan, limit_bytes: float | None) -> dict[str, Any]:
    """Bytes of everything."""
    job = plan.job
    return {
        "method": job.method,
        "zero_stage": job.zero_stage,
        "engine": job.engine,
        "devices": job.num_devices,
        "device": job.device,
        "precision": job.precision.name,
        "parameters": job.num_params,
        "trainable_parameters": job.trainable_params,
        "max_tokens": job.max_tokens,
        "phases_bytes": {phase: dict(items) for phase, items in plan.phases.items()},
        "host_bytes": dict(plan.host),
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.worst,
        "peak_moment": plan.moment,
        "update_bytes_by_checkpointing": update_by_checkpointing(plan),
        "sent_bytes_per_step": plan.sent_bytes,
        "limit_bytes": limit_bytes,
        "fits": None if limit_bytes is None else plan.peak_bytes <= limit_bytes,
        "refused": job.refused,
        "activations_are_estimated": job.arch.has_estimated_layers,
    }


def show(
    plans: Sequence[MemoryPlan],
    limit_bytes: float | None,
    *,
    console: Any = None,
    shortest: int = 64,
) -> None:
    """The table of the first plan that is asked for (the others as bars), on the terminal."""
    from rich.console import Console

    console = console or Console()
    job = plans[0].job
    trained = f"{job.trainable_params / 1e6:,.2f} M of " if job.is_lora else ""
    console.print(
        f"[bold]{job.method}[/], {trained}{job.num_params / 1e6:,.2f} M parameters, "
        f"{job.precision.name}, rows of {job.max_tokens} tokens, {job.num_devices} x {job.device}. "
        "GB = 1e9 bytes, of the rank that takes most."
    )
    for plan in plans:
        console.print(_table(plan))
        if plan.host:
            console.print(
                f"  on the host: {', '.join(f'{n} {gigabytes(b)}' for n, b in plan.host.items())}"
            )
        without, with_it = (gigabytes(n) for n in update_by_checkpointing(plan).values())
        console.print(f"  update without gradient checkpointing: {without}, with it: {with_it}")
        if plan.sent_bytes:
            console.print(
                f"  sent per step and rank: {gigabytes(plan.sent_bytes)} with one micro-batch, "
                f"{gigabytes(sent_bytes(plan.job, micro_batches=8))} with 8"
            )
        if job.arch.has_estimated_layers:
            console.print(
                "  layers of state-space or linear attention: activations are an "
                "estimate; --traced counts them"
            )
        if limit_bytes is not None:
            fits = plan.peak_bytes <= limit_bytes and plan.job.refused is None
            console.print(
                "  "
                f"[{'green' if fits else 'red'}]{verdict(plan, limit_bytes, shortest=shortest)}[/]"
            )
        elif plan.job.refused:
            console.print(f"  [red]is refused: {plan.job.refused}[/]")
    scale = max([p.peak_bytes for p in plans] + ([limit_bytes] if limit_bytes else []))
    console.print(
        "\nlargest phase by item"
        + ("" if limit_bytes is None else f"; | is {gigabytes(limit_bytes)}")
    )
    for plan in plans:
        console.print(_bar(plan, scale, limit_bytes))
    console.print(_legend(plans))


def compared(traced: Any, closed: int) -> str:
    """The trace of an update step beside the closed form, in one line."""
    parts = ", ".join(
        f"{name} {gigabytes(n)}"
        for name, n in sorted(traced.by_category.items(), key=lambda item: -item[1])
    )
    return (
        "traced on one device with a CPU's kernels: live tensors peak at "
        f"{gigabytes(traced.peak_bytes)} ({parts}); the closed form says {gigabytes(closed)} "
        f"({100 * (closed / traced.peak_bytes - 1):+.1f} %)"
    )


def name_of(plan: MemoryPlan) -> str:
    """``ZeRO-2 (deepspeed)``."""
    stage, engine = plan.job.zero_stage, plan.job.engine
    return (
        f"ZeRO-{stage} ({engine})"
        if stage
        else ("one device" if plan.job.num_devices == 1 else "ZeRO-0 (DDP)")
    )


def _table(plan: MemoryPlan) -> Any:
    from rich.table import Table

    table = Table(title=f"{name_of(plan)}: GB by phase", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase, justify="right", style="bold" if phase == plan.worst else None)
    names = dict.fromkeys(name for items in plan.phases.values() for name in items)
    for name in sorted(names, key=lambda n: list(COLOURS).index(n) if n in COLOURS else 99):
        values = [items.get(name, 0) for items in plan.phases.values()]
        table.add_row(name, *(f"{v / 1e9:.3f}" if v else "" for v in values))
    table.add_section()
    table.add_row(
        "total without mapped file", *(f"{plan.total(phase) / 1e9:.3f}" for phase in plan.phases)
    )
    return table


def _bar(plan: MemoryPlan, scale: float, limit_bytes: float | None, *, width: int = 64) -> Any:
    from rich.text import Text

    text = Text(f"{name_of(plan):<20}")
    cells: list[str] = []
    filled = 0.0
    for name, n in _ordered(plan.phases[plan.worst]):
        filled += n
        cells += [COLOURS.get(name, "white")] * (round(filled / scale * width) - len(cells))
    mark = None if limit_bytes is None else min(round(limit_bytes / scale * width), width)
    for i in range(width + 1):
        if i == mark:
            text.append("|", style="bold")
        if i < len(cells):
            text.append("█", style=cells[i])
        elif i < width:
            text.append(" ")
    text.append(f" {gigabytes(plan.peak_bytes)}")
    return text


def _ordered(items: Mapping[str, int]) -> list[tuple[str, int]]:
    order = list(COLOURS)
    return sorted(items.items(), key=lambda item: order.index(item[0]) if item[0] in order else 99)


def _legend(plans: Sequence[MemoryPlan]) -> Any:
    from rich.text import Text

    text = Text()
    for name in dict.fromkeys(n for p in plans for n, _ in _ordered(p.phases[p.worst])):
        text.append("█ ", style=COLOURS.get(name, "white"))
        text.append(f"{name}  ")
    return text
