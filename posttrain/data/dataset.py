"""Sources to prompt groups on disk: read, tokenise once, memory-map, split, report.

A tokenised source is a folder: ``tokens.arrow`` with a row for each group, and ``manifest.json``.
Its name is the sha256 of what decides the tokens: the content of the files, the tokenizer, the
template, and the options ``format, columns, carry, max_length, overlong`` (and ``split`` for the
hub). Nothing of the optimisation is in it, nor seed, weights or eval_fraction, which choose among
rows. It is complete or not there: written under a temporary name and renamed. Of two processes that
write the same one, the first to finish wins and both read its result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.batches import mixed64
from posttrain.data.chat import ChatEncoder, set_chat_template
from posttrain.data.config import DataConfig, Purpose
from posttrain.data.readers import (
    HubSource,
    Row,
    carried_by_prep,
    load_hub,
    read_rows,
    resolve,
)
from posttrain.data.report import DataReport, SourceReport, check_stop_trained
from posttrain.data.tokenise import Encoded, RowEncoder, encode_rows, prompt_hash
from posttrain.files import cache_root, file_digest, whole_folder, write_json
from posttrain.types import Completion, Pair, PromptGroup

_BATCH_ROWS = 4096  # rows of a record batch on disk


@dataclass(kw_only=True, frozen=True)
class Part:
    """Rows of one tokenised source."""

    table: Any
    """`datasets.Dataset`, memory-mapped, with the columns of ``schema``."""

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
        """Numbers of a column of ``schema``, one per group."""
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


# ---- the folder of a tokenised source

ENCODING_VERSION = 4
"""Raise when the same rows would become different tokens or another file layout."""

TOKENS, MANIFEST = "tokens.arrow", "manifest.json"


def cache_folder(config: DataConfig) -> Path:
    """``data`` in ``cache_root(data.cache_dir)``."""
    return cache_root(config.cache_dir) / "data"


def cache_key(
    source: Sequence[Path] | HubSource,
    tokenizer: str,
    encoder: ChatEncoder,
    config: DataConfig,
    purpose: str,
) -> str:
    """32 hex digits; equal keys mean equal tokens. ``tokenizer``: its digest."""
    if isinstance(source, HubSource):
        loaded = load_hub(source, split=config.split)
        content = [f"{source.name}:{source.config}[{config.split}] {loaded._fingerprint}"]
    else:  # with the suffix: the same bytes read as CSV are other rows
        content = [f"{''.join(p.suffixes[-2:]).lower()} {file_digest(p)}" for p in source]
    chosen = ("format", "columns", "max_length", "overlong")
    options = {name: getattr(config, name) for name in chosen}
    options |= {"purpose": purpose, "carry": sorted(config.carry)}
    decisive = [ENCODING_VERSION, content, tokenizer, encoder.template, encoder.mask_from, options]
    return _digest(decisive)[:32]


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of vocabulary, merges and special tokens. Padding and truncation, which calls leave
    behind, are left out."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = {"vocab": tokenizer.get_vocab(), "init": repr(tokenizer)}
    else:
        state = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    versions = [transformers.__version__, tokenizers.__version__]
    return _digest([state, tokenizer.special_tokens_map, *versions])


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; None if there is none, or its tokens have not the size it
    states."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        size_bytes = (folder / TOKENS).stat().st_size
    except (OSError, json.JSONDecodeError):
        return None
    return manifest if manifest.get("tokens_bytes") == size_bytes else None


def publish(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Fills ``folder`` atomically. ``write(tokens_path)`` writes the tokens and returns the
    manifest's entries.

    Returns the manifest of what lies in ``folder`` afterwards: another process's if that was there
    first.
    """
    try:
        with whole_folder(folder) as temporary:
            manifest = write(temporary / TOKENS)
            manifest["tokens_bytes"] = (temporary / TOKENS).stat().st_size
            write_json(temporary / MANIFEST, manifest)
            if folder.exists() and read_manifest(folder) is None:  # damaged
                shutil.rmtree(folder, ignore_errors=True)
        return manifest
    except OSError as error:
        if (there := read_manifest(folder)) is not None:
            return there
        raise OSError(
            error.errno,
            f"{folder.parent}: cannot write tokenised data here: {error}. Free space, or set "
            "--data.cache_dir or POSTTRAIN_CACHE.",
        ) from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# ---- a group as a row of it


def schema() -> Any:
    """Columns of a tokenised source. ``pairs`` is null where all completions are compared,
    ``label`` -1, 0 or 1."""
    import pyarrow as pa

    number, ids = pa.int32(), pa.list_(pa.int32())
    sides = {"chosen": number, "rejected": number}
    pair = pa.struct(sides | {"margin": pa.float64(), "weight": pa.float64()})
    columns = {
        "prompt_ids": ids,
        "completion_ids": pa.list_(ids),
        "loss_mask": pa.list_(pa.list_(pa.uint8())),
        "pairs": pa.list_(pair),
        "label": pa.list_(pa.int8()),
        "file": number,
        "row": pa.int64(),
        "prompt_hash": pa.uint64(),
    }
    counts = ("num_tokens", "longest", "num_pairs", "num_labels")
    return pa.schema(columns | dict.fromkeys(counts, number))


def to_record(group: PromptGroup, file_numbers: Mapping[str, int]) -> dict[str, Any]:
    """A group as a row; ``num_tokens`` counts the prompt once, ``longest`` is the prompt with its
    longest completion."""
    return {
        "prompt_ids": group.prompt_ids,
        "completion_ids": [c.token_ids for c in group.completions],
        "loss_mask": [c.loss_mask.astype("u1") for c in group.completions],
        "pairs": None if group.pairs is None else [vars(pair) for pair in group.pairs],
        "label": [int(c.columns.get("label", 0)) for c in group.completions],
        "file": file_numbers[group.meta["file"]],
        "row": group.meta["row"],
        "prompt_hash": prompt_hash(group),
        "num_tokens": group.num_tokens_shared,
        "longest": len(group.prompt_ids) + max(len(c.token_ids) for c in group.completions),
        "num_pairs": len(group.trained_pairs),
        "num_labels": num_labels(group),
    }


def num_labels(group: PromptGroup) -> int:
    """Completions that are rated desirable or not."""
    return sum(bool(c.columns.get("label")) for c in group.completions)


def to_group(columns: Any, row: int, files: Sequence[str]) -> PromptGroup:
    """What ``to_record`` wrote, as it was."""

    def lists(name: str) -> list[Any]:
        return [value.values.to_numpy() for value in columns.column(name)[row].values]

    pairs = columns.column("pairs")[row].as_py()
    labels = columns.column("label")[row].as_py()
    return PromptGroup(
        prompt_ids=columns.column("prompt_ids")[row].values.to_numpy(),
        completions=[
            Completion(
                token_ids=ids, loss_mask=mask, columns={"label": label} if any(labels) else {}
            )
            for ids, mask, label in zip(
                lists("completion_ids"), lists("loss_mask"), labels, strict=True
            )
        ],
        pairs=None if pairs is None else [Pair(**pair) for pair in pairs],
        meta={
            "file": files[columns.column("file")[row].as_py()],
            "row": columns.column("row")[row].as_py(),
        },
    )
