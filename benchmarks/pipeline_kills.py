"""Pipelines of size tiny, run as a user would and ended with SIGKILL at random moments, against the
same pipelines left alone.

    python benchmarks/pipeline_kills.py [--kills 10] [--pipelines rlhf r1 k15]

Prints for each: seconds of both, and whether every final model has the same bits.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(name: str, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "posttrain.cli.main", "pipeline", "run", name]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "--size", "tiny", "--out", str(out)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )


def run(name: str, out: Path, kills: int, rng: random.Random) -> tuple[float, int]:
    """(seconds, processes that were killed)."""
    began, killed = time.monotonic(), 0
    while True:
        process = start(name, out, out.with_suffix(".log"))
        until = time.monotonic() + (rng.uniform(3, 40) if killed < kills else 1e9)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if process.poll() is not None:
            assert process.returncode == 0, out.with_suffix(".log").read_text()[-3000:]
            return time.monotonic() - began, killed
        process.send_signal(signal.SIGKILL)  # its stage is left behind, and runs on
        process.wait()
        killed += 1


def models(root: Path) -> dict[str, bytes]:
    found = [*root.glob("*/final/*.safetensors"), *root.glob("*/model/*.safetensors")]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--pipelines", nargs="+", default=["rlhf", "r1", "k15"])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.pipelines:
            whole, killed = Path(folder, name, "whole"), Path(folder, name, "killed")
            whole.parent.mkdir()
            alone, _ = run(name, whole, 0, rng)
            again, count = run(name, killed, asked.kills, rng)
            first, second = models(whole), models(killed)
            same = sum(first[path] == second.get(path) for path in first)
            print(
                f"{name}: {alone:.0f} s; killed {count} times {again:.0f} s; "
                f"{same} of {len(first)} models have the same bits",
                flush=True,
            )


if __name__ == "__main__":
    main()
