"""What a run really took: the allocator's peak on CUDA, resident memory on a CPU (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Most bytes at once since ``start_measuring``, or since the process started."""

    allocated_bytes: int | None
    """CUDA: bytes of tensors (``max_memory_allocated``). None on a CPU: see ``live.LiveStorages``."""
    held_bytes: int
    """What the device or the machine had to give: CUDA's reserved blocks; on a CPU the resident set, libraries included."""


def start_measuring(device: torch.device) -> None:
    """The peak so far is forgotten; what is held now stays the floor."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM


def measured_peak(device: torch.device) -> Peak | None:
    """None where nothing can be read (macOS, MPS)."""
    if device.type == "cuda":
        return Peak(
            allocated_bytes=torch.cuda.max_memory_allocated(device), held_bytes=torch.cuda.max_memory_reserved(device)
        )  # fmt: skip
    held = status_bytes("VmHWM") if device.type == "cpu" else None
    return None if held is None else Peak(allocated_bytes=None, held_bytes=held)


def status_bytes(name: str) -> int | None:
    """A field of /proc/self/status: VmHWM (peak resident), VmRSS (resident), RssAnon, RssFile; None where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
