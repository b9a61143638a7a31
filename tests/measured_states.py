"""Model states that a process really holds: the storages behind parameters, gradients, master copy
and moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from posttrain.models.sharding import local, reshard
from posttrain.plan.trace import storages_4bit
from posttrain.training import sharding

_COUNTERS = ("step", "RMS", "qmap1", "qmap2")


def measured_states(accelerator: Any, policy: nn.Module, optimizer: Any) -> dict[str, int]:
    """Bytes of this process's {"weights", "gradients", "master", "moments", "counters", "buckets"},
    as they are allocated now.

    Complete when called between ``clip_and_check`` and ``take_step`` of the second or a later step:
    before the first update the optimizer has no moments. Every storage is counted once and whole:
    with the padding of flat buffers, tied weights once.

    weights: trained and frozen parameters, of FSDP2 and ZeRO-3 this process's part (ZeRO-3: and the
    small ones it keeps whole). gradients: ``p.grad`` (FSDP2: its part; DDP: the buckets that they
    are views of), or the partition that ZeRO accumulates. master: the separate fp32 copy that
    DeepSpeed updates; 0 elsewhere, where the weights are their own master. moments: the optimizer's
    state, with the scales of 8-bit blocks. counters: what does not grow with a tensor, its step
    count, Adafactor's RMS, the code books that 8-bit moments share. buckets: flat buffers that ZeRO
    keeps for communication. Not counted: buffers of the model, a reference model, activations.
    """
    reshard(policy)
    parameters = list(policy.parameters())
    states = sharding.base_optimizer(optimizer).state.values()
    kept = [
        (name, value)
        for state in states
        for name, value in state.items()
        if isinstance(value, Tensor)
    ]
    zero = policy.optimizer if sharding.is_deepspeed(accelerator) else None
    scales = [t for p in parameters for t in storages_4bit(p)]
    partitions = [] if zero is None else _zero_gradients(zero)
    return {
        "weights": _num_bytes(
            [
                *(p.data for p in parameters if not hasattr(p, "placements")),
                *map(local, parameters),
                *scales,
            ]
        ),
        "gradients": _num_bytes(
            [*(local(p.grad) for p in parameters if p.grad is not None), *partitions]
        ),
        "master": 0 if zero is None else _num_bytes(sharding.masters(zero)),
        "moments": _num_bytes(local(t) for name, t in kept if name not in _COUNTERS),
        "counters": _num_bytes(t for name, t in kept if name in _COUNTERS),
        "buckets": 0 if zero is None else _num_bytes(_zero_buckets(zero)),
    }


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _zero_gradients(zero: Any) -> list[Tensor]:
    """What ZeRO accumulates into; with bfloat16 weights ZeRO-1 keeps whole gradients in float32."""
    if hasattr(zero, "fp32_groups_gradients_flat"):
        return list(zero.fp32_groups_gradients_flat)
    held = [g for group in zero.averaged_gradients.values() if group is not None for g in group]
    if hasattr(zero, "bit16_groups"):
        held += [
            p.grad_accum
            for group in zero.bit16_groups
            for p in group
            if getattr(p, "grad_accum", None) is not None
        ]
        held += [g for group in getattr(zero, "all_grad_tensors", {}).values() for g in group or []]
    elif (flat := getattr(zero, "grad_partitions_flat_buffer", None)) is not None:
        held.append(flat)
    return held + [m.grad for m in sharding.masters(zero) if m.grad is not None]


def _zero_buckets(zero: Any) -> list[Tensor]:
    buckets = getattr(zero, "ipg_buckets", {}).values()
    buffers = [getattr(bucket, "buffer", None) for bucket in buckets]
    return [t for b in buffers if b is not None for t in (b if isinstance(b, list) else [b])]
