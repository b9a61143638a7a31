"""What the benchmarks share: peak memory, spread, and runs that are processes of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def status_bytes(name: str) -> int:
    """A field of /proc/self/status: VmHWM (peak resident), VmRSS (resident), RssAnon, RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


class Memory:
    """Peak of resident memory since `start`, above what was resident then (Linux)."""

    def start(self, *models: Any) -> None:
        """``models`` count as loaded: a safetensors file is mapped, its pages come when they are
        first read."""
        for model in models:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        Path("/proc/self/clear_refs").write_text("5")
        self._base = status_bytes("VmRSS")

    def above(self) -> int:
        return status_bytes("VmHWM") - self._base


def spread(values: Sequence[float]) -> str:
    """median (smallest to largest)"""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def spawn(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON object that the script prints last."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
