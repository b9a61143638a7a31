"""Weights in a mapped checkpoint: read where they lie in the file, until they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

USED_SHARE = 0.9
"""A mapped file of which less is in use costs more than a copy of what is used."""


def leave_mapped_checkpoint(model: Any) -> None:
    """Copies what a CPU's model has in mapped files, where most of a file's pages are there for
    nothing.

    Weights that loading packs (4 bit) or joins (experts) lie in memory of their own; what they were
    made from stays resident as long as any other weight, a norm's say, lies in the same file. Linux
    only; elsewhere nothing is copied.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"]
    for start, end in _mapped_files():
        inside = [t for t in tensors if start <= t.data_ptr() < end]
        if inside and sum(t.nbytes for t in inside) < USED_SHARE * (end - start):
            for tensor in inside:
                tensor.data = tensor.data.clone()


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges (proc(5), /proc/pid/maps), whatever the files' names: a hub's cache has
    hashes."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    fields = [line.split(maxsplit=5) for line in lines]
    ranges = [f[0].split("-") for f in fields if len(f) == 6 and f[5].startswith("/")]
    return [(int(start, 16), int(end, 16)) for start, end in ranges]
