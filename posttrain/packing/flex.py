"""FlexAttention over a packed row: its block mask from the segments' lengths, and one compiled
kernel for rows of any length.

Only CUDA trains with it (on a CPU it has no backward). Rows are padded to whole blocks, since the
compiled backward is not made for other lengths, and everything that takes part has one dtype.
``attention.why_not_flex`` tries the kernel before a run uses it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from posttrain.packing.batch import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

log = logging.getLogger(__name__)

BLOCK = 128
"""Queries and keys of a block of the mask."""
RECOMPILE_LIMIT = 64
"""Variants that are compiled before the run stops: float32 and bfloat16, with and without gradient,
windowed layers and whole ones, each for lengths that are and are not special to the compiler.
Dynamo's own limit is 8, after which it goes on uncompiled and holds all scores of the row."""


def mask_mod(layout: Layout, *, sliding_window: int | None, device: Any) -> Callable[..., Tensor]:
    """``mask_mod(batch, head, q, k) -> bool`` for this layout, defined up to the next whole block
    past the row."""
    total = sum(layout.lengths)
    segment, prefix, position = _by_token(layout)
    padding = padded_length(total) - total

    def to_device(values: np.ndarray, fill: int) -> Tensor:
        return F.pad(torch.from_numpy(values), (0, padding), value=fill).to(device)

    segment_L, prefix_L, position_L = (
        to_device(segment, -3),
        to_device(prefix, -2),
        to_device(position, 0),
    )

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = ((segment_L[q] == segment_L[k]) & (q >= k)) | (prefix_L[q] == segment_L[k])
        if sliding_window is not None:
            allowed = allowed & (position_L[q] - position_L[k] < sliding_window)
        return allowed

    return seen


def padded_length(total: int) -> int:
    """The row's length in whole blocks, in tokens."""
    return -(-total // BLOCK) * BLOCK


def _by_token(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[L] each: segment, the segment that it continues (-1: none), position in the sequence."""
    lengths, prefixes = np.array(layout.lengths), np.array(layout.prefixes)
    segment = np.repeat(np.arange(len(lengths)), lengths)
    start = np.cumsum(lengths) - lengths
    before = np.where(prefixes >= 0, lengths[prefixes], 0)
    return segment, prefixes[segment], np.arange(len(segment)) - start[segment] + before[segment]


def block_mask(layout: Layout, *, sliding_window: int | None, device: Any) -> Any:
    """The ``BlockMask`` of a layout, made once per row and window and shared by all layers.

    Its lists follow from the segments' lengths, so neither L x L booleans nor a compiler is needed.
    A block in which every query sees every key is listed as full (``mask_mod`` is not evaluated
    there); one that is listed as partial although it is full would be computed right as well.
    """
    name = ("flex", sliding_window, str(device))
    if name not in layout.cache:
        from torch.nn.attention.flex_attention import BlockMask

        partial, full = block_table(layout, sliding_window=sliding_window)
        lists: list[Any] = [
            torch.from_numpy(x)[None, None].to(device)
            for table in (partial, full)
            for x in _listed(table)
        ]
        length = padded_length(sum(layout.lengths))
        counts, blocks, full_counts, full_blocks = lists
        layout.cache[name] = BlockMask.from_kv_blocks(
            counts,
            blocks,
            full_counts,
            full_blocks,
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod(layout, sliding_window=sliding_window, device=device),
            seq_lengths=(length, length),
        )
    return layout.cache[name]


def block_table(layout: Layout, *, sliding_window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(partial, full) [query blocks, key blocks]: where some, and where all, of a block's pairs are
    seen. Disjoint."""
    total = sum(layout.lengths)
    blocks = padded_length(total) // BLOCK
    some, full = np.zeros((blocks, blocks), dtype=bool), np.zeros((blocks, blocks), dtype=bool)
    ends = np.cumsum(layout.lengths)
    starts = ends - layout.lengths
    for start, end, prefix in zip(starts.tolist(), ends.tolist(), layout.prefixes, strict=True):
        before = layout.lengths[prefix] if prefix >= 0 else 0
        for block in range(start // BLOCK, -(-end // BLOCK)):
            first, last = (
                max(start, block * BLOCK),
                min(end, (block + 1) * BLOCK) - 1,
            )  # this segment's queries in the block
            is_whole = last - first + 1 == BLOCK
            # keys of its own segment, then of its prefix: (first key, last key, position of the key
            # at index 0)
            for key_start, key_end, shift in (
                (start, last + 1, before - start),
                *_prefix_keys(starts, ends, prefix),
            ):
                low = key_start
                if sliding_window is not None:  # the first query sees furthest back
                    low = max(low, first - start + before - sliding_window + 1 - shift)
                if low >= key_end:
                    continue
                some[block, low // BLOCK : -(-key_end // BLOCK)] = True
                if is_whole:
                    full_low, full_high = (
                        low,
                        min(key_end, first + 1),
                    )  # all queries see what the first and the last one see
                    if sliding_window is not None:
                        full_low = max(full_low, last - start + before - sliding_window + 1 - shift)
                    full[block, -(-full_low // BLOCK) : max(full_high // BLOCK, 0)] = True
    _add_shared_prefixes(layout, full, sliding_window)
    if total % BLOCK:
        some[-1, -1] = True  # padded queries see padded keys, so that no softmax is empty
    return some & ~full, full


def _prefix_keys(starts: np.ndarray, ends: np.ndarray, prefix: int) -> list[tuple[int, int, int]]:
    return [(int(starts[prefix]), int(ends[prefix]), -int(starts[prefix]))] if prefix >= 0 else []


def _add_shared_prefixes(layout: Layout, full: np.ndarray, sliding_window: int | None) -> None:
    """Blocks of queries of several completions of one prompt see its inner blocks whole (without a
    window)."""
    if sliding_window is not None:
        return
    _, prefix, _ = _by_token(layout)
    ends = np.cumsum(layout.lengths)
    for block in range(len(prefix) // BLOCK):
        mine = prefix[block * BLOCK : (block + 1) * BLOCK]
        if mine[0] >= 0 and (mine == mine[0]).all():
            end = int(ends[mine[0]])
            full[block, -(-(end - layout.lengths[mine[0]]) // BLOCK) : end // BLOCK] = True


def _listed(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how many, which first) per query block, as BlockMask wants them."""
    return table.sum(1, dtype=np.int32), np.argsort(~table, axis=1, kind="stable").astype(np.int32)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """[1, heads, L, D] from query [1, heads, L, D], key and value [1, kv heads, L, D] of one
    dtype."""
    total = query.shape[2]
    padding = padded_length(total) - total
    if padding:
        query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    with torch.autocast(query.device.type, enabled=False):
        output = _kernel(query.device)(
            query,
            key,
            value,
            score_mod=cap if softcap is not None else None,
            block_mask=block_mask(layout, sliding_window=sliding_window, device=query.device),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[:, :, :total]


_COMPILED: dict[str, Any] = {}


def _kernel(device: torch.device) -> Any:
    """FlexAttention, on CUDA compiled (uncompiled it holds the scores of the row)."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled() if device.type == "cuda" else flex_attention


def compiled() -> Any:
    """The compiled kernel. More variants than RECOMPILE_LIMIT are an error (``fullgraph``), never a
    silent fall back."""
    if not _COMPILED:
        import torch._dynamo
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
        )
        _COMPILED["kernel"] = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    return _COMPILED["kernel"]
