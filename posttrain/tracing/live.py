"""Bytes of every storage that is alive, at each moment of a real or a fake run, and what they are
for at the peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from posttrain.tracing.quantised import storages_4bit

CATEGORIES = (
    "weights",
    "reference",
    "gradients",
    "moments",
    "activations",
    "recomputed",
    "casts",
    "logits",
    "temporaries",
)
"""recomputed: made by gradient checkpointing in the backward. casts: weights in the compute dtype.
logits: [tokens, V]. temporaries: everything else, for the most part gradients of activations."""


@dataclass
class Peak:
    """The most bytes alive at once, and of which category they were."""

    total_bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)


@dataclass
class _Owned:
    num_bytes: int
    category: str
    weak: Any


class LiveStorages(TorchDispatchMode):
    """``with LiveStorages() as live: ...`` counts the storages that operators make or read inside.

    One storage counts once, however many views it has, from its first operator until it is freed.
    What a kernel takes and gives back while it runs is not seen. ``num_vocabulary``: tensors with
    so many columns are logits.
    """

    def __init__(self, *, num_vocabulary: int = 0) -> None:
        super().__init__()
        self.live_bytes = 0
        self.phases: dict[str, Peak] = {}
        self._num_vocabulary = num_vocabulary
        self._phase = "forward"
        self._by_category: Counter[str] = Counter()
        self._owned: dict[int, _Owned] = {}

    @property
    def peak(self) -> Peak:
        """Over all phases."""
        return max(self.phases.values(), key=lambda p: p.total_bytes, default=Peak())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, what is made outside of a backward pass belongs to this phase (its own peak)."""
        before, self._phase = self._phase, name
        self._note_peak(name)
        try:
            yield
        finally:
            self._phase = before

    def own(self, tensor: Tensor, category: str) -> None:
        """Counts a tensor made elsewhere, or gives a known one another category."""
        storage = tensor.untyped_storage()
        known = self._owned.get(id(storage))
        if known is None:
            self._add(storage, category)
        elif known.category != category:
            self._by_category[known.category] -= known.num_bytes
            self._by_category[category] += known.num_bytes
            known.category = category

    def watch(self, model: nn.Module) -> None:
        """Parameters and buffers are weights (a tied one once); their gradients are told from other
        results of the backward."""
        for tensor in (
            *model.parameters(),
            *model.buffers(),
            *(t for p in model.parameters() for t in storages_4bit(p)),
        ):
            self.own(tensor, "weights")
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(
                    lambda p: self.own(p.grad, "gradients") if p.grad is not None else None
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(args):
            self._see(tensor, func, args)
        for tensor in tree_iter(result):
            self._see(tensor, func, args)
        return result

    def _see(self, tensor: Any, func: Any, args: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        known = self._owned.get(id(storage))
        if known is None:
            self._add(storage, self._category(tensor, func, args))
        elif known.num_bytes != storage.nbytes():
            self._resize(known, storage.nbytes())

    def _category(self, tensor: Tensor, func: Any, args: Any) -> str:
        source = (
            self._owned.get(id(args[0].untyped_storage()))
            if args and isinstance(args[0], Tensor)
            else None
        )
        if (
            func is torch.ops.aten._to_copy.default
            and source is not None
            and source.category in ("weights", "reference")
        ):
            return "casts"
        if self._num_vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self._num_vocabulary:
            return "logits"
        if torch._C._current_graph_task_id() != -1:
            return "recomputed" if torch.is_grad_enabled() else "temporaries"
        return (
            "activations" if self._phase == "forward" and torch.is_grad_enabled() else "temporaries"
        )

    def _add(self, storage: Any, category: str) -> None:
        key = id(storage)
        owned = _Owned(storage.nbytes(), category, ref(storage, lambda _: self._remove(key)))
        self._owned[key] = owned
        self.live_bytes += owned.num_bytes
        self._by_category[category] += owned.num_bytes
        self._note_peak("backward" if torch._C._current_graph_task_id() != -1 else self._phase)

    def _resize(self, owned: _Owned, num_bytes: int) -> None:
        self.live_bytes += num_bytes - owned.num_bytes
        self._by_category[owned.category] += num_bytes - owned.num_bytes
        owned.num_bytes = num_bytes
        self._note_peak("backward" if torch._C._current_graph_task_id() != -1 else self._phase)

    def _remove(self, key: int) -> None:
        owned = self._owned.pop(key)
        self.live_bytes -= owned.num_bytes
        self._by_category[owned.category] -= owned.num_bytes

    def _note_peak(self, phase: str) -> None:
        peak = self.phases.setdefault(phase, Peak())
        if self.live_bytes > peak.total_bytes:
            peak.total_bytes = self.live_bytes
            peak.by_category = {name: n for name, n in self._by_category.items() if n}
