"""Weighted sums of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

from posttrain.losses.preference_metrics import loss_beta
from posttrain.types import LossOutput


def weighted_sum(
    losses: Sequence[tuple[float, Callable[..., LossOutput]]],
) -> Callable[..., LossOutput]:
    """sum of weight * loss: every term keeps its unit and its own global denominator.

    The sum couples completions or needs the reference if one of the losses does. A metric that
    several losses have is named ``<loss>/<metric>`` (``<loss>#<position>/<metric>`` for one loss
    twice). Raises ValueError for no loss at all and for two losses with different batch statistics:
    there is one per step.
    """
    statistics = {
        id(s): s for _, f in losses if (s := getattr(f, "batch_statistic", None)) is not None
    }
    names = [getattr(f, "__name__", "loss") for _, f in losses]
    if not losses:
        raise ValueError("weighted_sum needs at least one (weight, loss); got none.")
    if len(statistics) > 1:
        raise ValueError(
            f"A step computes one batch statistic, and {', '.join(names)} declare "
            f"{len(statistics)}. Use one of them."
        )

    def loss(logps: Any) -> LossOutput:
        outputs = [function(logps) for _, function in losses]
        terms = [
            replace(term, weight=term.weight * weight)
            for (weight, _), output in zip(losses, outputs, strict=True)
            for term in output.terms
        ]
        metrics: dict[str, Any] = {}
        for i, output in enumerate(outputs):
            name = names[i] if names.count(names[i]) == 1 else f"{names[i]}#{i}"
            twice = {m for m in output.metrics if sum(m in other.metrics for other in outputs) > 1}
            metrics.update(
                {f"{name}/{m}" if m in twice else m: value for m, value in output.metrics.items()}
            )
        return LossOutput(terms=terms, metrics=metrics)

    loss.__name__ = loss.__qualname__ = " + ".join(
        f"{w:g}*{n}" for (w, _), n in zip(losses, names, strict=True)
    )
    loss.couples_completions = any(getattr(f, "couples_completions", True) for _, f in losses)  # type: ignore[attr-defined]
    loss.needs_reference = any(getattr(f, "needs_reference", True) for _, f in losses)  # type: ignore[attr-defined]
    with_beta = [f for _, f in losses if hasattr(f, "beta") or "beta" in signature(f).parameters]
    loss.beta = loss_beta(with_beta[0]) if with_beta else 0.1  # type: ignore[attr-defined]
    if statistics:
        loss.batch_statistic = next(iter(statistics.values()))  # type: ignore[attr-defined]
    return loss
