"""`make demo`: trains SmolLM2-135M-Instruct on a task it cannot do, with the recipe that users run, and shows what changed.

    python recipes/demo.py [--steps N]

Held-out problems appear nowhere in the training data. Answers are greedy and scored by reasoning-gym's own verifier.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from demo_task import score_answer

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "data" / "demo"
RUN = REPO / "runs" / "demo"
MAX_ANSWER_TOKENS = 32
NUM_SHOWN = 3
TRAIN_ROWS = 640


def answer_all(model_source: str, rows: list[dict[str, Any]], title: str) -> list[str]:
    """Greedy answers of a model to every row's question."""
    from rich.progress import Progress

    from posttrain.models.load import ModelConfig, load_model, load_tokenizer
    from posttrain.precision import default_precision, torch_dtype
    from posttrain.training.evaluate import greedy_answers

    config = ModelConfig(name=model_source)
    tokenizer = load_tokenizer(config)
    model = load_model(config, dtype=torch_dtype(default_precision("cpu").compute))
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in rows
    ]
    with Progress() as bar:
        task = bar.add_task(title, total=len(prompts))
        return list(
            greedy_answers(
                model, tokenizer, prompts, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=50,
                advance=lambda n: bar.advance(task, n),
            )
        )  # fmt: skip


def accuracy(answers: list[str], rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Share of exact answers, and half the width of its 95 % interval (Wilson 1927)."""
    n = len(rows)
    p = sum(score_answer(a, r) for a, r in zip(answers, rows, strict=True)) / n
    z = 1.96
    return p, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)


def train(steps: int | None) -> dict[str, list[float]]:
    """The recipe, as a user starts it; returns the held-out losses it measured."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml", "recipes/sft.py",
        "--config", "recipes/configs/sft_smollm2.yaml", "--train.name", RUN.name, "--train.resume", "never",
        *(["--train.max_steps", str(steps)] if steps else []),
    ]  # fmt: skip
    print("\n$ " + " ".join(["accelerate launch", *command[3:]]) + "\n", flush=True)
    subprocess.run(command, cwd=REPO, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    return {"eval_loss": [m["eval_loss"] for m in lines if "eval_loss" in m], "loss": [m["loss"] for m in lines if "loss" in m]}


def show(rows: list[dict[str, Any]], before: list[str], after: list[str], losses: dict[str, list[float]]) -> None:
    """Two tables: what was learned, and three problems with their answers."""
    from rich.console import Console
    from rich.table import Table

    (p0, w0), (p1, w1) = accuracy(before, rows), accuracy(after, rows)
    summary = Table(title=f"{len(rows)} held-out problems", title_justify="left")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right")):
        summary.add_column(column, justify=justify)  # type: ignore[arg-type]
    summary.add_row("loss (nats per token)", f"{losses['eval_loss'][0]:.3f}", f"{losses['eval_loss'][-1]:.3f}")
    summary.add_row("exact-match accuracy", f"{p0:.1%} ± {w0:.1%}", f"{p1:.1%} ± {w1:.1%}")
    answers = Table(title="Three of them", title_justify="left", show_lines=True)
    for column in ("question", "wanted", "before", "after"):
        answers.add_column(column, overflow="fold")
    for i in range(NUM_SHOWN):
        answers.add_row(
            rows[i]["messages"][-2]["content"].splitlines()[-1], rows[i]["messages"][-1]["content"], before[i], after[i]
        )
    console = Console()
    console.print()
    console.print(summary)
    console.print(answers)
    console.print(f"The trained model is in {RUN.relative_to(REPO) / 'final'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps; default: one pass over the training rows")
    args = parser.parse_args()
    subprocess.run([sys.executable, "recipes/demo_task.py", "--out", str(DATA), "--train", str(TRAIN_ROWS)], cwd=REPO, check=True)
    rows = [json.loads(line) for line in (DATA / "heldout.jsonl").read_text().splitlines()]
    before = answer_all("smollm2-135m", rows, "answers before")
    if RUN.exists():
        import shutil

        shutil.rmtree(RUN)
    losses = train(args.steps)
    after = answer_all(str(RUN / "final"), rows, "answers after")
    show(rows, before, after, losses)


if __name__ == "__main__":
    main()
