"""Weights in 4 bit as the accounting sees them."""

from __future__ import annotations

from typing import Any

import torch


def packed_4bit(layer: Any) -> Any:
    """A weight of such a layer as it is once quantised, of shape and dtype alone: its bytes are not
    initialised."""
    from bitsandbytes.functional import QuantState

    numel, dtype = layer.out_features * layer.in_features, layer.weight.dtype
    num_scales = -(-numel // 64)
    scales = QuantState(
        absmax=torch.empty(-(-num_scales // 256)),
        code=torch.empty(256),
        blocksize=256,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(num_scales, dtype=torch.uint8),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=torch.empty(16),
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=scales,
    )
    weight: Any = torch.nn.Parameter(
        torch.empty((-(-numel // 2), 1), dtype=torch.uint8), requires_grad=False
    )
    weight.quant_state = state
    return weight


def storages_4bit(weight: Any) -> list[torch.Tensor]:
    """The tensors beside a weight in 4 bit; none of another weight."""
    state = getattr(weight, "quant_state", None)
    return (
        []
        if state is None
        else [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    )
