"""Keys and values of sequences that grow: one slot per sequence, dense at the front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class RecordingCache(Cache):
    """Keeps what each layer computes for a packed row and changes nothing: keys and values [1, kv
    heads, L, D] by layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention layer."""
        self.recorded[layer_idx] = (key_states, value_states)
        return key_states, value_states


ROOM_STEP = 64
"""Tokens by which slots grow. A decode step reads slots whole, masked: a part of them would be
copied by every product (15 % of a step's time on a CPU)."""


class SlotCache(Cache):
    """[slots, kv heads, room, D] by layer; the room grows with the longest row, up to ``capacity``.
    In a decode step the first B slots are rows, ``lengths[b]`` tokens long."""

    def __init__(self, *, slots: int, capacity: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.slots, self.capacity, self._dtype = slots, capacity, dtype
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows_B: Tensor | None = None
        self._lengths_B: Tensor | None = None
        self._room = 0

    def _layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._kv:
            shape = (self.slots, like.shape[1], self._room, like.shape[-1])
            self._kv[layer] = (
                like.new_zeros(shape, dtype=self._dtype),
                like.new_zeros(shape, dtype=self._dtype),
            )
        return self._kv[layer]

    def _grow(self, longest: int) -> None:
        """Room for sequences of ``longest`` tokens."""
        if longest <= self._room:
            return
        before, self._room = self._room, min(-(-longest // ROOM_STEP) * ROOM_STEP, self.capacity)
        for layer, stores in self._kv.items():
            grown = [s.new_zeros((*s.shape[:2], self._room, s.shape[3])) for s in stores]
            for new, old in zip(grown, stores, strict=True):
                new[:, :, :before] = old
            self._kv[layer] = (grown[0], grown[1])

    def fill(
        self,
        slots: Sequence[int],
        recorded: dict[int, tuple[Tensor, Tensor]],
        spans: Sequence[tuple[int, int]],
    ) -> None:
        """Copies the given spans of a recorded row, one after the other, to the start of each
        slot."""
        self._grow(sum(end - start for start, end in spans) + 1)
        for layer, (keys, values) in recorded.items():
            for store, states in zip(self._layer(layer, keys), (keys, values), strict=True):
                at = 0
                for start, end in spans:
                    for slot in slots:
                        store[slot, :, at : at + end - start] = states[0, :, start:end]
                    at += end - start

    def move(self, source: int, target: int, length: int) -> None:
        """Slot ``source`` takes the place of ``target``."""
        for stores in self._kv.values():
            for store in stores:
                store[target, :, :length] = store[source, :, :length]

    def begin_step(self, lengths_B: Tensor, longest: int) -> int:
        """The next forward appends one token to each of the first B slots; ``longest`` counts it.
        Returns the keys it sees."""
        self._grow(longest)
        self._rows_B = torch.arange(lengths_B.shape[0], device=lengths_B.device)
        self._lengths_B = lengths_B
        return self._room

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention layer with [B, kv heads, 1, D]; returns views of the rows'
        slots."""
        assert self._rows_B is not None
        stores = self._layer(layer_idx, key_states)
        for store, states in zip(stores, (key_states, value_states), strict=True):
            store[self._rows_B, :, self._lengths_B] = states[:, :, 0].to(store.dtype)
        keys, values = (store[: self._rows_B.shape[0]] for store in stores)
        return keys, values
