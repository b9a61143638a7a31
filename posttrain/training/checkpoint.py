"""Checkpoints that survive a crash, and from which a run goes on bit for bit.

    checkpoints/step_40/
        manifest.json          step; size and sha256 of every other file
        state.json             what the loop wants back
        model.safetensors      trained parameters, persistent buffers (by rank under FSDP2)
        optimizer.safetensors  tensors of the optimizer's state by name (a part for each process)
        optimizer.json         options, fingerprint of frozen weights, the state's numbers, specs
                               of its tensors
        zero/                  under DeepSpeed instead of these three, as its engine writes it
        schedule.json, scaler.json, rng_<rank>.json, rollouts_<rank>.json

Written as ``.tmp_step_40`` in a folder that all ranks share, synced, renamed: ``step_40`` exists
whole or not at all. Read without pickle, but for ``zero/``: DeepSpeed unpickles with
``weights_only=False``, so resume those only from checkpoints you trust (a manifest finds no
malice).
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from posttrain.files import file_digest, put_in_place, sync, whole_file, write_json
from posttrain.models.sharding import local, reshard
from posttrain.training import sharding
from posttrain.training.config import UserFacingError
from posttrain.training.optimizer import OffloadedOptimizer

logger = logging.getLogger(__name__)

_MANIFEST, _STATE = "manifest.json", "state.json"
_FOLDER = re.compile(r"(?:\.old_)?step_(\d+)")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(UserFacingError):
    """A checkpoint could not be written; earlier ones are intact."""


def save_checkpoint(
    accelerator: Any,
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes ``root/step_<step>`` whole or not at all; all ranks call it, and all return or all
    raise CheckpointError.

    ``write(folder)`` writes this rank's files; ``state`` is JSON and comes back from
    ``find_resumable``. Then the main rank deletes older ones beyond ``keep`` (0: none), never the
    one just written. A rank that fails *inside* a collective of ``write`` (sharded saves) leaves
    the others to the backend's timeout.
    """
    temp, final = root / f".tmp_step_{step}", root / f"step_{step}"
    is_main, barrier = accelerator.is_main_process, accelerator.wait_for_everyone
    phases: tuple[tuple[bool, Callable[[], None]], ...] = (
        (is_main, lambda: _prepare(temp)),
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
        if not all_ok(accelerator, error is None):
            message = _explain(error, temp, final)
            barrier()  # until every rank has looked at the partial folder
            if is_main:
                shutil.rmtree(temp, ignore_errors=True)
            barrier()  # a rank that raised earlier could take the job down before it is gone
            raise CheckpointError(message) from error
    if is_main and keep:
        _prune(root, step, keep)
    barrier()
    return final


def all_ok(accelerator: Any, ok: bool) -> bool:
    """Whether ``ok`` is true on every rank: a collective."""
    return bool(accelerator.gather(torch.tensor([int(ok)], device=accelerator.device)).min())


def find_resumable(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and state of the newest checkpoint whose every file has the size and sha256 of its
    manifest, or None.

    A damaged one is named in a warning and skipped. Reads every byte: call it on one rank and
    broadcast the answer.
    """
    for _, folder in _checkpoints(root):
        if (reason := damage(folder)) is None:
            return folder, _read_json(folder / _STATE)
        text = "Checkpoint %s is damaged and was skipped: %s. Delete it to free its space."
        logger.warning(text, folder, reason)
    return None


def damage(folder: Path) -> str | None:
    """Why a checkpoint must not be resumed, or None if it is whole."""
    try:
        manifest = _read_json(folder / _MANIFEST)
        for name, entry in {_STATE: {}, **manifest["files"]}.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, the manifest says {entry['bytes']}"
            if file_digest(folder / name) != entry["sha256"]:
                return f"the sha256 of {name} is not the manifest's"
        steps = [manifest["step"], _read_json(folder / _STATE)["step"]]
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    is_own = {f"step_{n}" for n in steps} == {folder.name.removeprefix(".old_")}
    return None if is_own else f"it is of step {steps}"


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
                f"{path}:{number} is not a JSON object with a step ({error}); only the last line "
                "may be torn. Move the file away to start a new one."
            ) from error
        if line_step <= step:
            kept.append(line + b"\n")
    if lines:
        with whole_file(path) as aside:
            aside.write_bytes(b"".join(kept))
    return len(lines) - len(kept)


def _prepare(temp: Path) -> None:
    temp.parent.mkdir(parents=True, exist_ok=True)
    for stale in temp.parent.glob(".tmp_*"):
        shutil.rmtree(stale)
    temp.mkdir()


def _publish(temp: Path, final: Path, state: Mapping[str, Any]) -> None:
    write_json(temp / _STATE, state)
    files = {
        p.relative_to(temp).as_posix(): {"bytes": p.stat().st_size, "sha256": file_digest(p)}
        for p in sorted(temp.rglob("*"))
        if p.is_file()
    }
    write_json(temp / _MANIFEST, {"step": state["step"], "files": files})
    sync(temp)
    put_in_place(temp, final)  # what it puts aside is a checkpoint, too, until the new one is there


def _prune(root: Path, step: int, keep: int) -> None:
    """Deletes what ``keep`` does not cover. Of *later* steps, left by a run that was rewound, only
    damaged ones go."""
    surplus = [folder for n, folder in _checkpoints(root) if n < step][keep - 1 :]
    surplus += [folder for n, folder in _checkpoints(root) if n > step and damage(folder)]
    for folder in surplus:
        # renamed first, so that a crash here leaves no half checkpoint
        doomed = folder.with_name(f".tmp_delete_{folder.name}")
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
    survives = "There is no earlier checkpoint."
    if before:
        survives = f"{before} was not touched: resume from it."
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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def write_state(
    accelerator: Any, policy: Any, optimizer: Optimizer, schedule: LambdaLR, folder: Path
) -> None:
    """``write`` of ``save_checkpoint``, on every rank: its share of weights, moments, schedule and
    random state."""
    rank, is_main = accelerator.process_index, accelerator.is_main_process
    held = sharding.kind(accelerator)
    if sharding.is_deepspeed(accelerator):
        policy.save_checkpoint(
            str(folder), "zero", save_latest=False, exclude_frozen_parameters=True
        )
        write_json(folder / f"frozen_{rank}.json", {"frozen weights": _fingerprint(policy.module)})
    elif held == "fsdp2" or is_main:
        save_training_state(folder, policy, optimizer, part=_part(accelerator))
    if is_main:
        if accelerator.scaler is not None:
            write_json(folder / "scaler.json", accelerator.scaler.state_dict())
        topology = {"ranks": accelerator.num_processes, "sharding": held}
        write_json(folder / "schedule.json", {"step": schedule.last_epoch, **topology})
    write_json(folder / f"rng_{rank}.json", capture_rng())


def read_state(
    accelerator: Any, policy: Any, optimizer: Optimizer, schedule: LambdaLR, folder: Path
) -> None:
    """On every rank, into freshly built objects: the run goes on bit for bit. Raises ValueError on
    another topology."""
    saved = _read_json(folder / "schedule.json")
    before = f"{saved['ranks']} processes, weights held as {saved['sharding']}"
    now = f"{accelerator.num_processes} processes, weights held as {sharding.kind(accelerator)}"
    if before != now:
        raise ValueError(
            f"{folder} was written by {before}; this run has {now}. Resume with the launch "
            "configuration it was started with, or start a new run from its final/ folder."
        )
    rank = accelerator.process_index
    if sharding.is_deepspeed(accelerator):
        frozen = folder / f"frozen_{rank}.json"
        _check_same(frozen, _read_json(frozen), {"frozen weights": _fingerprint(policy.module)})
        all_trained = all(p.requires_grad for p in policy.module.parameters())
        path, _ = policy.load_checkpoint(str(folder), "zero", load_module_strict=all_trained)
        if path is None:
            raise ValueError(f"DeepSpeed found no state in {folder / 'zero'}. Delete {folder}.")
    else:
        load_training_state(folder, policy, optimizer, part=_part(accelerator))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(_read_json(folder / "scaler.json"))
    schedule.last_epoch, schedule._step_count = saved["step"] - 1, 2  # 1: it would warn
    schedule.step()  # sets the rates of this step
    restore_rng(_read_json(folder / f"rng_{rank}.json"))


def _part(accelerator: Any) -> str:
    """Of FSDP2's DTensors every process saves its own."""
    return f"_{accelerator.process_index}" if sharding.kind(accelerator) == "fsdp2" else ""


def save_training_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, *, part: str = ""
) -> None:
    """Trained parameters, persistent buffers and the optimizer's state (any of its tensors and
    numbers), exact, by name.

    A tensor that has two names (tied weights, the code books of 8-bit moments) is saved once.
    Frozen parameters are not saved (they are the model's own files): a fingerprint of them is.
    ``part`` goes into the file names.
    """
    model = sharding.unwrapped(model)
    reshard(model)
    names = _names(model, optimizer)
    state = {
        f"{kind}/{names[p]}": value
        for p, entry in optimizer.state.items()
        for kind, value in entry.items()
        if value is not None
    }
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    first = {id(t): name for name, t in reversed(tensors.items())}
    own = {name: local(t) for name, t in tensors.items() if first[id(t)] == name}
    save_file(_own_storage(_saved_tensors(model)), folder / f"model{part}.safetensors")
    save_file(_own_storage(own), folder / f"optimizer{part}.safetensors")
    about = {
        "run": _about(model, names, optimizer),
        "tensors": _specs(own),
        "shared": {name: first[id(t)] for name, t in tensors.items() if name not in own},
        "numbers": {name: value for name, value in state.items() if name not in tensors},
    }
    write_json(folder / f"optimizer{part}.json", about)


def load_training_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, *, part: str = ""
) -> None:
    """Puts ``save_training_state``'s values into a model and an optimizer built the same way,
    whatever their order.

    The present rate is not among them, it belongs to the schedule. Raises ValueError, before
    anything is changed, if names, shapes, dtypes, the optimizer, its options or frozen weights
    differ.
    """
    model = sharding.unwrapped(model)
    reshard(model)
    names, own = _names(model, optimizer), _saved_tensors(model)
    weights_file = folder / f"model{part}.safetensors"
    tensors_file = folder / f"optimizer{part}.safetensors"
    about_file = folder / f"optimizer{part}.json"
    weights, tensors, about = (
        load_file(weights_file),
        load_file(tensors_file),
        _read_json(about_file),
    )
    _check_same(about_file, about["run"], _about(model, names, optimizer))
    _check_same(weights_file, _specs(weights), _specs(own))
    _check_same(tensors_file, _specs(tensors), about["tensors"])
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    parameters = {name: p for p, name in names.items()}
    on_host = isinstance(sharding.base_optimizer(optimizer), OffloadedOptimizer)
    fused = {p for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    placed: dict[str, Any] = dict(about["numbers"])
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        p = parameters[name]
        device = "cpu" if on_host or (kind == "step" and p not in fused) else p.device
        # a moment gets the strides (and the sharding) of its parameter: fused kernels are silently
        # wrong with others
        like = p if value.shape == local(p).shape else value
        placed[key] = torch.empty_like(like, dtype=value.dtype, device=device, requires_grad=False)
        local(placed[key]).copy_(value)
    placed |= {key: placed[owner] for key, owner in about["shared"].items()}
    optimizer.state.clear()
    for key, value in placed.items():
        kind, name = key.split("/", 1)
        optimizer.state[parameters[name]][kind] = value


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    tensors = {n: local(p) for n, p in model.named_parameters() if p.requires_grad}
    return tensors | {n: b for n, b in model.named_buffers() if n in persistent}


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and a copy where two names view one storage: safetensors refuses to write
    that."""
    storage = {name: t.untyped_storage().data_ptr() for name, t in tensors.items()}
    owner = {pointer: name for name, pointer in storage.items()}
    return {
        n: (t if owner[storage[n]] == n else t.clone()).detach().contiguous()
        for n, t in tensors.items()
    }


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """Names of the optimizer's parameters. KeyError: it was built before the model got its adapters
    or a new head."""
    known: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {p: known[p] for group in optimizer.param_groups for p in group["params"]}


def _about(model: nn.Module, names: Mapping[Tensor, str], optimizer: Optimizer) -> dict[str, str]:
    """What must not change in a run: frozen weights, the optimizer, and for every parameter its
    group's options and the rate that the schedule multiplies."""
    base = sharding.base_optimizer(optimizer)
    about = {"frozen weights": _fingerprint(model), "optimizer": type(base).__name__}
    if isinstance(base, OffloadedOptimizer):
        about["optimizer"] = f"offloaded {type(base.inner).__name__}"
    for group in optimizer.param_groups:
        fixed = {**group, "lr": group.get("initial_lr", group["lr"])}
        text = ", ".join(
            f"{k}={v}" for k, v in sorted(fixed.items()) if k not in ("params", "initial_lr")
        )
        about |= {names[p]: text for p in group["params"]}
    return about


def _fingerprint(model: nn.Module) -> str:
    """sha256 over name, shape, dtype and the first 1024 elements of every frozen parameter."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            first = local(p).detach().reshape(-1)[:1024].cpu()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}


def _check_same(file: Path, got: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{file}: {len(missing)} names are missing {missing[:3]}, {len(extra)} are unexpected "
            f"{extra[:3]}. Resume with the model and the adapters it was written with."
        )
    for name in wanted:
        if got[name] != wanted[name]:
            raise ValueError(
                f"{file}: {name} has [{got[name]}], this run has [{wanted[name]}]. Set the old "
                "values, or start a new run: only with the same does a run go on bit for bit."
            )


def capture_rng() -> dict[str, Any]:
    """State of the generators of python, numpy, torch and this rank's CUDA device, as JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_initialized() else None
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": cuda,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Puts back what ``capture_rng`` took, also after a trip through JSON."""
    if state["cuda"] and not torch.cuda.is_available():
        raise ValueError("The checkpoint has the random state of a CUDA device. Resume on one.")
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"]:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
