"""Weighted sums of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from posttrain.types import Loss, LossOutput, as_loss


def weighted_sum(losses: Sequence[tuple[float, Callable[..., LossOutput]]]) -> Loss:
    """sum of weight * loss: every term keeps its unit and its own global denominator.

    The sum couples completions or needs the reference if one of the losses does. A metric that
    several losses have is named ``<loss>/<metric>`` (``<loss>#<position>/<metric>`` for one loss
    twice). Raises ValueError for no loss at all and for two losses with different batch statistics:
    there is one per step.
    """
    terms = [(weight, as_loss(function)) for weight, function in losses]
    statistics = {id(f.statistic): f.statistic for _, f in terms if f.statistic is not None}
    names = [f.name.rpartition(".")[2] for _, f in terms]
    if not terms:
        raise ValueError("weighted_sum needs at least one (weight, loss); got none.")
    if len(statistics) > 1:
        raise ValueError(
            f"A step computes one batch statistic, and {', '.join(names)} declare "
            f"{len(statistics)}. Use one of them."
        )

    def total(logps: Any) -> LossOutput:
        results = [function(logps) for _, function in terms]
        weighted = [
            replace(term, weight=term.weight * weight)
            for (weight, _), result in zip(terms, results, strict=True)
            for term in result.terms
        ]
        metrics: dict[str, Any] = {}
        for i, result in enumerate(results):
            name = names[i] if names.count(names[i]) == 1 else f"{names[i]}#{i}"
            twice = {m for m in result.metrics if sum(m in o.metrics for o in results) > 1}
            metrics.update(
                {f"{name}/{m}" if m in twice else m: value for m, value in result.metrics.items()}
            )
        return LossOutput(terms=weighted, metrics=metrics)

    parts = [f"{w:g}*{n}" for (w, _), n in zip(terms, names, strict=True)]
    total.__name__ = total.__qualname__ = " + ".join(parts)
    betas = [f.beta for _, f in terms if "beta" in f.accepts or "beta" in f.options]
    return Loss(
        function=total,
        reference=any(f.reference for _, f in terms),
        couples_completions=any(f.couples_completions for _, f in terms),
        outputs=tuple(dict.fromkeys(o for _, f in terms for o in f.outputs)),
        statistic=next(iter(statistics.values()), None),
        implicit_beta=betas[0] if betas else None,
    )
