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
    """``model`` and ``head`` under the policy's present weights, as of the last ``refresh``."""

    def __init__(self, policy: Policy, *, compute: torch.dtype) -> None:
        self._live = policy.base
        self.compute = compute
        self._casts = any(_is_cast(m, compute) for m in self._live.modules())
        self._pairs: list[tuple[nn.Module, SamplingLinear]] = []
        self.model: Any = self._copy() if self._casts else self._live
        self.refresh()

    def _copy(self) -> nn.Module:
        """A model whose own weights are only those that are cast."""
        shared: dict[int, Any] = {
            id(t): t for t in (*self._live.parameters(), *self._live.buffers())
        }
        merged = {name: m for name, m in self._live.named_modules() if _is_mergeable(m)}
        inside = tuple(f"{name}." for name in merged)
        twin = copy.deepcopy(self._live, dict(shared))
        for name, module in list(self._live.named_modules()):
            if name in merged or (_is_cast(module, self.compute) and not name.startswith(inside)):
                base = module.get_base_layer() if name in merged else module
                linear = SamplingLinear(base, self.compute)
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
        """[B, V] the head on hidden states, before the family's transform; autocast must be off."""
        head = self.model.get_output_embeddings()
        if type(head) is SamplingLinear:
            return head(hidden_BH)
        if type(head) is not nn.Linear:
            with torch.autocast(hidden_BH.device.type, dtype=self.compute, enabled=self._casts):
                return head(hidden_BH)
        bias = None if head.bias is None else head.bias.to(head.weight.dtype)
        return nn.functional.linear(hidden_BH.to(head.weight.dtype), head.weight, bias)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, no gradients and no dropout; afterwards every module is in the mode that it was
        in."""
        modes = [(module, module.training) for module in self._live.modules()]
        kind = next(self._live.parameters()).device.type
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(kind, dtype=self.compute, enabled=self._casts):
                yield
        finally:
            for module, training in modes:
                module.training = training


class SamplingLinear(nn.Module):
    """A linear layer in the compute dtype; its bias is the training model's."""

    def __init__(self, base: nn.Module, compute: torch.dtype) -> None:
        super().__init__()
        self._base, self._compute = (
            [base],
            compute,
        )  # in a list: the training layer is no part of this model
        on_cpu = next(base.parameters()).device.type == "cpu"
        self._blocked = on_cpu and compute == torch.bfloat16 and blocked_products_work()
        self.weight: Tensor | None = None

    def take(self, weight: Tensor) -> None:
        """From now on computes with these values."""
        self.weight = None
        weight = weight.detach().to(self._compute)
        self.weight = _reorder(weight) if self._blocked else weight

    def forward(self, input_H: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        input_H = input_H.to(self._compute)
        bias = self._base[0].bias
        bias = None if bias is None else bias.to(self._compute)
        if self._blocked:
            return _blocked_linear(input_H, self.weight, bias)
        return nn.functional.linear(input_H, self.weight, bias)


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
        product = _blocked_linear(ones[:2], _reorder(ones), None)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info(
            "sampling reads bfloat16 weights in torch's own layout: %s",
            str(error).partition("\n")[0],
        )
        return False
    return bool((product == 64).all())


def _is_cast(module: nn.Module, compute: torch.dtype) -> bool:
    """A plain linear layer that autocast would cast (also an output head that shares the
    embedding's weight)."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and compute in (torch.bfloat16, torch.float16)
    )


def _is_mergeable(module: nn.Module) -> bool:
    """A LoRA layer on a plain linear one, without DoRA."""
    if not hasattr(module, "lora_A") or not hasattr(module, "get_base_layer"):
        return False
    plain = type(module.get_base_layer()) is nn.Linear and not getattr(
        module, "fan_in_fan_out", False
    )
    return (
        plain
        and not any(getattr(module, "use_dora", {}).values())
        and not getattr(module, "merged_adapters", [])
    )


def _merged_weight(module: Any) -> Tensor:
    if type(module) is nn.Linear:
        return module.weight
    weight = module.get_base_layer().weight
    if getattr(module, "disable_adapters", False):
        return weight
    return weight + sum(
        module.get_delta_weight(name).to(weight.dtype) for name in module.active_adapters
    )
