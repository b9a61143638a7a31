"""The weights that the engine in this process samples with: the training model itself, or a copy in
the compute dtype.

Training in bfloat16 keeps float32 weights and casts them in every forward; decoding makes hundreds
of forwards between two updates. So the copy holds what autocast would cast to (the same log-probs),
LoRA merged in. Every other weight is shared with the training model: nothing is held twice that is
not cast. On a CPU the copy is in oneDNN's blocked layout, which products with few rows read a fifth
faster.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.policy import Policy

log = logging.getLogger(__name__)


class SamplingWeights:
    """``model`` under the policy's present weights, as of the last ``refresh``."""

    def __init__(self, policy: Policy, *, compute: torch.dtype) -> None:
        self._live = policy.base
        self.compute = compute
        self._casts = any(_is_cast(m, compute) for m in self._live.modules())
        self._pairs: list[tuple[Any, SamplingLinear]] = []
        self.model: Any = self._copy() if self._casts else self._live
        self.refresh()

    def _copy(self) -> nn.Module:
        """A model whose own weights are only those that are cast."""
        shared: dict[int, Any] = {
            id(t): t for t in (*self._live.parameters(), *self._live.buffers())
        }
        twin = copy.deepcopy(self._live, shared)
        merged: tuple[str, ...] = ()
        for name, module in self._live.named_modules():
            if name.startswith(merged):
                continue
            if _is_mergeable(module):
                merged += (f"{name}.",)
            elif not _is_cast(module, self.compute):
                continue
            linear = SamplingLinear(getattr(module, "base_layer", module), self.compute)
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, linear)
            self._pairs.append((module, linear))
        return twin.eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the present weights."""
        for module, linear in self._pairs:
            linear.take(_merged_weight(module))

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """[B, V] the head on hidden states, before the family's transform."""
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            hidden_BH = hidden_BH.to(head.weight.dtype)
        with torch.autocast(hidden_BH.device.type, dtype=self.compute, enabled=self._casts):
            return head(hidden_BH)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, no gradients and no dropout; afterwards every module is in the mode that it was
        in."""
        in_training = [module for module in self._live.modules() if module.training]
        kind = next(self._live.parameters()).device.type
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(kind, dtype=self.compute, enabled=self._casts):
                yield
        finally:
            for module in in_training:
                module.training = True


class SamplingLinear(nn.Module):
    """``base`` in the compute dtype; its bias is the training model's."""

    def __init__(self, base: nn.Module, compute: torch.dtype) -> None:
        super().__init__()
        self._base: list[Any] = [base]  # in a list: the training layer is no part of this model
        self._compute = compute
        on_cpu = next(base.parameters()).device.type == "cpu"
        self._blocked = on_cpu and compute == torch.bfloat16 and blocked_products_work()
        self.weight = torch.empty(0)

    def take(self, weight: Tensor) -> None:
        """From now on computes with these values."""
        self.weight = torch.empty(0)  # frees the last ones
        weight = weight.detach().to(self._compute)
        self.weight = _reorder(weight) if self._blocked else weight

    def forward(self, input_H: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        product = _blocked_linear if self._blocked else nn.functional.linear
        bias = self._base[0].bias
        bias = None if bias is None else bias.to(self._compute)
        return product(input_H.to(self._compute), self.weight, bias)


EXPECTED_ROWS = 64
"""Rows of the products that the blocked layout is made for; others are right as well."""


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_ROWS)


def _blocked_linear(input_H: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input_H, weight, bias, "none", [], "")


@cache
def blocked_products_work() -> bool:
    """Whether oneDNN's blocked bfloat16 layout works on this CPU, found out by one small product.

    The two operators are private to torch and exist on every x86 build; on a CPU with neither
    AVX-512 nor avx_ne_convert they raise. Without them the same numbers come from torch's own
    layout, which is read more slowly.
    """
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    try:
        return bool((_blocked_linear(ones[:2], _reorder(ones), None) == 64).all())
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        log.info("sampling reads bfloat16 weights in torch's own layout: %s", reason)
        return False


def _is_cast(module: nn.Module, compute: torch.dtype) -> bool:
    """A plain linear layer that autocast would cast (also an output head that shares the
    embedding's weight)."""
    is_16_bit = compute in (torch.bfloat16, torch.float16)
    return type(module) is nn.Linear and module.weight.dtype == torch.float32 and is_16_bit


def _is_mergeable(module: Any) -> bool:
    """A LoRA layer on a plain linear one, without DoRA."""
    return (
        hasattr(module, "lora_A")
        and type(getattr(module, "base_layer", None)) is nn.Linear
        and not getattr(module, "fan_in_fan_out", False)
        and not any(getattr(module, "use_dora", {}).values())
        and not getattr(module, "merged_adapters", [])
    )


def _merged_weight(module: Any) -> Tensor:
    if type(module) is nn.Linear:
        return module.weight
    weight = module.base_layer.weight
    if not module.disable_adapters:
        for name in module.active_adapters:
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight
