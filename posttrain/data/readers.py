"""Files, folders and hub data sets as a stream of rows. Every error names the file and the row.

A row number is 1-based: the line in JSON lines, the record in CSV (without the header), JSON
arrays, Parquet and the hub.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

_TEXTS = (".jsonl", ".ndjson", ".json", ".csv")
SUFFIXES = (*_TEXTS, ".parquet", ".arrow", *(f"{suffix}.gz" for suffix in _TEXTS))
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?$")
_SPLITS = {"train": "train(ing)?", "test": "test", "validation": "valid(ation)?|val|dev|eval"}
_ABOUT_ROWS = {"dataset_info.json", "dataset_infos.json"}
_OF_PREP = {"manifest.json", "rejects.jsonl"}
_CSV_FIELD_LIMIT_BYTES = 2**31 - 1  # the module's default of 128 KiB rejects long documents


@dataclass(kw_only=True, frozen=True)
class Row:
    """One record as it stands in the file."""

    file: str
    """Path of the file, or ``owner/name[split]`` on the hub."""
    row_number: int
    """1-based; see the module's docstring."""
    values: Mapping[str, Any]
    """Column name to value."""

    @property
    def where(self) -> str:
        """``file:row`` for messages."""
        return f"{self.file}:{self.row_number}"


class HubSource(NamedTuple):
    """A data set on the hub: ``owner/name`` and an optional configuration."""

    name: str
    config: str | None


def carried_by_prep(source: str) -> list[str]:
    """Columns that `posttrain prep --carry` wrote into this folder, or into train/ or test/ of it:
    they were said there to change nothing."""
    folder = Path(source).expanduser()
    manifests = [place / "manifest.json" for place in (folder, folder.parent)]
    path = next((path for path in manifests if path.is_file()), None)
    if path is None:
        return []
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    is_of_prep = isinstance(known, dict) and {"format_version", "options"} <= known.keys()
    return list(known["options"].get("carry", [])) if is_of_prep else []


def read_rows(source: str, *, split: str = "train") -> Iterator[Row]:
    """The rows of a file, a folder or a hub id (``resolve``). A bad row is a ValueError, never
    skipped."""
    found = resolve(source, split=split)
    if not isinstance(found, HubSource):
        for path in found:
            yield from read_file(path)
        return
    name, number = f"{source}[{split}]", 0
    for number, values in enumerate(load_hub(found, split=split), start=1):
        yield Row(file=name, row_number=number, values=values)
    if number == 0:
        raise ValueError(f"{name}: no rows; the split is empty. Choose another with --data.split.")


BadRow = Callable[[int, str], None]
"""(row number, reason): what happens to a row that cannot be read."""


def read_file(
    path: Path, *, name: str | None = None, on_bad_row: BadRow | None = None
) -> Iterator[Row]:
    """The rows of one file, by its suffix; their ``file`` is ``name``, or the path. An empty file
    is a ValueError: it is nearly always a failed export.

    Without ``on_bad_row`` the first bad row is a ValueError. With it, it is told of the row and
    reading goes on, with the next row where the file allows it, with the end of the file where it
    is damaged from there on.
    """
    lowered, name = path.name.lower(), name or str(path)
    if not lowered.endswith(SUFFIXES):
        raise ValueError(
            f"{path}: unknown suffix {''.join(path.suffixes) or '(none)'!r}; rows are read from "
            f"{', '.join(SUFFIXES)}. Rename or convert the file."
        )
    bad = on_bad_row or partial(_refuse, path)
    readers = {".parquet": _arrow, ".arrow": _arrow, ".csv": _csv, ".json": _json}
    read = readers.get(Path(lowered.removesuffix(".gz")).suffix, _json_lines)
    number = 0
    for number, value in read(path, bad):
        if isinstance(value, dict):
            yield Row(file=name, row_number=number, values=value)
        else:
            bad(
                number,
                f"a row is a JSON object with columns; got {_KINDS.get(type(value), 'a number')}: "
                f'{_short(value)}. Write one object per row, such as {{"prompt": ..., '
                '"completion": ...}.',
            )
    if number == 0 and on_bad_row is None:
        raise ValueError(
            f"{path}: no rows; the file is empty. Remove it from the sources or write it again."
        )


