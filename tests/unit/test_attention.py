"""Both attention backends against a dense mask written from the definition: a token sees its
sequence up to itself."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from posttrain.models.policy import Policy
from posttrain.packing import attention, flex
from posttrain.packing.attention import flex_segment_attention, segment_attention
from posttrain.packing.batch import Layout
from posttrain.packing.plan import PackingConfig
from tests.helpers import tiny_llama

LAYOUT = dict(lengths=(7, 4, 1, 6, 9, 3), prefixes=(-1, 0, 0, 0, -1, 4))


def dense_mask(lengths, prefixes, window=None):
    """seen[q, k] by walking each sequence: prefix tokens, then its own."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    total = sum(lengths)
    seen = torch.zeros(total, total, dtype=torch.bool)
    for i, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        before = (
            list(range(starts[prefix], starts[prefix] + lengths[prefix])) if prefix >= 0 else []
        )
        tokens = before + list(range(starts[i], starts[i] + length))
        for q_at in range(len(before), len(tokens)):
            for k_at in range(q_at + 1):
                if window is None or q_at - k_at < window:
                    seen[tokens[q_at], tokens[k_at]] = True
    return seen


def dense_attention(q, k, v, seen, *, scaling, softcap):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 5, 1])
def test_segments_equal_a_dense_mask_with_gradients(window, softcap):
    torch.manual_seed(0)
    total = sum(LAYOUT["lengths"])
    inputs = [
        torch.randn(1, h, total, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)
    ]
    got, _ = segment_attention(
        None,
        *inputs,
        None,
        packing=Layout(**LAYOUT),
        scaling=0.4,
        sliding_window=window,
        softcap=softcap,
    )
    wanted = dense_attention(
        *inputs, dense_mask(**LAYOUT, window=window), scaling=0.4, softcap=softcap
    )
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 5, 1])
def test_flex_mask_is_the_dense_mask(window):
    layout = Layout(**LAYOUT)
    total = sum(layout.lengths)
    mask_mod = flex.mask_mod(layout, sliding_window=window, device="cpu")
    rows, columns = torch.meshgrid(torch.arange(total), torch.arange(total), indexing="ij")
    assert torch.equal(mask_mod(0, 0, rows, columns), dense_mask(**LAYOUT, window=window))


def random_layout(rng):
    """Prompts with and without completions, lengths around whole blocks among them."""
    lengths, prefixes = [], []
    for _ in range(rng.randint(1, 4)):
        prompt = len(lengths)
        lengths.append(rng.choice([1, 3, 12, 15, 16, 17, 32, 38]))
        prefixes.append(-1)
        for _ in range(rng.choice([0, 1, 4])):
            lengths.append(rng.choice([1, 2, 5, 15, 16, 17, 25]))
            prefixes.append(prompt)
    return Layout(lengths=tuple(lengths), prefixes=tuple(prefixes))


