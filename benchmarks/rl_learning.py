"""GRPO learns what TRL's GRPOTrainer learns, and how long each takes: reward against wall time,
three seeds, plotted.

    python benchmarks/rl_learning.py --seeds 0 1 2 --out benchmarks/rl_learning.svg

Sums of two numbers up to 50 after three examples, SmolLM2-135M; the reward is 1 if the completion's
first line is the number. Both sides: the same problems in a step, 8 completions of each, the same
rate, AdamW, group-normalised advantages (sample standard deviation), no KL, one update for each
batch. Wall time: the steps alone, without loading. Each run is a process, interleaved.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import spawn, spread

GROUP, MAX_TOKENS = 8, 8
EXAMPLES = "2+3=5\n10+4=14\n7+12=19\n"


def problems(count: int, seed: int) -> list[dict[str, Any]]:
    """[{prompt, answer}]"""
    rng = random.Random(seed)
    pairs = [(rng.randrange(51), rng.randrange(51)) for _ in range(count)]
    return [{"prompt": f"{EXAMPLES}{a}+{b}=", "answer": str(a + b)} for a, b in pairs]


def right(completion: str, sample: dict[str, Any]) -> float:
    """1.0 for a first line that is the number."""
    return float(completion.partition("\n")[0].strip() == sample["answer"])


def run_ours(
    rows: list[dict[str, Any]], source: str, args: argparse.Namespace
) -> list[tuple[float, float]]:
    from posttrain import ModelConfig, OptimizerConfig, PackingConfig, TrainConfig
    from posttrain.data.prompts import PromptConfig
    from posttrain.rl.batches import RolloutConfig
    from posttrain.rollout.engine import SamplingConfig
    from posttrain.trainers.rl import RLConfig, RLTrainer
    from posttrain.training.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        config = RLConfig(
            model=ModelConfig(name=source),
            data=PromptConfig(template="plain"),
            sampling=SamplingConfig(max_tokens=MAX_TOKENS),
            algorithm_options={"beta": 0.0, "std": "sample"},
            rollout=RolloutConfig(group_size=GROUP, show_every=0),
            packing=PackingConfig(max_tokens=1024),
            optimizer=OptimizerConfig(lr=args.lr, schedule="constant"),
            train=TrainConfig(
                run_dir=folder,
                name="run",
                batch_size=args.prompts,
                max_steps=args.steps,
                precision=args.dtype,
                seed=args.seed,
            ),
        )
        RLTrainer(train_dataset=rows, rewards={right: 1.0}, config=config).train()
        steps = [m for m in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "step_s" in m]
    return [(m["step_s"], m["reward"]) for m in steps]


def run_trl(
    rows: list[dict[str, Any]], source: str, args: argparse.Namespace
) -> list[tuple[float, float]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[float] = []
    rewards: list[list[float]] = [[]]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())
            rewards.append([])

    def reward(completions: Any, answer: Any, **_: Any) -> list[float]:
        values = [right(c, {"answer": a}) for c, a in zip(completions, answer, strict=True)]
        rewards[-1] += values
        return values

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
            processing_class=AutoTokenizer.from_pretrained(source),
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=args.per_device,
                num_generations=GROUP,
                beta=0.0,
                loss_type="grpo",
                gradient_accumulation_steps=args.prompts * GROUP // args.per_device,
                max_completion_length=MAX_TOKENS,
                max_steps=args.steps,
                learning_rate=args.lr,
                lr_scheduler_type="constant",
                bf16=args.dtype == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
                seed=args.seed,
                weight_decay=0.0,
            ),
        )
        trainer.train()
    seconds = [b - a for a, b in zip(marks[::2], marks[1::2], strict=True)]
    return [(s, statistics.fmean(r)) for s, r in zip(seconds, rewards, strict=False)]


def plot(curves: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    """Reward of each step against the seconds of training until its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for (name, runs), colour in zip(curves.items(), ("#1b6ca8", "#b0413e"), strict=True):
        for number, run in enumerate(runs):
            seconds = [sum(s for s, _ in run[: i + 1]) for i in range(len(run))]
            axes.plot(
                seconds,
                [r for _, r in run],
                color=colour,
                lw=1.2,
                alpha=0.8,
                label=name if number == 0 else None,
            )
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("mean reward of a step's completions")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8, help="problems in a step")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--per_device", type=int, default=16, help="TRL's batches, in completions")
    parser.add_argument("--out", default="rl_learning.svg", help="the plot")
    parser.add_argument("--contestant", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    from posttrain.models.load import resolve_source

    if args.contestant:
        rows = problems(args.prompts * args.steps, seed=100 + args.seed)
        run = run_ours if args.contestant == "ours" else run_trl
        print(json.dumps({"steps": run(rows, resolve_source("smollm2-135m"), args)}))
        return
    curves: dict[str, list[list[tuple[float, float]]]] = {"posttrain": [], "TRL": []}
    passed = [
        f"--{name}={getattr(args, name)}"
        for name in ("steps", "prompts", "lr", "dtype", "per_device")
    ]
    for number, seed in enumerate(args.seeds):
        for name in list(curves)[:: 1 if number % 2 == 0 else -1]:
            contestant = "ours" if name == "posttrain" else "trl"
            curves[name].append(
                spawn(__file__, ["--contestant", contestant, "--seed", str(seed), *passed])["steps"]
            )
            print(f"seed {seed} {name}: {json.dumps(curves[name][-1])}", file=sys.stderr)
    plot(curves, Path(args.out))
    print("| | reward, first 3 steps | reward, last 5 steps | seconds |\n|---|---|---|---|")
    for name, runs in curves.items():
        first, last = (
            [statistics.fmean(r for _, r in part) for part in parts]
            for parts in ([run[:3] for run in runs], [run[-5:] for run in runs])
        )
        print(
            f"| {name} | {spread(first)} | {spread(last)} | "
            f"{spread([sum(s for s, _ in run) for run in runs])} |"
        )


if __name__ == "__main__":
    main()
