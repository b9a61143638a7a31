"""The training state of a run, bit for bit: weights, the optimizer's state, schedule, loss scale,
random numbers.

    model.safetensors      trained parameters, persistent buffers (by rank under FSDP2)
    optimizer.safetensors  tensors of the optimizer's state by name, with the part of each process
    optimizer.json         options, fingerprint of frozen weights, the state's numbers, specs of
                           its tensors
    zero/                  under DeepSpeed instead of these two, as its engine writes it
    schedule.json, scaler.json, rng_<rank>.json

It is read without pickle, but for ``zero/``: DeepSpeed unpickles with ``weights_only=False``, so
resume those only from checkpoints you trust (a manifest finds no malice).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from posttrain.models.sharding import local, reshard
from posttrain.training import sharding
from posttrain.training.checkpoint import write_json
from posttrain.training.optimizer import OffloadedOptimizer


def save_training_state(
    folder: Path, model: nn.Module, optimizer: Optimizer, *, part: str = ""
) -> None:
    """Trained parameters, persistent buffers and the optimizer's state (any of its tensors and
    numbers), exact, by name.

    A tensor that has two names (tied weights, the code books of 8-bit moments) is saved once.
    Frozen parameters are not saved (they are the model's own files): a fingerprint of them is.
    ``part`` goes into the file names: of FSDP2's DTensors every process saves its own.
    """
    model = sharding.unwrapped(model)
    reshard(model)
    names = _names(model, optimizer)
    state = {
        f"{kind}/{names[p]}": value
        for p, entry in optimizer.state.items()
        for kind, value in entry.items()
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
        "numbers": {
            name: value
            for name, value in state.items()
            if name not in tensors and value is not None
        },
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
    weights, tensors = (
        load_file(folder / f"model{part}.safetensors"),
        load_file(folder / f"optimizer{part}.safetensors"),
    )
    about = json.loads((folder / f"optimizer{part}.json").read_bytes())
    _check_same(folder / f"optimizer{part}.json", about["run"], _about(model, names, optimizer))
    _check_same(folder / f"model{part}.safetensors", _specs(weights), _specs(own))
    _check_same(folder / f"optimizer{part}.safetensors", _specs(tensors), about["tensors"])
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


def _about(model: nn.Module, names: Mapping[Tensor, str], optimizer: Optimizer) -> dict[str, str]:
    """What must not change in a run: frozen weights, the optimizer, its options for every
    parameter."""
    base = sharding.base_optimizer(optimizer)
    name = (
        f"offloaded {type(base.inner).__name__}"
        if isinstance(base, OffloadedOptimizer)
        else type(base).__name__
    )
    return {"frozen weights": _fingerprint(model), "optimizer": name, **_options(names, optimizer)}


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    tensors: dict[str, Tensor] = {
        n: local(p) for n, p in model.named_parameters() if p.requires_grad
    }
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


def _fingerprint(model: nn.Module) -> str:
    """sha256 over name, shape, dtype and the first 1024 elements of every frozen parameter."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not p.requires_grad:
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(
                local(p).detach().reshape(-1)[:1024].cpu().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """Names of the optimizer's parameters. KeyError: it was built before the model got its adapters
    or a new head."""
    known: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {p: known[p] for group in optimizer.param_groups for p in group["params"]}


def _options(names: Mapping[Tensor, str], optimizer: Optimizer) -> dict[str, str]:
    """Per parameter what must not change in a run: its group's options and the rate that the
    schedule multiplies."""
    options: dict[str, str] = {}
    for group in optimizer.param_groups:
        fixed = {**group, "lr": group.get("initial_lr", group["lr"])}
        text = ", ".join(
            f"{k}={v}" for k, v in sorted(fixed.items()) if k not in ("params", "initial_lr")
        )
        options |= {names[p]: text for p in group["params"]}
    return options


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}


def _check_same(file: Path, got: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{file} does not fit this run: {len(missing)} names are missing {missing[:3]}, "
            f"{len(extra)} are unexpected {extra[:3]}. Resume with the model and the adapters it "
            "was written with."
        )
    for name in wanted:
        if got[name] != wanted[name]:
            raise ValueError(
                f"{file}: {name} has [{got[name]}], this run has [{wanted[name]}]. Only with the "
                "same model, precision and optimizer does a resumed run equal an uninterrupted "
                "one: set the old values, or start a new run."
            )


def capture_rng() -> dict[str, Any]:
    """State of the generators of python, numpy, torch and this rank's CUDA device, as JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex()
        if torch.cuda.is_initialized()
        else None,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Puts back what ``capture_rng`` took, also after a trip through JSON."""
    if state["cuda"] and not torch.cuda.is_available():
        raise ValueError(
            "The checkpoint holds the random state of a CUDA device; here is none. Resume on one."
        )
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"]:
        torch.cuda.set_rng_state(
            torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8)
        )


