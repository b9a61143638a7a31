"""SFT against TRL: the same model, rows, dtype and global batch, interleaved, each run a process of
its own.

    python benchmarks/sft_vs_trl.py   # both dtypes, 3 rounds: about 35 minutes on 2 cores
    python benchmarks/sft_vs_trl.py --dtype bf16 --rounds 5

Contestants: `ours`; `trl-default` (SFTConfig as it comes: gradient checkpointing, batches of 8
padded to the longest); `trl-best` (no checkpointing, batches grouped by length, the fastest batch
size of --sizes measured here first). Packing is not among TRL's settings: without flash attention
its packed rows see each other on CPU, so its gradient is wrong. Rows: GSM8K (--rows FILE.jsonl[.gz]
with question and answer), else generated ones of like lengths.

Reported: trained tokens/s over all steps but the first, and the peak of resident memory above the
loaded model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Memory, spawn, spread

GLOBAL_BATCH = 16


def read_rows(path: str | None, count: int) -> list[dict[str, str]]:
    """[{prompt, completion}]: question and answer of GSM8K, or word problems of like lengths from a
    fixed seed."""
    if path:
        opener: Any = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt") as file:
            rows = [json.loads(line) for line in file][:count]
        return [{"prompt": r["question"], "completion": r["answer"]} for r in rows]
    rng = random.Random(0)
    words = (
        "Natalia sold clips to her friends in April and then half as many in May how much did "
        "she earn each day"
    ).split()

    def text(mean: int) -> str:
        return (
            " ".join(rng.choices(words, k=max(8, int(rng.lognormvariate(0, 0.45) * mean))))
            + f" {rng.randint(1, 99)}"
        )

    return [{"prompt": text(45), "completion": text(75)} for _ in range(count)]


def run_ours(
    rows: list[dict[str, str]], model_folder: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Our trainer; the time of a step is the whole step, planning and metrics included."""
    import torch

    from posttrain import SFTConfig, SFTTrainer
    from posttrain.models.load import ModelConfig, load_model, load_tokenizer
    from posttrain.packing.plan import PackingConfig
    from posttrain.training.config import TrainConfig
    from posttrain.training.metrics import read_metrics
    from posttrain.training.optimizer import OptimizerConfig

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            model=ModelConfig(name=model_folder),
            packing=PackingConfig(max_tokens=args.max_tokens, logits_chunk=args.logits_chunk),
            optimizer=OptimizerConfig(lr=1e-5, schedule="constant"),
            train=TrainConfig(
                run_dir=folder, batch_size=GLOBAL_BATCH, max_steps=args.steps, precision=args.dtype
            ),
        )
        tokenizer = load_tokenizer(config.model)
        model = load_model(config.model, dtype=torch.float32)
        memory = Memory()
        memory.start(model)
        SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, config=config).train()
        peak = memory.above()
        steps = [m for m in read_metrics(Path(folder) / "sft" / "metrics.jsonl") if "step_s" in m][
            1:
        ]
    tokens = sum(m["trained_tokens"] for m in steps)
    return {
        "tokens_per_s": tokens / sum(m["step_s"] for m in steps),
        "peak_bytes": peak,
        "loss": [m["loss"] for m in steps],
    }


def run_trl(
    rows: list[dict[str, str]], model_folder: str, args: argparse.Namespace
) -> dict[str, Any]:
    """TRL's SFTTrainer; the time from the end of one optimizer step to the end of the next."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    best = (
        {}
        if args.contestant == "trl-default"
        else dict(gradient_checkpointing=False, train_sampling_strategy="group_by_length")
    )
    per_device = 8 if args.contestant == "trl-default" else args.per_device
    chat = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": r["prompt"]}],
                "completion": [{"role": "assistant", "content": r["completion"]}],
            }
            for r in rows
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=GLOBAL_BATCH // per_device,
            max_steps=args.steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            bf16=args.dtype == "bf16",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            max_length=1024,
            **best,
        )
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        memory = Memory()
        memory.start(model)
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=chat,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        counts: list[int] = []
        collate = trainer.data_collator

        def counting(features: list[Any]) -> Any:
            batch = collate(features)
            counts.append(int((batch["labels"][:, 1:] != -100).sum()))
            return batch

        trainer.data_collator = counting
        trainer.train()
        peak = memory.above()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][1:]
    per_step = GLOBAL_BATCH // per_device
    tokens = sum(counts[per_step : per_step * args.steps])
    return {"tokens_per_s": tokens / (ends[-1] - ends[0]), "peak_bytes": peak, "loss": losses}


def start(
    contestant: str, dtype: str, args: argparse.Namespace, *, per_device: int, steps: int
) -> dict[str, Any]:
    arguments = [
        "--contestant",
        contestant,
        "--dtype",
        dtype,
        "--steps",
        str(steps),
        "--per_device",
        str(per_device),
    ]
    arguments += ["--max_tokens", str(args.max_tokens), "--logits_chunk", str(args.logits_chunk)]
    return spawn(__file__, [*arguments, *(["--rows", args.rows] if args.rows else [])])


def compare(dtype: str, args: argparse.Namespace) -> list[str]:
    """Interleaved rounds; ratios are taken within a round, so that a slow minute hits both
    sides."""
    fastest = args.sizes[0]
    if len(args.sizes) > 1:
        sizes = {
            size: start("trl-best", dtype, args, per_device=size, steps=3)["tokens_per_s"]
            for size in args.sizes
        }
        fastest = max(sizes, key=lambda size: sizes[size])
        print(f"{dtype}: trl-best batch sizes {sizes} -> {fastest}", file=sys.stderr)
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(args.rounds):
        names = ["ours", "trl-default", "trl-best"]
        names = names if number % 2 == 0 else names[::-1]
        rounds.append(
            {n: start(n, dtype, args, per_device=fastest, steps=args.steps) for n in names}
        )
        print(f"{dtype} round {number}: " + json.dumps(rounds[-1]), file=sys.stderr)
    lines = []
    for name in ("ours", "trl-default", "trl-best"):
        speed = [r[name]["tokens_per_s"] for r in rounds]
        memory = [r[name]["peak_bytes"] / 1e9 for r in rounds]
        ratio = [r["ours"]["tokens_per_s"] / r[name]["tokens_per_s"] for r in rounds]
        share = [r["ours"]["peak_bytes"] / r[name]["peak_bytes"] for r in rounds]
        label = name + (f" (batches of {fastest})" if name == "trl-best" else "")
        lines.append(
            f"| {dtype} | {label} | {spread(speed)} | {spread(memory)} | {spread(ratio)} "
            f"| {spread(share)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", help="JSONL(.gz) with question and answer; without it rows are generated"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps of a run; the first is not timed"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="*", default=["bf16", "fp32"])
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[2, 4, 8], help="batch sizes tried for trl-best"
    )
    parser.add_argument("--max_tokens", type=int, default=512, help="our token budget")
    parser.add_argument("--logits_chunk", type=int, default=512)
    parser.add_argument("--per_device", type=int, default=8, help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.contestant:
        lines = [line for dtype in args.dtype for line in compare(dtype, args)]
        print(
            "| dtype | | trained tokens/s | peak above model, GB | ours / it, speed | ours / it, "
            "memory |\n|---|---|---|---|---|---|"
        )
        print("\n".join(lines))
        return
    from posttrain.models.load import resolve_source

    args.dtype = args.dtype[0]
    rows = read_rows(args.rows, GLOBAL_BATCH * args.steps)
    run = run_ours if args.contestant == "ours" else run_trl
    print(json.dumps(run(rows, resolve_source("smollm2-135m"), args)))


if __name__ == "__main__":
    main()
