"""A reference model: the policy as it was, by one of two ways that give the same log-probs.

* a frozen copy of the weights;
* under LoRA the base model itself, with the adapters switched off (no second copy).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from posttrain.models.policy import Policy, in_eval_mode


def frozen_copy(policy: Policy, *, compute: torch.dtype | None = None) -> Policy:
    """The same policy with weights of its own that never get a gradient, in eval mode.

    ``compute``: weights of linear layers are held in this dtype, which is what autocast would cast
    them to in every forward: bit-identical log-probs from half the memory. None keeps every weight
    as it is.
    """
    twin = policy.around(
        copy.deepcopy(policy.model), device_type=next(policy.parameters()).device.type
    )
    return freeze(twin, compute=compute)


def freeze(policy: Policy, *, compute: torch.dtype | None = None) -> Policy:
    """No gradients, eval mode, linear weights in ``compute``. Tied weights are left alone: the
    embedding reads them as they are."""
    policy.requires_grad_(False)
    policy.eval()
    if compute is None:
        return policy
    tied = {id(m.weight) for m in policy.modules() if isinstance(m, nn.Embedding)}
    for weight in [m.weight for m in policy.modules() if type(m) is nn.Linear]:
        if id(weight) not in tied and weight.dtype == torch.float32:
            weight.data = weight.data.to(compute)
    return policy


def has_adapters(model: nn.Module) -> bool:
    """Whether peft wraps the model."""
    return hasattr(model, "peft_config")


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside, the model is its base, in eval mode (dropout off)."""
    with in_eval_mode(model), model.disable_adapter():
        yield


def weights_digest(model: nn.Module) -> str:
    """blake2b over name, shape, dtype and bytes of every weight but the adapters', the same for a
    base with and without adapters around it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_base_weights(model).items()):
        flat = tensor.detach().reshape(-1).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    if not has_adapters(model):
        return dict(model.named_parameters())
    return {
        n.replace("base_model.model.", "", 1).replace(".base_layer.", "."): p
        for n, p in model.named_parameters()
        if ".lora_" not in n and ".modules_to_save." not in n
    }
