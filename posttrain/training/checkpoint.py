"""Checkpoints that survive a crash.

    checkpoints/step_40/  manifest.json   step; size and sha256 of every other file
                          state.json      what the loop wants back
                          ...             the training state (``training/state.py``)

Written as ``.tmp_step_40`` in a folder that all ranks share, synced, renamed: ``step_40`` exists
whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from posttrain.training.config import UserFacingError

logger = logging.getLogger(__name__)

_MANIFEST, _STATE = "manifest.json", "state.json"
_FOLDER = re.compile(r"(?:\.old_)?step_(\d+)")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(UserFacingError):
    """A checkpoint could not be written; earlier ones are intact."""


def save_checkpoint(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    state: Mapping[str, Any],
    keep: int | None,
    is_main: bool,
    barrier: Callable[[], None],
    all_ok: Callable[[bool], bool],
    best: int | None = None,
) -> Path:
    """Writes ``root/step_<step>`` whole or not at all; all ranks call it, and all return or all
    raise CheckpointError.

    ``write(folder)`` writes this rank's files; ``state`` is JSON and comes back from
    ``find_resumable``; ``all_ok`` is true on every rank iff its argument is true on every rank
    (``agree(accelerator)``). Then the main rank deletes older ones beyond ``keep`` (None: none),
    never the one just written nor step ``best``. A rank that fails *inside* a collective of
    ``write`` (sharded saves) leaves the others to the backend's timeout.
    """
    if keep is not None and keep < 1:
        raise ValueError(
            f"save_total_limit must be at least 1, or None to keep every checkpoint; got {keep}."
        )
    temp, final = root / f".tmp_step_{step}", root / f"step_{step}"
    phases: tuple[tuple[bool, Callable[[], None]], ...] = (
        (is_main, lambda: _prepare(root, temp)),
        (True, lambda: write(temp)),
        (is_main, lambda: _publish(temp, final, {**state, "step": step})),
    )
    for takes_part, phase in phases:
        error: Exception | None = None
        try:
            if takes_part:
                phase()
        except Exception as raised:  # noqa: BLE001 - the ranks agree before anyone raises
            error = raised
        if not all_ok(error is None):
            message = _explain(error, temp, final)
            barrier()  # until every rank has looked at the partial folder
            if is_main:
                shutil.rmtree(temp, ignore_errors=True)
            barrier()  # a rank that raised earlier could take the job down before it is gone
            raise CheckpointError(message) from error
    if is_main and keep is not None:
        _prune(root, step, keep, best)
    barrier()
    return final


def find_resumable(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and state of the newest checkpoint whose every file has the size and sha256 of its
    manifest, or None.

    A damaged one is named in a warning and skipped. Reads every byte: call it on one rank and
    broadcast the answer.
    """
    for _, folder in _checkpoints(root):
        if (reason := damage(folder)) is None:
            return folder, json.loads((folder / _STATE).read_bytes())
        logger.warning(
            "Checkpoint %s is damaged and was skipped: %s. Delete it to free its space.",
            folder,
            reason,
        )
    return None


def damage(folder: Path) -> str | None:
    """Why a checkpoint must not be resumed, or None if it is whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        for name, entry in {_STATE: {}, **manifest["files"]}.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, the manifest says {entry['bytes']}"
            if _sha256(folder / name) != entry["sha256"]:
                return f"the sha256 of {name} is not the manifest's"
        steps = [manifest["step"], json.loads((folder / _STATE).read_bytes())["step"]]
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    return (
        None
        if {f"step_{n}" for n in steps} == {folder.name.removeprefix(".old_")}
        else f"it is of step {steps}"
    )


def cut_metrics(path: Path, step: int) -> int:
    """Rewrites a metrics file (one JSON object per line) to the lines with ``"step" <= step``;
    returns how many went.

    Atomic. A torn last line, as a crash leaves it, goes too; any other unreadable line raises
    ValueError. No file: 0.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            line_step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number} is not a JSON object with a step ({error}), so the file cannot "
                f"be cut back to step {step}: only its last line may be torn. Move the file away "
                "to start a new one."
            ) from error
        if line_step <= step:
            kept.append(line + b"\n")
    if lines:
        temp = path.with_name(f".tmp_{path.name}")
        temp.write_bytes(b"".join(kept))
        _fsync(temp)
        os.replace(temp, path)
        _fsync(path.parent)
    return len(lines) - len(kept)


def _prepare(root: Path, temp: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".tmp_*"):
        shutil.rmtree(stale)
    temp.mkdir()


def _publish(temp: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Manifest, fsync of every file and folder, rename, fsync of the parent: then a power cut loses
    nothing."""
    write_json(temp / _STATE, state)
    paths = sorted(temp.rglob("*"))
    files = {
        path.relative_to(temp).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
        if path.is_file()
    }
    write_json(temp / _MANIFEST, {"step": state["step"], "files": files})
    for path in (*paths, temp / _MANIFEST, temp):
        _fsync(path)
    aside = final.with_name(f".old_{final.name}")
    # rename cannot replace a folder; between the two renames find_resumable takes the one put aside
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(temp, final)
    _fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _prune(root: Path, step: int, keep: int, best: int | None) -> None:
    """Deletes what ``keep`` does not cover. Of *later* steps, left by a run that was rewound, only
    damaged ones go."""
    others = [(n, folder) for n, folder in _checkpoints(root) if n != best]
    surplus = [folder for n, folder in others if n < step][keep - 1 :]
    surplus += [folder for n, folder in others if n > step and damage(folder)]
    for folder in surplus:
        doomed = folder.with_name(
            f".tmp_delete_{folder.name}"
        )  # so that a crash here leaves no half checkpoint
        try:
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning(
                "Old checkpoint %s could not be deleted: %s. Delete it by hand.", folder, error
            )


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first; of one step the folder in place before the one put aside."""
    found = [
        (int(m[1]), f) for f in root.glob("*") if (m := _FOLDER.fullmatch(f.name)) and f.is_dir()
    ]
    return sorted(found, key=lambda item: (-item[0], item[1].name.startswith(".")))


def _explain(error: Exception | None, temp: Path, final: Path) -> str:
    before = next((folder for _, folder in _checkpoints(final.parent)), None)
    survives = (
        f"{before} was not touched: resume from it."
        if before
        else "There is no earlier checkpoint."
    )
    start = f"Checkpoint {final} was not written, its partial folder is removed"
    if error is None:
        return f"{start}: another process failed, its message says why. {survives}"
    existing = next(p for p in (final.parent, *final.parent.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    # safetensors wraps the system's text in an error of its own, torch.save drops it
    full = getattr(error, "errno", None) in _DISK_FULL or any(
        os.strerror(n) in str(error) for n in _DISK_FULL
    )
    if not full and free > 2**16:
        return f"{start}: {type(error).__name__}: {error}. {survives}"
    sizes = [
        sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in (temp, before) if f
    ]
    return (
        f"{start}: the disk is full ({error}). It needs at least {max(sizes):,} bytes; "
        f"{free + sizes[0]:,} are free in {existing} (under a quota, less). {survives} Free space, "
        "lower save_total_limit, or move the output folder."
    )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Indented."""
    path.write_text(json.dumps(value, indent=1))


def agree(accelerator: Any) -> Callable[[bool], bool]:
    """``all_ok`` of ``save_checkpoint`` over the ranks of a run: a collective, so every rank must
    call it."""
    return lambda ok: bool(
        accelerator.gather(torch.tensor([int(ok)], device=accelerator.device)).min()
    )
