"""What a run is trained on: sources, their format, and how rows become tokens; and what decides the
output of `posttrain prep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from posttrain.data.row import COLUMNS
from posttrain.resolve import settings

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "pairs",
    "ranked",
    "labelled",
    "rated",
]
"""A layout of rows (``posttrain.data.layouts``); sharegpt is messages, alpaca is
prompt_completion."""
Purpose = Literal["sft", "preference", "reward"]
"""What rows are read for: demonstrations; comparisons whose completions are trained; comparisons
whose completions are scored."""
Overlong = Literal["truncate", "drop", "error"]


def check_columns(columns: Mapping[str, str] | None, example: str) -> None:
    """ValueError where a renaming leads to a name that no layout reads."""
    unknown = sorted(set(columns or ()) - set(COLUMNS))
    if unknown:
        raise ValueError(
            f"columns: {unknown} belong to no format. Known: {', '.join(COLUMNS)}. Write {example}."
        )


@settings
class DataConfig:
    """Where the rows come from and how they become prompt groups. Nothing here depends on the
    optimisation."""

    train: list[str] = field(default_factory=list)
    """Training sources: paths of JSONL, JSON, CSV (each also .gz) or Parquet files, folders of
    them, or hub ids ``owner/name`` or ``owner/name:config``. Default: none, for a caller that
    passes rows of its own."""

    weights: list[float] | None = None
    """Mixing weights, one per training source, relative, all > 0: source i gives weights[i] /
    sum(weights) of each epoch's rows. Default None: plain concatenation, every row once per
    epoch."""

    eval: list[str] = field(default_factory=list)
    """Evaluation sources, as ``train``. Default: none."""

    eval_fraction: float = 0.0
    """Fraction of training rows, in [0, 1), held out for evaluation; rows with the same prompt stay
    on one side. Chosen by ``seed`` and content. Only without ``eval``. Default 0: no rows held
    out."""

    format: Format = "auto"
    """How rows are read. Default auto: each row by its columns. Where a row fits several layouts,
    what is set is read, and what the others would read is carried along."""

    columns: dict[str, str] | None = None
    """Renames columns before the format is read, {column of the format: column of the file}, for
    example ``{prompt: question, completion: answer}``. Default None: names as in the file."""

    carry: list[str] = field(default_factory=list)
    """Columns, and keys of messages and answers, that are not read: they are known to change
    nothing. "*": all that the layout does not read. Default none: a column that is neither read nor
    known to be metadata is an error."""

    split: str = "train"
    """Split of hub ids and of folders that hold several; files have none. Default train."""

    max_length: int = 1024
    """Limit of prompt + completion, tokens. Default 1024."""

    overlong: Overlong = "truncate"
    """A row over ``max_length``: ``truncate`` cuts the end of the completion (and drops the row if
    its prompt alone fills the limit), ``drop`` leaves it out, ``error`` stops and names it. Dropped
    and cut rows are counted. Default truncate."""

    chat_template: str | None = None
    """Path of a jinja file that replaces the tokenizer's chat template, also in what is saved.
    Default: None."""

    seed: int = 0
    """Seed of the evaluation split. Default 0."""

    cache_dir: str | None = None
    """Folder of tokenised data. Default None: $POSTTRAIN_CACHE, else ``posttrain`` in the user's
    cache folder."""

    num_proc: int = 1
    """Processes that tokenise; more than one take seconds to start. Default 1: in this process."""

    def __post_init__(self) -> None:
        self._check_sources()
        if self.max_length < 2:
            raise ValueError(
                "data.max_length counts prompt and completion tokens, at least one of each; got "
                f"{self.max_length}. Set --data.max_length 1024."
            )
        if self.num_proc < 1:
            raise ValueError(f"data.num_proc is a number of processes >= 1; got {self.num_proc}.")
        example = "--data.columns '{prompt: question, completion: answer}', yours on the right"
        check_columns(self.columns, example)

    def _check_sources(self) -> None:
        for name, sources in (("train", self.train), ("eval", self.eval)):
            if isinstance(sources, str):
                wanted = f"data.{name} is a list of sources; got the string {sources!r}"
                raise ValueError(f"{wanted}. Write [{sources!r}].")
        if not 0.0 <= self.eval_fraction < 1.0:
            raise ValueError(
                f"data.eval_fraction is a fraction of rows in [0, 1); got {self.eval_fraction}."
            )
        if self.eval and self.eval_fraction:
            raise ValueError(
                f"data.eval_fraction={self.eval_fraction} would be ignored: data.eval={self.eval} "
                "is what is evaluated. Set one of the two."
            )
        if self.weights is None:
            return
        if len(self.weights) != len(self.train):
            raise ValueError(
                f"data.weights needs one weight per source of data.train; got {len(self.weights)} "
                f"weights for {len(self.train)} sources."
            )
        bad = [w for w in self.weights if not (math.isfinite(w) and w > 0)]
        if bad:
            raise ValueError(
                f"data.weights must be finite and > 0; got {bad[0]}. Or remove it from data.train."
            )


Strategy = Literal["best-worst", "all", "adjacent", "random", "long2short"]
Layout = Literal["pairs", "groups", "labelled", "sft"]
NearDuplicates = Literal["off", "split", "drop"]

TokenCounter = Callable[[Sequence[tuple[list[dict[str, Any]], Any]]], list[int]]
"""(messages, tools) of conversations -> their lengths in tokens; picklable, for worker
processes."""


@settings
class PrepConfig:
    """Options of one `posttrain prep`: same input and options, same bytes."""

    inputs: list[str]
    """Files (JSONL, JSON, CSV, each also .gz; Parquet), folders, hub ids."""
    out: Path
    """Folder to write; must not exist or be empty."""
    format: Format = "auto"
    """A layout of ``posttrain.data.layouts``; auto: from each row's columns."""
    columns: dict[str, str] | None = None
    """{column of a layout: column of the files}; as an option prompt=question chosen=good."""
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
    """Embedded model, folder or hub id whose tokenizer counts for max_tokens."""
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
                "--max-tokens and --tokenizer belong together: give both, or --max-chars."
            )
        check_columns(self.columns, "--columns prompt=question completion=answer")

    def recorded(self) -> dict[str, Any]:
        """Options for the manifest: all that decide the output, and not where it is or how many
        processes made it."""
        left_out = ("inputs", "out", "workers", "strict")
        return {k: v for k, v in sorted(vars(self).items()) if k not in left_out}
