"""Checkpoints that survive a crash, and the training state in them, bit for bit.

    checkpoints/step_40/  manifest.json          step; size and sha256 of every other file
                          state.json             what the loop wants back
                          model.safetensors      trained parameters, persistent buffers (one process and DDP;
                          optimizer.safetensors  AdamW's state by parameter name         FSDP2 and DeepSpeed: the
                          optimizer.json         groups, fingerprint of frozen weights   folders accelerate writes)
                          schedule.json, scaler.json, rng_<rank>.json

Written as ``.tmp_step_40`` in a folder that all ranks share, synced, renamed: ``step_40`` exists whole or not at all.
It is read without pickle. Sharded runs are read by torch and DeepSpeed, which unpickle (``.metadata``;
DeepSpeed uses with ``weights_only=False``): resume those only from checkpoints you trust, a manifest finds no malice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)

_MANIFEST, _STATE = "manifest.json", "state.json"
_FOLDER = re.compile(r"(?:\.old_)?step_(\d+)")
_SHARDED = ("FSDP", "DEEPSPEED")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(RuntimeError):
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
    """Writes ``root/step_<step>`` whole or not at all; all ranks call it, and all return or all raise CheckpointError.

    ``write(folder)`` writes this rank's files; ``state`` is JSON and comes back from ``find_resumable``; ``all_ok`` is
    true on every rank iff its argument is true on every rank (``agree(accelerator)``). Then the main rank deletes older
    ones beyond ``keep`` (None: none), never the one just written nor step ``best``. A rank that fails *inside* a
    collective of ``write`` (sharded saves) leaves the others to the backend's timeout.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"save_total_limit must be at least 1, or None to keep every checkpoint; got {keep}.")
    temp, final = root / f".tmp_step_{step}", root / f"step_{step}"
    phases: tuple[tuple[bool, Callable[[], None]], ...] = (
        (is_main, lambda: _prepare(root, temp)),
        (True, lambda: write(temp)),
        (is_main, lambda: _publish(temp, final, {**state, "step": step})),
    )
    for takes_part, phase in phases:
        error = _attempt(phase) if takes_part else None
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
    """Folder and state of the newest checkpoint whose every file has the size and sha256 of its manifest, or None.

    A damaged one is named in a warning and skipped. Reads every byte: call it on one rank and broadcast the answer.
    """
    for _, folder in _checkpoints(root):
        if (reason := damage(folder)) is None:
            return folder, json.loads((folder / _STATE).read_bytes())
        logger.warning("Checkpoint %s is damaged and was skipped: %s. Delete it to free its space.", folder, reason)
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
    return None if {f"step_{n}" for n in steps} == {folder.name.removeprefix(".old_")} else f"it is of step {steps}"


def cut_metrics(path: Path, step: int) -> int:
    """Rewrites a metrics file (one JSON object per line) to the lines with ``"step" <= step``; returns how many went.

    Atomic. A torn last line, as a crash leaves it, goes too; any other unreadable line raises ValueError. No file: 0.
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
                f"{path}:{number} is not a JSON object with a step ({error}), so the file cannot be cut back to step "
                f"{step}: only its last line may be torn. Move the file away to start a new one."
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
    """Manifest, fsync of every file and folder, rename, fsync of the parent: then a power cut loses nothing."""
    _write_json(temp / _STATE, state)
    paths = sorted(temp.rglob("*"))
    files = {
        path.relative_to(temp).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
        if path.is_file()
    }
    _write_json(temp / _MANIFEST, {"step": state["step"], "files": files})
    for path in (*paths, temp / _MANIFEST, temp):
        _fsync(path)
    aside = final.with_name(f".old_{final.name}")
    if final.exists():  # rename cannot replace a folder; between the two renames find_resumable takes the one put aside
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    os.rename(temp, final)
    _fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _prune(root: Path, step: int, keep: int, best: int | None) -> None:
    """Deletes what ``keep`` does not cover. Of *later* steps, left by a run that was rewound, only damaged ones go."""
    others = [(n, folder) for n, folder in _checkpoints(root) if n != best]
    surplus = [folder for n, folder in others if n < step][keep - 1 :]
    surplus += [folder for n, folder in others if n > step and damage(folder)]
    for folder in surplus:
        doomed = folder.with_name(f".tmp_delete_{folder.name}")  # so that a crash here leaves no half checkpoint
        try:
            os.rename(folder, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("Old checkpoint %s could not be deleted: %s. Delete it by hand.", folder, error)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first; of one step the folder in place before the one put aside."""
    found = [(int(m[1]), f) for f in root.glob("*") if (m := _FOLDER.fullmatch(f.name)) and f.is_dir()]
    return sorted(found, key=lambda item: (-item[0], item[1].name.startswith(".")))


