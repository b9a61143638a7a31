"""Which files a source is: a file, a folder of rows, what `datasets` or `posttrain prep` saved, a
data set of the hub on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (
    ".jsonl",
    ".ndjson",
    ".json",
    ".csv",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".ndjson.gz",
    ".json.gz",
    ".csv.gz",
)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?$")
_SPLITS = {"train": "train(ing)?", "test": "test", "validation": "valid(ation)?|val|dev|eval"}
_ABOUT_ROWS = {"dataset_info.json", "dataset_infos.json"}
_OF_PREP = {"manifest.json", "rejects.jsonl"}


class HubSource(NamedTuple):
    """A dataset on the hub: ``owner/name`` and an optional configuration."""

    name: str
    config: str | None


def resolve(source: str, *, split: str = "train") -> list[Path] | HubSource:
    """The files of a path or folder, or the hub id. ``split``: of a folder that holds several.
    Raises ValueError if the source is neither, and for a folder of which it cannot be told what to
    read."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, split)
    if path.exists():
        return [path]
    if _HUB_ID.match(source) and not source.lower().endswith(SUFFIXES):
        name, _, config = source.partition(":")
        return HubSource(name, config or None)
    folder, _, config = source.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return _of_folder(Path(folder).expanduser(), split, config)
    raise ValueError(
        f"{source}: no such file or folder (looked in {Path.cwd()}), and not a hub id, which is "
        "written owner/name or owner/name:config. Check the path."
    )


def _of_folder(folder: Path, split: str, config: str | None = None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        return _saved(folder / split, split)
    if (folder / "state.json").is_file():
        return _saved(folder, split)
    described = _described(folder, split, config)
    if described is not None:
        return described
    return _of_split(folder, _rows_in(folder), split)


def _saved(folder: Path, split: str) -> list[Path]:
    """The Arrow files of ``Dataset.save_to_disk``, in their order."""
    state = folder / "state.json"
    if not state.is_file():
        there = sorted(p.name for p in folder.parent.iterdir() if p.is_dir())
        raise ValueError(
            f"{folder.parent}: has no split {split!r}; there are {', '.join(there)}. "
            "Choose with --data.split."
        )
    said = json.loads(state.read_text(encoding="utf-8"))
    if said.get("_indices_data_files"):
        raise ValueError(
            f"{folder}: saved with an index beside the rows. Save it again after "
            "`dataset.flatten_indices()`."
        )
    return [folder / entry["filename"] for entry in said["_data_files"]]


def _described(folder: Path, split: str, config: str | None) -> list[Path] | None:
    """The files that the front matter of a hub data set's README names for the split; None where it
    names none."""
    import yaml

    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    front = (
        yaml.safe_load(text.split("---\n")[1])
        if text.startswith("---\n") and text.count("---\n") > 1
        else None
    )
    configs = {
        c["config_name"]: c for c in (front or {}).get("configs") or () if c.get("data_files")
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
    files: Any = configs[config]["data_files"]
    entries = [{"split": "train", "path": files}] if isinstance(files, str) else files
    entries = [e if isinstance(e, dict) else {"split": "train", "path": e} for e in entries]
    paths = [e["path"] for e in entries if e["split"] == split]
    patterns = [p for path in paths for p in (path if isinstance(path, list) else [path])]
    found = sorted({p for pattern in patterns for p in folder.glob(pattern)})
    if not found:
        splits = ", ".join(str(e["split"]) for e in entries)
        raise ValueError(
            f"{folder}: README.md names no file of split {split!r} that is here; it "
            f"has {splits} (--data.split)."
        )
    return found


def _rows_in(folder: Path) -> list[Path]:
    found = [p for p in folder.rglob("*") if p.is_file()]
    inside = [
        p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    about = _ABOUT_ROWS | (
        _OF_PREP if all((folder / name).is_file() for name in _OF_PREP) else set()
    )
    files = sorted(p for p in inside if p.name.lower().endswith(SUFFIXES) and p.name not in about)
    if not files:
        names = ", ".join(sorted(p.name for p in inside)[:5]) or "nothing"
        raise ValueError(
            f"{folder}: no data file in this folder; looked for "
            f"{', '.join(SUFFIXES)}, found {names}."
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
        f"files are {split!r} cannot be told from their names; reading all of them would train on "
        "held-out rows. Name the files instead, such as "
        f"{next(p for p in files if p not in held_out)}."
    )
