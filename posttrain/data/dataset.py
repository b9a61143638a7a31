"""Sources to prompt groups on disk: read, tokenise once, memory-map, split, report."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.cache import (
    TOKENS,
    cache_folder,
    cache_key,
    publish,
    read_manifest,
    tokenizer_digest,
)
from posttrain.data.chat import ChatEncoder, set_chat_template
from posttrain.data.config import DataConfig, Purpose
from posttrain.data.mixture import mixed64
from posttrain.data.readers import HubSource, Row, carried_by_prep, read_rows, resolve
from posttrain.data.report import DataReport, SourceReport, check_stop_trained
from posttrain.data.table import schema, to_group, to_record
from posttrain.data.tokenise import Encoded, RowEncoder, encode_rows
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
    encode = RowEncoder(encoder=ChatEncoder(tokenizer), config=config, purpose=purpose)
    digest = tokenizer_digest(tokenizer)
    sources = [*config.train, *config.eval]
    loaded = [_load_source(source, encode, digest, progress) for source in sources]
    parts, reports = [part for part, _ in loaded], [report for _, report in loaded]
    num_train = len(config.train)
    train_parts, eval_parts = parts[:num_train], parts[num_train:]
    if config.eval_fraction:
        train_parts, eval_parts = _hold_out(train_parts, config.eval_fraction, config.seed)
    train = GroupDataset(train_parts)
    evaluation = GroupDataset(eval_parts) if eval_parts else None
    if purpose != "reward":
        check_stop_trained(train, encode.encoder.stop_ids)
    report = DataReport(
        train=reports[:num_train],
        eval=reports[num_train:],
        num_train_rows=len(train),
        num_eval_rows=len(evaluation or ()),
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
    encode = RowEncoder(encoder=ChatEncoder(tokenizer), config=config, purpose=purpose)
    report = SourceReport(source="<memory>", mask_from=encode.encoder.mask_from)
    numbered = enumerate(rows, start=1)
    placed = (Row(file="<memory>", row_number=i, values=r) for i, r in numbered)
    groups = list(report.counted(map(encode, placed)))
    if not report.num_read:
        raise ValueError("No rows were given: nothing to train on. Pass at least one.")
    if _checked(report, config).num_truncated or report.dropped:
        warnings.warn(
            f"Of the rows in memory not all are trained on whole: {report.num_read} rows, "
            f"{report.num_truncated} cut to data.max_length={config.max_length}, dropped: "
            f"{report.dropped}.",
            stacklevel=2,
        )
    if purpose != "reward":
        check_stop_trained(groups, encode.encoder.stop_ids)
    return groups


def _load_source(
    source: str, encode: RowEncoder, tokenizer: str, progress: bool
) -> tuple[Part, SourceReport]:
    """One source from the cache, tokenised first if it is not there. ``tokenizer``: its digest."""
    import datasets

    config = encode.config
    config = replace(config, carry=[*config.carry, *carried_by_prep(source)])
    encode = replace(encode, config=config)
    found = resolve(source, split=config.split)
    is_hub = isinstance(found, HubSource)
    files = [f"{source}[{config.split}]"] if is_hub else [str(path) for path in found]
    key = cache_key(found, tokenizer, encode.encoder, config, encode.purpose)
    folder = cache_folder(config) / key
    manifest = read_manifest(folder)
    cached = manifest is not None
    if manifest is None:
        from rich.progress import track

        rows = read_rows(source, split=config.split)
        results = encode_rows(rows, encode, num_proc=config.num_proc)
        shown = track(results, f"tokenising {source}", disable=not progress, transient=True)
        manifest = publish(folder, lambda path: _write(path, shown, encode, source, files))
    report = SourceReport(**manifest["report"] | {"source": source, "from_cache": cached})
    table = datasets.Dataset.from_file(str(folder / TOKENS))
    return Part(table=table, files=files, rows=np.arange(len(table)), key=key), report


def _checked(report: SourceReport, config: DataConfig) -> SourceReport:
    """ValueError if no row is left."""
    if not report.num_kept:
        raise ValueError(
            f"{report.source}: no row is left to train on: {report.num_read} read, dropped: "
            f"{report.dropped}. Raise --data.max_length (now {config.max_length})."
        )
    return report


def _write(
    path: Path, results: Iterable[Encoded], encode: RowEncoder, source: str, files: Sequence[str]
) -> dict[str, Any]:
    """Writes the kept rows and returns the manifest's entries."""
    import pyarrow as pa

    columns = schema()
    report = SourceReport(source=source, mask_from=encode.encoder.mask_from)
    numbers = {name: i for i, name in enumerate(files)}
    records = (to_record(group, numbers) for group in report.counted(results))
    with path.open("wb") as file, pa.ipc.new_stream(file, columns) as writer:
        while batch := list(itertools.islice(records, _BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns))
    return {"report": vars(_checked(report, encode.config))}


def _hold_out(parts: list[Part], fraction: float, seed: int) -> tuple[list[Part], list[Part]]:
    """(train, eval): the fraction of the rows whose prompts come first in an order drawn by the
    seed, prompts kept whole."""
    hashes = [p.column("prompt_hash") for p in parts]
    prompts, size = np.unique(np.concatenate(hashes), return_counts=True)
    by_seed = prompts ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    order = np.argsort(mixed64(by_seed), kind="stable")
    target = max(1, round(fraction * int(size.sum())))
    num_prompts = int(np.searchsorted(np.cumsum(size[order]), target)) + 1
    held_out = prompts[order[:num_prompts]]
    masks = [np.isin(h, held_out) for h in hashes]
    train = [replace(p, rows=p.rows[~m]) for p, m in zip(parts, masks, strict=True)]
    empty = [i for i, p in enumerate(train) if len(p.rows) == 0]
    if empty:
        raise ValueError(
            f"data.eval_fraction={fraction} holds out every row of training source {empty[0]} "
            f"(rows with the same prompt stay together; {len(prompts)} different prompts in "
            f"{int(size.sum())} rows). Lower it, or give held-out rows with --data.eval."
        )
    kept = [replace(p, rows=p.rows[m]) for p, m in zip(parts, masks, strict=True)]
    return train, [p for p in kept if len(p.rows)]
