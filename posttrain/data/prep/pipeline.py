"""The run: two passes over bounded memory, written aside and renamed.

rows -> samples -> spill files by prompt hash  (one pass; bad rows to rejects.jsonl)
each spill file -> rows -> Parquet             (independent of each other, in worker processes)
"""

from __future__ import annotations

import gc
import hashlib
import json
import marshal
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.config import PrepConfig, TokenCounter
from posttrain.data.layouts import read_sample
from posttrain.data.messages import checked, message_text
from posttrain.data.prep.duplicates import EvaluationSet, near_duplicates
from posttrain.data.prep.rows import (
    CONTAMINATED,
    NEAR_DUPLICATE,
    Located,
    Values,
    prompt_id,
    rows_of,
    within_limits,
)
from posttrain.data.readers import HubSource, Row, read_file, read_rows, resolve
from posttrain.data.report import column_counts
from posttrain.data.row import Answer, Sample
from posttrain.files import file_digest, refuse_filled, whole_folder

_PARTITION_BYTES = 16 * 2**20
_MAX_PARTITIONS = 256
_HUB_PARTITIONS = 64
_GZIP_RATIO = 4
_PLACE = ("source", "row", "prompt_id")
OUTPUT_COLUMNS = frozenset(
    "prompt chosen rejected margin chosen_score rejected_score weight completions ranks scores "
    "completion label messages tools source row prompt_id".split()
)
"""Columns of any layout: one that is carried along under such a name is written as raw_<name>."""


