"""`posttrain prep tests`: of a problem's inputs and programs known to be right, tests for the
reward of code."""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.files import write_json_lines

_OPTIONS: dict[str, tuple[Any, str]] = {
    "--cases-column": ("inputs", "list of standard inputs (default: inputs)"),
    "--solutions-column": ("solutions", "list of right Python programs (default: solutions)"),
    "--agree": (
        0.7,
        "share of the programs that must print the same for a test to be kept (k1.5: 7 of 10)",
    ),
    "--passing": (
        0.9,
        "share that must pass every kept test for a problem to be kept (k1.5: 9 of 10)",
    ),
    "--timeout": (5.0, "seconds for a program and an input (default: 5)"),
    "--memory-mb": (512, "10^6 bytes for a program (default: 512)"),
    "--workers": (os.cpu_count() or 1, "programs that run at the same time"),
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prep tests`; imports nothing heavy."""
    rows = "files of rows with the columns of the next two options"
    parser.add_argument("inputs", nargs="+", metavar="ROWS", help=rows)
    kept = "the rows that are kept, with `tests` for code_tests"
    parser.add_argument("--out", required=True, metavar="FILE", help=kept)
    for flag, (default, text) in _OPTIONS.items():
        parser.add_argument(flag, default=default, type=type(default), help=text)


def run(arguments: argparse.Namespace) -> None:
    """Runs every program on every input in the sandbox; keeps what they agree on. Kimi k1.5,
    arXiv:2501.12599 section 2.3.5."""
    from rich.progress import track

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
            outputs = [[job.result() for job in line] for line in jobs]
            agree, passing = (
                math.ceil(share * len(solutions) - 1e-9)
                for share in (arguments.agree, arguments.passing)
            )
            try:
                found = agreed_cases(outputs, agree=agree, passing=passing)
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
            num_cases += len(cases)
            if found is not None:
                tests = [{"stdin": cases[i], "stdout": text} for i, text in found.items()]
                num_tests += len(tests)
                kept.append({**row.values, "tests": tests})
    write_json_lines(Path(arguments.out), kept)
    print(
        f"{len(rows)} problems with {num_cases} inputs; wrote {len(kept)} problems with "
        f"{num_tests} tests to {arguments.out}"
    )


def agreed_cases(
    outputs: Sequence[Sequence[str | None]], *, agree: int = 7, passing: int = 9
) -> dict[int, str] | None:
    """{case: expected output} of the cases to keep; None: leave the problem out.

    ``outputs[submission][case]``, None where a submission failed. A case is kept if at least
    ``agree`` submissions print the same, the problem if at least ``passing`` of them print that on
    every kept case. Kimi k1.5, arXiv:2501.12599 section 2.3.5, for 10 submissions.
    """
    if not len(outputs) < 2 * agree <= 2 * len(outputs) or not 1 <= passing <= len(outputs):
        raise ValueError(
            f"agree is a majority of the submissions and passing a part; got {agree}, "
            f"{passing} of {len(outputs)}."
        )
    kept: dict[int, str] = {}
    for case, printed in enumerate(zip(*outputs, strict=True)):
        ((text, count),) = Counter(p for p in printed if p is not None).most_common(1) or [("", 0)]
        if count >= agree:
            kept[case] = text
    passed = sum(all(row[case] == text for case, text in kept.items()) for row in outputs)
    return kept if kept and passed >= passing else None


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
