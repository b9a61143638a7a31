"""Does DPO learn what TRL's learns? Held-out accuracy and wall time of both: the same model, pairs,
steps, rate and batch.

    python benchmarks/preference_learning.py --seeds 0 1 2

Pairs: a list of words to reverse (reasoning-gym), the right answer against one with two words
exchanged. Accuracy: share of held-out pairs whose implicit reward log pi - log pi_ref is larger for
the right answer, computed by the same code for both models. Wall time: of the trainer's train(), in
a fresh process, loading not counted. TRL runs without gradient checkpointing.
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

TASK = "word_sequence_reversal"


def make_pairs(count: int, *, seed: int) -> list[dict[str, Any]]:
    """[{prompt, chosen, rejected}] as messages."""
    import reasoning_gym

    rng = random.Random(seed)
    rows = []
    for problem in reasoning_gym.create_dataset(
        TASK, size=count, seed=seed, min_words=3, max_words=6
    ):
        words = problem["answer"].split(", ")
        i, j = rng.sample(range(len(words)), 2)
        wrong = list(words)
        wrong[i], wrong[j] = wrong[j], wrong[i]
        if wrong != words:
            message = [{"role": "user", "content": problem["question"].strip()}]
            answers = [[{"role": "assistant", "content": ", ".join(w)}] for w in (words, wrong)]
            rows.append({"prompt": message, "chosen": answers[0], "rejected": answers[1]})
    return rows


def train_ours(rows: list[dict[str, Any]], source: str, args: argparse.Namespace) -> float:
    from posttrain import (
        DPOConfig,
        DPOTrainer,
        ModelConfig,
        OptimizerConfig,
        PackingConfig,
        TrainConfig,
    )

    config = DPOConfig(
        model=ModelConfig(name=source),
        packing=PackingConfig(max_tokens=1024),
        optimizer=OptimizerConfig(
            lr=args.lr, schedule="constant", weight_decay=0.0, max_grad_norm=1.0
        ),
        train=TrainConfig(
            run_dir=args.out,
            name="run",
            batch_size=args.batch,
            max_steps=args.steps,
            seed=args.seed,
            precision=args.dtype,
        ),
    )
    trainer = DPOTrainer(config=config, train_dataset=rows)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    (Path(args.out) / "run" / "final").rename(Path(args.out) / "model")
    return seconds


def train_trl(rows: list[dict[str, Any]], source: str, args: argparse.Namespace) -> float:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(source)
    models = [AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2)]
    trainer = DPOTrainer(
        model=models[0],
        ref_model=models[1],
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        args=DPOConfig(
            output_dir=args.out,
            per_device_train_batch_size=args.per_device,
            gradient_checkpointing=False,
            gradient_accumulation_steps=args.batch // args.per_device,
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            bf16=args.dtype == "bf16",
            use_cpu=True,
            report_to=[],
            seed=args.seed,
            save_strategy="no",
            disable_tqdm=True,
            max_length=1024,
            beta=0.1,
        ),
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.model.save_pretrained(Path(args.out) / "model")
    return seconds


def accuracies(folders: list[str], rows: list[dict[str, Any]], source: str) -> list[float]:
    """Of each model against the one in ``source``."""
    import torch
    from accelerate import PartialState

    from posttrain.data import DataConfig, groups_from_rows
    from posttrain.models.load import ModelConfig, load_model, load_tokenizer
    from posttrain.models.policy import Policy
    from posttrain.packing.batch import pack
    from posttrain.packing.plan import PackingConfig, plan_step

    PartialState()
    groups = groups_from_rows(
        rows,
        load_tokenizer(ModelConfig(name=source)),
        config=DataConfig(overlong="drop"),
        purpose="preference",
    )

    @torch.no_grad()
    def sums(folder: str) -> dict[tuple[int, int], float]:
        policy = Policy(
            load_model(ModelConfig(name=folder), dtype=torch.float32),
            PackingConfig(max_tokens=2048),
        ).eval()
        found = {}
        for part in plan_step(groups, world_size=1, max_tokens=2048, mode="shared").ranks[0]:
            batch = pack(groups, part.parts, mode="shared")
            logps = batch.with_logps(policy(batch)).logps_S
            found.update(zip(batch.refs, logps.tolist(), strict=True))
        return found

    base = sums(source)
    results = []
    for folder in folders:
        now = sums(folder)
        ratio = {ref: now[ref] - base[ref] for ref in now}
        results.append(statistics.fmean(ratio[g, 0] > ratio[g, 1] for g in range(len(groups))))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--per_device", type=int, default=4, help="TRL's batch size, in pairs")
    parser.add_argument("--contestant", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    from posttrain.models.load import resolve_source

    source = resolve_source("smollm2-135m")
    if args.contestant:
        rows = make_pairs(args.steps * args.batch + 64, seed=1000 + args.seed)[
            : args.steps * args.batch
        ]
        run = train_ours if args.contestant == "ours" else train_trl
        print(json.dumps({"seconds": run(rows, source, args)}))
        return
    held_out = make_pairs(220, seed=7_000_000)[:200]
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    reached: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(args.seeds):
            names = ["ours", "trl"] if number % 2 == 0 else ["trl", "ours"]
            for name in names:
                out = Path(folder) / f"{name}_{seed}"
                arguments = [
                    "--contestant",
                    name,
                    "--seed",
                    str(seed),
                    "--out",
                    str(out),
                    "--dtype",
                    args.dtype,
                    "--lr",
                    str(args.lr),
                ]
                arguments += [
                    "--steps",
                    str(args.steps),
                    "--batch",
                    str(args.batch),
                    "--per_device",
                    str(args.per_device),
                ]
                seconds[name].append(spawn(__file__, arguments)["seconds"])
                print(f"seed {seed} {name}: {seconds[name][-1]:.0f} s", file=sys.stderr)
            both = accuracies(
                [str(Path(folder) / f"{name}_{seed}" / "model") for name in ("ours", "trl")],
                held_out,
                source,
            )
            for name, accuracy in zip(("ours", "trl"), both, strict=True):
                reached[name].append(accuracy)
            print(f"seed {seed}: accuracy ours {both[0]:.3f}, TRL {both[1]:.3f}", file=sys.stderr)
    print("| | held-out accuracy, mean ± standard deviation | seconds |\n|---|---|---|")
    for name in ("ours", "trl"):
        deviation = statistics.stdev(reached[name]) if len(reached[name]) > 1 else 0.0
        print(
            f"| {name} | {statistics.fmean(reached[name]):.3f} ± {deviation:.3f} | "
            f"{spread(seconds[name])} |"
        )


if __name__ == "__main__":
    main()
