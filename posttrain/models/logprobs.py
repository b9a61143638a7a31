"""log pi(y_t | ...) of the trained tokens only, the logits never held for more than one chunk.

The LM head is the widest layer of a language model: V columns per token. It is applied to the
hidden states that predict a trained token, ``chunk`` tokens at a time; the backward recomputes each
chunk from the hidden states and the saved log-sum-exp, so T * V numbers are never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from posttrain.blocks import blocks, slices
from posttrain.types import Ragged

if TYPE_CHECKING:
    from posttrain.packing.batch import PackedBatch


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """What a family does between head and softmax: ``softcap * tanh(scale * x / softcap)``, or
    ``scale * x`` without cap; then the division by the sampling temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply(self, logits: Tensor) -> Tensor:
        """The transformed logits; the identity returns its argument."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature


SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform(config: Any) -> LogitTransform:
    """Reads it from a transformers config: Gemma softcaps, Cohere multiplies, Granite divides.

    A policy whose family has a transform that is not listed here takes the model's own logits.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    if getattr(text, "logit_scale", None) is not None:
        scale *= float(text.logit_scale)
    if getattr(text, "logits_scaling", None) is not None:
        scale /= float(text.logits_scaling)
    caps = (getattr(text, name, None) for name in SOFTCAPS)
    return LogitTransform(scale=scale, softcap=next((cap for cap in caps if cap), None))


class _ChunkedLogps(torch.autograd.Function):
    """logps_T = log_softmax(transform(hidden W^T + b))[target], chunk by chunk, softmax in at least
    float32."""

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
        kept: Ragged | None,
    ) -> Tensor:
        weight = weight_VH.detach().to(compute)
        out = torch.promote_types(compute, torch.float32)
        logps_T = torch.empty(targets_T.shape, dtype=out, device=hidden_TH.device)
        lse_T = torch.empty_like(logps_T)
        for part in slices(targets_T.shape[0], chunk):
            logits = _logits(hidden_TH[part].to(compute), weight, bias_V)
            for rows in blocks(logits):
                here = slice(part.start + rows.start, part.start + rows.stop)
                block = _only_kept(transform.apply(logits[rows].to(out)), kept, here)
                lse_T[here] = torch.logsumexp(block, dim=-1)
                logps_T[here] = block.gather(1, targets_T[here, None]).squeeze(1) - lse_T[here]
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, lse_T)
        ctx.transform, ctx.chunk, ctx.compute, ctx.kept = transform, chunk, compute, kept
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
        for part in slices(targets_T.shape[0], ctx.chunk):
            hidden = hidden_TH[part].to(ctx.compute)
            grad = _logits(hidden, weight, bias_V)
            _logits_to_gradient(grad, part, targets_T, lse_T, grad_T, ctx.transform, ctx.kept)
            if grad_bias is not None:
                grad_bias += grad.sum(0).to(grad_bias.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight).to(grad_hidden.dtype)
            if need_weight:
                grad_weight = _add_matmul(grad_weight, grad, hidden, weight_VH.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.T
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def _only_kept(logits: Tensor, kept: Ragged | None, tokens: slice) -> Tensor:
    """Logits with -inf at every id that a token of ``tokens`` was not drawn from."""
    if kept is None:
        return logits
    ends = kept.ends[tokens]
    starts = torch.cat(
        (
            kept.ends[tokens.start - 1 : tokens.start] if tokens.start else ends.new_zeros(1),
            ends[:-1],
        )
    )
    sizes = ends - starts
    left_out = torch.ones_like(logits, dtype=torch.bool)
    row = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    left_out[row, kept.values[int(starts[0]) : int(ends[-1])]] = False
    left_out[sizes == 0] = False
    return logits.masked_fill(left_out, float("-inf"))


def _logits_to_gradient(
    logits: Tensor,
    part: slice,
    targets_T: Tensor,
    lse_T: Tensor,
    grad_T: Tensor,
    transform: LogitTransform,
    kept: Ragged | None,
) -> None:
    """Overwrites a chunk's logits with d(sum grad * logp)/d(logits): grad * ([v = target] -
    softmax_v) * transform'."""
    for rows in blocks(logits):
        raw, here = logits[rows], slice(part.start + rows.start, part.start + rows.stop)
        block = transform.apply(raw.to(lse_T.dtype))
        slope = _transform_slope(block, transform)
        grad_logps = grad_T[here, None]
        grad = _only_kept(block, kept, here).sub_(lse_T[here, None]).exp_().mul_(-grad_logps)
        grad.scatter_add_(1, targets_T[here, None], grad_logps.to(grad.dtype))
        grad = grad if slope is None else grad.mul_(slope)
        if grad is not raw:  # it was cast, or transformed out of place
            raw.copy_(grad)


def _transform_slope(logits: Tensor, transform: LogitTransform) -> Tensor | float | None:
    """d transform(x) / dx, expressed by its value; None for the identity."""
    scale = transform.scale / transform.temperature
    if transform.softcap is not None:
        return scale * (1 - (logits * (transform.temperature / transform.softcap)) ** 2)
    return None if scale == 1.0 else scale


def _add_matmul(
    total: Tensor | None, grad_TV: Tensor, hidden_TH: Tensor, dtype: torch.dtype
) -> Tensor:
    """total + grad^T hidden, accumulated in ``dtype``."""
    if total is None:
        return (grad_TV.T @ hidden_TH).to(dtype)
    if dtype == grad_TV.dtype:
        return total.addmm_(grad_TV.T, hidden_TH)
    return total.add_(grad_TV.T @ hidden_TH)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a matmul on this tensor runs: autocast's where it is on, else the tensor's
    own."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def token_logps(
    hidden_TH: Tensor,
    targets_T: Tensor,
    head: nn.Module,
    *,
    transform: LogitTransform,
    chunk: int,
    kept: Ragged | None = None,
) -> Tensor:
    """logps_T [T], at least float32, with gradient to the hidden states and to the head's trainable
    parameters.

    ``kept``: log-probs are renormalised over these ids (a sampler that truncates its distribution).

    A plain linear head takes the fused path (its weight is read once per call, forward and
    backward). Any other head (LoRA on the head, a quantised one) is called as it is, chunk by chunk
    under recomputation: its weight gradients then accumulate chunk by chunk. T = 0 gives an empty
    result that still depends on the hidden states.
    """
    if targets_T.shape[0] == 0:
        return hidden_TH.sum(-1)[:0].to(torch.promote_types(hidden_TH.dtype, torch.float32))
    kind = hidden_TH.device.type
    if type(head) is nn.Linear:
        compute = compute_dtype(head.weight)
        with torch.autocast(kind, enabled=False):
            return _ChunkedLogps.apply(
                hidden_TH, head.weight, head.bias, targets_T, transform, chunk, compute, kept
            )

    def part_logps(logits_CV: Tensor, part: slice) -> Tensor:
        return torch.log_softmax(logits_CV, dim=-1).gather(1, targets_T[part, None]).squeeze(1)

    return HeadInput(
        hidden_TH=hidden_TH, head=head, transform=transform, chunk=chunk, kept=kept
    ).by_chunks(part_logps)


