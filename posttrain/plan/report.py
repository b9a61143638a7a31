"""A plan for people: a table of items and phases, a bar per kind of sharding, one line; and for
programs, plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.plan.price import MemoryPlan, advice, memory_plan

ITEMS = (
    "weights, LoRA, gradients, master, moments, counters, reference, reward model, rollout copy, "
    "KV cache, activations, recomputed, casts, logits, temporaries, communication, "
    "gathered weights, libraries, allocator"
).split(", ")
"""In the order that they are shown in."""
_HUES = ("blue", "magenta", "cyan", "green", "yellow", "red", "white")
COLOURS = {
    name: "dim" if name in ITEMS[-2:] else ("bright_" if i % 2 else "") + _HUES[i % 7]
    for i, name in enumerate(ITEMS)
}
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}B": base**power
    for unit, base in (("", 1000), ("I", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def parse_bytes(text: str) -> int:
    """``80GB`` (1e9), ``80GiB`` (2^30), ``500MB``, or a number of bytes. Raises ValueError for
    anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(
            "Memory is a number with a unit, such as 80GB (1e9 bytes) or 80GiB (2^30); got "
            f"{text!r}."
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def gigabytes(num_bytes: float) -> str:
    """``12.3 GB``; GB = 1e9 bytes."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f} GB"


def listed(items: Mapping[str, int]) -> str:
    """``weights 1.20 GB, moments 2.40 GB``."""
    return ", ".join(f"{name} {gigabytes(n)}" for name, n in items.items())


def one_line(plan: MemoryPlan, limit_bytes: float | None) -> str:
    """Peak, phase, largest items and the limit; what starting a run prints."""
    largest = sorted(plan.phases[plan.worst].items(), key=lambda item: -item[1])[:4]
    rest = "" if limit_bytes is None else f" of {gigabytes(limit_bytes)}"
    return (
        f"memory: at most {gigabytes(plan.peak_bytes)}{rest} per process, in the {plan.worst} "
        f"phase ({listed(dict(largest))}; GB = 1e9 bytes)"
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
        "sharding": job.sharding,
        "devices": job.num_devices,
        "device": job.device,
        "precision": job.precision.name,
        "parameters": job.num_params,
        "trainable_parameters": job.trainable_params,
        "max_tokens": job.max_tokens,
        "phases_bytes": plan.phases,
        "host_bytes": plan.host,
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.worst,
        "peak_moment": plan.moment,
        "update_bytes_by_checkpointing": update_by_checkpointing(plan),
        "sent_bytes_per_step": plan.sent_bytes(),
        "limit_bytes": limit_bytes,
        "fits": None if limit_bytes is None else plan.peak_bytes <= limit_bytes,
        "refused": job.refused,
        "activations_are_estimated": plan.is_estimate,
    }


def show(
    plans: Sequence[MemoryPlan],
    limit_bytes: float | None,
    *,
    console: Console | None = None,
    shortest: int = 64,
) -> None:
    """A table of each plan and all of them as bars, on the terminal."""
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
        for line in _remarks(plan, limit_bytes, shortest=shortest):
            console.print(f"  {line}")
    limit = "" if limit_bytes is None else f"; | is {gigabytes(limit_bytes)}"
    console.print(f"\nlargest phase by item{limit}")
    scale = max(*(plan.peak_bytes for plan in plans), limit_bytes or 0)
    for plan in plans:
        console.print(_bar(plan, scale, limit_bytes))
    shown = {name for plan in plans for name in plan.phases[plan.worst]}
    legend = (Text("█ ", colour) + Text(f"{n}  ") for n, colour in COLOURS.items() if n in shown)
    console.print(Text().join(legend))


def _remarks(plan: MemoryPlan, limit_bytes: float | None, *, shortest: int) -> list[str]:
    off, on = update_by_checkpointing(plan).values()
    lines = [
        f"update without gradient checkpointing: {gigabytes(off)}, with it: {gigabytes(on)}",
    ]
    if plan.host:
        lines.insert(0, f"on the host: {listed(plan.host)}")
    if plan.job.num_devices > 1:
        lines.append(
            f"sent per step and rank: {gigabytes(plan.sent_bytes())} with one micro-batch, "
            f"{gigabytes(plan.sent_bytes(8))} with 8"
        )
    if plan.is_estimate:
        lines.append("activations are an estimate: a scan was traced for few tokens and extended")
    if limit_bytes is not None:
        good = plan.peak_bytes <= limit_bytes and plan.job.refused is None
        colour = "green" if good else "red"
        lines.append(f"[{colour}]{verdict(plan, limit_bytes, shortest=shortest)}[/]")
    elif plan.job.refused:
        lines.append(f"[red]is refused: {plan.job.refused}[/]")
    return lines


def name_of(plan: MemoryPlan) -> str:
    """``ZeRO-2 (deepspeed)``."""
    job = plan.job
    if job.sharding == "whole":
        return "one device" if job.num_devices == 1 else "ZeRO-0 (DDP)"
    return f"ZeRO-{job.zero_stage} ({'fsdp2' if job.sharding == 'fsdp2' else 'deepspeed'})"


def _table(plan: MemoryPlan) -> Table:
    table = Table(title=f"{name_of(plan)}: GB by phase", title_justify="left")
    table.add_column("")
    for phase in plan.phases:
        table.add_column(phase, justify="right", style="bold" if phase == plan.worst else None)
    for name in COLOURS:
        values = [items.get(name, 0) for items in plan.phases.values()]
        if any(values):
            table.add_row(name, *(f"{v / 1e9:.3f}" if v else "" for v in values))
    table.add_section()
    table.add_row("total", *(f"{plan.total(phase) / 1e9:.3f}" for phase in plan.phases))
    return table


def _bar(plan: MemoryPlan, scale: float, limit_bytes: float | None, *, width: int = 64) -> Text:
    items, filled = plan.phases[plan.worst], 0.0
    cells: list[tuple[str, str]] = []
    for name, colour in COLOURS.items():
        filled += items.get(name, 0)
        cells += [("█", colour)] * (round(filled / scale * width) - len(cells))
    cells += [(" ", "")] * (width + 1 - len(cells))
    if limit_bytes is not None:
        cells.insert(min(round(limit_bytes / scale * width), width), ("|", "bold"))
    return Text.assemble(f"{name_of(plan):<20}", *cells, f" {gigabytes(plan.peak_bytes)}")
