"""`posttrain prep`: raw preference data to training rows."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from posttrain.cli import eval as evaluation
from posttrain.data.config import PrepConfig
from posttrain.data.messages import message_text
from posttrain.files import replace_text, write_json_lines

_OF_PAIRS = ("strategy", "ties", "min_margin")


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the kinds of `prep`; imports nothing heavy."""
    kinds = parser.add_subparsers(
        dest="kind", metavar="pairs|sft|show|difficulty|tests", required=True
    )
    pairs = kinds.add_parser("pairs", help="comparisons for DPO, reward models and KTO")
    sft = kinds.add_parser("sft", help="demonstrations: the best answer of each prompt")
    layouts = "groups: one row per prompt, ranked; labelled: one row per answer, for KTO"
    choices = ("pairs", "groups", "labelled")
    pairs.add_argument("--layout", default="pairs", choices=choices, help=layouts)
    _declare_fields(pairs, left_out=("layout",))
    _declare_fields(sft, left_out=("layout", *_OF_PAIRS))
    difficulty = kinds.add_parser(
        "difficulty", help="write a model's pass rate beside each problem"
    )
    evaluation.declare_difficulty(difficulty)
    tests = "tests of programming problems, from submissions known to be right"
    declare_tests(kinds.add_parser("tests", help=tests))
    show = kinds.add_parser(
        "show", help="print rows of a folder that prep wrote, differences highlighted"
    )
    show.add_argument("folder", metavar="DIR")
    show.add_argument("--n", type=int, default=3, help="rows (default: 3)")


def _declare_fields(parser: argparse.ArgumentParser, *, left_out: Sequence[str]) -> None:
    """Every field of PrepConfig with its docstring: the inputs by place, the others as options."""
    from docstring_parser import parse_from_object

    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    for field in parse_from_object(PrepConfig).params:
        name, text = field.arg_name, str(field.description)
        if name == "inputs":
            parser.add_argument("inputs", nargs="+", metavar="RAW", help=text)
        elif name == "out":
            parser.add_argument("--out", required=True, type=Path, metavar="DIR", help=text)
        elif name not in left_out:
            kind = _kind(PrepConfig.__annotations__[name])
            default = getattr(PrepConfig, name, [])
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, default=default, help=text, **kind)


def _kind(hint: Any) -> dict[str, Any]:
    """A type as argparse is told of it."""
    if type(None) in get_args(hint):
        hint = get_args(hint)[0]
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) in (list, dict):
        return {"nargs": "+", "action": "extend"}
    return {"choices": get_args(hint)} if get_origin(hint) is Literal else {"type": hint}


def run(arguments: argparse.Namespace) -> None:
    """Does the work and prints what came of it."""
    if arguments.kind in ("difficulty", "tests"):
        is_tests = arguments.kind == "tests"
        (run_tests if is_tests else evaluation.run_difficulty)(arguments)
        return
    if arguments.kind == "show":
        from rich.console import Console

        from posttrain.data.prep.report import show

        show(Path(arguments.folder), count=arguments.n, console=Console())
        return
    from posttrain.data.prep.pipeline import prepare

    values = {k: v for k, v in vars(arguments).items() if k not in ("command", "kind")}
    values["columns"] = _renamings(values["columns"] or ())
    config = PrepConfig(**{"layout": "sft", **values})
    counter = None if config.tokenizer is None else partial(count_tokens, config.tokenizer)
    manifest = prepare(config, count_tokens=counter)
    print_summary(manifest, config.out, report=_write_report(config.out))


def _write_report(out: Path) -> Path | None:
    """report.html beside the rows; None where the libraries of its charts are not installed."""
    from posttrain.report.prep import prep_page

    path = out / "report.html"
    try:
        replace_text(path, prep_page(out))
    except ImportError:
        return None
    return path


def print_summary(manifest: dict[str, Any], out: Path, *, report: Path | None = None) -> None:
    """Counts in and out, by reason."""
    counts = manifest["counts"]
    print(
        f"{counts['read']:,} rows read, {counts['rejected']:,} bad, {counts['prompts']:,} prompts"
    )
    if counts["rejected"]:
        with (out / "rejects.jsonl").open(encoding="utf-8") as lines:
            first = "{file}:{row}: {reason}".format(**json.loads(next(lines)))
        print(f"  bad rows are in {out / 'rejects.jsonl'}; the first, {first}")
    for reason, n in manifest["dropped"].items():
        print(f"  {n:,} dropped: {reason}")
    for use, names in manifest["columns"].items():
        print(f"  {use}: {', '.join(f'{name} ({n:,})' for name, n in names.items())}")
    written = [f"{counts.get(f'written_{side}', 0):,} {side}" for side in ("train", "test")]
    print(f"wrote {' and '.join(written)} rows to {out}")
    print(f"look at {report}" if report else "for a page: pip install 'posttrain[report]'")


def _renamings(pairs: Sequence[str]) -> dict[str, str] | None:
    """{ours: yours}. ValueError for anything but OURS=YOURS."""
    wrong = [pair for pair in pairs if not all(pair.partition("="))]
    if wrong:
        raise ValueError(
            f"--columns takes OURS=YOURS, several after one another; got {wrong[0]!r}. Write, for "
            "instance, --columns prompt=question chosen=good rejected=bad."
        )
    return dict(pair.split("=", 1) for pair in pairs) or None


def count_tokens(name: str, conversations: Sequence[tuple[list[dict[str, Any]], Any]]) -> list[int]:
    """Lengths of conversations in tokens under the chat template of the tokenizer ``name``, which
    is loaded once in each process."""
    tokenizer = _tokenizer(name)
    if tokenizer.chat_template is None:
        texts = ["\n".join(message_text(m) for m in c) for c, _ in conversations]
    else:
        texts = [
            tokenizer.apply_chat_template(c, tools=tools, tokenize=False)
            for c, tools in conversations
        ]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


@cache
def _tokenizer(name: str) -> Any:
    from posttrain.models.load import ModelConfig, load_tokenizer

    return load_tokenizer(ModelConfig(name=name))


_TESTS_OPTIONS: dict[str, tuple[Any, str]] = {
    "--cases-column": ("inputs", "list of standard inputs (default: inputs)"),
    "--solutions-column": ("solutions", "list of right Python programs (default: solutions)"),
    "--agree": (0.7, "share of the programs that must agree on a kept test (k1.5: 7 of 10)"),
    "--passing": (0.9, "share that must pass all kept tests of a kept problem (k1.5: 9 of 10)"),
    "--timeout": (5.0, "seconds for a program and an input (default: 5)"),
    "--memory-mb": (512, "10^6 bytes for a program (default: 512)"),
    "--workers": (os.cpu_count() or 1, "programs that run at the same time"),
}


def declare_tests(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prep tests`; imports nothing heavy."""
    rows = "files of rows with the columns of the next two options"
    parser.add_argument("inputs", nargs="+", metavar="ROWS", help=rows)
    kept = "the rows that are kept, with `tests` for code_tests"
    parser.add_argument("--out", required=True, metavar="FILE", help=kept)
    for flag, (default, text) in _TESTS_OPTIONS.items():
        parser.add_argument(flag, default=default, type=type(default), help=text)


def run_tests(arguments: argparse.Namespace) -> None:
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
