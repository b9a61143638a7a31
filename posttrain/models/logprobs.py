"""log pi(y_t | ...) of the trained tokens only, the logits never held for more than one chunk.

The LM head is the widest layer of a language model: V columns per token. It is applied to the hidden states that predict
a trained token, ``chunk`` tokens at a time; the backward recomputes each chunk from the hidden states and the saved
log-sum-exp, so T * V numbers are never stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a family does between head and softmax: ``softcap * tanh(scale * x / softcap)``, or ``scale * x`` without cap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """The transformed logits; the identity returns its argument."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def logit_transform(config: Any) -> LogitTransform:
    """Reads it from a transformers config: Gemma softcaps, Cohere multiplies, Granite divides.

    A family with a transform that is not listed here is caught by the self-check at the start of every run.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    if getattr(text, "logit_scale", None) is not None:
        scale *= float(text.logit_scale)
    if getattr(text, "logits_scaling", None) is not None:
        scale /= float(text.logits_scaling)
    return LogitTransform(scale=scale, softcap=getattr(text, "final_logit_softcapping", None))


class _ChunkedLogps(torch.autograd.Function):
    """logps_T = log_softmax(transform(hidden W^T + b))[target], chunk by chunk, softmax in at least float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        transform: LogitTransform,
        chunk: int,
        compute: torch.dtype,
    ) -> Tensor:
        weight = weight_VH.detach().to(compute)
        out = torch.promote_types(compute, torch.float32)
        logps_T = torch.empty(targets_T.shape, dtype=out, device=hidden_TH.device)
        lse_T = torch.empty_like(logps_T)
        for at in range(0, targets_T.shape[0], chunk):
            part = slice(at, at + chunk)
            logits = _logits(hidden_TH[part].to(compute), weight, bias_V, transform, out)
            lse_T[part] = torch.logsumexp(logits, dim=-1)
            logps_T[part] = logits.gather(1, targets_T[part, None]).squeeze(1) - lse_T[part]
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, lse_T)
        ctx.transform, ctx.chunk, ctx.compute = transform, chunk, compute
        return logps_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> Any:  # type: ignore[override]
        hidden_TH, weight_VH, bias_V, targets_T, lse_T = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        weight = weight_VH.detach().to(ctx.compute)
        grad_hidden = torch.empty_like(hidden_TH) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VH) if need_weight else None
        grad_bias = torch.zeros_like(bias_V) if need_bias else None
        for at in range(0, targets_T.shape[0], ctx.chunk):
            part = slice(at, at + ctx.chunk)
            hidden = hidden_TH[part].to(ctx.compute)
            logits = _logits(hidden, weight, bias_V, ctx.transform, lse_T.dtype)
            # d logp / d logit_v = [v = target] - softmax_v, written into the logits' own storage where that is possible
            slope = _transform_slope(logits, ctx.transform)
            grad = logits.sub_(lse_T[part, None]).exp_().mul_(-grad_T[part, None])
            grad.scatter_add_(1, targets_T[part, None], grad_T[part, None].to(grad.dtype))
            grad = grad if slope is None else grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(0).to(grad_bias.dtype)
            grad = grad.to(ctx.compute)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight).to(grad_hidden.dtype)
            if grad_weight is not None:
                _accumulate_matmul(grad_weight, grad, hidden)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, out: torch.dtype) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    return transform.apply(logits.to(out))


def _transform_slope(logits: Tensor, transform: LogitTransform) -> Tensor | float | None:
    """d transform(x) / dx, expressed by its value; None for the identity."""
    if transform.softcap is not None:
        return transform.scale * (1 - (logits / transform.softcap) ** 2)
    return None if transform.scale == 1.0 else transform.scale


def _accumulate_matmul(total_VH: Tensor, grad_TV: Tensor, hidden_TH: Tensor) -> None:
    """total += grad^T hidden, accumulated in the dtype of the total."""
    if total_VH.dtype == grad_TV.dtype:
        total_VH.addmm_(grad_TV.T, hidden_TH)
    else:
        total_VH += grad_TV.T @ hidden_TH


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matmul on this tensor runs: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def token_logps(
    hidden_TH: Tensor, targets_T: Tensor, head: nn.Module, *, transform: LogitTransform, chunk: int
) -> Tensor:
    """logps_T [T], at least float32, with gradient to the hidden states and to the head's trainable parameters.

    A plain linear head takes the fused path (its weight is read once per call, forward and backward). Any other head (LoRA on
    the head, a quantised one) is called as it is, chunk by chunk under recomputation: its weight gradients then
    accumulate chunk by chunk. T = 0 gives an empty result that still depends on the hidden states.
    """
    if targets_T.shape[0] == 0:
        return hidden_TH.sum(-1)[:0].to(torch.promote_types(hidden_TH.dtype, torch.float32))
    kind = hidden_TH.device.type
    if type(head) is nn.Linear:
        compute = compute_dtype(head.weight)
        with torch.autocast(kind, enabled=False):
            return _ChunkedLogps.apply(hidden_TH, head.weight, head.bias, targets_T, transform, chunk, compute)

    def part_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        logits = transform.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)

    pieces = [
        checkpoint(part_logps, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_TH.split(chunk), targets_T.split(chunk), strict=True)
    ]
    return torch.cat(pieces)
