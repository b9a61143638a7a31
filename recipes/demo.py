"""`make demo`: DeepSeek-R1 in miniature, with the recipes that users run.

    python recipes/demo.py [--seed N] [--sft-steps N] [--rl-steps N] [--precision
    auto|fp32|bf16|bf16-pure]

SmolLM2-135M-Instruct says how many words are in a list. A few demonstrations teach it a format:
most of them guess, one in four counts in its thought (cold start). Then a verifier of the number
alone (GRPO) finds out that counting pays: answers become longer and right. Held-out problems are in
no training data. Writes runs/demo_cold_start, runs/demo_grpo (with rewards.svg) and what the
commands printed, data/word_count/*.log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "data" / "word_count"
RUNS = REPO / "runs"
NUM_SHOWN = 3
WIDTH = 80
PROGRAMS = {
    "python": [sys.executable],
    "posttrain": [sys.executable, "-m", "posttrain.cli.main"],
}
Answers = list[dict[str, Any]]


def run(
    console: Console, what: str, command: tuple[str, ...], *, log: str, metrics: Path | None = None
) -> None:
    """A command as a user would type it, shown first; then one live line. What it prints goes to
    ``log``."""
    joined = re.sub(
        r"(--\S+) (?!--)", "\\1\N{NO-BREAK SPACE}", " ".join(command)
    )  # an option stays with its value
    shown = textwrap.wrap(
        joined, WIDTH - 4, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    console.print(f"\n[bold]{what}[/bold]")
    console.print(Text("$ " + " \\\n".join(shown).replace("\N{NO-BREAK SPACE}", " "), style="dim"))
    DATA.mkdir(parents=True, exist_ok=True)
    path, began = DATA / log, time.monotonic()
    arguments = [*PROGRAMS[command[0]], *command[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": str(WIDTH)}
    with path.open("w") as file:
        process = subprocess.Popen(
            arguments, cwd=REPO, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while process.poll() is None:
                    live.update(
                        Text(f"  {_clock(began)}  {_now(metrics)}"[: WIDTH - 1]), refresh=True
                    )
                    time.sleep(0.5)
        finally:
            process.kill()
    if process.returncode != 0:
        tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
        console.print(
            f"{escape(tail)}\n\nThe command failed; all it printed is in {path.relative_to(REPO)}.",
            highlight=False,
        )
        sys.exit(1)
    console.print(f"  {_clock(began)}  {_now(metrics) or 'done'}", highlight=False)


def _clock(began: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    return f"{minutes}:{seconds:02d}"


def _now(path: Path | None) -> str:
    """The last step that a run has written: number, loss or reward, length, speed."""
    steps = read_steps(path) if path else []
    if not steps:
        return "starting" if path else ""
    last = steps[-1]
    what = (
        f"reward {last['reward']:.2f}  length {last['length']:.1f} tokens  {last['step_s']:.0f} s "
        "a step"
        if "reward" in last
        else f"loss {last['loss']:.2f}  {last['step_s']:.0f} s a step"
    )
    return f"step {last['step']}  {what}"


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The optimizer steps of a metrics.jsonl, also of one that is being written."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [step for step in map(json.loads, lines) if "step_s" in step]


def read_answers(path: Path) -> Answers:
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(console: Console, rows: list[dict[str, Any]], answers: dict[str, Answers]) -> None:
    """What each stage changed, and three problems before and after."""
    from posttrain.rl.evaluate import half_width

    table = Table(title=f"{len(answers['before'])} held-out problems", title_justify="left")
    table.add_column("")
    for name in answers:
        table.add_column(name, justify="right")
    right = {name: [float(a["correct"]) for a in given] for name, given in answers.items()}
    ended = {
        name: statistics.fmean(a["finish_reason"] == "stop" for a in given)
        for name, given in answers.items()
    }
    table.add_row(
        "right (95 % interval)",
        *((f"{statistics.fmean(r):.0%} ± {half_width(r):.0%}") for r in right.values()),
    )
    table.add_row("ended by themselves", *(f"{share:.0%}" for share in ended.values()))
    table.add_row(
        "mean length, tokens",
        *(f"{statistics.fmean(a['tokens'] for a in given):.0f}" for given in answers.values()),
    )
    console.print()
    console.print(table)
    for i in range(NUM_SHOWN):
        console.print(
            f"\n[bold]{escape(rows[i]['messages'][-2]['content'])}[/bold]  ({rows[i]['answer']})",
            highlight=False,
        )
        for name, given in answers.items():
            said = " ".join(given[i]["text"].split())
            lines = textwrap.wrap(
                f"{said[:200]}{' ...' if len(said) > 200 else ''}", WIDTH - 23
            ) or ["(nothing)"]
            style = "green" if given[i]["correct"] else "red"
            for number, line in enumerate(lines):
                console.print(Text.assemble(f"  {name if number == 0 else '':18} ", (line, style)))


def draw(steps: list[dict[str, Any]], answers: dict[str, Answers], path: Path) -> None:
    """Reward and length over the steps of the reinforcement learning, with the held-out problems at
    both ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    x = [s["step"] for s in steps]
    above.plot(
        x,
        [s["reward"] for s in steps],
        marker="o",
        color="tab:blue",
        label="sampled answers, trained on",
    )
    ends = [answers["after cold start"], answers["after GRPO"]]
    above.plot(
        [0, x[-1]],
        [statistics.fmean(a["correct"] for a in e) for e in ends],
        "D",
        color="tab:orange",
        label="held-out problems",
    )
    above.set(
        ylabel="share that is right", ylim=(0, 1.02), title="GRPO from a verifier: counting pays"
    )
    above.legend(loc="lower right")
    below.plot(x, [s["length"] for s in steps], marker="o", color="tab:blue")
    below.plot(
        [0, x[-1]],
        [statistics.fmean(a["tokens"] for a in e) for e in ends],
        "D",
        color="tab:orange",
    )
    below.set(ylabel="mean length, tokens", xlabel="optimizer step", ylim=(0, None))
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="other problems and other samples (default: 0)"
    )
    parser.add_argument(
        "--sft-steps", type=int, default=8, help="optimizer steps of the cold start"
    )
    parser.add_argument("--rl-steps", type=int, default=7, help="optimizer steps of GRPO")
    parser.add_argument(
        "--precision", default="auto", help="of both trainings: auto, fp32, bf16, bf16-pure"
    )
    args = parser.parse_args()
    console, began = Console(width=WIDTH), time.monotonic()
    for name in ("demo_cold_start", "demo_grpo"):
        shutil.rmtree(RUNS / name, ignore_errors=True)
    shared = ("--train.seed", str(args.seed), "--train.precision", args.precision)
    run(
        console,
        "Problems: how many words are in a list?",
        (
            "python",
            "recipes/demo_task.py",
            "--out",
            "data/word_count",
            "--task",
            "word_count",
            "--train",
            "640",
            "--eval",
            "100",
            "--seed",
            str(args.seed),
        ),
        log="problems.log",
    )
    run(
        console,
        "Before: SmolLM2-135M-Instruct answers the held-out problems",
        (
            "posttrain",
            "eval",
            "smollm2-135m",
            "--task",
            "data/word_count/heldout.jsonl",
            "--reward",
            "numeric_answer",
            "--max-tokens",
            "48",
            "--must-end",
            "--temperature",
            "1",
            "--out",
            "data/word_count/before.jsonl",
        ),
        log="before.log",
    )
    run(
        console,
        "Cold start: demonstrations, of which one in four counts in its thought",
        (
            "posttrain",
            "sft",
            "--config",
            "demo_cold_start",
            "--train.max_steps",
            str(args.sft_steps),
            *shared,
        ),
        log="cold_start.log",
        metrics=RUNS / "demo_cold_start" / "metrics.jsonl",
    )
    run(
        console,
        "GRPO: eight answers to each problem, a verifier of the number, nothing else",
        (
            "posttrain",
            "rl",
            "--config",
            "demo_grpo",
            "--train.max_steps",
            str(args.rl_steps),
            *shared,
        ),
        log="grpo.log",
        metrics=RUNS / "demo_grpo" / "metrics.jsonl",
    )
    kept = RUNS / "demo_grpo" / "rollouts"
    answers = {
        "before": read_answers(DATA / "before.jsonl"),
        "after cold start": read_answers(kept / "held_out_000000.jsonl"),
        "after GRPO": read_answers(kept / f"held_out_{args.rl_steps:06d}.jsonl"),
    }
    rows = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text().splitlines()]
    show(console, rows, answers)
    picture = RUNS / "demo_grpo" / "rewards.svg"
    draw(read_steps(RUNS / "demo_grpo" / "metrics.jsonl"), answers, picture)
    console.print(
        f"\n{_clock(began)} minutes. The reward curve is in {picture.relative_to(REPO)},\nthe "
        "trained model in runs/demo_grpo/final, answers in runs/demo_grpo/rollouts.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
