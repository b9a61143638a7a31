"""Runs inside the vLLM server (launch/vllm.sh): reloads the policy's weights, with all that was
made of them at the first load, and gives a receipt of what arrived.

On a CPU, vLLM 0.32 packs the LM head's weight for its matrix product. Where the head is tied to the
embedding, its own ``reload_weights`` renews the embedding and leaves the packed copy as it was:
samples then come from a mixture of two policies.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import torch

PROCESS = uuid.uuid4().hex


def checksum(tensor: torch.Tensor) -> str:
    """As posttrain/rollout/handover.py makes it."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class Arrivals:
    """Notes what comes to a model's ``load_weights``, from a folder or over NCCL."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._load = model.load_weights
        self.reset()
        model.load_weights = self.load_weights

    def reset(self) -> None:
        """Another hand-over begins."""
        self.tensors: list[list[Any]] = []
        self._in_dtype: dict[str, str] = {}
        self._loaded: set[str] = set()
        self._parameters = [name for name, _ in self._model.named_parameters()]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *more: Any) -> Any:
        """In place of the model's own."""
        loaded = self._load(self._noted(weights), *more)
        self._loaded.update(loaded or ())
        return loaded

    def _noted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        for name, tensor in weights:
            digest, dtype = checksum(tensor), str(tensor.dtype).removeprefix("torch.")
            self.tensors.append([name, dtype, list(tensor.shape), digest])
            same = tensor.dtype == self._dtype
            self._in_dtype[name] = digest if same else checksum(tensor.to(self._dtype))
            yield name, tensor

    def receipt(self) -> dict[str, Any]:
        """Of what arrived since ``reset``, compared with what the model holds wherever it holds a
        tensor as it came (whole, or as rows of a fused one)."""
        differs, read_back = [], 0
        held = dict(self._model.named_parameters())
        fused = getattr(self._model, "packed_modules_mapping", None) or {}
        shapes = {name: shape for name, _, shape, _ in self.tensors}
        for name, shape in shapes.items():
            tensor = find_held(held, name, shapes, fused)
            if tensor is None or tensor.dtype != self._dtype or list(tensor.shape) != shape:
                continue
            read_back += 1
            if checksum(tensor) != self._in_dtype[name]:
                differs.append(name)
        missing = [n for n in self._parameters if n not in self._loaded] if self._loaded else []
        return {
            "tensors": self.tensors,
            "differs": differs,
            "missing": missing,
            "read_back": read_back,
            "dtype": str(self._dtype).removeprefix("torch."),
        }


def find_held(
    held: dict[str, torch.Tensor],
    name: str,
    shapes: dict[str, list[int]],
    fused: dict[str, list[str]],
) -> torch.Tensor | None:
    """What the model holds of an arrived tensor: the parameter of its name (a vocabulary may be
    padded), or its rows of a fused one. None where that is not plain: a part of it on another
    worker, or packed for a kernel."""
    rows = math.prod(shapes[name][:1])
    if name in held:
        tensor = held[name].data
        return tensor[:rows] if tensor.ndim and len(tensor) > rows else tensor
    path = name.split(".")
    for whole, parts in fused.items():
        at = next((i for i, word in enumerate(path) if word in parts), None)
        if at is None or len(parts) < 2:
            continue
        names = [".".join([*path[:at], part, *path[at + 1 :]]) for part in parts]
        tensor = held.get(".".join([*path[:at], whole, *path[at + 1 :]]))
        if tensor is None or tensor.ndim == 0 or any(n not in shapes for n in names):
            continue
        sizes = [shapes[n][0] for n in names]
        if len(tensor) != sum(sizes):
            continue
        start = sum(sizes[: names.index(name)])
        return tensor.data[start : start + rows]
    return None


class ReloadPolicy:
    """Further methods of a worker, called by ``/collective_rpc``."""

    def mark_policy(self, mark: str | None) -> None:
        """Says which weights the worker has from now on; None: none in particular, a hand-over
        begins."""
        self._policy_mark = None if mark is None else f"{mark} {PROCESS}"
        if mark is None:
            self._watch_arrivals()

    def _watch_arrivals(self) -> None:
        worker: Any = self
        if not hasattr(self, "_arrivals"):
            model = worker.model_runner.get_model()
            self._arrivals = Arrivals(model, worker.model_config.dtype)
        self._arrivals.reset()

    def policy_mark(self) -> str | None:
        """The mark and the process that was given it; None in one that was started since."""
        return getattr(self, "_policy_mark", None)

    def policy_receipt(self) -> dict[str, Any] | None:
        """What arrived in the last hand-over; None before the first."""
        return self._arrivals.receipt() if hasattr(self, "_arrivals") else None

    def reload_policy(self, weights_path: str) -> None:
        """Weights from a folder of safetensors."""
        worker: Any = self
        worker.reload_weights(weights_path=weights_path)
        for module in worker.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
