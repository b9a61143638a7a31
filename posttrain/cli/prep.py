"""`posttrain prep`: raw preference data to training rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from posttrain.cli import eval as evaluation
from posttrain.cli import prep_tests
from posttrain.data.config import PrepConfig, Strategy
from posttrain.data.messages import message_text

_HELP = {
    "format": "layout of the rows (default: by their columns)",
    "columns": "rename columns, e.g. prompt=question chosen=good rejected=bad",
    "carry": "columns that change nothing: not read, written along; '*': all others, not written",
    "test_fraction": "share of prompts for test/ (default: 0)",
    "seed": "of the split and of strategy random (default: 0)",
    "decontaminate": "leave out what overlaps with these files",
    "ngram": "words that make an overlap (default: 13)",
    "near_duplicates": "prompts alike by MinHash: split: kept on one side; drop: the first stays "
    "(default: off)",
    "threshold": "Jaccard similarity of near-duplicates (default: 0.8)",
    "max_chars": "longest prompt + answer, characters",
    "max_tokens": "longest prompt + answer, tokens; needs --tokenizer",
    "tokenizer": "embedded model, folder or hub id whose tokenizer counts",
    "split": "split of hub ids (default: train)",
    "strict": "stop at the first bad row",
    "workers": "processes; the output does not depend on it (default: 2)",
}
_HELP_OF_PAIRS = {
    "layout": "pairs; groups: one row per prompt, ranked; labelled: one row per answer, for KTO",
    "strategy": "which pairs are made of K answers (default: best-worst)",
    "ties": "pairs of equal rank (default: drop)",
    "min_margin": "least score difference of a pair",
}
_KINDS: dict[str, dict[str, Any]] = {
    "columns": {"nargs": "+", "action": "extend", "metavar": "OURS=YOURS"},
    "carry": {"nargs": "+", "metavar": "COLUMN"},
    "decontaminate": {"nargs": "+", "metavar": "EVAL"},
    "near_duplicates": {"choices": ("off", "split", "drop")},
    "layout": {"choices": ("pairs", "groups", "labelled")},
    "strategy": {"choices": get_args(Strategy)},
    "ties": {"choices": ("drop", "keep")},
    "strict": {"action": "store_true"},
    "max_chars": {"type": int, "metavar": "N"},
    "max_tokens": {"type": int, "metavar": "N"},
    "min_margin": {"type": float, "metavar": "X"},
    "tokenizer": {"metavar": "M"},
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the kinds of `prep`; imports nothing heavy."""
    kinds = parser.add_subparsers(
        dest="kind", metavar="pairs|sft|show|difficulty|tests", required=True
    )
    pairs = kinds.add_parser("pairs", help="comparisons for DPO, reward models and KTO")
    sft = kinds.add_parser("sft", help="demonstrations: the best answer of each prompt")
    for sub, helps in ((pairs, _HELP | _HELP_OF_PAIRS), (sft, _HELP)):
        sources = "JSONL, JSON, CSV (also .gz), Parquet, a folder, a hub id"
        sub.add_argument("inputs", nargs="+", metavar="RAW", help=sources)
        target = "folder to write; must not exist, or be empty"
        sub.add_argument("--out", required=True, metavar="DIR", help=target)
        for name, text in helps.items():
            flag, default = f"--{name.replace('_', '-')}", getattr(PrepConfig, name, [])
            kind = _KINDS.get(name) or {"type": type(default)}
            sub.add_argument(flag, default=default, help=text, **kind)
    difficulty = kinds.add_parser(
        "difficulty", help="write a model's pass rate beside each problem"
    )
    evaluation.declare_difficulty(difficulty)
    tests = "tests of programming problems, from submissions known to be right"
    prep_tests.declare(kinds.add_parser("tests", help=tests))
    show = kinds.add_parser(
        "show", help="print rows of a folder that prep wrote, differences highlighted"
    )
    show.add_argument("folder", metavar="DIR")
    show.add_argument("--n", type=int, default=3, help="rows (default: 3)")


def run(arguments: argparse.Namespace) -> None:
    """Does the work and prints what came of it."""
    if arguments.kind in ("difficulty", "tests"):
        is_tests = arguments.kind == "tests"
        (prep_tests.run if is_tests else evaluation.run_difficulty)(arguments)
        return
    if arguments.kind == "show":
        from rich.console import Console

        from posttrain.data.prep.report import show

        show(Path(arguments.folder), count=arguments.n, console=Console())
        return
    from posttrain.data.prep.pipeline import prepare

    values = {k: v for k, v in vars(arguments).items() if k not in ("command", "kind")}
    values["columns"] = _renamings(values["columns"] or ())
    values["out"] = Path(arguments.out)
    config = PrepConfig(**{"layout": "sft", **values})
    counter = None if config.tokenizer is None else partial(count_tokens, config.tokenizer)
    manifest = prepare(config, count_tokens=counter)
    print_summary(manifest, config.out, report=_write_report(config.out))


def _write_report(out: Path) -> Path | None:
    """report.html beside the rows; None where the libraries of its charts are not installed."""
    from posttrain.report.page import write

    try:
        from posttrain.report.prep import prep_page

        text = prep_page(out)
    except ImportError:
        return None
    write(out / "report.html", text)
    return out / "report.html"


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