def _attempt(phase: Callable[[], None]) -> Exception | None:
    """Runs a phase and hands its exception back, so that the ranks can agree before anyone raises."""
    try:
        phase()
    except Exception as error:
        return error
    return None


def _explain(error: Exception | None, temp: Path, final: Path) -> str:
    before = next((folder for _, folder in _checkpoints(final.parent)), None)
    survives = f"{before} was not touched: resume from it." if before else "There is no earlier checkpoint."
    start = f"Checkpoint {final} was not written, its partial folder is removed"
    if error is None:
        return f"{start}: another process failed, its message says why. {survives}"
    existing = next(p for p in (final.parent, *final.parent.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    # safetensors wraps the system's text in an error of its own, torch.save drops it
    full = getattr(error, "errno", None) in _DISK_FULL or any(os.strerror(n) in str(error) for n in _DISK_FULL)
    if not full and free > 2**16:
        return f"{start}: {type(error).__name__}: {error}. {survives}"
    sizes = [sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in (temp, before) if f]
    return (
        f"{start}: the disk is full ({error}). It needs at least {max(sizes):,} bytes; {free + sizes[0]:,} are free in "
        f"{existing} (under a quota, less). {survives} Free space, lower save_total_limit, or move the output folder."
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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def save_training_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Trained parameters, persistent buffers and AdamW's state, exact, by name; a tied tensor once.

    Frozen parameters are not saved (they are the model's own files): a fingerprint of them is.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    names = _names(model, optimizer)
    state = {f"{kind}/{names[p]}": value for p, entry in optimizer.state.items() for kind, value in entry.items()}
    save_file(_own_storage(_saved_tensors(model)), folder / "model.safetensors")
    save_file(_own_storage(state), folder / "optimizer.safetensors")
    _write_json(folder / "optimizer.json", {"frozen weights": _fingerprint(model), **_options(names, optimizer)})


def load_training_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Puts ``save_training_state``'s values into a model and an AdamW built the same way, whatever their order.

    The present rate is not among them, it belongs to the schedule. Raises ValueError, before anything is changed, if
    names, shapes, dtypes, optimizer options or frozen weights differ.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    names, own = _names(model, optimizer), _saved_tensors(model)
    weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    steps = {name: moments.pop(f"step/{name}") for name in names.values() if f"step/{name}" in moments}
    wanted = {f"{kind}/{name}": p for p, name in names.items() if name in steps for kind in _MOMENTS}
    about = {"frozen weights": _fingerprint(model), **_options(names, optimizer)}
    _check_same(folder / "optimizer.json", json.loads((folder / "optimizer.json").read_bytes()), about)
    _check_same(folder / "model.safetensors", _specs(weights), _specs(own))
    _check_same(folder / "optimizer.safetensors", _specs(moments), _specs(wanted))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    for p, name in names.items():
        optimizer.state.pop(p, None)
        if name in steps:  # fused: moments with the strides of p (else silently wrong), step on its device
            optimizer.state[p] = {kind: torch.empty_like(p).copy_(moments[f"{kind}/{name}"]) for kind in _MOMENTS}
            optimizer.state[p]["step"] = steps[name].to(p.device if p in fused else "cpu", copy=True)


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    tensors: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return tensors | {n: b for n, b in model.named_buffers() if n in persistent}


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and a copy where two names view one storage: safetensors refuses to write that."""
    storage = {name: t.untyped_storage().data_ptr() for name, t in tensors.items()}
    owner = {pointer: name for name, pointer in storage.items()}
    return {n: (t if owner[storage[n]] == n else t.clone()).detach().contiguous() for n, t in tensors.items()}


def _fingerprint(model: nn.Module) -> str:
    """sha256 over name, shape, dtype and the first 1024 elements of every frozen parameter."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().reshape(-1)[:1024].cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """Names of the optimizer's parameters. KeyError: it was built before the model got its adapters or a new head."""
    known: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {p: known[p] for group in optimizer.param_groups for p in group["params"]}


def _options(names: Mapping[Tensor, str], optimizer: Optimizer) -> dict[str, str]:
    """Per parameter what must not change in a run: its group's options and the rate that the schedule multiplies."""
    options: dict[str, str] = {}
    for group in optimizer.param_groups:
        fixed = {**group, "lr": group.get("initial_lr", group["lr"])}
        text = ", ".join(f"{k}={v}" for k, v in sorted(fixed.items()) if k not in ("params", "initial_lr"))
        options |= {names[p]: text for p in group["params"]}
    return options


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}


def _check_same(file: Path, got: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{file} does not fit this run: {len(missing)} names are missing {missing[:3]}, {len(extra)} are "
            f"unexpected {extra[:3]}. Resume with the model and the adapters it was written with."
        )
    for name in wanted:
        if got[name] != wanted[name]:
            raise ValueError(
                f"{file}: {name} has [{got[name]}], this run has [{wanted[name]}]. Only with the same model, precision "
                "and optimizer does a resumed run equal an uninterrupted one: set the old values, or start a new run."
            )


def capture_rng() -> dict[str, Any]:
    """State of the generators of python, numpy, torch and this rank's CUDA device, as JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_initialized() else None,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Puts back what ``capture_rng`` took, also after a trip through JSON."""
    if state["cuda"] and not torch.cuda.is_available():
        raise ValueError("The checkpoint holds the random state of a CUDA device; here is none. Resume on one.")
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"]:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


def write_state(accelerator: Any, policy: nn.Module, optimizer: Optimizer, schedule: LambdaLR, folder: Path) -> None:
    """``write`` of ``save_checkpoint``, on every rank: its share of weights, moments, schedule and random state."""
    if accelerator.distributed_type in _SHARDED:
        accelerator.save_state(str(folder), safe_serialization=True)
    elif accelerator.is_main_process:
        save_training_state(folder, policy, optimizer)
        if accelerator.scaler is not None:
            _write_json(folder / "scaler.json", accelerator.scaler.state_dict())
    if accelerator.is_main_process:
        _write_json(folder / "schedule.json", {"step": schedule.last_epoch, "ranks": accelerator.num_processes})
    _write_json(folder / f"rng_{accelerator.process_index}.json", capture_rng())


def read_state(accelerator: Any, policy: nn.Module, optimizer: Optimizer, schedule: LambdaLR, folder: Path) -> None:
    """On every rank, into freshly built objects: the run goes on bit for bit. Raises ValueError on another topology."""
    saved = json.loads((folder / "schedule.json").read_bytes())
    if saved["ranks"] != accelerator.num_processes:
        raise ValueError(
            f"{folder} was written by {saved['ranks']} processes, this run has {accelerator.num_processes} and could "
            f"not equal an uninterrupted one. Launch {saved['ranks']} processes."
        )
    if accelerator.distributed_type in _SHARDED:
        accelerator.load_state(str(folder))  # it only logs when its random states fail to load: ours follow below
    else:
        load_training_state(folder, policy, optimizer)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(json.loads((folder / "scaler.json").read_bytes()))
    schedule.last_epoch, schedule._step_count = saved["step"], saved["step"] + 1
    schedule._last_lr = [lr * f(saved["step"]) for lr, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, lr in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = lr
    restore_rng(json.loads((folder / f"rng_{accelerator.process_index}.json").read_bytes()))


def agree(accelerator: Any) -> Callable[[bool], bool]:
    """``all_ok`` of ``save_checkpoint`` over the ranks of a run: a collective, so every rank must call it."""
    return lambda ok: bool(accelerator.gather(torch.tensor([int(ok)], device=accelerator.device)).min())
