"""Parameters of which a process holds a part: FSDP2 (DTensor) and DeepSpeed ZeRO-3 (``ds_tensor``).

Inside a module's forward both are whole: the LM head's weight too, once per forward and backward,
however many chunks it is read in (``models/policy.py``). Everything here is for code that reads
parameters outside of a forward. What gathers is a collective: every process calls it, in the same
order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _is_dtensor(tensor: Any) -> bool:
    return hasattr(tensor, "placements")  # without the import, which takes half a second


def local(tensor: Any) -> Tensor:
    """This process's part, sharing memory with the parameter; the tensor itself where it is
    whole."""
    if _is_dtensor(tensor):
        return tensor.to_local()
    return tensor.ds_tensor if hasattr(tensor, "ds_tensor") else tensor


def reshard(module: nn.Module) -> None:
    """FSDP2 leaves the outermost weights whole after a forward without backward; afterwards every
    parameter is a shard."""
    part: Any
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()


@contextmanager
def whole(tensor: Any) -> Iterator[Tensor]:
    """The tensor whole, valid inside."""
    if hasattr(tensor, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    else:
        yield tensor.full_tensor() if _is_dtensor(tensor) else tensor.detach()


@torch.no_grad()
def whole_state(model: nn.Module, *, keep: bool, only_trained: bool) -> dict[str, Tensor]:
    """The state dict of ``model`` gathered on the CPU, a tied tensor once under all its names;
    empty where ``keep`` is false.

    ``only_trained``: without frozen parameters (adapters are saved without their base).
    """
    reshard(model)
    trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    names = [n for n in model.state_dict() if not only_trained or n in trained]
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    copies: dict[int, Tensor] = {}
    for tensor in {id(tensors[n]): tensors[n] for n in names}.values():
        with whole(tensor) as value:
            if keep:
                copies[id(tensor)] = value.to("cpu", copy=True)
    return {n: copies[id(tensors[n])] for n in names} if keep else {}


def shard_frozen(
    module: nn.Module,
    device: torch.device,
    *,
    layer_names: Iterable[str],
    compute: torch.dtype | None,
) -> None:
    """FSDP2 around a model without gradients: each process holds a part of it, layers are gathered
    in turn.

    ``layer_names``: classes that are gathered as one (``_no_split_modules``); ``compute``: dtype
    they are gathered in, None: their own. Works beside DeepSpeed as well.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=compute, cast_forward_inputs=False)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    names = set(layer_names)
    for part in [m for m in module.modules() if type(m).__name__ in names]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


@torch.no_grad()
def mix_into(mine: nn.Module, theirs: nn.Module, share: float) -> None:
    """mine <- share * theirs + (1 - share) * mine, parameter by parameter, however either is
    sharded."""
    from torch.distributed.tensor import distribute_tensor

    reshard(mine)
    reshard(theirs)
    target: Any
    for target, parameter in zip(mine.parameters(), theirs.parameters(), strict=True):
        with whole(parameter) as part:
            if _is_dtensor(target):
                sharded = distribute_tensor(part, target.device_mesh, target.placements)
                part = sharded.to_local()
            local(target).lerp_(part.to(target.dtype), share)
