"""Runs that the planner decides, for real: its token budgets, and the optimizers.

    python benchmarks/memory_runs.py --solve   # the token budget for a limit, and 1.25 times it
    python benchmarks/memory_runs.py --optimizers   # SmolLM2-135M with each optimizer

Each run is a fresh process of memory_accuracy.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import memory_accuracy
from common import spawn
from memory_accuracy import Case, error, job_of


def run(case: Case) -> dict[str, Any]:
    """Of a fresh process."""
    return spawn(str(Path(memory_accuracy.__file__)), ["--case", json.dumps(asdict(case))])


def solve() -> None:
    """The planner's answer for a limit against a fresh process with that budget, and with 1.25
    times it."""
    from posttrain.plan.price import SOLVER_MARGIN, max_tokens

    print(
        "| method | precision | checkpointing | limit MB | token budget | peak resident MB | "
        "with 1.25 x the budget |"
    )
    print("|---|---|---|---|---|---|---|")
    checkpointing = False
    kinds = (
        ("sft", "fp32", 6e9),
        ("sft", "bf16", 8e9),
        ("rl", "fp32", 6e9),
        ("rl", "bf16", 8e9),
        ("dpo", "bf16", 8e9),
    )
    for method, precision, limit in kinds:
        case = Case(
            family="smollm2-135m",
            method=method,
            tokens=512,
            checkpointing=checkpointing,
            precision=precision,
            watched=False,
            completion=256,
        )
        tokens = max_tokens(job_of(case), limit * (1 - SOLVER_MARGIN))
        budgets = [replace(case, tokens=n) for n in (tokens, tokens * 5 // 4)]
        peaks = [run(budget)["resident"] for budget in budgets]
        verdicts = [f"{p / 1e6:.0f} ({'under' if p <= limit else 'over'})" for p in peaks]
        print(
            f"| {method} | {precision} | {'yes' if checkpointing else 'no'} | {limit / 1e6:.0f} | "
            f"{tokens} | {verdicts[0]} | {verdicts[1]} |",
            flush=True,
        )


def optimizers() -> None:
    """What each keeps and what the whole run holds, predicted and measured."""
    from posttrain.plan.price import memory_plan

    print(
        "| optimizer | moments MB, predicted | measured | live MB | traced % | resident MB "
        "| planned % |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in ("adamw", "adamw_8bit", "sgd", "adafactor"):
        case = Case(
            family="smollm2-135m",
            method="sft",
            tokens=512,
            checkpointing=False,
            precision="bf16",
            optimizer=name,
        )
        plan, row = memory_plan(job_of(case)), run(case)
        moments = sum(plan.phases["update"].get(item, 0) for item in ("moments", "counters"))
        figures = [
            f"{moments / 1e6:.3f}",
            f"{row['moments'] / 1e6:.3f}",
            f"{row['live'] / 1e6:.0f}",
        ]
        figures += [
            error(plan.live_bytes, row["live"]),
            f"{row['resident'] / 1e6:.0f}",
            error(plan.peak_bytes, row["resident"]),
        ]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables: tuple[Callable[[], None], ...] = (solve, optimizers)
    for table in tables:
        parser.add_argument(f"--{table.__name__}", action="store_true", help=table.__doc__)
    args = parser.parse_args()
    for table in tables:
        if getattr(args, table.__name__):
            table()


if __name__ == "__main__":
    main()
