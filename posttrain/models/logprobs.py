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
from torch.autograd.function import once_differentiable
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


CPU_BLOCK_ELEMENTS = 2**21
"""On a CPU the softmax of a chunk runs in blocks of about this many logits (8 MiB of float32): they stay in the cache."""


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
        for part in _chunks(targets_T.shape[0], chunk):
            logits = _logits(hidden_TH[part].to(compute), weight, bias_V)
            for rows in _blocks(logits):
                here = slice(part.start + rows.start, part.start + rows.stop)
                block = transform.apply(logits[rows].to(out))
                lse_T[here] = torch.logsumexp(block, dim=-1)
                logps_T[here] = block.gather(1, targets_T[here, None]).squeeze(1) - lse_T[here]
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, lse_T)
        ctx.transform, ctx.chunk, ctx.compute = transform, chunk, compute
        return logps_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> Any:  # type: ignore[override]
        hidden_TH, weight_VH, bias_V, targets_T, lse_T = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        weight = weight_VH.detach().to(ctx.compute)
        grad_hidden = torch.empty_like(hidden_TH) if need_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V) if need_bias else None
        for part in _chunks(targets_T.shape[0], ctx.chunk):
            hidden = hidden_TH[part].to(ctx.compute)
            grad = _logits(hidden, weight, bias_V)
            _logits_to_gradient(grad, targets_T[part], lse_T[part], grad_T[part], ctx.transform)
            if grad_bias is not None:
                grad_bias += grad.sum(0).to(grad_bias.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight).to(grad_hidden.dtype)
            if need_weight:
                grad_weight = _add_matmul(grad_weight, grad, hidden, weight_VH.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunks(total: int, size: int) -> list[slice]:
    """As many slices as ``size`` asks for, all of about the same length: a short last one would cost a whole pass over W."""
    count = -(-total // size)
    ends = [total * (i + 1) // count for i in range(count)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _blocks(logits: Tensor) -> list[slice]:
    """Rows of a chunk whose softmax is computed at once."""
    rows = logits.shape[0]
    if logits.device.type != "cpu":
        return [slice(0, rows)]
    return _chunks(rows, max(1, CPU_BLOCK_ELEMENTS // logits.shape[1]))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.T
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def _logits_to_gradient(logits: Tensor, targets: Tensor, lse: Tensor, grad_logps: Tensor, transform: LogitTransform) -> None:
    """Overwrites logits with d(sum grad * logp)/d(logits): grad * ([v = target] - softmax_v) * transform'."""
    for rows in _blocks(logits):
        raw = logits[rows]
        block = transform.apply(raw.to(lse.dtype))
        slope = _transform_slope(block, transform)
        grad = block.sub_(lse[rows, None]).exp_().mul_(-grad_logps[rows, None])
        grad.scatter_add_(1, targets[rows, None], grad_logps[rows, None].to(grad.dtype))
        grad = grad if slope is None else grad.mul_(slope)
        if grad.data_ptr() != raw.data_ptr():
            raw.copy_(grad)


def _transform_slope(logits: Tensor, transform: LogitTransform) -> Tensor | float | None:
    """d transform(x) / dx, expressed by its value; None for the identity."""
    if transform.softcap is not None:
        return transform.scale * (1 - (logits / transform.softcap) ** 2)
    return None if transform.scale == 1.0 else transform.scale


def _add_matmul(total: Tensor | None, grad_TV: Tensor, hidden_TH: Tensor, dtype: torch.dtype) -> Tensor:
    """total + grad^T hidden, accumulated in ``dtype``."""
    if total is None:
        return (grad_TV.T @ hidden_TH).to(dtype)
    if dtype == grad_TV.dtype:
        return total.addmm_(grad_TV.T, hidden_TH)
    return total.add_(grad_TV.T @ hidden_TH)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matmul on this tensor runs: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def token_logps(hidden_TH: Tensor, targets_T: Tensor, head: nn.Module, *, transform: LogitTransform, chunk: int) -> Tensor:
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
