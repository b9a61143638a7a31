"""Files and folders that exist whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Indented."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A row in each line; what JSON does not know is written as text."""
    lines = (json.dumps(row, default=str) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """The whole text in place of what the file held, or nothing of it."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to; what lies there when the block ends takes the place of ``target``. After
    an error it is gone and ``target`` as it was."""
    with _folder_beside(target) as folder:
        path = folder / target.name
        yield path
        sync(path)
        put_in_place(path, target)


@contextmanager
def whole_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """The same for a new folder. OSError where ``target`` has files by then, unless they shall be
    replaced."""
    with _folder_beside(target) as folder:
        yield folder
        folder.chmod(0o755)  # a temporary one is private
        sync(folder)
        if replace:
            put_in_place(folder, target)
        else:
            os.rename(folder, target)


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def free_name_beside(folder: Path) -> Path:
    """``<name>.old-1``, or the next number that is free."""
    names = (folder.with_name(f"{folder.name}.old-{n}") for n in itertools.count(1))
    return next(path for path in names if not path.exists())


def refuse_filled(out: Path) -> None:
    """ValueError unless ``out`` does not exist, or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"Output folder {out} exists and is not empty; nothing is overwritten. "
            "Give another --out."
        )


def put_in_place(source: Path, target: Path) -> None:
    """Renames a file or a folder to ``target``. A folder that is there is put aside first, as
    ``.old_<name>`` (no rename replaces it), and deleted afterwards."""
    aside = target.with_name(f".old_{target.name}")
    if target.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    os.rename(source, target)
    _fsync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


_BLOCKS, _BLOCK = 64, 4096


def cache_root(configured: str | None) -> Path:
    """What is configured, else $POSTTRAIN_CACHE, else ``posttrain`` in $XDG_CACHE_HOME or
    ~/.cache."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = configured or os.environ.get("POSTTRAIN_CACHE") or user_cache / "posttrain"
    return Path(chosen).expanduser()


def file_digest(path: Path) -> str:
    """sha256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path, only: str = "*") -> str:
    """12 hex digits of a file, or of the files of a folder with their names. Of weights
    (.safetensors) 64 evenly spaced blocks are read: training changes every block."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob(only) if p.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}".encode())
        with file.open("rb") as opened:
            if file.suffix != ".safetensors" or size <= _BLOCKS * _BLOCK:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
                continue
            for number in range(_BLOCKS):
                opened.seek(number * size // _BLOCKS)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()[:12]


def sync(path: Path) -> None:
    """A file, or a folder with all that is in it, outlives a power cut."""
    for part in (*sorted(path.rglob("*")), path):
        _fsync(part)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
