"""DPO and reward modelling against TRL: the same model, pairs, dtype and global batch, interleaved,
each run a process.

    posttrain prep pairs hh_harmless_300.jsonl.gz --out /tmp/hh
    python benchmarks/preference_vs_trl.py --pairs /tmp/hh/train --dtype bf16 --task dpo

Contestants: `ours` and `trl` with the reference computed in every step; `ours-cached` and
`trl-cached` with reference log-probs computed before training (not timed). TRL runs in its fastest
correct setting on a CPU: no gradient checkpointing, batches of the size in --sizes that is fastest
here; its padding-free mode does not exist at present. Without --pairs, dialogues of like lengths
are generated.

Reported: pairs/s over all steps but the first; the peak of resident memory above the loaded models
(policy and reference).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Memory, spawn, spread

CONTESTANTS = {
    "dpo": ("ours", "trl"),
    "dpo-cached": ("ours-cached", "trl-cached"),
    "reward": ("ours", "trl"),
}


def read_pairs(path: str | None, count: int) -> list[dict[str, Any]]:
    """[{prompt, chosen, rejected}] as messages: rows of `posttrain prep pairs`, or generated
    ones."""
    if path:
        from posttrain.data import read_rows

        rows = [row.values for row in read_rows(path)]
        rows = random.Random(0).sample(rows, count)
        return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    rng = random.Random(0)
    words = (
        "what would you do if somebody asked how to make a bad thing look good and not get "
        "caught by anyone at all"
    ).split()

    def text(mean: int) -> str:
        return " ".join(rng.choices(words, k=max(4, int(rng.lognormvariate(0, 0.6) * mean))))

    return [
        {
            "prompt": [{"role": "user", "content": text(90)}],
            "chosen": [{"role": "assistant", "content": text(40)}],
            "rejected": [{"role": "assistant", "content": text(40)}],
        }
        for _ in range(count)
    ]


def run_ours(
    pairs: list[dict[str, Any]], model_folder: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Our trainer; the time of a step is the whole step, planning and metrics included."""
    from posttrain import DPOConfig, DPOTrainer, ReferenceConfig, RewardConfig, RewardTrainer
    from posttrain.models.load import ModelConfig, load_tokenizer
    from posttrain.packing.plan import PackingConfig
    from posttrain.training.config import TrainConfig
    from posttrain.training.metrics import read_metrics
    from posttrain.training.optimizer import OptimizerConfig

    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = dict(
            model=ModelConfig(name=model_folder),
            packing=PackingConfig(max_tokens=args.max_tokens),
            optimizer=OptimizerConfig(lr=1e-6, schedule="constant"),
            train=TrainConfig(
                run_dir=folder,
                name="run",
                batch_size=args.batch,
                max_steps=args.steps,
                precision=args.dtype,
            ),
        )
        tokenizer = load_tokenizer(shared["model"])
        memory = Memory()
        if args.task == "reward":
            trainer: Any = RewardTrainer(
                config=RewardConfig(**shared), tokenizer=tokenizer, train_dataset=pairs
            )
        else:
            of = ReferenceConfig(cache=args.contestant.endswith("cached"), cache_dir=folder)
            trainer = DPOTrainer(
                config=DPOConfig(**shared, reference=of), tokenizer=tokenizer, train_dataset=pairs
            )
        load, set_up, loops = trainer._load_model, trainer._set_up, []

        def load_and_start(*arguments: Any) -> Any:
            model = load(*arguments)
            memory.start(model)
            return model

        def set_up_and_keep(loop: Any, *arguments: Any) -> None:
            set_up(loop, *arguments)
            loops.append(loop)

        trainer._load_model, trainer._set_up = load_and_start, set_up_and_keep
        trainer.train()
        reference = (
            loops[0].reference
        )  # its copy is made inside the run, TRL's is loaded before the measurement starts
        peak = memory.above() - (reference.num_bytes if reference is not None else 0)
        steps = [m for m in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "step_s" in m][
            1:
        ]
    rate = args.batch * len(steps) / sum(m["step_s"] for m in steps)
    return {"pairs_per_s": rate, "peak_bytes": peak, "loss": [m["loss"] for m in steps]}


