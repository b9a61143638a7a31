"""Whole GRPO steps against TRL's GRPOTrainer: the same model, prompts, group size and dtype,
interleaved, each run a process.

    python benchmarks/rl_vs_trl.py --rows gsm8k_train_2000.jsonl.gz --dtype bf16 --rounds 2

A step: --prompts questions, 8 completions of each (up to --max_tokens), a reward, one update, no
KL. `--reward answer` (the last number is right) gives most groups of this model nothing to learn
from, and those are not computed here; with `--reward dense` (the share of letters that are e) every
completion is trained, so that the same work is compared. TRL generates with transformers' generate
(`trl`) or its continuous batching (`trl-cb`), and trains without gradient checkpointing in batches
of --per_device completions. Reported: prompts/s of whole steps, completion tokens/s of sampling
alone, trained tokens/s of all that is not sampling or reward, over all steps but the first; and the
peak of resident memory above the loaded model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Memory, spawn, spread

GROUP = 8


def read_questions(path: str, count: int) -> list[dict[str, Any]]:
    """[{prompt, answer}] of GSM8K rows."""
    from posttrain.data import read_rows

    rows = [row.values for row in read_rows(path)]
    picked = random.Random(0).sample(rows, count)
    return [
        {"prompt": [{"role": "user", "content": r["question"]}], "answer": r["answer"]}
        for r in picked
    ]


def last_number_is(text: str, answer: str) -> float:
    """1.0 if the last number of the text is what follows #### in the answer."""
    found = re.findall(r"-?[0-9][0-9,]*", text)
    return float(
        bool(found)
        and found[-1].replace(",", "") == answer.rpartition("####")[2].strip().replace(",", "")
    )


def share_of_e(text: str, answer: str) -> float:
    """Differs between any two completions, almost always."""
    return text.count("e") / max(len(text), 1)


REWARDS = {"answer": last_number_is, "dense": share_of_e}


def run_ours(rows: list[dict[str, Any]], source: str, args: argparse.Namespace) -> dict[str, Any]:
    from posttrain import ModelConfig, OptimizerConfig, PackingConfig, TrainConfig
    from posttrain.models.load import load_model
    from posttrain.rl.batches import RolloutConfig
    from posttrain.rollout.engine import SamplingConfig
    from posttrain.rollout.local import LocalConfig
    from posttrain.trainers.rl import RLConfig, RLTrainer
    from posttrain.training.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        import torch

        from posttrain.models.load import load_tokenizer

        config = RLConfig(
            model=ModelConfig(name=source),
            sampling=SamplingConfig(max_tokens=args.max_tokens),
            algorithm_options={"beta": 0.0},
            rollout=RolloutConfig(group_size=GROUP, show_every=0),
            local=LocalConfig(max_rows=args.max_rows),
            packing=PackingConfig(max_tokens=args.budget),
            optimizer=OptimizerConfig(lr=1e-6, schedule="constant"),
            train=TrainConfig(
                run_dir=folder,
                name="run",
                batch_size=args.prompts,
                max_steps=args.steps,
                precision=args.dtype,
            ),
        )
        model = load_model(config.model, dtype=torch.float32)
        memory = Memory()
        memory.start(model)
        judge = REWARDS[args.reward]

        def reward(completion: str, sample: dict[str, Any]) -> float:
            return judge(completion, sample["answer"])

        trainer = RLTrainer(
            model=model,
            tokenizer=load_tokenizer(config.model),
            train_dataset=rows,
            rewards={reward: 1.0},
            config=config,
        )
        trainer.train()
        peak = memory.above()
        steps = [m for m in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "step_s" in m][
            1:
        ]
    tokens = [m["length"] * GROUP * args.prompts for m in steps]
    rollout_s = [m["rollout_s"] for m in steps]
    rest = [m["step_s"] - m["rollout_s"] - m["reward_s"] for m in steps]
    return _figures(args, [m["step_s"] for m in steps], rollout_s, rest, tokens, peak)


