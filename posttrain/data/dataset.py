"""Sources to prompt groups on disk: read, tokenise once, memory-map, split, report."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.cache import (
    TOKENS,
    cache_folder,
    cache_key,
    publish,
    read_manifest,
    source_digests,
    tokenizer_digest,
)
from posttrain.data.chat import ChatEncoder, set_chat_template
from posttrain.data.config import DataConfig, Purpose
from posttrain.data.layouts import SAME
from posttrain.data.mixture import mixed64
from posttrain.data.readers import Row, read_rows
from posttrain.data.report import DataReport, SourceReport, column_counts
from posttrain.data.samples import check_stop_trained
from posttrain.data.sources import HubSource, resolve
from posttrain.data.table import schema, to_group, to_record
from posttrain.data.tokenise import Encoded, RowEncoder, check_layout, encode_rows
from posttrain.types import PromptGroup

_BATCH_ROWS = 4096  # rows of a record batch on disk


@dataclass(kw_only=True, frozen=True)
class Part:
    """Rows of one tokenised source."""

    table: Any
    """`datasets.Dataset`, memory-mapped, with the columns of ``table.schema``."""

    files: Sequence[str]
    """Names that the column ``file`` counts."""

    rows: np.ndarray[Any, Any]
    """Indices into the table that belong to this part."""

    key: str
    """Of the table in the cache: equal keys mean equal tokens."""

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """Numbers of a column, of this part's rows."""
        return self.table.data.column(name).to_numpy()[self.rows]


class GroupDataset(Sequence[PromptGroup]):
    """Prompt groups of one or more sources, laid end to end; read from disk as they are asked
    for."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.sizes = [len(p.rows) for p in self.parts]
        """Groups of each source, as `batch_indices` takes them."""
        self.lengths = self.column("num_tokens").astype(np.int64)
        """Tokens of each group, its prompt once."""
        self.longest = self.column("longest").astype(np.int64)
        """Tokens of the prompt with the group's longest completion."""
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= i < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} groups")
        source = int(np.searchsorted(self._ends, i, side="right"))
        return self.at(source, i - int(self._ends[source]) + self.sizes[source])

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """Numbers of a column of ``table.schema``, one per group."""
        return np.concatenate([p.column(name) for p in self.parts])

    def digest(self) -> str:
        """16 hex digits, equal for equal groups in the same order."""
        content = hashlib.sha256()
        for part in self.parts:
            content.update(part.key.encode() + part.rows.astype("<i8").tobytes())
        return content.hexdigest()[:16]

    def at(self, source: int, index: int) -> PromptGroup:
        """Group ``index`` of one source: what a pair of `batch_indices` names."""
        part = self.parts[source]
        return to_group(part.table.data, int(part.rows[index]), part.files)


@dataclass(kw_only=True, frozen=True)
class GroupData:
    """What `load_groups` returns."""

    train: GroupDataset
    """Groups to train on."""

    eval: GroupDataset | None
    """Groups to evaluate on; None if neither data.eval nor data.eval_fraction asks for any."""

    report: DataReport
    """What became of every row."""


def load_groups(
    config: DataConfig, tokenizer: Any, *, purpose: Purpose = "sft", progress: bool = True
) -> GroupData:
    """Tokenised groups of ``config.train`` and ``config.eval``, from the cache where they are
    already there.

    With ``config.chat_template`` the tokenizer's template is replaced in place. Several processes
    may call it at once; to tokenise only once, let one call first. Raises ValueError for bad rows
    (file and row), and if no stop token is trained.
    """
    if not config.train:
        raise ValueError(
            "data.train is empty: nothing to train on. Set --data.train '[rows.jsonl]'."
        )
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    encoder, digest = ChatEncoder(tokenizer), tokenizer_digest(tokenizer)
    loaded = [_load_source(s, config, encoder, digest, purpose, progress) for s in config.train]
    held_out = [_load_source(s, config, encoder, digest, purpose, progress) for s in config.eval]
    train_parts, eval_parts = [p for p, _ in loaded], [p for p, _ in held_out]
    if config.eval_fraction:
        train_parts, eval_parts = _hold_out(train_parts, config.eval_fraction, config.seed)
    train = GroupDataset(train_parts)
    evaluation = GroupDataset(eval_parts) if eval_parts else None
    if purpose != "reward":
        check_stop_trained(train, encoder.stop_ids)
    report = DataReport(
        train=[r for _, r in loaded],
        eval=[r for _, r in held_out],
        num_train_rows=len(train),
        num_eval_rows=0 if evaluation is None else len(evaluation),
    )
    return GroupData(train=train, eval=evaluation, report=report)