def write_state(
    accelerator: Any, policy: nn.Module, optimizer: Optimizer, schedule: LambdaLR, folder: Path
) -> None:
    """``write`` of ``save_checkpoint``, on every rank: its share of weights, moments, schedule and
    random state."""
    if sharding.is_deepspeed(accelerator):
        policy.save_checkpoint(
            str(folder), "zero", save_latest=False, exclude_frozen_parameters=True
        )
        write_json(
            folder / f"frozen_{accelerator.process_index}.json",
            {"frozen weights": _fingerprint(policy.module)},
        )
    elif sharding.kind(accelerator) == "fsdp2":
        save_training_state(folder, policy, optimizer, part=f"_{accelerator.process_index}")
    elif accelerator.is_main_process:
        save_training_state(folder, policy, optimizer)
        if accelerator.scaler is not None:
            write_json(folder / "scaler.json", accelerator.scaler.state_dict())
    if accelerator.is_main_process:
        topology = {"ranks": accelerator.num_processes, "sharding": sharding.kind(accelerator)}
        write_json(folder / "schedule.json", {"step": schedule.last_epoch, **topology})
    write_json(folder / f"rng_{accelerator.process_index}.json", capture_rng())


def _load_zero(folder: Path, engine: Any, rank: int) -> None:
    frozen = folder / f"frozen_{rank}.json"
    _check_same(
        frozen, json.loads(frozen.read_bytes()), {"frozen weights": _fingerprint(engine.module)}
    )
    all_trained = all(p.requires_grad for p in engine.module.parameters())
    path, _ = engine.load_checkpoint(str(folder), "zero", load_module_strict=all_trained)
    if path is None:
        raise ValueError(
            f"DeepSpeed found no state in {folder / 'zero'}. Delete the checkpoint, and the one "
            "before it is resumed."
        )


def read_state(
    accelerator: Any, policy: nn.Module, optimizer: Optimizer, schedule: LambdaLR, folder: Path
) -> None:
    """On every rank, into freshly built objects: the run goes on bit for bit. Raises ValueError on
    another topology."""
    saved = json.loads((folder / "schedule.json").read_bytes())
    if saved["ranks"] != accelerator.num_processes:
        raise ValueError(
            f"{folder} was written by {saved['ranks']} processes, this run has "
            f"{accelerator.num_processes} and could not equal an uninterrupted one. Launch "
            f"{saved['ranks']} processes."
        )
    before, now = saved.get("sharding", "whole"), sharding.kind(accelerator)
    if before != now:
        raise ValueError(
            f"{folder} was written by a run whose weights were held as {before}, this one holds "
            f"them as {now}. Resume with the launch configuration it was started with, or start a "
            "new run from its final/ folder."
        )
    if sharding.is_deepspeed(accelerator):
        _load_zero(folder, policy, accelerator.process_index)
    else:
        load_training_state(
            folder,
            policy,
            optimizer,
            part=f"_{accelerator.process_index}" if sharding.kind(accelerator) == "fsdp2" else "",
        )
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(json.loads((folder / "scaler.json").read_bytes()))
    schedule.last_epoch, schedule._step_count = saved["step"], saved["step"] + 1
    schedule._last_lr = [
        lr * f(saved["step"]) for lr, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, lr in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = lr
    restore_rng(json.loads((folder / f"rng_{accelerator.process_index}.json").read_bytes()))
