"""`make demo`: DeepSeek-R1 in miniature. SmolLM2-135M-Instruct learns a format from a few demonstrations (cold start), then
the task from a verifier alone (GRPO). With the recipes that users run.

    python recipes/demo.py [--sft-steps N] [--rl-steps N] [--precision auto|fp32|bf16|bf16-pure]

Problems: put the words of a list into reverse order (reasoning-gym, its verifier). Held-out problems are in no training data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "data" / "demo"
RUNS = REPO / "runs"
NUM_SHOWN = 3


def run(*command: str) -> None:
    """A command as a user would type it, shown first."""
    shown = " ".join(command).replace(f"{REPO}/", "")
    print(f"\n$ {shown}\n", flush=True)
    programs = {
        "python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
        "posttrain": [sys.executable, "-m", "posttrain.cli.main"],
    }  # fmt: skip
    arguments = [*programs[command[0]], *command[1:]]
    subprocess.run(arguments, cwd=REPO, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def evaluate(model: str, name: str) -> list[dict[str, Any]]:
    """Greedy answers to the held-out problems, verified."""
    out = DATA / f"answers_{name}.jsonl"
    run(
        "posttrain", "eval", model, "--task", str(DATA / "heldout.jsonl"), "--reward", "gym_answer", "--max-tokens", "64",
        "--out", str(out),
    )  # fmt: skip
    return [json.loads(line) for line in out.read_text().splitlines()]


def show(rows: list[dict[str, Any]], answers: dict[str, list[dict[str, Any]]], seconds: float) -> None:
    """What each stage changed, and three problems."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from posttrain.training.pass_at_k import half_width

    summary = Table(title=f"{len(rows)} held-out problems", title_justify="left")
    problems = Table(title="Three of them", title_justify="left", show_lines=True)
    summary.add_column("")
    for column in ("question", "wanted"):
        problems.add_column(column, overflow="fold")
    for name in answers:
        summary.add_column(name, justify="right")
        problems.add_column(name, overflow="fold")
    right = {name: [float(a["correct"]) for a in given] for name, given in answers.items()}
    summary.add_row("pass@1 (95 % interval)", *(f"{statistics.fmean(r):.1%} ± {half_width(r):.1%}" for r in right.values()))
    summary.add_row("mean length, tokens", *(f"{statistics.fmean(a['tokens'] for a in given):.1f}" for given in answers.values()))
    for i in range(NUM_SHOWN):
        texts = [Text(given[i]["text"], style="green" if given[i]["correct"] else "red") for given in answers.values()]
        question = rows[i]["messages"][-2]["content"].splitlines()[-1]
        problems.add_row(Text(question), Text(rows[i]["answer"]), *texts)
    console = Console()
    console.print()
    console.print(summary)
    console.print(problems)
    console.print(f"{seconds / 60:.0f} minutes. The trained model is in runs/demo_rl/final.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft-steps", type=int, default=16, help="optimizer steps of the cold start")
    parser.add_argument("--rl-steps", type=int, default=26, help="optimizer steps of GRPO")
    parser.add_argument("--precision", default="auto", help="of both trainings: auto, fp32, bf16, bf16-pure")
    args = parser.parse_args()
    began = time.monotonic()
    for name in ("demo_cold_start", "demo_rl"):
        shutil.rmtree(RUNS / name, ignore_errors=True)
    run("python", "recipes/demo_task.py", "--out", str(DATA), "--train", "640", "--reasoning")
    rows = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text().splitlines()]
    answers = {"before": evaluate("smollm2-135m", "before")}
    launch = ("accelerate", "launch", "--config_file", "launch/cpu.yaml")
    run(
        *launch, "recipes/sft.py", "--config", "recipes/configs/sft_smollm2.yaml", "--train.name", "demo_cold_start",
        "--train.max_steps", str(args.sft_steps), "--train.precision", args.precision,
    )  # fmt: skip
    answers["after SFT"] = evaluate("runs/demo_cold_start/final", "sft")
    run(
        *launch, "recipes/rl.py", "--config", "recipes/configs/grpo_smollm2.yaml", "--model.name", "runs/demo_cold_start/final",
        "--train.name", "demo_rl", "--train.max_steps", str(args.rl_steps), "--data.eval", "[]",
        "--train.precision", args.precision,
    )  # fmt: skip
    answers["after RL"] = evaluate("runs/demo_rl/final", "rl")
    show(rows, answers, time.monotonic() - began)


if __name__ == "__main__":
    main()
