"""Run folders as runs leave them, made in a moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.tiny import byte_tokenizer

EVIL = '</script><img src=x onerror="document.title=1">'
TEXTS = ("plain 1+1=2", EVIL, "Zürich 世界 🙂 \u2028 end", "", " spaces  and\nlines\n", "unscored")
PROMPT = "<|im_start|>user\nWhat is <b>1+1</b>?<|im_end|>\n"


def run_folder(path: Path, *, lr: float = 0.1, done: bool = True, **settings: Any) -> Path:
    """Three steps, evaluated before and after."""
    path.mkdir(parents=True)
    data = {
        "read": 1000,
        "kept": 998,
        "dropped": 2,
        "dropped_by": {"longer than max_length": 2},
        "columns": {"used": {"messages": 998}, "carried": {"topic": 7}},
    }
    held = {"eval_pass@1": 0.25, "eval_pass@1_ci95": 0.25, "eval_loss": 2.5}
    lines: list[dict[str, Any]] = [{"step": 0, "data": data, **held}]
    for step in (1, 2, 3):
        timed = {"step_s": 4.0, "tokens_per_s": 10.0, "rollout_s": 1.0, "update_s": 2.0}
        step_line = {"step": step, "loss": 3.0 - step, "grad_norm": 1.0, "lr": lr, **timed}
        lines.append({**step_line, "iteration": (step - 1) // 2, "my_metric": 1.5 * step})
    lines.append({"step": 3, **held, "eval_pass@1": 0.75})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"optimizer": {"lr": lr}, "train": {"name": path.name}, **settings}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    planned = {"load": {"weights": 10**9}, "update": {"weights": 10**9, "gradients": 2 * 10**9}}
    about = {
        "num_steps": 3,
        "method": "SFT (sft)",
        "environment": {"device": "CPU, x86_64", "version of torch": "2.13.0"},
        "memory": {"planned_bytes": planned, "measured_bytes": 2.5e9, "measured": "peak resident"},
    }
    (path / "about.json").write_text(json.dumps(about))
    if done:
        (path / "final").mkdir()
        byte_tokenizer().save_pretrained(path / "final")
        os.utime(path / "final")
    return path


def add_samples(path: Path, *, iterations: int = 2, held_out: bool = True) -> Path:
    """One completion of each text in each iteration."""
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    (path / "rollouts").mkdir()
    for iteration in range(iterations):
        rows = []
        for k, text in enumerate(TEXTS):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            n = len(ids)
            rows.append(
                {
                    "iteration": iteration,
                    "where": "problems.jsonl:1",
                    "completion": k,
                    "prompt_ids": tokenizer(PROMPT, add_special_tokens=False)["input_ids"],
                    "advantage": 0.5,
                    "token_ids": ids,
                    "logps": (-(rng.exponential(1.0, n) ** 2)).tolist(),
                    "sampled": [i % 3 > 0 for i in range(n)],
                    "trained": [i % 3 > 1 for i in range(n)],
                    "kept_ids": None,
                    "segments": [[n, iteration]],
                    "finish_reason": "stop" if k else "length",
                    "text": text,
                    "reward": None if text == "unscored" else float(k % 2),
                    "parts": [{"name": "my.right", "value": None if k == 5 else k % 2 + 0.0}],
                    "verdict": None if text == "unscored" else k % 2 + 0.0,
                    "problems": [],
                }
            )
        name = f"iteration_{iteration:06d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path / "rollouts" / name)
    answers = [
        {
            "where": "heldout.jsonl:7",
            "prompt_ids": tokenizer(PROMPT, add_special_tokens=False)["input_ids"],
            "text": text,
            "tokens": 5,
            "finish_reason": "stop",
            "correct": True,
            "reward": 1.0,
            "rewards": {"my.right": 1.0},
        }
        for text in ("held out answer", EVIL)
    ]
    if held_out:
        lines = "".join(json.dumps(a) + "\n" for a in answers)
        (path / "rollouts" / "held_out_000003.jsonl").write_text(lines)
    return path