def groups_from_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    config: DataConfig | None = None,
    purpose: Purpose = "sft",
) -> list[PromptGroup]:
    """Rows that a program has in memory (a list of dicts, a `datasets.Dataset`) as groups, without
    cache.

    Cut and dropped rows are counted in one warning. Raises ValueError as `load_groups` does.
    """
    config = config or DataConfig()
    if isinstance(rows, Mapping):
        raise ValueError(
            "rows are a list of objects, one per row; got one object. Write [{...}, ...]."
        )
    numbered: Iterator[Row] = (
        Row(file="<memory>", row_number=i, values=r) for i, r in enumerate(rows, start=1)
    )  # type: ignore[arg-type]
    _check_format(config, purpose)
    encode = RowEncoder(encoder=ChatEncoder(tokenizer), config=config, purpose=purpose)
    results = list(map(encode, numbered))
    if not results:
        raise ValueError("No rows were given: nothing to train on. Pass at least one.")
    groups = [r.group for r in results if r.group is not None]
    dropped = Counter(r.reason for r in results if r.group is None)
    cut = sum(r.num_cut_tokens > 0 for r in results)
    if not groups:
        raise ValueError(_nothing_left("<memory>", len(results), dropped, config))
    if cut or dropped:
        counts = (
            f"{len(results)} rows, {cut} cut to data.max_length={config.max_length}, dropped: "
            f"{dict(dropped)}"
        )
        warnings.warn(
            f"Of the rows in memory not all are trained on whole: {counts}.", stacklevel=2
        )
    if purpose != "reward":
        check_stop_trained(groups, encode.encoder.stop_ids)
    return groups


def _load_source(
    source: str,
    config: DataConfig,
    encoder: ChatEncoder,
    digest: str,
    purpose: Purpose,
    progress: bool,
) -> tuple[Part, SourceReport]:
    """One source from the cache, tokenised first if it is not there."""
    import datasets

    resolved = resolve(source, split=config.split)
    files = (
        [f"{source}[{config.split}]"]
        if isinstance(resolved, HubSource)
        else [str(p) for p in resolved]
    )
    _check_format(config, purpose)
    key = cache_key(source_digests(resolved, split=config.split), digest, encoder, config, purpose)
    folder = cache_folder(config) / key
    manifest = read_manifest(folder)
    cached = manifest is not None
    if manifest is None:
        encode = RowEncoder(encoder=encoder, config=config, purpose=purpose)
        rows = read_rows(source, split=config.split)
        results = _with_progress(
            encode_rows(rows, encode, num_proc=config.num_proc), source, progress
        )
        manifest = publish(
            folder,
            lambda path: {"report": _write(path, results, encode, source=source, files=files)},
        )
    report = SourceReport(**manifest["report"] | {"source": source, "from_cache": cached})
    table = datasets.Dataset.from_file(str(folder / TOKENS))
    return Part(table=table, files=files, rows=np.arange(len(table)), key=key), report


def _check_format(config: DataConfig, purpose: Purpose) -> None:
    """A layout that is set must be one of the purpose."""
    if config.format != "auto":
        try:
            check_layout(SAME.get(config.format, config.format), purpose)
        except ValueError as error:
            raise ValueError(
                f"data.format={config.format}: {error}. Leave it at auto, or use the trainer that "
                "these rows are for."
            ) from error


