"""Runs real commands as a user would: `accelerate launch --config_file ...`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """One thread per process (libgomp spins), the repository importable, no hub."""
    keep = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_"))
    }
    path = os.pathsep.join([str(REPO), *filter(None, [keep.get("PYTHONPATH")])])
    return {**keep, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **extra}


def command(launch: str, script: str, *arguments: str) -> list[str]:
    """``launch``: a file of launch/, and options of the launcher after it."""
    file, *options = launch.split()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(REPO / "launch" / file), *options]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = ["--main_process_port", str(port)] if launch != "cpu.yaml" else []
    return [*launcher, *several, str(REPO / script), *arguments]


def run(launch: str, script: str, *arguments: str, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(launch, script, *arguments), env=environment(**env), cwd=REPO, capture_output=True, text=True, timeout=timeout_s
    )


def check(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def posttrain(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    full: Sequence[str] = [sys.executable, "-m", "posttrain.cli.main", *arguments]
    return subprocess.run(full, env=environment(), cwd=REPO, capture_output=True, text=True, timeout=timeout_s)