def run_trl(
    pairs: list[dict[str, Any]], model_folder: str, args: argparse.Namespace
) -> dict[str, Any]:
    """TRL's trainer; the time from the end of one optimizer step to the end of the next."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = dict(
            output_dir=folder,
            per_device_train_batch_size=args.per_device,
            gradient_accumulation_steps=args.batch // args.per_device,
            max_steps=args.steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16=args.dtype == "bf16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            max_length=1024,
            gradient_checkpointing=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        data = Dataset.from_list(pairs)
        memory = Memory()
        if args.task == "reward":
            model = AutoModelForSequenceClassification.from_pretrained(
                model_folder, dtype=torch.float32, num_labels=1
            )
            memory.start(model)
            trainer: Any = RewardTrainer(
                model=model,
                args=RewardConfig(**shared),
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        else:
            cached = args.contestant.endswith("cached")
            model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
            reference = (
                None
                if cached
                else AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
            )
            memory.start(*(m for m in (model, reference) if m is not None))
            trainer = DPOTrainer(
                model=model,
                ref_model=reference,
                args=DPOConfig(**shared, precompute_ref_log_probs=cached),
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        trainer.train()
        peak = memory.above()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][1:]
    rate = args.batch * (args.steps - 1) / (ends[-1] - ends[0])
    return {"pairs_per_s": rate, "peak_bytes": peak, "loss": losses}


def start(
    contestant: str, dtype: str, args: argparse.Namespace, *, per_device: int, steps: int
) -> dict[str, Any]:
    """One run in a fresh process."""
    arguments = [
        "--contestant",
        contestant,
        "--dtype",
        dtype,
        "--task",
        args.task,
        "--steps",
        str(steps),
    ]
    arguments += [
        "--per_device",
        str(per_device),
        "--max_tokens",
        str(args.max_tokens),
        "--batch",
        str(args.batch),
    ]
    return spawn(__file__, [*arguments, *(["--pairs", args.pairs] if args.pairs else [])])


def compare(dtype: str, args: argparse.Namespace) -> list[str]:
    """Interleaved rounds; ratios are taken within a round, so that a slow minute hits both
    sides."""
    ours, theirs = CONTESTANTS[args.task]
    fastest = args.sizes[0]
    if len(args.sizes) > 1:
        speeds = {
            size: start(theirs, dtype, args, per_device=size, steps=2)["pairs_per_s"]
            for size in args.sizes
        }
        fastest = max(speeds, key=lambda size: speeds[size])
        print(f"{args.task} {dtype}: TRL's batch sizes {speeds} -> {fastest}", file=sys.stderr)
    rounds = []
    for number in range(args.rounds):
        names = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        rounds.append(
            {n: start(n, dtype, args, per_device=fastest, steps=args.steps) for n in names}
        )
        print(f"{args.task} {dtype} round {number}: " + json.dumps(rounds[-1]), file=sys.stderr)
    speed = [r[ours]["pairs_per_s"] / r[theirs]["pairs_per_s"] for r in rounds]
    memory = [r[ours]["peak_bytes"] / r[theirs]["peak_bytes"] for r in rounds]
    columns = [spread([r[n]["pairs_per_s"] for r in rounds]) for n in (ours, theirs)]
    columns += [spread([r[n]["peak_bytes"] / 1e9 for r in rounds]) for n in (ours, theirs)]
    return [
        f"| {args.task} | {dtype} | {' | '.join(columns)} | {spread(speed)} | {spread(memory)} "
        f"| {fastest} |"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", help="file or folder of rows with prompt, chosen, rejected")
    parser.add_argument(
        "--task", choices=sorted(CONTESTANTS), nargs="*", default=["dpo", "dpo-cached", "reward"]
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="*", default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps of a run; the first is not timed"
    )
    parser.add_argument("--batch", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[1, 2, 4], help="TRL's batch sizes to try, in pairs"
    )
    parser.add_argument("--max_tokens", type=int, default=512, help="our token budget")
    parser.add_argument("--per_device", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tasks, dtypes = args.task, args.dtype
    if not args.contestant:
        lines = []
        for args.task in tasks:
            lines += [line for dtype in dtypes for line in compare(dtype, args)]
        print(
            "| | dtype | ours, pairs/s | TRL, pairs/s | ours, GB | TRL, GB | speed, ours / TRL | "
            "memory, ours / TRL | batches |\n|---|---|---|---|---|---|---|---|---|"
        )
        print("\n".join(lines))
        return
    from posttrain.models.load import resolve_source

    (args.task,), (args.dtype,) = tasks, dtypes
    pairs = read_pairs(args.pairs, args.batch * args.steps)
    run = run_ours if args.contestant.startswith("ours") else run_trl
    print(json.dumps(run(pairs, resolve_source("smollm2-135m"), args)))


if __name__ == "__main__":
    main()