def load_hub(source: HubSource, *, split: str) -> Any:
    """The hub data set as a `datasets.Dataset`; ValueError with the cause if it cannot be had."""
    import datasets

    try:
        return datasets.load_dataset(source.name, source.config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source.name}: no such file or folder here (looked in {Path.cwd()}), and as a hub id "
            f"it could not be loaded with config {source.config or 'default'!r}, split {split!r}: "
            f"{error}. Check the spelling, --data.split and the network, or pass a path."
        ) from error


def _refuse(path: Path, number: int, message: str) -> None:
    raise ValueError(f"{path}:{number}: {message}")


def _lines(path: Path, bad: BadRow) -> Iterator[str]:
    """Decoded lines, one at a time, so that an error knows its line; a bad one comes out empty."""
    number = 0
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    bad(
                        number,
                        f"not UTF-8: byte 0x{error.object[error.start]:02x} at position "
                        f"{error.start} of the line. Convert the file: iconv -f <its encoding> -t "
                        "utf-8.",
                    )
                    text = "\n"
                yield text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        bad(
            number + 1,
            f"the gzip file is damaged or cut short after {number} lines ({error}). Copy or "
            "download it again; `gzip -t` checks it.",
        )


def _json_lines(
    path: Path, bad: BadRow, lines: Iterable[str] | None = None
) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines or _lines(path, bad), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            what = "nested too deeply" if is_deep else str(error).replace("line 1 column", "column")
            bad(
                number,
                f"not JSON: {what}: {_short(line)}. Every line must be one JSON object; correct or "
                "remove this line.",
            )


def _json(path: Path, bad: BadRow) -> Iterator[tuple[int, Any]]:
    """A JSON array of objects; a ``.json`` file whose first line is an object by itself is read as
    JSON lines."""
    text = "".join(_lines(path, bad))
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, bad, text.split("\n"))
        return
    try:
        values = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        advice = "Correct the file; JSON lines belong in a .jsonl file."
        bad(getattr(error, "lineno", 1), f"not JSON: {error}. {advice}")
        return
    yield from enumerate(values, start=1)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each key of which stands once: json keeps the last and drops the others."""
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return made


def _csv(path: Path, bad: BadRow) -> Iterator[tuple[int, Any]]:
    previous_limit = csv.field_size_limit(_CSV_FIELD_LIMIT_BYTES)
    number = 0
    try:
        reader = csv.DictReader(_lines(path, bad), strict=True)
        header = reader.fieldnames or ()
        if len(set(header)) != len(header):
            raise ValueError(f"{path}: two columns have the same name: {list(header)}. Rename one.")
        for number, values in enumerate(reader, start=1):
            if None in values or None in values.values():
                bad(
                    number,
                    f"the record that ends on line {reader.line_num} has not the {len(header)} "
                    f"fields of the header {header}. Quote fields that hold commas or line breaks.",
                )
            else:
                yield number, values
    except csv.Error as error:
        bad(number + 1, f"not CSV: {error}. Quote fields, and double quotes inside them.")
    finally:
        csv.field_size_limit(previous_limit)


def _arrow(path: Path, bad: BadRow) -> Iterator[tuple[int, Any]]:
    """Rows of Parquet, and of the Arrow streams that `datasets` saves."""
    import pyarrow
    import pyarrow.parquet

    number, suffix = 0, path.suffix[1:].lower()
    try:
        with pyarrow.OSFile(str(path)) as raw:
            if suffix == "parquet":
                batches = pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=1024)
            else:
                batches = pyarrow.ipc.open_stream(raw)
            for batch in batches:
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except pyarrow.ArrowException as error:
        what = f"not a readable {suffix.capitalize()} file: {error}"
        bad(number + 1, f"{what}. Copy or write it again.")


_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def _short(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def resolve(source: str, *, split: str = "train") -> list[Path] | HubSource:
    """The files of a path or folder, or the hub id. ``split``: of a folder that holds several.
    Raises ValueError if the source is neither, and for a folder of which it cannot be told what to
    read."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, split)
    if path.exists():
        return [path]
    name, _, config = source.partition(":")
    if _HUB_ID.match(source) and not source.lower().endswith(SUFFIXES):
        return HubSource(name, config or None)
    folder, _, config = source.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return _of_folder(Path(folder).expanduser(), split, config)
    raise ValueError(
        f"{source}: no such file or folder (looked in {Path.cwd()}), and not a hub id, which is "
        "written owner/name or owner/name:config. Check the path."
    )


