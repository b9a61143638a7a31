"""What this machine can give, and what this process has taken (Linux; None where it cannot be
read)."""

from __future__ import annotations

import re
from pathlib import Path

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str) -> int:
    """``80GB`` (1e9), ``80GiB`` (2^30), ``500MB``, or a number of bytes. Raises ValueError for
    anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None or found.group(2).upper() not in _UNITS:
        raise ValueError(
            "Memory is a number with a unit, such as 80GB (1e9 bytes) or 80GiB "
            f"(2^30); got {text!r}."
        )
    return int(float(found.group(1)) * _UNITS[found.group(2).upper()])


def gigabytes(num_bytes: float) -> str:
    """``12.3 GB``; GB = 1e9 bytes."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f} GB"


def _fields(path: Path) -> dict[str, int]:
    """Name and kB of a file such as /proc/meminfo, in bytes."""
    lines = path.read_text().splitlines() if path.exists() else []
    parts = [line.split() for line in lines if line.endswith(" kB")]
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in parts}


def rss_bytes() -> int | None:
    """Memory that is resident in this process now."""
    return _fields(Path("/proc/self/status")).get("VmRSS")


def peak_rss_bytes() -> int | None:
    """Most memory that was resident in this process since it started (VmHWM)."""
    return _fields(Path("/proc/self/status")).get("VmHWM")


def available_bytes(*, cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this process could have in all: free memory and what it already has, or the limit of its
    cgroup if less."""
    free = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if free is None:
        return None
    return min([free + (rss_bytes() or 0), *_cgroup_limits(cgroup)])


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of this process's cgroup and of those above it: memory.max, and in version 1
    memory.limit_in_bytes."""
    own = Path("/proc/self/cgroup")
    lines = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    limits = []
    for top, file, controllers in (
        (root, "memory.max", ""),
        (root / "memory", "memory.limit_in_bytes", "memory"),
    ):
        path = next((p for _, c, p in lines if controllers in c.split(",")), "/")
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place == top.parent:
                break
            if (place / file).exists() and (text := (place / file).read_text().strip()) != "max":
                limits.append(int(text))
    return limits
