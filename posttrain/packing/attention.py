"""Attention over a packed row: each segment sees itself causally and the prefix it continues,
nothing else.

Registered with transformers' ``AttentionInterface`` under the names below, without a mask function,
so that no mask of the whole row is ever made (only of segments with a prefix or a window) and any
model that dispatches its attention works unpatched. The row's ``Layout`` travels as the keyword
argument ``packing`` of the model's forward, also through gradient checkpointing.

    posttrain_segment  every device: one ``scaled_dot_product_attention`` per segment
    posttrain_flex     CUDA: FlexAttention with a block mask (``packing/flex.py``)

Sliding windows and softcaps are computed exactly in both. Attention sinks are refused: such models
run one sequence per forward (``models/policy.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from posttrain.packing import flex
from posttrain.packing.batch import Layout

if TYPE_CHECKING:
    from torch import Tensor

# without "sdpa": transformers refuses that substring for models with softcaps
SEGMENT_NAME = "posttrain_segment"
FLEX_NAME = "posttrain_flex"


WINDOWS = "windows"
"""Name in ``Layout.cache`` of the sliding windows that the layers asked for."""


class NotPackable(RuntimeError):
    """A model asks of the attention what packed attention cannot do; it runs one sequence per
    forward instead."""


def register() -> None:
    """Makes both backends known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(SEGMENT_NAME, segment_attention)
    AttentionInterface.register(FLEX_NAME, flex_segment_attention)


