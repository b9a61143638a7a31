"""`posttrain prep`: raw preference data to training rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.cli import eval as evaluation
from posttrain.cli import prep_tests
from posttrain.data.messages import message_text


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the kinds of `prep`; imports nothing heavy."""
    kinds = parser.add_subparsers(
        dest="kind", metavar="pairs|sft|show|difficulty|tests", required=True
    )
    pairs = kinds.add_parser("pairs", help="comparisons for DPO, reward models and KTO")
    sft = kinds.add_parser("sft", help="demonstrations: the best answer of each prompt")
    for sub in (pairs, sft):
        _declare_shared(sub)
    pairs.add_argument(
        "--layout",
        default="pairs",
        choices=("pairs", "groups", "labelled"),
        help="pairs; groups: one row per prompt, ranked; labelled: one row per answer, for KTO",
    )
    pairs.add_argument(
        "--strategy",
        default="best-worst",
        choices=("best-worst", "all", "adjacent", "random", "long2short"),
        help="which pairs are made of K answers (default: best-worst)",
    )
    pairs.add_argument(
        "--ties",
        default="drop",
        choices=("drop", "keep"),
        help="pairs of equal rank (default: drop)",
    )
    pairs.add_argument(
        "--min-margin", type=float, metavar="X", help="least score difference of a pair"
    )
    evaluation.declare_difficulty(
        kinds.add_parser("difficulty", help="write a model's pass rate beside each problem")
    )
    prep_tests.declare(
        kinds.add_parser(
            "tests", help="tests of programming problems, from submissions known to be right"
        )
    )
    show = kinds.add_parser(
        "show", help="print rows of a folder that prep wrote, differences highlighted"
    )
    show.add_argument("folder", metavar="DIR")
    show.add_argument("--n", type=int, default=3, help="rows (default: 3)")


def _declare_shared(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "inputs",
        nargs="+",
        metavar="RAW",
        help="JSONL, JSON, CSV (also .gz), Parquet, a folder, a hub id",
    )
    sub.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write; must not exist, or be empty"
    )
    sub.add_argument(
        "--format", default="auto", help="layout of the rows (default: by their columns)"
    )
    sub.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="rename columns, e.g. prompt=question",
    )
    sub.add_argument(
        "--carry",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns that change nothing: not read, written along; '*': all others, not written",
    )
    sub.add_argument(
        "--test-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of prompts for test/ (default: 0)",
    )
    sub.add_argument(
        "--seed", type=int, default=0, help="of the split and of strategy random (default: 0)"
    )
    sub.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="EVAL",
        help="leave out what overlaps with these files",
    )
    sub.add_argument(
        "--ngram", type=int, default=13, help="words that make an overlap (default: 13)"
    )
    sub.add_argument(
        "--near-duplicates",
        default="off",
        choices=("off", "split", "drop"),
        help="prompts alike by MinHash: split: kept on one side; drop: the first "
        "stays (default: off)",
    )
    sub.add_argument(
        "--threshold",
        type=float,
        default=0.8,
        help="Jaccard similarity of near-duplicates (default: 0.8)",
    )
    sub.add_argument(
        "--max-chars", type=int, metavar="N", help="longest prompt + answer, characters"
    )
    sub.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest prompt + answer, tokens; needs --tokenizer",
    )
    sub.add_argument(
        "--tokenizer", metavar="M", help="embedded model, folder or hub id whose tokenizer counts"
    )
    sub.add_argument("--split", default="train", help="split of hub ids (default: train)")
    sub.add_argument("--strict", action="store_true", help="stop at the first bad row")
    sub.add_argument(
        "--workers",
        type=int,
        default=2,
        help="processes; the output does not depend on it (default: 2)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Does the work and prints what came of it."""
    if arguments.kind == "difficulty":
        evaluation.run_difficulty(arguments)
        return
    if arguments.kind == "tests":
        prep_tests.run(arguments)
        return
    if arguments.kind == "show":
        from rich.console import Console

        from posttrain.data.prep.show import show

        show(Path(arguments.folder), count=arguments.n, console=Console())
        return
    from posttrain.data.prep import PrepConfig, prepare

    values = {k: v for k, v in vars(arguments).items() if k not in ("command", "kind")}
    values["columns"] = dict(pair.split("=", 1) for pair in values["columns"]) or None
    config = PrepConfig(
        **{**values, "out": Path(arguments.out), "layout": values.get("layout", "sft")}
    )
    counter = None if config.tokenizer is None else TokenCounter(config.tokenizer)
    manifest = prepare(config, count_tokens=counter)
    print_summary(manifest, config.out)


def print_summary(manifest: dict[str, Any], out: Path) -> None:
    """Counts in and out, by reason."""
    counts = manifest["counts"]
    print(
        f"{counts['read']:,} rows read, {counts['rejected']:,} bad, {counts['prompts']:,} prompts"
    )
    for reason, n in manifest["dropped"].items():
        print(f"  {n:,} dropped: {reason}")
    for use, names in manifest["columns"].items():
        print(f"  {use}: {', '.join(f'{name} ({n:,})' for name, n in names.items())}")
    written = [f"{counts.get(f'written_{side}', 0):,} {side}" for side in ("train", "test")]
    print(f"wrote {' and '.join(written)} rows to {out}; look at {out / 'report.html'}")


class TokenCounter:
    """Conversations to lengths in tokens under a tokenizer's chat template; loads it when first
    called, in each process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_tokenizer": None}

    def __call__(self, conversations: Sequence[tuple[list[dict[str, Any]], Any]]) -> list[int]:
        if self._tokenizer is None:
            from posttrain.models.load import ModelConfig, load_tokenizer

            self._tokenizer = load_tokenizer(ModelConfig(name=self._name))
        if self._tokenizer.chat_template is None:
            texts = ["\n".join(message_text(m) for m in c) for c, _ in conversations]
        else:
            texts = [
                self._tokenizer.apply_chat_template(c, tools=tools, tokenize=False)
                for c, tools in conversations
            ]
        return [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]