def run_trl(rows: list[dict[str, Any]], source: str, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[float] = []
    generated: list[tuple[float, int]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    def reward(completions: Any, answer: Any, **_: Any) -> list[float]:
        return [
            REWARDS[args.reward](c[0]["content"], a)
            for c, a in zip(completions, answer, strict=True)
        ]

    extra: dict[str, Any] = {}
    if args.contestant == "trl-cb":
        extra = {
            "use_transformers_continuous_batching": True,
            "transformers_continuous_batching_config": {"num_blocks": 64},
        }
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        memory = Memory()
        memory.start(model)
        trainer = GRPOTrainer(
            model=model,
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
                max_completion_length=args.max_tokens,
                max_steps=args.steps,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                bf16=args.dtype == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=False,
                **extra,
            ),
        )
        inner = trainer._generate_single_turn

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = inner(*arguments, **options)
            generated.append((time.perf_counter() - began, sum(map(len, result[0]))))
            return result

        trainer._generate_single_turn = timed
        trainer.train()
        peak = memory.above()
    seconds = [b - a for a, b in zip(marks[::2], marks[1::2], strict=True)][1:]
    per_step = len(generated) // args.steps
    chunks = [generated[i : i + per_step] for i in range(0, len(generated), per_step)][1:]
    rollout_s = [sum(s for s, _ in c) for c in chunks]
    return _figures(
        args,
        seconds,
        rollout_s,
        [t - r for t, r in zip(seconds, rollout_s, strict=True)],
        [float(sum(n for _, n in c)) for c in chunks],
        peak,
    )


def _figures(
    args: Any, step_s: Any, rollout_s: Any, rest_s: Any, tokens: Any, peak: int
) -> dict[str, Any]:
    return {
        "prompts_per_s": args.prompts * len(step_s) / sum(step_s),
        "rollout_tokens_per_s": sum(tokens) / sum(rollout_s),
        "update_tokens_per_s": sum(tokens) / sum(rest_s),
        "mean_length": statistics.fmean(tokens) / (args.prompts * GROUP),
        "step_s": statistics.fmean(step_s),
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", required=True, help="GSM8K rows (question, answer)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument(
        "--contestants", nargs="*", default=["ours", "trl"], choices=["ours", "trl", "trl-cb"]
    )
    parser.add_argument("--reward", choices=list(REWARDS), default="answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of a run; the first is not timed"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--max_rows", type=int, default=64)
    parser.add_argument("--budget", type=int, default=1536, help="our token budget")
    parser.add_argument("--per_device", type=int, default=8, help="TRL's batches, in completions")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    from posttrain.models.load import resolve_source

    if args.contestant:
        rows = read_questions(args.rows, args.prompts * args.steps)
        run = run_ours if args.contestant == "ours" else run_trl
        print(json.dumps(run(rows, resolve_source("smollm2-135m"), args)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    passed = [
        f"--{k}={getattr(args, k)}"
        for k in (
            "rows",
            "dtype",
            "reward",
            "steps",
            "prompts",
            "max_tokens",
            "max_rows",
            "budget",
            "per_device",
        )
    ]
    for number in range(args.rounds):
        for name in args.contestants if number % 2 == 0 else args.contestants[::-1]:
            results[name].append(spawn(__file__, ["--contestant", name, *passed]))
            print(f"round {number} {name}: {json.dumps(results[name][-1])}", file=sys.stderr)
    print(
        "| | prompts/s | sampling, tokens/s | update, tokens/s | peak, GB | ours / it: step | "
        "sampling | update | memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        own = [
            spread([r[k] * (1e-9 if k == "peak_bytes" else 1) for r in runs])
            for k in ("prompts_per_s", "rollout_tokens_per_s", "update_tokens_per_s", "peak_bytes")
        ]
        ratios = [
            spread([a[k] / b[k] for a, b in zip(results["ours"], runs, strict=True)])
            for k in ("prompts_per_s", "rollout_tokens_per_s", "update_tokens_per_s", "peak_bytes")
        ]
        print(f"| {name} | {' | '.join(own)} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