def _of_folder(folder: Path, split: str, config: str | None = None) -> list[Path]:
    """The files of what `datasets` saved, of a hub data set with a card, or of a folder of rows."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder, split)
    described = _described(folder, split, config)
    return _of_split(folder, _rows_in(folder), split) if described is None else described


def _saved(folder: Path, split: str) -> list[Path]:
    """The Arrow files of ``save_to_disk``, in their order."""
    if (folder / "dataset_dict.json").is_file():
        there = sorted(p.name for p in folder.iterdir() if p.is_dir())
        if split not in there:
            raise ValueError(
                f"{folder}: has no split {split!r}; there are {', '.join(there)} (--data.split)."
            )
        folder = folder / split
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{folder}: saved with an index. Save it again after `dataset.flatten_indices()`."
        )
    return [folder / entry["filename"] for entry in state["_data_files"]]


def _described(folder: Path, split: str, config: str | None) -> list[Path] | None:
    """The files that the card of a hub data set (README.md) names for the split; None where it
    names none."""
    from datasets.data_files import sanitize_patterns
    from huggingface_hub.repocard import metadata_load

    readme = folder / "README.md"
    card = (metadata_load(readme) if readme.is_file() else None) or {}
    configs = {
        c["config_name"]: c["data_files"] for c in card.get("configs") or () if c.get("data_files")
    }
    if config is None and len(configs) == 1:
        config = next(iter(configs))
    if config not in configs:
        if configs or config is not None:
            known = ", ".join(configs) or "none"
            raise ValueError(
                f"{folder}: which of its configs? README.md names {known}. Write {folder}:NAME."
            )
        return None
    by_split = sanitize_patterns(configs[config])
    found = sorted({p for pattern in by_split.get(split, ()) for p in folder.glob(pattern)})
    if not found:
        raise ValueError(
            f"{folder}: README.md names no file of split {split!r} that is here; it has "
            f"{', '.join(by_split)} (--data.split)."
        )
    return found


def _rows_in(folder: Path) -> list[Path]:
    inside = [
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    is_of_prep = all((folder / name).is_file() for name in _OF_PREP)
    about = _ABOUT_ROWS | (_OF_PREP if is_of_prep else set())
    files = sorted(p for p in inside if p.name.lower().endswith(SUFFIXES) and p.name not in about)
    if not files:
        raise ValueError(
            f"{folder}: no data file in this folder; looked for {', '.join(SUFFIXES)}, found "
            f"{', '.join(sorted(p.name for p in inside)[:5]) or 'nothing'}."
        )
    return files


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Those of the split, where every file's name or folder says its split; all files where none is
    held out, or all are."""

    def is_of(path: Path, name: str) -> bool:
        pattern = re.compile(rf"^({_SPLITS.get(name, re.escape(name))})([^a-z]|$)", re.IGNORECASE)
        return any(pattern.match(part) for part in path.relative_to(folder).parts)

    held_out = [p for p in files if is_of(p, "test") or is_of(p, "validation")]
    chosen = [p for p in files if is_of(p, split)]
    if chosen and all(any(is_of(p, name) for name in (*_SPLITS, split)) for p in files):
        return chosen
    if len(held_out) in (0, len(files)):
        return files
    raise ValueError(
        f"{folder}: holds several splits, among them {held_out[0].relative_to(folder)}, and which "
        f"files are {split!r} cannot be told from their names. Name the files instead, such as "
        f"{next(p for p in files if p not in held_out)}."
    )
