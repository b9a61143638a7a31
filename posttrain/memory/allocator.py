"""glibc's heap on a CPU: freed blocks stay with the process while it trains, and go back when too
much of them is unused.

A block that goes back to the system costs its page faults when it is taken again: given back at two
points of every micro-batch, a step of SmolLM2-135M took a fifth to a third longer. Kept, they
become holes: glibc cannot put an aligned block into the one that a block of the same size left
(posix_memalign asks for size + alignment), so resident memory grows to a third and more above the
live tensors. ``HeapGuard`` lets the process grow to its live tensors at their most and what the
plan has for holes, then gives all of them back.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache
from typing import Any

from posttrain.memory.limits import rss_bytes
from posttrain.memory.plan import MAPPED_BYTES


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` (malloc.h)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        ).split()
    ]


@cache
def _glibc() -> Any:
    """None where there is another C library, or one older than 2.33."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallinfo2.restype = _Mallinfo
            return libc if libc.malloc_trim and libc.mallopt else None
    return None


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks: given back at once, each costs its page faults again (a
    tenth of a CPU step)."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(
            -3, MAPPED_BYTES
        )  # M_MMAP_THRESHOLD; larger ones (logits, scores of eager attention) leave no holes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class HeapGuard:
    """Gives the pages of freed blocks back once the process holds ``allowed`` bytes more (inf:
    never) than it had in use at most.

    Not as soon as so many are free: what comes next takes them again. Above what it held without
    holes when they last went back: pages that came some other way (code, a mapped file that is
    read) count as holes until then, once. Does nothing without glibc.
    """

    def __init__(self, allowed: float) -> None:
        self._libc = _glibc() if allowed < float("inf") else None
        self._allowed = allowed
        self._floor = self._most = 0
        self.give_back()

    def give_back(self) -> None:
        """All of them, now."""
        if self._libc is not None:
            self._libc.malloc_trim(0)
            held, used = self._held_and_used()
            self._floor, self._most = held - used, max(self._most, used)

    def check(self) -> None:
        """All of them, if they are too many. A tenth of a millisecond where they are not."""
        if self._libc is not None:
            held, used = self._held_and_used()
            self._floor = min(
                self._floor, held - used
            )  # pages that went some other way: a mapped file's, to swap
            self._most = max(self._most, used)
            if held - self._floor - self._most > self._allowed:
                self.give_back()

    def watch(self, model: Any) -> None:
        """Checks before each part of a decoder layer that trains, where it is recomputed too, and
        after it in the backward."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        def before(part: Any, inputs: tuple[Any, ...]) -> None:
            if part.training:
                self.check()
                if inputs and getattr(inputs[0], "requires_grad", False):
                    inputs[0].register_hook(lambda _: self.check())

        for module in model.modules() if self._libc is not None else ():
            if isinstance(module, GradientCheckpointingLayer):
                for part in (
                    module.children()
                ):  # a layer's own hooks do not run again when it is recomputed
                    part.register_forward_pre_hook(before)

    def _held_and_used(self) -> tuple[int, int]:
        now = self._libc.mallinfo2()
        return rss_bytes() or 0, now.uordblks + now.hblkhd