@pytest.mark.parametrize("window", [None, 1, 5, 16, 38])
def test_the_block_table_lists_what_the_mask_says(window, monkeypatch):
    """Every block with a visible pair is listed, no other one is, and one that is called full has
    no hidden pair."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    rng = random.Random(0)
    for _ in range(40):
        layout = random_layout(rng)
        seen = dense_mask(layout.lengths, layout.prefixes, window).numpy()
        blocks = -(-len(seen) // 16)
        padding = blocks * 16 - len(seen)
        tiles = np.pad(seen, (0, padding)).reshape(blocks, 16, blocks, 16)
        wanted = tiles.any((1, 3))
        wanted[-1, -1] |= padding > 0
        partial, full = flex.block_table(layout, sliding_window=window)
        assert not (partial & full).any()
        assert ((partial | full) == wanted).all(), (layout, window)
        assert not (full & ~tiles.all((1, 3))).any(), (layout, window)


def test_inner_blocks_are_full():
    """A prompt of four blocks and its two completions: only the diagonals need the mask, and no
    block sees the other completion."""
    partial, full = flex.block_table(
        Layout(lengths=(512, 128, 128), prefixes=(-1, 0, 0)), sliding_window=None
    )
    assert (partial == np.eye(6, dtype=bool)).all()
    assert (full[:4] == np.tri(4, 6, -1, dtype=bool)).all()
    assert (full[4:] == np.array([True] * 4 + [False] * 2)).all()
    _, full = flex.block_table(
        Layout(lengths=(512, 50, 78), prefixes=(-1, 0, 0)), sliding_window=None
    )
    assert full[4].tolist() == [True] * 4 + [False], (
        "also for a block with queries of both completions"
    )


def test_block_mask_has_empty_blocks_between_sequences():
    """What makes it fast: 20 sequences of one block each fill 20 of 400 blocks."""
    layout = Layout(lengths=(128,) * 20, prefixes=(-1,) * 20)
    assert flex.block_mask(layout, sliding_window=None, device="cpu").sparsity() == pytest.approx(
        95.0
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 100])
def test_flex_attention_forward_equals_segments(window, softcap):
    """The block mask drives the real FlexAttention on CPU (forward only there), over rows that are
    padded to whole blocks."""
    torch.manual_seed(0)
    layout = Layout(lengths=(150, 40, 61, 30), prefixes=(-1, 0, 0, -1))
    q, k, v = (torch.randn(1, h, 281, 16) for h in (4, 2, 2))
    options = dict(packing=layout, scaling=0.25, sliding_window=window, softcap=softcap)
    got, _ = flex_segment_attention(None, q, k, v, None, **options)
    wanted, _ = segment_attention(None, q, k, v, None, **options)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)


def test_flex_attention_gets_one_dtype_and_whole_blocks(monkeypatch):
    """Under autocast the rotary embedding leaves query and key in float32, beside a bfloat16
    value."""
    given = []
    real = flex._kernel(torch.device("cpu"))

    def kernel(query, key, value, **options):
        given.extend((x.dtype, x.shape[2]) for x in (query, key, value))
        return real(query, key, value, **options)

    monkeypatch.setattr(flex, "_kernel", lambda device: kernel)
    layout = Layout(
        lengths=(600,), prefixes=(-1,)
    )  # longer than what is computed in float32 on a CPU
    q, k, v = (torch.randn(1, 2, 600, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = flex_segment_attention(None, q, k, v.bfloat16(), None, packing=layout)
    assert given == [(torch.bfloat16, 640)] * 3 and got.dtype == torch.bfloat16
    wanted, _ = segment_attention(None, q, k, v, None, packing=layout)
    torch.testing.assert_close(got.float(), wanted, atol=0.02, rtol=0.02)


def test_the_compiled_kernel_has_a_budget_of_variants_and_ends_loudly():
    """Rows of other lengths are no new variants; one variant too many is an error, not a silent
    fall back. What is a variant is dynamo's matter, so the graphs themselves are not compiled here.
    In a process of its own, since the limit is torch's."""
    script = """
import functools
import torch
from posttrain.packing import flex
from posttrain.packing.batch import Layout
from torch._dynamo.utils import counters

torch.compile = functools.partial(torch.compile, backend="eager")
flex._kernel = lambda device: flex.compiled()
graphs = []
with torch.no_grad():
    for lengths in ((150, 40), (1, 2, 3), (300, 41, 7), (129, 600), (70, 500, 9, 4), (128, 1), (90, 2)):
        layout = Layout(lengths=lengths, prefixes=(-1, *(0,) * (len(lengths) - 1)))
        q, k, v = (torch.randn(1, h, sum(lengths), 16) for h in (4, 2, 2))
        got = flex.attend(q, k, v, layout, scaling=None, sliding_window=None, softcap=None)
        assert got.shape == q.shape
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2], graphs
    torch._dynamo.config.recompile_limit = graphs[-1]
    try:
        flex.attend(q.double(), k.double(), v.double(), layout, scaling=None, sliding_window=5, softcap=2.0)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        print("refused", graphs)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("refused"), done.stdout + done.stderr


def test_a_kernel_that_does_not_work_is_replaced_in_one_line(monkeypatch, caplog):
    """No Triton, no compiler, an unsupported card: attention by segment instead, and FlexAttention
    by name is refused."""
    monkeypatch.setattr(attention, "TRIED_FLEX", {})
    monkeypatch.setattr(
        torch,
        "compile",
        lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("Cannot find Triton\nlong")),
    )
    monkeypatch.setattr(flex, "_COMPILED", {})
    monkeypatch.setattr(flex, "_kernel", lambda device: flex.compiled())
    policy = Policy(tiny_llama(), PackingConfig())
    with caplog.at_level("WARNING"):
        policy.forward_mode = replace(policy.forward_mode, backend=attention.FLEX_NAME)
        policy._use_flex(torch.device("cpu"))
    assert [r.message for r in caplog.records] == [
        "FlexAttention does not work here (RuntimeError: Cannot find Triton); attention runs segment by segment, exact but slower"
    ]
    assert (
        policy.forward_mode.backend == attention.SEGMENT_NAME == policy.config._attn_implementation
    )
    policy.packing = PackingConfig(backend="flex")
    with pytest.raises(ValueError, match="backend=flex does not work here: RuntimeError"):
        policy._use_flex(torch.device("cpu"))


@pytest.mark.parametrize("broken", [False, True])
def test_the_trial_compares_the_kernel_with_plain_attention(broken, monkeypatch):
    """Forward and backward, by a kernel made of torch's attention here, since FlexAttention has no
    backward on a CPU."""
    from torch.nn.attention.flex_attention import create_mask

    def kernel(q, k, v, *, score_mod, block_mask, scale, enable_gqa):
        mask = create_mask(block_mask.mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")[
            0, 0
        ]
        if broken:
            mask = mask | mask.roll(1, dims=1)
        return dense_attention(q, k, v, mask, scaling=q.shape[-1] ** -0.5, softcap=None).transpose(
            1, 2
        )

    monkeypatch.setattr(attention, "TRIED_FLEX", {})
    monkeypatch.setattr(flex, "_kernel", lambda device: kernel)
    found = attention.why_not_flex(torch.device("cpu"), heads=4, kv_heads=2, width=16, softcap=None)
    assert ("off by" in found) if broken else found is None


def test_packed_attention_without_its_layout_is_an_error():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="without its layout"):
        segment_attention(torch.nn.Linear(1, 1), q, q, q, None)
