"""The softmax over a vocabulary runs in blocks of rows that stay in a CPU's cache."""

from __future__ import annotations

from torch import Tensor

CPU_BLOCK_ELEMENTS = 2**21
"""Logits of a block (8 MiB of float32)."""


def slices(total: int, size: int) -> list[slice]:
    """As many slices as ``size`` asks for, all of about the same length: a short last one would
    cost a whole pass over what each is multiplied by."""
    count = -(-total // size)
    ends = [total * (i + 1) // count for i in range(count)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def blocks(logits_CV: Tensor) -> list[slice]:
    """Rows whose softmax is computed at once: all of them on a GPU."""
    rows, vocabulary = logits_CV.shape
    if logits_CV.device.type != "cpu":
        return [slice(0, rows)]
    return slices(rows, max(1, CPU_BLOCK_ELEMENTS // vocabulary))