@dataclass(frozen=True, kw_only=True)
class HeadInput:
    """The hidden states of the trained tokens, and how they become logits: what outputs of the
    forward are made of."""

    hidden_TH: Tensor
    """[T, H] the states that predict a trained token."""
    head: Callable[[Tensor], Tensor]
    transform: LogitTransform
    chunk: int
    """Tokens whose logits exist at a time."""
    kept: Ragged | None = None
    backbone: Any = None
    """What the backbone returned (``router_logits``, ...)."""
    batch: PackedBatch | None = None
    policy: Any = None
    """The policy whose forward this is."""

    def logits(self, part: slice) -> Tensor:
        """[C, V] of some tokens, at least float32, -inf where a sampler left an id out."""
        return self._logits(self.hidden_TH[part], part)

    def _logits(self, hidden: Tensor, part: slice) -> Tensor:
        logits = self.head(hidden)
        logits = self.transform.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return _only_kept(logits, self.kept, part)

    def by_chunks(self, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """[T, ...] ``function(logits_CV, tokens)``, chunk by chunk under recomputation: T * V
        numbers are never stored, and weight gradients of the head accumulate chunk by chunk."""

        def run(hidden: Tensor, part: slice) -> Tensor:
            return function(self._logits(hidden, part), part)

        parts = [
            slice(at, min(at + self.chunk, len(self.hidden_TH)))
            for at in range(0, len(self.hidden_TH), self.chunk)
        ]
        pieces = [
            checkpoint(run, self.hidden_TH[part], part, use_reentrant=False) for part in parts
        ]
        empty = self.hidden_TH.sum(-1)[:0]
        return (
            torch.cat(pieces)
            if pieces
            else empty.to(torch.promote_types(empty.dtype, torch.float32))
        )


def token_entropy(x: HeadInput) -> Tensor:
    """[T] entropy in nats of the distribution that each trained token is drawn from, over the whole
    vocabulary: log sum_v e^{z_v} - sum_v p_v z_v."""

    def of_logits(logits_CV: Tensor, _: slice) -> Tensor:
        finite_CV = logits_CV.masked_fill(logits_CV == float("-inf"), 0.0)
        probs_CV = torch.softmax(logits_CV, dim=-1)
        return torch.logsumexp(logits_CV, dim=-1) - (probs_CV * finite_CV).sum(-1)

    return x.by_chunks(of_logits)


def router_probs(x: HeadInput) -> Tensor:
    """[T, layers, experts] routing probabilities at the positions that predict a trained token.
    ValueError for a model without routers."""
    logits = getattr(x.backbone, "router_logits", None)
    if not logits:
        raise ValueError(
            "A loss asks for the routers' probabilities, but this model returns no router_logits: "
            "it has no mixture of experts, or its family keeps them to itself."
        )
    assert x.batch is not None
    probs = [torch.softmax(layer.float(), dim=-1)[x.batch.predictor_T] for layer in logits]
    return torch.stack(probs, dim=1)


OUTPUTS: dict[str, Callable[[HeadInput], Tensor]] = {
    "entropy": token_entropy,
    "hidden": lambda x: x.hidden_TH,
    "router": router_probs,
}
"""What a loss can ask the forward for by name. Another output is an object with a ``name`` that is
called with a ``HeadInput``."""
