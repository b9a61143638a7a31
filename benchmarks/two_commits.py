"""Is one commit slower than another? SFT, DPO and RL of SmolLM2-135M, the two interleaved.

    git worktree add ../before COMMIT
    python benchmarks/two_commits.py ../before . [--rounds 3] [--only sft dpo rl]

Each run is a process of its own in the folder of its commit: the recipe with its shipped settings
on rows made here, a few steps, the first one left out. Prints the median seconds of a step, and the
ratio of the two by round: its median and spread. Completions of RL are drawn, so their lengths
differ between commits: its seconds are those of 1,000 tokens drawn and trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, PROMPTS, GROUP_SIZE = 5, 4, 8


def write_rows(folder: Path) -> dict[str, Path]:
    """Rows of the length of GSM8K's and HH's, the same for both."""
    rng, words = random.Random(0), "two of the boys had more apples than each other girl".split()

    def text(n: int) -> str:
        return " ".join(rng.choice(words) for _ in range(n))

    rows = {
        "sft": [{"prompt": text(45), "completion": text(90)} for _ in range(400)],
        "dpo": [{"prompt": text(60), "chosen": text(70), "rejected": text(50)} for _ in range(400)],
        "rl": [{"question": text(40), "answer": str(rng.randrange(99))} for _ in range(100)],
    }
    paths = {}
    for name, some in rows.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in some))
    return paths


def arguments(kind: str, rows: Path, folder: Path) -> list[str]:
    """The recipe's command line."""
    common = [
        "--model.name", "smollm2-135m", "--data.train", f"[{rows}]", "--train.run_dir", str(folder),
        "--train.name", kind, "--train.max_steps", str(STEPS), "--train.batch_size", str(PROMPTS),
        "--train.precision", "fp32",
    ]  # fmt: skip
    if kind != "rl":
        return common
    rewards = "{numeric_answer: 1.0, repetition_penalty: 0.1}"
    return [
        *common, "--rollout.group_size", str(GROUP_SIZE), "--sampling.max_tokens", "64",
        "--rewards.functions", rewards, "--algorithm_options.beta", "0.0",
        "--rollout.show_every", "0",
    ]  # fmt: skip


def seconds(repository: Path, kind: str, rows: Path) -> float:
    """Median seconds of a step (in RL of 1,000 drawn tokens), the first step left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
            "launch/cpu.yaml", f"recipes/{kind}.py", *arguments(kind, rows, Path(folder)),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(repository.resolve())}
        done = subprocess.run(
            command, cwd=repository, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{kind} in {repository}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        lines = (Path(folder) / kind / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if "step_s" in m][1:]
    if kind == "rl":
        drawn = PROMPTS * GROUP_SIZE * sum(m["length"] for m in steps)
        return 1000 * sum(m["step_s"] for m in steps) / drawn
    return statistics.median(m["step_s"] for m in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["sft", "dpo", "rl"])
    given = parser.parse_args()
    print("| | before, s | after, s | after / before by round: median (range) |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder))
        for kind in given.only:
            found: dict[Path, list[float]] = {given.before: [], given.after: []}
            for number in range(given.rounds):
                for repository in list(found)[:: 1 if number % 2 else -1]:
                    found[repository].append(seconds(repository, kind, rows[kind]))
            before, after = found.values()
            ratios = [b / a for a, b in zip(before, after, strict=True)]
            print(
                f"| {kind} | {statistics.median(before):.2f} | {statistics.median(after):.2f} | "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
