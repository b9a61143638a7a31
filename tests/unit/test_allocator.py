"""Freed memory goes back to the system when it is asked to, or where a layer trains once too much
is held."""

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


def fill(megabytes):  # so many, freed, under a block that stays
    blocks = [bytearray(b"x") * 2**20 for _ in range(megabytes)]
    pinned.append(bytearray(b"x") * 2**20)


pinned, layer = [], Layer()
keep_freed_memory()
guards = {"none": HeapGuard(float("inf")), "wide": HeapGuard(300e6), "tight": HeapGuard(100e6)}
guards["tight"].watch(layer)
empty = rss_bytes()
fill(200)
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
held["used them"] = rss_bytes()
fill(300)
layer(torch.zeros(1))
held["trains"] = rss_bytes()
out = layer(torch.zeros(1, requires_grad=True))
fill(300)
held["forward is done"] = rss_bytes()
out.sum().backward()
held["backward is done"] = rss_bytes()
layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, partial(checkpoint, use_reentrant=False)
out = layer(torch.zeros(1))
fill(300)
held["checkpoint is made"] = rss_bytes()
out.sum().backward()
held["is recomputed"] = rss_bytes()
fill(200)
guards["wide"].give_back()
held["gives back"] = rss_bytes()
print(*((n - empty) // 10**6 for n in held.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_a_layer_that_trains_gives_freed_memory_back_once_too_much_is_held():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    *kept, trains, forward, backward, checkpoint, recomputed, gives = map(int, done.stdout.split())
    assert (
        len(kept) == 5
        and min(*kept, forward, checkpoint) > 150
        and max(trains, backward, recomputed, gives) < 50
    )
