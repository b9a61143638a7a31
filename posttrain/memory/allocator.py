"""glibc's heap on a CPU: freed blocks stay with the process while it trains. They go back before a checkpoint is written, and
between steps where the process holds nearly what its plan allows: rows of ever new lengths leave ever new holes.

A block that goes back to the system costs its page faults when it is taken again: given back at two points of every micro-batch,
a step of SmolLM2-135M took a fifth to a third longer, once before every step of RL a seventh. The price is holes: glibc cannot
put an aligned block into the one that a block of the same size left (posix_memalign asks for size + alignment), so resident
memory lies above the live tensors.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from functools import cache
from typing import Any

from posttrain.memory.limits import rss_bytes
from posttrain.memory.plan import MAPPED_BYTES


@cache
def _glibc() -> Any:
    """None where there is another C library."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            return libc if libc.malloc_trim and libc.mallopt else None
    return None


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks: given back at once, each costs its page faults again (a tenth of a CPU step)."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(-3, MAPPED_BYTES)  # M_MMAP_THRESHOLD; larger ones (logits, scores of eager attention) leave no holes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def return_freed_memory(device_type: str, *, above: float = 0.0) -> None:
    """Gives the pages of freed blocks back to the system, if the process holds more than ``above`` bytes; on a CPU with glibc
    only. Microseconds where there are none."""
    libc = _glibc() if device_type == "cpu" else None
    if libc is not None and (rss_bytes() or 0) > above:
        libc.malloc_trim(0)


def hold_under(model: Any, limit: float) -> None:
    """Gives freed memory back before a decoder layer trains while the process holds more than ``limit`` bytes, so that holes
    of a long forward do not outgrow the plan. Where little came back, not again before 2 % more are held."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    libc, above = _glibc(), limit
    if libc is None or limit == float("inf"):
        return

    def check(layer: Any, _: Any) -> None:
        nonlocal above
        held = rss_bytes() or 0
        if held <= limit:
            above = limit
        elif layer.training and held > above:
            libc.malloc_trim(0)
            above = max(limit, 1.02 * (rss_bytes() or 0))

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(check)
