"""Files, folders and hub datasets as a stream of rows. Every error names the file and the row.

A row number is 1-based: the line in JSON lines, the record in CSV (without the header), JSON
arrays, Parquet and the hub.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from posttrain.data.sources import SUFFIXES, HubSource, resolve

_CSV_FIELD_LIMIT_BYTES = 2**31 - 1  # the module's default of 128 KiB rejects long documents


@dataclass(kw_only=True, frozen=True)
class Row:
    """One record as it stands in the file."""

    file: str
    """Path of the file, or ``owner/name[split]`` on the hub."""

    row_number: int
    """1-based; see the module's docstring."""

    values: dict[str, Any]
    """Column name to value."""

    @property
    def where(self) -> str:
        """``file:row`` for messages."""
        return f"{self.file}:{self.row_number}"


def read_rows(source: str, *, split: str = "train") -> Iterator[Row]:
    """The rows of a file, a folder or a hub id (``sources.resolve``). A bad row is a ValueError,
    never skipped."""
    resolved = resolve(source, split=split)
    if isinstance(resolved, HubSource):
        yield from _numbered(f"{source}[{split}]", load_hub(resolved, split=split))
        return
    for path in resolved:
        yield from read_file(path)


BadRow = Callable[[int, str], None]
"""(row number, reason): what happens to a row that cannot be read."""


def read_file(path: Path, *, on_bad_row: BadRow | None = None) -> Iterator[Row]:
    """The rows of one file, by its suffix. An empty file is a ValueError: it is nearly always a
    failed export.

    Without ``on_bad_row`` the first bad row is a ValueError. With it, it is told of the row and
    reading goes on, with the next row where the file allows it, with the end of the file where it
    is damaged from there on.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(
            f"{path}: unknown suffix {''.join(path.suffixes) or '(none)'!r}; rows are read from "
            f"{', '.join(SUFFIXES)}. Rename or convert the file."
        )
    bad = on_bad_row or partial(_refuse, path)
    stem = name.removesuffix(".gz")
    if stem.endswith((".parquet", ".arrow")):
        values: Iterable[tuple[int, Any]] = enumerate(_arrow(path, bad), start=1)
    elif stem.endswith(".csv"):
        values = _csv(path, bad)
    elif stem.endswith(".json"):
        values = _json(path, bad)
    else:
        values = _json_lines(_lines(path, bad), bad)
    empty = on_bad_row is None
    for number, value in values:
        empty = False
        if isinstance(value, dict):
            yield Row(file=str(path), row_number=number, values=value)
        else:
            advice = 'Write one object per row, such as {"prompt": ..., "completion": ...}.'
            bad(
                number,
                f"a row is a JSON object with columns; got {_kind(value)}: "
                f"{_short(value)}. {advice}",
            )
    if empty:
        raise ValueError(
            f"{path}: no rows; the file is empty. Remove it from the sources or write it again."
        )


def load_hub(source: HubSource, *, split: str) -> Any:
    """The hub dataset as a `datasets.Dataset`; ValueError with the cause if it cannot be had."""
    import datasets

    try:
        return datasets.load_dataset(source.name, source.config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source.name}: no such file or folder here (looked in {Path.cwd()}), and as a hub id "
            f"it could not be loaded with config {source.config or 'default'!r}, split {split!r}: "
            f"{error}. Check the spelling, --data.split and the network, or download the data and "
            "pass its path."
        ) from error


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    number = 0
    for number, values in enumerate(rows, start=1):
        yield Row(file=name, row_number=number, values=dict(values))
    if number == 0:
        raise ValueError(f"{name}: no rows; the split is empty. Choose another with --data.split.")


def _refuse(path: Path, number: int, message: str) -> None:
    raise ValueError(f"{path}:{number}: {message}")


def _lines(path: Path, bad: BadRow) -> Iterator[str]:
    """Decoded lines, one at a time, so that an error knows its line; a bad one comes out empty."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    where = (
                        f"byte 0x{error.object[error.start]:02x} at position {error.start} of "
                        "the line"
                    )
                    bad(
                        number,
                        f"not UTF-8: {where}. Convert the file: iconv -f <its encoding> -t utf-8.",
                    )
                    text = "\n"
                yield text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"the gzip file is damaged or cut short after {number} lines ({error})"
        bad(number + 1, f"{what}. Copy or download it again; `gzip -t` checks it.")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _json_lines(lines: Iterable[str], bad: BadRow) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            where = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            what = "nested too deeply" if isinstance(error, RecursionError) else where
            bad(
                number,
                f"not JSON: {what}: {_short(line)}. Every line must be one JSON object; "
                "correct or remove this line.",
            )
            continue
        yield number, value


def _json(path: Path, bad: BadRow) -> Iterator[tuple[int, Any]]:
    """A JSON array of objects; a ``.json`` file whose first line is an object by itself is read as
    JSON lines."""
    text = "".join(_lines(path, bad))
    if not text.lstrip().startswith("["):
        yield from _json_lines(text.split("\n"), bad)
        return
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        where = (
            f"{error.msg} at line {line}, column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        bad(line, f"not JSON: {where}. Correct the file; JSON lines belong in a .jsonl file.")
        return
    yield from enumerate(values, start=1)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each key of which stands once: json keeps the last and drops the others."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in an object"
        )
    return made


def _csv(path: Path, bad: BadRow) -> Iterator[tuple[int, dict[str, Any]]]:
    previous_limit = csv.field_size_limit(_CSV_FIELD_LIMIT_BYTES)
    number = 0
    try:
        reader = csv.DictReader(_lines(path, bad), strict=True)
        header = reader.fieldnames or ()
        if len(set(header)) != len(header):
            raise ValueError(
                f"{path}: two columns have the same name: {list(header)}. Rename one; "
                "only the last would be read."
            )
        for number, values in enumerate(reader, start=1):
            if None in values or None in values.values():
                bad(
                    number,
                    f"the record that ends on line {reader.line_num} has not the "
                    f"{len(reader.fieldnames or ())} fields of the header {reader.fieldnames}. "
                    "Quote fields that hold commas or line breaks.",
                )
                continue
            yield number, values
    except csv.Error as error:
        bad(number + 1, f"not CSV: {error}. Quote fields, and double quotes inside them.")
    finally:
        csv.field_size_limit(previous_limit)


def _arrow(path: Path, bad: BadRow) -> Iterator[dict[str, Any]]:
    """Rows of Parquet, and of the Arrow streams that `datasets` saves."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.OSFile(str(path)) as raw:
            is_parquet = path.name.lower().endswith(".parquet")
            whole = pyarrow.parquet.ParquetFile(raw) if is_parquet else pyarrow.ipc.open_stream(raw)
            for batch in whole.iter_batches(batch_size=1024) if is_parquet else whole:
                for values in batch.to_pylist():
                    number += 1
                    yield values
    except pyarrow.ArrowException as error:
        bad(
            number + 1,
            f"not a readable {path.suffix[1:].capitalize()} file: {error}. Copy or write it again.",
        )


def _kind(value: Any) -> str:
    names = {
        list: "an array",
        str: "a string",
        int: "a number",
        float: "a number",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
