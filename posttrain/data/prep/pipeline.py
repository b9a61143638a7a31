"""The run: two passes over bounded memory, written aside and renamed.

rows -> samples -> spill files by prompt hash  (one pass; bad rows to rejects.jsonl)
each spill file -> rows -> Parquet             (independent of each other, in worker processes)
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from posttrain.data.config import Format
from posttrain.data.layouts import read_sample
from posttrain.data.messages import checked, message_text
from posttrain.data.prep.contamination import EvaluationSet
from posttrain.data.prep.duplicates import PromptIndex
from posttrain.data.prep.options import PrepConfig, TokenCounter
from posttrain.data.prep.partition import (
    OUTPUT_COLUMNS,
    Extra,
    PartitionJob,
    Statistics,
    as_text,
    run_partition,
    spill_record,
)
from posttrain.data.prep.report import write_report
from posttrain.data.prep.rows import prompt_id
from posttrain.data.readers import Row, read_file, read_rows
from posttrain.data.report import column_counts
from posttrain.data.sources import HubSource, resolve
from posttrain.files import refuse_filled, whole_folder

_PARTITION_BYTES = 16 * 2**20
_MAX_PARTITIONS = 256
_GZIP_RATIO = 4


def prepare(
    config: PrepConfig, *, count_tokens: TokenCounter | None = None, show_progress: bool = True
) -> dict[str, Any]:
    """Writes ``config.out`` whole or not at all, and returns its manifest.

    Raises ValueError for a folder that is not empty, inputs of which no row is usable, and under
    ``strict`` for the first bad row.
    """
    if config.format not in get_args(Format):
        raise ValueError(
            f"--format is one of {', '.join(get_args(Format))}; got {config.format!r}."
        )
    out = config.out.expanduser()
    refuse_filled(out)
    with whole_folder(out) as folder:
        return _prepare_in(folder, config, count_tokens, show_progress)


def _prepare_in(
    folder: Path, config: PrepConfig, count_tokens: TokenCounter | None, show_progress: bool
) -> dict[str, Any]:
    sources = {source: resolve(source, split=config.split) for source in config.inputs}
    for name in ("spill", "train", "test", "rejects"):
        (folder / name).mkdir()
    num_partitions = _num_partitions(sources)
    with _pool(config, num_partitions) as pool:
        return _two_passes(
            folder, config, count_tokens, show_progress, sources, pool, num_partitions
        )


def _two_passes(
    folder: Path,
    config: PrepConfig,
    count_tokens: TokenCounter | None,
    show_progress: bool,
    sources: dict[str, Any],
    pool: Any,
    num_partitions: int,
) -> dict[str, Any]:
    counts, representatives, extra, columns = _spill(
        folder, config, sources, num_partitions, show_progress, pool
    )
    if not counts["parsed"]:
        raise ValueError(
            f"No row of {', '.join(config.inputs)} could be used ({counts['read']} read). First "
            f"reason: {_first_reject(folder)}"
        )
    evaluation = None
    if config.decontaminate:
        evaluation = EvaluationSet(
            (r.values for name in config.decontaminate for r in read_rows(name)), n=config.ngram
        )
    jobs = [
        PartitionJob(
            number=i,
            folder=folder,
            config=config,
            representatives=representatives,
            evaluation=evaluation,
            count_tokens=count_tokens,
            extra=extra,
        )
        for i in range(num_partitions)
    ]
    statistics = Statistics()
    for part in _progress(_run_jobs(jobs, pool), "building rows", len(jobs), show_progress):
        statistics.add(part)
    manifest = {
        "format_version": 2,
        "inputs": [
            {"name": name, **d}
            for source in config.inputs
            for name, d in _digests(source, sources[source])
        ],
        "options": config.recorded(),
        "counts": {**counts, **dict(sorted(statistics.counts.items()))},
        "dropped": dict(sorted(statistics.dropped.items())),
        "columns": columns,
    }
    _finish(folder, manifest, statistics, config)
    return manifest


def _finish(
    folder: Path, manifest: dict[str, Any], statistics: Statistics, config: PrepConfig
) -> None:
    with (folder / "rejects.jsonl").open("wb") as out:
        for path in [
            folder / "rejects" / "bad_rows.jsonl",
            *sorted((folder / "rejects").glob("[0-9]*.jsonl")),
        ]:
            with path.open("rb") as part:
                shutil.copyfileobj(part, out)
    for name in ("spill", "rejects"):
        shutil.rmtree(folder / name)
    if not any((folder / "test").iterdir()):
        (folder / "test").rmdir()
    if not any((folder / "train").iterdir()):
        raise ValueError(
            f"No training row is left; dropped: {manifest['dropped']}. Loosen the limits, or "
            "choose another --strategy."
        )
    (folder / "manifest.json").write_text(
        json.dumps(manifest, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    write_report(folder / "report.html", manifest, statistics, layout=config.layout)


def _num_partitions(sources: dict[str, Any]) -> int:
    """From the size of the inputs alone, so that it is the same on every machine."""
    total = 0
    for resolved in sources.values():
        if isinstance(resolved, HubSource):
            return 64
        total += sum(p.stat().st_size * (_GZIP_RATIO if p.suffix == ".gz" else 1) for p in resolved)
    return min(_MAX_PARTITIONS, 1 + total // _PARTITION_BYTES)


def _spill(
    folder: Path,
    config: PrepConfig,
    sources: dict[str, Any],
    num_partitions: int,
    show_progress: bool,
    pool: Any,
) -> tuple[dict[str, int], dict[str, str], Extra, dict[str, dict[str, int]]]:
    """First pass: (rows read, parsed, rejected; near-duplicates of other prompts; further columns;
    use of columns)."""
    counts = {"read": 0, "parsed": 0, "rejected": 0}
    columns: Counter[tuple[tuple[str, str], ...]] = Counter()
    extra = Extra()
    index = PromptIndex(pool) if config.near_duplicates != "off" else None
    with ExitStack() as stack:
        files = [
            stack.enter_context((folder / "spill" / f"{i:05d}").open("wb"))
            for i in range(num_partitions)
        ]
        bad_rows = folder / "rejects" / "bad_rows.jsonl"
        rejects = stack.enter_context(
            bad_rows.open("w", encoding="utf-8", errors="backslashreplace")
        )

        def reject(file: str, row: int, reason: str, values: Any = None) -> None:
            if config.strict:
                raise ValueError(f"{file}:{row}: {reason} (--strict)")
            counts["rejected"] += 1
            whole = {} if values is None else {"values": values}
            rejects.write(
                json.dumps(
                    {"file": file, "row": row, "reason": reason, **whole},
                    ensure_ascii=False,
                    default=str,
                )
                + "\n"
            )

        short = cache(partial(_short, sources=sources))
        for row in _progress(_rows(config, sources, reject), "reading", None, show_progress):
            source = short(row.file)
            try:
                sample = read_sample(
                    row.values, format=config.format, columns=config.columns, carry=config.carry
                )
                if sample.weight != 1 and config.layout != "pairs":
                    raise ValueError(
                        f"a weight ({sample.weight:g}) belongs to a pair; --layout {config.layout} "
                        "has no place for it"
                    )
                carried = {
                    f"raw_{k}" if k in OUTPUT_COLUMNS else k: checked(as_text(row.values[k]) or "")
                    for k in config.carry
                    if row.values.get(k) is not None
                }
            except ValueError as error:
                reject(source, row.row_number, str(error), row.values)
                continue
            identity = prompt_id(sample.prompt, sample.tools)
            counts["parsed"] += 1
            columns[tuple(sample.columns.items())] += 1
            extra.add(sample, carried)
            line = spill_record(sample, identity, source, row.row_number, carried)
            files[int(identity[:8], 16) % num_partitions].write(line)
            if index is not None:
                index.add(identity, "\n".join(message_text(m) for m in sample.prompt))
    counts["read"] = counts["parsed"] + counts["rejected"]
    alike = {} if index is None else index.representatives(config.threshold)
    return counts, alike, extra, column_counts(columns)


def _rows(config: PrepConfig, sources: dict[str, Any], reject: Any) -> Iterator[Row]:
    for source, resolved in sources.items():
        if isinstance(resolved, HubSource):
            yield from read_rows(source, split=config.split)
            continue
        for path in resolved:
            yield from read_file(path, on_bad_row=partial(reject, _short(str(path), sources)))


def _short(file: str, sources: dict[str, Any]) -> str:
    """The file relative to the input it belongs to: the same output wherever the data lies."""
    for source in sources:
        root = Path(source).expanduser()
        if file == str(root):
            return root.name
        if file.startswith(f"{root}/"):
            return f"{root.name}/{file.removeprefix(f'{root}/')}"
    return file


def _digests(source: str, resolved: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(resolved, HubSource):
        yield source, {}
        return
    for path in resolved:
        with path.open("rb") as file:
            yield (
                _short(str(path), {source: None}),
                {"sha256": hashlib.file_digest(file, "sha256").hexdigest()},
            )


def _first_reject(folder: Path) -> str:
    lines = (folder / "rejects" / "bad_rows.jsonl").read_text(encoding="utf-8").splitlines()
    if not lines:
        return "the inputs are empty."
    first = json.loads(lines[0])
    return f"{first['file']}:{first['row']}: {first['reason']}"


def _run_jobs(jobs: list[PartitionJob], pool: Any) -> Iterator[Statistics]:
    """In the order of the partitions, whatever the number of processes."""
    yield from map(run_partition, jobs) if pool is None else pool.imap(run_partition, jobs)


def _pool(config: PrepConfig, num_partitions: int) -> Any:
    """Worker processes, started before the first pass so that they are ready after it; a null
    context where one is enough."""
    workers = min(config.workers, num_partitions)
    if workers == 1:
        return nullcontext()
    import multiprocessing

    return multiprocessing.get_context("spawn").Pool(
        workers, initializer=gc.disable
    )  # what partitions make has no cycles


def _progress(items: Iterator[Any], text: str, total: int | None, show: bool) -> Iterator[Any]:
    """Passes the items on with a bar that counts them."""
    if not show:
        yield from items
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(text, total=total)
        every = 1 if total is not None else 512
        for number, item in enumerate(items, start=1):
            if number % every == 0:
                bar.update(task, completed=number)
            yield item
