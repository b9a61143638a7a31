"""Freed memory goes back to the system when it is asked to, or before a layer trains once too much of it is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
from functools import partial
import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from posttrain.memory.allocator import HeapGuard, keep_freed_memory
from posttrain.memory.limits import rss_bytes


class Layer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.part = torch.nn.Linear(1, 1)

    def forward(self, x):
        return torch.sigmoid(self.part(x))


def fill():  # 200 MB, freed, under a block that stays
    blocks = [bytearray(b"x") * 2**20 for _ in range(200)]
    pinned.append(bytearray(b"x") * 2**20)


pinned, layer = [], Layer()
keep_freed_memory()
guards = {"none": HeapGuard(float("inf")), "wide": HeapGuard(300e6), "tight": HeapGuard(100e6)}
guards["tight"].watch(layer)
empty = rss_bytes()
fill()
held = {}
for name in ("none", "wide"):
    guards[name].check()
    held[name] = rss_bytes()
layer.eval()(torch.zeros(1))
held["evaluates"] = rss_bytes()
used = [bytearray(b"x") * 2**20 for _ in range(150)]  # 50 MB of holes are left
layer.train()(torch.zeros(1))
held["uses them"] = rss_bytes()
del used
layer(torch.zeros(1))
held["trains"] = rss_bytes()
layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, partial(checkpoint, use_reentrant=False)
out = layer(torch.zeros(1))
fill()
held["forward is done"] = rss_bytes()
out.sum().backward()
held["is recomputed"] = rss_bytes()
fill()
guards["wide"].give_back()
held["gives back"] = rss_bytes()
print(*((n - empty) // 10**6 for n in held.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_a_layer_that_trains_gives_freed_memory_back_once_there_is_too_much():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    none, wide, evaluates, uses, trains, forward, recomputed, gives = map(int, done.stdout.split())
    assert min(none, wide, evaluates, uses, forward) > 150 and max(trains, recomputed, gives) < 50
