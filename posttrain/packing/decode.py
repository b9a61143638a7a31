"""Attention of decoding: one new token of each row on that row's keys, all rows at once, by plain
matrix products.

(On CPUs torch's fused kernel is slow for a single query; on a GPU the products are small either
way.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
