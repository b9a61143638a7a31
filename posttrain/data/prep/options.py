"""What decides the output of `posttrain prep`: same input and options, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.data.config import Format, check_choice

Strategy = Literal["best-worst", "all", "adjacent", "random", "long2short"]
Layout = Literal["pairs", "groups", "labelled", "sft"]
NearDuplicates = Literal["off", "split", "drop"]

TokenCounter = Callable[[Sequence[tuple[list[dict[str, Any]], Any]]], list[int]]
"""(messages, tools) of conversations -> their lengths in tokens; picklable, for worker
processes."""


@dataclass(frozen=True, kw_only=True)
class PrepConfig:
    """Options of one run."""

    inputs: list[str]
    """Files (JSONL, JSON, CSV, each also .gz; Parquet), folders, hub ids."""
    out: Path
    """Folder to write; must not exist or be empty."""
    format: str = "auto"
    """A layout of ``posttrain.data.layouts``; auto: from each row's columns."""
    columns: dict[str, str] | None = None
    """{column of a layout: column of the files}."""
    carry: list[str] = field(default_factory=list)
    """Columns that change nothing: not read, and written beside each row. "*": all that the layout
    does not read."""
    layout: Layout = "pairs"
    """pairs; groups (one row per prompt, all completions ranked); labelled (one row per answer, for
    KTO); sft (the best)."""
    strategy: Strategy = "best-worst"
    """Which pairs are made of K answers (``build``)."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs of equal rank: left out, or written with margin 0, in the order of the data."""
    test_fraction: float = 0.0
    """Share of prompts, in [0, 1), that go to test/; all rows of a prompt (and of its
    near-duplicates) go to one side."""
    seed: int = 0
    """Of the split, of strategy random, and of the sampled pairs in the report."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation files; prompts or answers that share an n-gram with them are left out."""
    ngram: int = 13
    """Words of such an n-gram; a shorter evaluation text counts as a whole."""
    near_duplicates: NearDuplicates = "off"
    """split: near-duplicate prompts on one side of the split; drop: only the first of them
    stays."""
    threshold: float = 0.8
    """Jaccard similarity of word 5-grams from which two prompts are near-duplicates."""
    min_margin: float | None = None
    """Least score difference of a pair, in the data's units; pairs without scores are then left
    out. None: no threshold."""
    max_chars: int | None = None
    """Longest prompt + answer, characters. None: no limit."""
    max_tokens: int | None = None
    """Longest prompt + answer under the tokenizer's chat template, tokens. None: no limit."""
    tokenizer: str | None = None
    """Embedded model, folder or hub id whose tokenizer counts."""
    split: str = "train"
    """Split of hub ids."""
    strict: bool = False
    """A bad row is an error instead of a line in rejects.jsonl."""
    workers: int = 2
    """Processes; the output does not depend on them."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.test_fraction < 1.0:
            raise ValueError(
                f"--test-fraction is a share of prompts in [0, 1); got {self.test_fraction}."
            )
        if not 0.0 < self.threshold <= 1.0 or self.ngram < 1 or self.workers < 1:
            raise ValueError(
                "--threshold is a similarity in (0, 1], --ngram and --workers are >= 1; got "
                f"{self.threshold}, {self.ngram}, {self.workers}."
            )
        if (self.max_tokens is None) != (self.tokenizer is None):
            raise ValueError(
                "--max-tokens and --tokenizer belong together: give both, or "
                "--max-chars for a limit in characters."
            )
        check_choice("--strategy", self.strategy, Strategy)
        check_choice("--layout", self.layout, Layout)
        check_choice("--format", self.format, Format)

    def recorded(self) -> dict[str, Any]:
        """Options for the manifest: all that decide the output, and not where it is or how many
        processes made it."""
        left_out = ("inputs", "out", "workers", "strict")
        return {k: v for k, v in sorted(vars(self).items()) if k not in left_out}
