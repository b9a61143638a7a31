"""`posttrain prep tests`: of a problem's inputs and programs known to be right, tests for the
reward of code."""

from __future__ import annotations

import argparse
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prep tests`; imports nothing heavy."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="ROWS",
        help="files of rows with the columns of the next two options",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the rows that are kept, with `tests` for code_tests",
    )
    parser.add_argument(
        "--cases-column", default="inputs", help="list of standard inputs (default: inputs)"
    )
    parser.add_argument(
        "--solutions-column",
        default="solutions",
        help="list of right Python programs (default: solutions)",
    )
    parser.add_argument(
        "--agree",
        type=float,
        default=0.7,
        metavar="F",
        help="share of the programs that must print the same for a test to be kept (k1.5: 7 of 10)",
    )
    parser.add_argument(
        "--passing",
        type=float,
        default=0.9,
        metavar="F",
        help="share that must pass every kept test for a problem to be kept (k1.5: 9 of 10)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds for a program and an input (default: 5)",
    )
    parser.add_argument(
        "--memory-mb", type=int, default=512, help="10^6 bytes for a program (default: 512)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="programs that run at the same time",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs every program on every input in the sandbox; keeps what they agree on. Kimi k1.5,
    arXiv:2501.12599 section 2.3.5."""
    from rich.progress import track

    from posttrain.data.code_cases import agreed_cases
    from posttrain.data.readers import read_rows

    rows = [row for source in arguments.inputs for row in read_rows(source)]
    kept, num_tests, num_cases = [], 0, 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for row in track(rows, description="problems"):
            solutions, cases = (
                _texts(row, column)
                for column in (arguments.solutions_column, arguments.cases_column)
            )
            jobs = [
                [pool.submit(_printed, program, case, arguments) for case in cases]
                for program in solutions
            ]
            agree, passing = (
                math.ceil(share * len(solutions) - 1e-9)
                for share in (arguments.agree, arguments.passing)
            )
            try:
                found = agreed_cases(
                    [[job.result() for job in line] for line in jobs], agree=agree, passing=passing
                )
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
            num_cases += len(cases)
            if found is not None:
                tests = [{"stdin": cases[i], "stdout": text} for i, text in found.items()]
                num_tests += len(tests)
                kept.append({**row.values, "tests": tests})
    Path(arguments.out).write_text(
        "".join(json.dumps(line, default=str) + "\n" for line in kept), encoding="utf-8"
    )
    print(
        f"{len(rows)} problems with {num_cases} inputs; wrote {len(kept)} problems with "
        f"{num_tests} tests to {arguments.out}"
    )


def _texts(row: Any, column: str) -> list[str]:
    found = row.values.get(column)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise ValueError(
            f"{row.where}: column {column!r} must be a list of texts; got {found!r:.100}."
        )
    return found


def _printed(program: str, stdin: str, arguments: argparse.Namespace) -> str | None:
    """What a program prints, trailing white space aside; None if it fails, prints too much or does
    not end."""
    from posttrain.rewards.code import lines, run_sandboxed

    limits = {
        "timeout_s": arguments.timeout,
        "memory_bytes": arguments.memory_mb * 10**6,
        "processes": 16,
    }
    result = run_sandboxed(program, stdin=stdin, **limits)
    failed = result["status"] != "exit" or result["code"] != 0 or result["too_long"]
    return None if failed else "\n".join(lines(result["output"]))
