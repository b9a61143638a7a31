"""Sampling in the training process against a vLLM server on the CPU: the same prompts, seeds and
lengths, bfloat16, interleaved.

    make test-vllm      # installs the server's environment
    python benchmarks/rollout_vs_vllm.py --rows gsm8k_train_2000.jsonl.gz --rounds 3

8 GSM8K questions, 8 completions of each, up to 128 tokens, temperature 1. `vllm`: the server has
all cores, and its defaults; `vllm-default`: it keeps one core for HTTP, as vLLM does by itself. A
short call warms each up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from common import spawn, spread
from rollout_checks import questions

REPO = Path(__file__).resolve().parents[1]
PORT = 8231


def timed(engine: Any, prompts: list[tuple[int, ...]], max_tokens: int) -> dict[str, float]:
    """Tokens/s of 8 completions of each prompt."""
    from posttrain.rollout.engine import Request, SamplingConfig

    engine.generate([Request(prompt_ids=prompts[0], seeds=(1, 2))], SamplingConfig(max_tokens=4))
    requests = [
        Request(prompt_ids=p, seeds=tuple(range(8 * i, 8 * i + 8))) for i, p in enumerate(prompts)
    ]
    began = time.perf_counter()
    drawn = engine.generate(requests, SamplingConfig(max_tokens=max_tokens))
    seconds = time.perf_counter() - began
    tokens = sum(len(d.token_ids) for row in drawn for d in row)
    return {"tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds}


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from posttrain.data import stop_token_ids
    from posttrain.models.load import ModelConfig, load_model, load_tokenizer
    from posttrain.models.policy import Policy
    from posttrain.packing.plan import PackingConfig
    from posttrain.rollout.local import LocalEngine

    tokenizer = load_tokenizer(ModelConfig())
    policy = Policy(load_model(ModelConfig(), dtype=torch.float32), PackingConfig()).eval()
    engine = LocalEngine(policy, compute=torch.bfloat16, stop_ids=stop_token_ids(tokenizer))
    return timed(engine, questions(args.rows, 8, tokenizer), args.max_tokens)


def run_vllm(args: argparse.Namespace) -> dict[str, float]:
    from posttrain.data import stop_token_ids
    from posttrain.models.load import ModelConfig, load_tokenizer, resolve_source
    from posttrain.rollout.handover import FolderHandover
    from posttrain.rollout.vllm import VLLMConfig, VLLMEngine

    tokenizer = load_tokenizer(ModelConfig())
    all_cores = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 2) - 1}",
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }
    environment = {**os.environ, **(all_cores if args.contestant == "vllm" else {})}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        command = [
            "bash",
            str(REPO / "launch" / "vllm.sh"),
            resolve_source("smollm2-135m"),
            str(PORT),
        ]
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=REPO, start_new_session=True
        )
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).read()
                    break
                except OSError:
                    if server.poll() is not None:
                        raise RuntimeError((Path(folder) / "log").read_text()[-2000:]) from None
                    time.sleep(1)
            config = VLLMConfig(url=f"http://127.0.0.1:{PORT}")
            handover = FolderHandover(Path(folder), lambda _: None)
            engine = VLLMEngine(config, handover=handover, stop_ids=stop_token_ids(tokenizer))
            return timed(engine, questions(args.rows, 8, tokenizer), args.max_tokens)
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", required=True, help="GSM8K rows (question, answer)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--contestants", nargs="*", default=["ours", "vllm", "vllm-default"])
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contestant:
        print(json.dumps(run_ours(args) if args.contestant == "ours" else run_vllm(args)))
        return
    results: dict[str, list[float]] = {name: [] for name in args.contestants}
    for number in range(args.rounds):
        for name in args.contestants if number % 2 == 0 else args.contestants[::-1]:
            run = spawn(
                __file__,
                ["--contestant", name, "--rows", args.rows, "--max_tokens", str(args.max_tokens)],
            )
            results[name].append(run["tokens_per_s"])
            print(f"round {number} {name}: {json.dumps(run)}", file=sys.stderr)
    print("| | tokens/s | ours / it |\n|---|---|---|")
    for name, values in results.items():
        print(
            f"| {name} | {spread(values)} | "
            f"{spread([a / b for a, b in zip(results['ours'], values, strict=True)])} |"
        )


if __name__ == "__main__":
    main()