def _write(
    path: Path, results: Iterable[Encoded], encode: RowEncoder, *, source: str, files: Sequence[str]
) -> dict[str, Any]:
    """Writes the kept rows and returns the report's entries. ValueError if no row is left."""
    import pyarrow as pa

    columns = schema()
    numbers = {name: i for i, name in enumerate(files)}
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    layouts: Counter[str] = Counter()
    uses: Counter[tuple[tuple[str, str], ...]] = Counter()

    def records() -> Iterator[dict[str, Any]]:
        for result in results:
            counts["num_read"] += 1
            layouts[result.layout] += 1
            uses[result.columns] += 1
            if result.group is None:
                dropped[result.reason] += 1
                continue
            counts["num_kept"] += 1
            counts["num_truncated"] += result.num_cut_tokens > 0
            counts["num_cut_tokens"] += result.num_cut_tokens
            counts["num_tokens"] += result.group.num_tokens_shared
            counts["num_trained_tokens"] += result.group.num_trained
            yield to_record(result.group, numbers)

    stream = records()
    with path.open("wb") as file, pa.ipc.new_stream(file, columns) as writer:
        while batch := list(itertools.islice(stream, _BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns))
    if not counts["num_kept"]:
        raise ValueError(_nothing_left(source, counts["num_read"], dropped, encode.config))
    names = (
        "num_read",
        "num_kept",
        "num_truncated",
        "num_cut_tokens",
        "num_tokens",
        "num_trained_tokens",
    )
    entries = {
        "layouts": dict(layouts),
        "columns": column_counts(uses),
        "mask_from": encode.encoder.mask_from,
        "dropped": dict(dropped),
    }
    return entries | {name: counts[name] for name in names}


def _nothing_left(
    source: str, num_read: int, dropped: Mapping[str, int], config: DataConfig
) -> str:
    return (
        f"{source}: no row is left to train on: {num_read} read, dropped: {dict(dropped)}. Raise "
        f"--data.max_length (now {config.max_length}) or correct the data."
    )


def _hold_out(parts: list[Part], fraction: float, seed: int) -> tuple[list[Part], list[Part]]:
    """(train, eval): the fraction of the rows whose prompts come first in an order drawn by the
    seed, prompts kept whole."""
    hashes = [p.column("prompt_hash") for p in parts]
    prompts, size = np.unique(np.concatenate(hashes), return_counts=True)
    by_seed = mixed64(
        prompts ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    )  # another order for every seed
    order = np.argsort(by_seed, kind="stable")
    target = max(1, round(fraction * int(size.sum())))
    num_prompts = int(np.searchsorted(np.cumsum(size[order]), target)) + 1
    held_out = prompts[order[:num_prompts]]
    masks = [np.isin(h, held_out) for h in hashes]
    train = [dataclasses.replace(p, rows=p.rows[~m]) for p, m in zip(parts, masks, strict=True)]
    empty = [i for i, p in enumerate(train) if len(p.rows) == 0]
    if empty:
        raise ValueError(
            f"data.eval_fraction={fraction} holds out every row of training source {empty[0]} "
            f"(rows with the same prompt stay together; {len(prompts)} different prompts in "
            f"{int(size.sum())} rows). Lower it, or give held-out rows with --data.eval."
        )
    kept = [dataclasses.replace(p, rows=p.rows[m]) for p, m in zip(parts, masks, strict=True)]
    return train, [p for p in kept if len(p.rows)]


def _with_progress(results: Iterator[Encoded], source: str, show: bool) -> Iterator[Encoded]:
    """Passes the results on, with a line that counts rows and tokens while they come."""
    if not show:
        yield from results
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    text = TextColumn(
        "tokenising {task.description}: {task.completed:,} rows, {task.fields[tokens]:,} tokens"
    )
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task(source, total=None, tokens=0)
        rows = tokens = 0
        for result in results:
            rows += 1
            tokens += 0 if result.group is None else result.group.num_tokens_shared
            if rows % 64 == 0:
                bar.update(task, completed=rows, tokens=tokens)
            yield result