@dataclass(kw_only=True)
class Statistics:
    """What manifest and report say of the rows; adds up over partitions."""

    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    chosen_lengths: Counter[int] = field(default_factory=Counter)
    """Characters, in bins of powers of two: bin b holds 2^b to 2^(b+1) - 1."""
    rejected_lengths: Counter[int] = field(default_factory=Counter)
    longer_chosen: Counter[bool] = field(default_factory=Counter)
    """Of pairs of unequal length: whether the longer side is chosen."""
    margins: Counter[float] = field(default_factory=Counter)
    """Rounded to two significant digits."""

    def add(self, other: Statistics) -> None:
        """Sums."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.update(theirs)

    def of_pairs(self) -> dict[str, Any]:
        """For the manifest: lengths by bin b (2^b to 2^(b+1) - 1 characters), how often the longer
        answer is chosen, and margins as (from, to, pairs)."""
        sides = {"chosen": self.chosen_lengths, "rejected": self.rejected_lengths}
        heights, edges = np.histogram(
            list(self.margins), bins=20, weights=list(self.margins.values())
        )
        bins = zip(edges, edges[1:], heights, strict=False)
        return {
            "characters": {side: dict(sorted(found.items())) for side, found in sides.items()},
            "pairs_of_unequal_length": self.longer_chosen.total(),
            "longer_is_chosen": self.longer_chosen[True],
            "margins": [(float(low), float(high), int(n)) for low, high, n in bins if self.margins],
        }

    def see(self, pair: Values) -> None:
        """Counts lengths and margin of a pair that is written."""
        chosen, rejected = (
            sum(len(message_text(m)) for m in pair[side]) for side in ("chosen", "rejected")
        )
        self.chosen_lengths[chosen.bit_length() - 1] += 1
        self.rejected_lengths[rejected.bit_length() - 1] += 1
        if chosen != rejected:
            self.longer_chosen[chosen > rejected] += 1
        if pair["margin"] is not None:
            self.margins[float(f"{pair['margin']:.2g}")] += 1


def prepare(
    config: PrepConfig, *, count_tokens: TokenCounter | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Writes ``config.out`` whole or not at all, and returns its manifest.

    Raises ValueError for a folder that is not empty, inputs of which no row is usable, and under
    ``strict`` for the first bad row.
    """
    from rich.progress import track

    out = config.out.expanduser()
    refuse_filled(out)
    sources = [file for source in config.inputs for file in _files(source, config.split)]
    num_partitions = _num_partitions([path for _, path in sources])
    bar = partial(track, disable=not show_progress, transient=True)
    with whole_folder(out) as folder, _pool(config, num_partitions) as pool:
        imap = map if pool is None else pool.imap
        reading = _Reading(folder, config)
        samples = reading.spilled(bar(reading.rows(sources), "reading"), num_partitions)
        alike = {}
        if config.near_duplicates == "off":
            deque(samples, maxlen=0)
        else:
            texts = (
                (place["prompt_id"], "\n".join(map(message_text, sample.prompt)))
                for sample, place in samples
            )
            alike = near_duplicates(texts, config.threshold, imap=imap)
        reading.check()
        job = _Job(
            folder=folder,
            config=config,
            representatives=alike,
            evaluation=_evaluation(config),
            count_tokens=count_tokens,
            schema=_schema(config.layout, reading),
        )
        statistics = Statistics()
        with (folder / "rejects.jsonl").open("a", encoding="utf-8") as rejects:
            parts = imap(partial(run_partition, job), range(num_partitions))
            for part, dropped in bar(parts, "building rows", total=num_partitions):
                statistics.add(part)
                rejects.writelines(map(_line, dropped))
        manifest = {
            "format_version": 2,
            "inputs": [
                {"name": name} | ({"sha256": file_digest(path)} if path else {})
                for name, path in sources
            ],
            "options": config.recorded(),
            "counts": {**reading.counts, **dict(sorted(statistics.counts.items()))},
            "dropped": dict(sorted(statistics.dropped.items())),
            "columns": column_counts(reading.uses),
        }
        if config.layout == "pairs":
            manifest["statistics"] = statistics.of_pairs()
        _finish(folder, manifest)
    return manifest


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    if not (folder / "train").exists():
        raise ValueError(
            f"No training row is left; dropped: {manifest['dropped']}. Loosen the limits."
        )
    shutil.rmtree(folder / "spill")
    text = json.dumps(manifest, indent=1, default=str, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _evaluation(config: PrepConfig) -> EvaluationSet | None:
    rows = (row.values for name in config.decontaminate for row in read_rows(name))
    return EvaluationSet(rows, n=config.ngram) if config.decontaminate else None


def _files(source: str, split: str) -> Iterator[tuple[str, Path | None]]:
    """(name, path) of each file; the name is relative to the source, so that the output is the same
    wherever the data lies. A hub id has no path."""
    found, root = resolve(source, split=split), Path(source).expanduser()
    if isinstance(found, HubSource):
        yield source, None
        return
    for path in found:
        inside = path.is_relative_to(root)
        yield str(root.name / path.relative_to(root) if inside else path), path


def _num_partitions(paths: list[Path | None]) -> int:
    """From the size of the inputs alone, so that it is the same on every machine."""
    sizes = (p.stat().st_size * (_GZIP_RATIO if p.suffix == ".gz" else 1) for p in paths if p)
    known = min(_MAX_PARTITIONS, 1 + sum(sizes) // _PARTITION_BYTES)
    return _HUB_PARTITIONS if None in paths else known


def _pool(config: PrepConfig, num_partitions: int) -> Any:
    """Worker processes, started before the first pass so that they are ready after it; a null
    context where one is enough."""
    workers = min(config.workers, num_partitions)
    if workers == 1:
        return nullcontext()
    import multiprocessing

    # what partitions make has no cycles
    return multiprocessing.get_context("spawn").Pool(workers, initializer=gc.disable)


class _Reading:
    """The first pass: rows become samples in the spill file of their prompt's partition."""

    def __init__(self, folder: Path, config: PrepConfig) -> None:
        self._folder, self._config = folder, config
        self._rejects = (folder / "rejects.jsonl").open(
            "w", encoding="utf-8", errors="backslashreplace"
        )
        self._first_reason = "the inputs are empty."
        self.counts = {"read": 0, "parsed": 0, "rejected": 0}
        self.uses: Counter[tuple[tuple[str, str], ...]] = Counter()
        """How often each set of (column, use) was seen."""
        self.message_keys: set[str] = set()
        """Of messages, beside role and content."""
        self.places: set[str] = set()
        """Columns that are written beside those of the layout."""

    def rows(self, sources: list[tuple[str, Path | None]]) -> Iterator[Row]:
        """Rows of all files under their names in the output; bad ones are rejected."""
        for name, path in sources:
            if path is None:
                yield from read_rows(name, split=self._config.split)
                continue
            yield from read_file(path, name=name, on_bad_row=partial(self._reject, name))

    def spilled(self, rows: Iterable[Row], num_partitions: int) -> Iterator[Located]:
        """The samples of the rows, after each is written."""
        (self._folder / "spill").mkdir()
        with ExitStack() as stack:
            stack.enter_context(self._rejects)
            paths = (_spill_file(self._folder, i) for i in range(num_partitions))
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for row in rows:
                try:
                    sample, place = self._read(row)
                except ValueError as error:
                    self._reject(row.file, row.row_number, str(error), values=row.values)
                    continue
                self.counts["parsed"] += 1
                self.uses[tuple(sample.columns.items())] += 1
                self.places.update(place)
                for message in chain(sample.prompt, *(a.messages for a in sample.answers)):
                    if len(message) > 2:
                        self.message_keys.update(message)
                number = int(place["prompt_id"][:8], 16) % num_partitions
                files[number].write(_record(sample, place))
                yield sample, place

    def _read(self, row: Row) -> Located:
        config = self._config
        sample = read_sample(
            row.values, format=config.format, columns=config.columns, carry=config.carry
        )
        place: Values = {"source": row.file, "row": row.row_number}
        place["prompt_id"] = prompt_id(sample.prompt, sample.tools)
        if sample.tools:
            place["tools"] = sample.tools
        if sample.weight != 1:
            if config.layout != "pairs":
                raise ValueError(
                    f"a weight ({sample.weight:g}) has no place in --layout {config.layout}"
                )
            place["weight"] = sample.weight
        for name in config.carry:
            if row.values.get(name) is not None:
                written = f"raw_{name}" if name in OUTPUT_COLUMNS else name
                place[written] = checked(as_text(row.values[name]) or "")
        return sample, place

    def _reject(self, file: str, row: int, reason: str, **more: Any) -> None:
        if self._config.strict:
            raise ValueError(f"{file}:{row}: {reason} (--strict)")
        if not self.counts["rejected"]:
            self._first_reason = f"{file}:{row}: {reason}"
        self.counts["rejected"] += 1
        self._rejects.write(_line({"file": file, "row": row, "reason": reason, **more}))

    def check(self) -> None:
        """Counts what was read; ValueError if no row was usable."""
        self.counts["read"] = self.counts["parsed"] + self.counts["rejected"]
        if not self.counts["parsed"]:
            raise ValueError(
                f"No row of {', '.join(self._config.inputs)} could be used ({self.counts['read']} "
                f"read). First reason: {self._first_reason}"
            )


def _line(reject: Values) -> str:
    return json.dumps(reject, ensure_ascii=False, default=str) + "\n"


def _spill_file(folder: Path, number: int) -> Path:
    return folder / "spill" / f"{number:05d}"


def _record(sample: Sample, place: Values) -> bytes:
    """A sample as one record of its partition: its length and marshal, which is several times as
    fast as JSON."""
    answers = [[a.messages, a.rank, a.score, a.label] for a in sample.answers]
    record = marshal.dumps([place, sample.layout, sample.prompt, sample.margin, answers])
    return len(record).to_bytes(8) + record


def _prompts(path: Path) -> dict[str, list[Located]]:
    """{prompt id: its samples} of a spill file, both in the order of the data."""
    prompts: dict[str, list[Located]] = {}
    with path.open("rb") as file:
        while size := int.from_bytes(file.read(8)):
            place, layout, prompt, margin, raw = marshal.loads(file.read(size))
            answers = [Answer(messages=m, rank=r, score=s, label=v) for m, r, s, v in raw]
            sample = Sample(prompt=prompt, answers=answers, layout=layout, margin=margin)
            prompts.setdefault(place["prompt_id"], []).append((sample, place))
    return prompts


@dataclass(kw_only=True, frozen=True)
class _Job:
    """What is the same for all partitions."""

    folder: Path
    config: PrepConfig
    representatives: dict[str, str]
    evaluation: EvaluationSet | None
    count_tokens: TokenCounter | None
    schema: Any


def run_partition(job: _Job, number: int) -> tuple[Statistics, list[Values]]:
    """The second pass: one partition of the prompts becomes rows, written as Parquet. Returns what
    was left out, too."""
    config, statistics = job.config, Statistics()
    rows: list[Values] = []
    rejects: list[Values] = []

    def drop(place: Values, reason: str) -> None:
        statistics.dropped[reason] += 1
        if place:
            rejects.append({"file": place["source"], "row": place["row"], "reason": reason})

    for identity, samples in _prompts(_spill_file(job.folder, number)).items():
        statistics.counts["prompts"] += 1
        reason = _reason_against(identity, samples, job)
        if reason is None:
            rows += rows_of(samples, config, drop, statistics.counts)
            continue
        statistics.counts.update(samples=len(samples), dropped_samples=len(samples))
        for _, place in samples:
            drop(place, reason)
    splits: dict[str, list[Values]] = {}
    for row in within_limits(rows, config, job.count_tokens, drop):
        first = job.representatives.get(row["prompt_id"], row["prompt_id"])
        # by a hash of seed and prompt: independent of all other prompts and of their order
        key = f"split:{config.seed}:{first}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
        split = "test" if drawn < config.test_fraction * 2**64 else "train"
        splits.setdefault(split, []).append(row)
        statistics.counts[f"written_{split}"] += 1
        if config.layout == "pairs":
            statistics.see(row)
    for split, written in splits.items():
        (job.folder / split).mkdir(exist_ok=True)
        _write_parquet(job.folder / split / f"{number:05d}.parquet", written, job.schema)
    return statistics, rejects


def _reason_against(identity: str, samples: list[Located], job: _Job) -> str | None:
    if job.config.near_duplicates == "drop" and identity in job.representatives:
        return NEAR_DUPLICATE
    if job.evaluation is not None:
        texts = {message_text(m) for sample, _ in samples for m in sample.prompt}
        texts |= {a.text for sample, _ in samples for a in sample.answers}
        if any(map(job.evaluation.overlaps, texts)):
            return CONTAMINATED
    return None


def _schema(layout: str, reading: _Reading) -> Any:
    """The same for all files. Arguments of calls, schemas and carried objects are JSON text: Arrow
    would give each the keys of all others."""
    import pyarrow as pa

    function = pa.struct({"name": pa.string(), "arguments": pa.string()})
    call = pa.struct({"id": pa.string(), "type": pa.string(), "function": function})
    kinds = {"weight": pa.int8(), "tool_calls": pa.list_(call)}
    keys = ["role", "content", *sorted(reading.message_keys - {"role", "content"})]
    talk = pa.list_(pa.struct({key: kinds.get(key, pa.string()) for key in keys}))
    number = pa.float64()
    columns: dict[str, Any] = {
        "pairs": {
            **dict.fromkeys(("prompt", "chosen", "rejected"), talk),
            **dict.fromkeys(("margin", "chosen_score", "rejected_score"), number),
        },
        "groups": {
            "prompt": talk,
            "completions": pa.list_(talk),
            "ranks": pa.list_(pa.int32()),
            "scores": pa.list_(number),
        },
        "labelled": {"prompt": talk, "completion": talk, "label": pa.bool_()},
        "sft": {"messages": talk},
    }[layout]
    known = {"weight": number, "row": pa.int64()}
    beside = [*_PLACE, *sorted(reading.places - {*_PLACE})]
    return pa.schema(columns | {name: known.get(name, pa.string()) for name in beside})


def _write_parquet(path: Path, rows: list[Values], schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f.name for f in schema if f.type == pa.string() and f.name not in _PLACE]
    if texts:
        rows = [row | {n: as_text(row[n]) for n in texts if n in row} for row in rows]
    if "tool_calls" in str(schema):
        rows = [_on_wire(row) for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def _on_wire(value: Any) -> Any:
    """The value with the arguments of every call in it as JSON text."""
    if isinstance(value, list):
        return [_on_wire(v) for v in value]
    if isinstance(value, dict):
        return {k: as_text(v) if k == "arguments" else _on_wire(v) for k, v in value.items()}
    return value


def as_text(value: Any) -> str | None:
    """The value as a column of texts holds it: a text as it is, anything else as JSON."""
    is_text = value is None or isinstance(value, str)
    return value if is_text else json.dumps(value, ensure_ascii=False, default=str)