def _layout(
    module: Any, packing: Layout | None, extra: dict[str, Any], window: int | None
) -> Layout:
    if packing is None:
        raise NotPackable(
            f"{type(module).__name__} was called with posttrain's packed attention but without its "
            "layout, so sequences would see each other. Call the model through Policy, or inside "
            "`plain_attention(model)`."
        )
    for name, what in (
        ("attention_mask", "a mask of its own"),
        ("s_aux", "attention sinks"),
        ("sinks", "attention sinks"),
        ("position_bias", "a position bias"),
    ):
        if extra.get(name) is not None:
            raise NotPackable(
                f"{type(module).__name__} has {what}, which packed attention cannot do."
            )
    packing.cache.setdefault(WINDOWS, set()).add(window)
    return packing


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Layout | DecodeLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v for every segment of a row. query [1, heads, L, D], key and
    value [1, kv heads, L, D].

    Returns [1, L, heads, D]. The row is cut once and joined once, so the backward costs O(L), not
    O(segments * L).
    """
    if isinstance(packing, DecodeLayout):
        return decode_attention(
            query,
            key,
            value,
            packing,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
        ), None
    layout = _layout(module, packing, {**extra, "attention_mask": attention_mask}, sliding_window)
    lengths = list(layout.lengths)
    compute = _compute_dtype(query, layout)
    queries, keys, values = (x.to(compute).split(lengths, dim=2) for x in (query, key, value))
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        for i, prefix in enumerate(layout.prefixes):
            q, k, v = queries[i], keys[i], values[i]
            if prefix >= 0:
                k, v = torch.cat((keys[prefix], k), dim=2), torch.cat((values[prefix], v), dim=2)
            mask = _segment_mask(layout, i, sliding_window, q)
            outputs.append(
                _attend(q, k, v, mask, scaling=scaling, dropout=dropout, softcap=softcap)
            )
        return torch.cat([o.transpose(1, 2) for o in outputs], dim=1).to(value.dtype), None


CPU_FLOAT32_KEYS = 512
"""On a CPU, torch's bfloat16 attention is slower than its float32 one for rows up to about this
many keys: forward and backward of 57 queries on 182 keys take 2.4 ms against 0.8 ms (Zen 4), of 512
on 512 the same 18 ms."""


def _compute_dtype(query: Tensor, layout: Layout) -> torch.dtype:
    """What autocast or the model asks for; float32 for short bfloat16 segments on a CPU."""
    kind = query.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if wanted != torch.bfloat16 or kind != "cpu":
        return wanted
    longest = max(layout.length_with_prefix(i) for i in range(len(layout.lengths)))
    return torch.float32 if longest < CPU_FLOAT32_KEYS else wanted


def _segment_mask(
    layout: Layout, segment: int, sliding_window: int | None, like: Tensor
) -> Tensor | None:
    """Additive mask [queries, keys] of a segment, or None where plain causal attention says the
    same."""
    num_q, num_k = layout.lengths[segment], layout.length_with_prefix(segment)
    window = sliding_window if sliding_window is not None and num_k > sliding_window else None
    if num_q == num_k and window is None:
        return None
    name = ("sdpa", num_q, num_k, window, like.dtype, like.device)
    if name not in layout.cache:
        q_position = torch.arange(num_k - num_q, num_k, device=like.device)[:, None]
        k_position = torch.arange(num_k, device=like.device)[None, :]
        seen = k_position <= q_position
        if window is not None:
            seen &= k_position > q_position - window
        layout.cache[name] = torch.zeros(
            num_q, num_k, dtype=like.dtype, device=like.device
        ).masked_fill_(~seen, float("-inf"))
    return layout.cache[name]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """One segment; ``mask=None`` means causal with as many keys as queries."""
    if softcap is None:
        gqa = q.shape[1] != k.shape[1]
        if gqa and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            # with enable_gqa torch has no fused kernel for a mask or for float32: it would hold all
            # scores
            gqa = False
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=gqa,
        )
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.full(
            scores.shape[-2:], float("-inf"), dtype=scores.dtype, device=scores.device
        ).triu_(1)
    weights = torch.softmax(
        (scores + mask).to(torch.promote_types(scores.dtype, torch.float32)), dim=-1
    ).to(q.dtype)
    return F.dropout(weights, p=dropout) @ v


def flex_segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Layout | DecodeLayout | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """As ``segment_attention``, through one compiled FlexAttention kernel (CUDA; its backward is
    not implemented on CPU)."""
    if isinstance(packing, DecodeLayout):
        return decode_attention(
            query,
            key,
            value,
            packing,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
        ), None
    layout = _layout(module, packing, {**extra, "attention_mask": attention_mask}, sliding_window)
    if dropout > 0:
        raise RuntimeError(
            f"FlexAttention has no dropout; got dropout={dropout}. Use --packing.backend sdpa."
        )
    compute = _compute_dtype(query, layout)
    output = flex.attend(
        query.to(compute),
        key.to(compute),
        value.to(compute),
        layout,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output.transpose(1, 2).to(value.dtype), None


TRIED_FLEX: dict[tuple[Any, ...], str | None] = {}


def why_not_flex(
    device: torch.device, *, heads: int, kv_heads: int, width: int, softcap: float | None
) -> str | None:
    """Why the compiled kernel cannot be used on this device for attention of this shape; None where
    it can.

    Runs forward and backward of a small row through it and compares both with torch's attention on
    the same row, so that a missing compiler, an unsupported card or a wrong kernel is met here and
    not in a training step.
    """
    name = (str(device), heads, kv_heads, width, softcap)
    if name not in TRIED_FLEX:
        try:
            TRIED_FLEX[name] = _try_flex(device, heads, kv_heads, width, softcap)
        except Exception as error:  # noqa: BLE001 - Triton, the C compiler, dynamo and CUDA each raise their own
            TRIED_FLEX[name] = (
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            )
    return TRIED_FLEX[name]


TRIAL = Layout(lengths=(200, 60, 90, 40), prefixes=(-1, 0, 0, -1))
TRIAL_ERROR = 0.03
"""Largest difference from float32 attention, relative to the largest value: bfloat16 rounds to
0.004."""


def _try_flex(
    device: torch.device, heads: int, kv_heads: int, width: int, softcap: float | None
) -> str | None:
    generator = torch.Generator().manual_seed(0)
    total = sum(TRIAL.lengths)
    exact = [
        torch.randn(1, h, total, width, generator=generator) for h in (heads, kv_heads, kv_heads)
    ]
    weight = torch.randn(1, total, heads, width, generator=generator).to(device)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        layout = Layout(lengths=TRIAL.lengths, prefixes=TRIAL.prefixes)
        q, k, v = (x.to(torch.bfloat16).to(device, dtype).requires_grad_() for x in exact)
        if dtype == torch.float32:
            output, _ = segment_attention(None, q, k, v, None, packing=layout, softcap=softcap)
        else:
            output = flex.attend(
                q, k, v, layout, scaling=None, sliding_window=None, softcap=softcap
            ).transpose(1, 2)
        total_output = (output * weight.to(dtype)).sum()
        results.append([output, *torch.autograd.grad(total_output, (q, k, v))])
    for wanted, got in zip(*results, strict=True):
        got, wanted = got.detach().float(), wanted.detach()
        error = float((got - wanted).abs().max() / wanted.abs().max())
        if not error <= TRIAL_ERROR:
            return f"its result is off by {error:.2g} of the largest value"
    return None


# ---- decoding: one new token of each row on that row's keys, all rows at once, by plain matrix
# products (on CPUs torch's fused kernel is slow for a single query; on a GPU the products are small
# either way)


@dataclass(frozen=True, kw_only=True)
class DecodeLayout:
    """B rows, one query each; row b sees its first ``num_keys_B[b]`` keys, its own included."""

    num_keys_B: Tensor
    longest: int
    """At least the largest of them: keys that are given for each row, the rest masked."""
    cache: dict[Any, Tensor] = field(default_factory=dict)

    def mask(self, sliding_window: int | None, like: Tensor) -> Tensor:
        """Additive [B, 1, 1, longest]; made once per step and window."""
        name = (sliding_window, like.dtype)
        if name not in self.cache:
            position = torch.arange(self.longest, device=like.device)[None]
            seen = position < self.num_keys_B[:, None]
            if sliding_window is not None:
                seen &= position >= self.num_keys_B[:, None] - sliding_window
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~seen, float("-inf")
            )
            self.cache[name] = mask[:, None, None]
        return self.cache[name]


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: DecodeLayout,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """query [B, heads, 1, D], key and value [B, kv heads, longest, D] -> [B, 1, heads, D]. Softmax
    in at least float32."""
    num_rows, heads, _, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(num_rows, kv_heads, heads // kv_heads, width).to(key.dtype)
    scores = torch.matmul(grouped, key.transpose(-1, -2)).to(
        torch.promote_types(key.dtype, torch.float32)
    )
    scores = scores * (scaling if scaling is not None else width**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + layout.mask(sliding_window, scores), dim=-1).to(value.dtype)
    return torch.matmul(weights, value).reshape(num_rows, 1, heads, width)
