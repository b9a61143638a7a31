"""On-policy distillation: the student samples, and at each of its tokens its whole distribution is
compared with a teacher's, exactly over the vocabulary.

The comparison is an output of the student's forward (``Loss.outputs``): hidden states of both cross
into it, logits exist for one chunk of tokens at a time, and the gradient cache, packing and
micro-batches treat it like a log-prob.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable

from posttrain.blocks import blocks
from posttrain.types import Logps, Loss, LossOutput

if TYPE_CHECKING:
    from torch import Tensor

DivergenceKind = Literal["reverse_kl", "forward_kl", "jensen_shannon"]


def divergence(
    student_CV: Tensor,
    teacher_CV: Tensor,
    *,
    kind: DivergenceKind = "reverse_kl",
    mix: float = 0.5,
) -> Tensor:
    """[C] divergences of two categorical distributions given by their logits; S student, T teacher.

    reverse_kl: KL(S || T) = sum_v s_v (log s_v - log t_v), which avoids what the teacher avoids;
    forward_kl: KL(T || S), which covers what the teacher does; jensen_shannon: with M = mix T +
    (1 - mix) S, mix KL(T || M) + (1 - mix) KL(S || M), at most ln 2 for mix 0.5. Agarwal et al.
    2023 (GKD), arXiv:2306.13649 eq. 1 and 2. Equal distributions: exactly 0. Where the vocabularies
    were padded to different sizes both are cut to the smaller one and renormalised.
    """
    if kind not in get_args(DivergenceKind) or not 0 < mix < 1:
        raise ValueError(
            f"A divergence is one of {', '.join(get_args(DivergenceKind))}, with 0 < mix < 1; got "
            f"{kind!r} and {mix}."
        )
    return _Divergence.apply(student_CV, teacher_CV, kind, mix)


class _Divergence(torch.autograd.Function):
    """Values and gradient to the student's logits z at once, block by block: beside the logits of
    both nothing of their size is held. With E the mean over S, every d/dz but forward_kl's (s - t)
    is s * (g - E[g]): g = log s - log t, or (1 - mix) (log s - log m)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student_CV: Tensor, teacher_CV: Tensor, kind: DivergenceKind, mix: float
    ) -> Tensor:
        size = min(student_CV.shape[-1], teacher_CV.shape[-1])
        values_C = student_CV.new_empty(student_CV.shape[:-1])
        needed = ctx.needs_input_grad[0]
        slopes_CV = torch.zeros_like(student_CV) if needed else None
        for rows in blocks(student_CV):
            log_s = torch.log_softmax(student_CV[rows, :size], -1)
            log_t = torch.log_softmax(teacher_CV[rows, :size].to(log_s), -1)
            values_C[rows], slope = _values_and_slope(log_s, log_t, kind, mix)
            if slopes_CV is not None:
                slopes_CV[rows, :size] = slope
        if slopes_CV is not None:
            ctx.save_for_backward(slopes_CV)
        return values_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> Any:  # type: ignore[override]
        (slopes_CV,) = ctx.saved_tensors
        return slopes_CV * grad_C[..., None], None, None, None


def _values_and_slope(
    log_s: Tensor, log_t: Tensor, kind: DivergenceKind, mix: float
) -> tuple[Tensor, Tensor]:
    s = log_s.exp()
    if kind == "forward_kl":
        t = log_t.exp()
        return (t * (log_t - log_s)).sum(-1), s - t
    if kind == "reverse_kl":
        g = log_s - log_t
        of_teacher: Tensor | float = 0.0
    else:
        log_m = torch.logaddexp(log_t + math.log(mix), log_s + math.log1p(-mix))
        g = (1 - mix) * (log_s - log_m)
        of_teacher = mix * (log_t.exp() * (log_t - log_m)).sum(-1)
    mean = (s * g).sum(-1)
    return of_teacher + mean, s * (g - mean[..., None])


class TeacherDivergence:
    """An output of the forward: [T] ``divergence`` of the student from one teacher.

    ``teacher(student, batch)`` gives what the teacher's head is applied to (``Policy.head_input``
    of a frozen policy); it is called without gradient. A sampler's truncation is not part of the
    comparison.
    """

    def __init__(
        self,
        name: str,
        teacher: Callable[[Any, Any], Any],
        *,
        kind: DivergenceKind = "reverse_kl",
        mix: float = 0.5,
    ) -> None:
        self.name = f"divergence/{name}"
        self._teacher, self._kind, self._mix = teacher, kind, mix

    def __call__(self, student: Any) -> Tensor:
        """[T] with gradient to the student."""
        with torch.no_grad():
            teacher = replace(self._teacher(student.policy, student.batch), kept=None)

        def of_logits(logits_CV: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                theirs = teacher.logits(part)
            return divergence(logits_CV, theirs, kind=self._kind, mix=self._mix)

        return replace(student, kept=None).by_chunks(of_logits)


def distillation(teachers: Sequence[tuple[float, TeacherDivergence]]) -> Loss:
    """sum of weight * divergence to each teacher, mean over the trained tokens of the global batch;
    with rewards in a ``weighted_sum``. ValueError without a teacher or for two of one name."""
    names = [output.name for _, output in teachers]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"distillation needs teachers of different names; got {names or 'none'}.")

    def distilled(logps: Logps) -> LossOutput:
        parts = {output.name: logps[output.name] for _, output in teachers}
        items_T = torch.stack([weight * parts[output.name] for weight, output in teachers]).sum(0)
        metrics = {f"{name}_nats": values.detach() for name, values in parts.items()}
        return LossOutput(items=items_T, aggregation="token_mean", metrics=metrics)

    outputs = tuple(output for _, output in teachers)
    return Loss(function=distilled, reference=False, couples_completions=False, outputs=outputs)
