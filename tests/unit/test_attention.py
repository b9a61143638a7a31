"""Both attention backends against a dense mask written from the definition: a token sees its sequence up to itself."""

from __future__ import annotations

import pytest
import torch

from posttrain.packing.attention import flex_block_mask, flex_mask_mod, segment_attention
from posttrain.packing.batch import Layout

LAYOUT = dict(lengths=(7, 4, 1, 6, 9, 3), prefixes=(-1, 0, 0, 0, -1, 4))


def dense_mask(lengths, prefixes, window=None):
    """seen[q, k] by walking each sequence: prefix tokens, then its own."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    total = sum(lengths)
    seen = torch.zeros(total, total, dtype=torch.bool)
    for i, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        before = list(range(starts[prefix], starts[prefix] + lengths[prefix])) if prefix >= 0 else []
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
    inputs = [torch.randn(1, h, total, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    got, _ = segment_attention(None, *inputs, None, packing=Layout(**LAYOUT), scaling=0.4, sliding_window=window, softcap=softcap)
    wanted = dense_attention(*inputs, dense_mask(**LAYOUT, window=window), scaling=0.4, softcap=softcap)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((wanted * weight).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 5, 1])
def test_flex_mask_is_the_dense_mask(window):
    layout = Layout(**LAYOUT)
    total = sum(layout.lengths)
    mask_mod = flex_mask_mod(layout, sliding_window=window, device="cpu")
    rows, columns = torch.meshgrid(torch.arange(total), torch.arange(total), indexing="ij")
    assert torch.equal(mask_mod(0, 0, rows, columns), dense_mask(**LAYOUT, window=window))


def test_flex_attention_forward_equals_segments():
    """The block mask drives the real FlexAttention on CPU (forward only there), over rows longer than one block."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    layout = Layout(lengths=(150, 40, 61, 30), prefixes=(-1, 0, 0, -1))
    q, k, v = (torch.randn(1, h, 281, 16) for h in (4, 2, 2))
    block_mask = flex_block_mask(layout, sliding_window=100, device="cpu")
    got = flex_attention(q, k, v, block_mask=block_mask, scale=0.25, enable_gqa=True).transpose(1, 2)
    wanted, _ = segment_attention(None, q, k, v, None, packing=layout, scaling=0.25, sliding_window=100)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)


def test_block_mask_has_empty_blocks_between_sequences():
    """What makes it fast: 20 sequences of one block each fill 20 of 400 blocks."""
    layout = Layout(lengths=(128,) * 20, prefixes=(-1,) * 20)
    assert flex_block_mask(layout, sliding_window=None, device="cpu").sparsity() == pytest.approx(95.0)


def test_packed_attention_without_its_layout_is_an_error():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="without its layout"):
        segment_attention(torch.nn.Linear(1, 1), q, q, q, None)
