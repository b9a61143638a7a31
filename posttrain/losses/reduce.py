"""The one place where items become a number: ``weight * sum(items) / denominator``, with
denominators of the whole step.

    token_mean      sum over tokens / trained tokens (default; every token counts the same)
    sequence_mean   mean over completions of their mean over tokens (every completion the same)
    sequence_sum    mean over completions of their sum over tokens (k1.5, arXiv:2501.12599 eq. 3)
    pair_mean       sum over pairs of weight * item / sum of weights
    group_mean      mean over groups of the mean over their items
                    (InstructGPT's 1/C(K,2), arXiv:2203.02155 eq. 1)
    constant(L)     sum / (L * completions) (Dr. GRPO, arXiv:2503.20783)

Because the counts are those of the global batch, a micro-batch's contribution is the same wherever
it is computed and the gradient is the same under every split. (The mean of micro-batch means is
not: 2.5 against 3.5 on ten tokens of mean loss 2 beside two of mean loss 5.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posttrain.types import Aggregation, Counts, Logps, Loss, LossOutput, LossTerm, as_loss

if TYPE_CHECKING:
    from torch import Tensor


_DEFAULT: dict[str, Aggregation] = {
    "token": "token_mean",
    "completion": "sequence_mean",
    "pair": "pair_mean",
    "group": "group_mean",
}


def reduce_term(term: LossTerm, logps: Logps, counts: Counts) -> Tensor:
    """This micro-batch's share of a term: shares of all micro-batches and ranks add up to the
    term's value.

    ``term.items`` has one entry per trained token [T], completion [S], pair [B] or group [P] of
    this micro-batch. Raises ValueError for items of a wrong length or an aggregation that their
    unit does not have.
    """
    aggregation = term.aggregation or _DEFAULT[term.unit]
    _check_length(term, logps)
    if aggregation == "constant":
        if term.constant is None or term.constant <= 0:
            raise ValueError(
                "aggregation='constant' needs LossTerm(constant=L) with L > 0; got "
                f"{term.constant}."
            )
        return term.weight * term.items.sum() / (term.constant * counts.completions)
    reduce = {"token": _tokens, "completion": _completions, "pair": _pairs, "group": _groups}[
        term.unit
    ]
    share = reduce(term.items, aggregation, logps, counts)
    if share is None:
        raise ValueError(
            f"aggregation='{aggregation}' is not defined for items of unit '{term.unit}'. Tokens "
            "have token_mean, sequence_mean, sequence_sum, group_mean; completions sequence_mean, "
            "group_mean; pairs pair_mean, group_mean; groups group_mean; all have constant."
        )
    return term.weight * share


def _tokens(
    items_T: Tensor, aggregation: Aggregation, logps: Logps, counts: Counts
) -> Tensor | None:
    if aggregation == "token_mean":
        return items_T.sum() / counts.tokens
    if aggregation == "sequence_sum":
        return items_T.sum() / counts.completions
    mean_S = logps.sum_by_sequence(items_T) / logps.num_tokens_S.clamp(min=1)
    return _completions(mean_S, aggregation, logps, counts)


def _completions(
    items_S: Tensor, aggregation: Aggregation, logps: Logps, counts: Counts
) -> Tensor | None:
    trained_S = items_S * (logps.num_tokens_S > 0)
    if aggregation == "sequence_mean":
        return trained_S.sum() / counts.completions
    if aggregation == "group_mean":
        return (trained_S / logps.group_size_S.clamp(min=1)).sum() / counts.groups
    return None


def _pairs(
    items_B: Tensor, aggregation: Aggregation, logps: Logps, counts: Counts
) -> Tensor | None:
    weighted_B = items_B * logps.weight_B
    if aggregation == "pair_mean":
        return weighted_B.sum() / counts.pairs if counts.pairs else weighted_B.sum()
    if aggregation == "group_mean":
        group_B = logps.group_S[logps.pairs_B2[:, 0]]
        weight_P = logps.weight_B.new_zeros(_num_groups(logps)).index_add(
            0, group_B, logps.weight_B
        )
        return (weighted_B / weight_P[group_B]).sum() / max(counts.paired_groups, 1)
    return None


def _groups(
    items_P: Tensor, aggregation: Aggregation, logps: Logps, counts: Counts
) -> Tensor | None:
    return items_P.sum() / counts.groups if aggregation == "group_mean" else None


def _num_groups(logps: Logps) -> int:
    return int(logps.group_S[-1]) + 1


def _check_length(term: LossTerm, logps: Logps) -> None:
    wanted = {
        "token": lambda: logps.logps_T.shape[0],
        "completion": lambda: logps.group_S.shape[0],
        "pair": lambda: logps.pairs_B2.shape[0],
        "group": lambda: _num_groups(logps),
    }[term.unit]()
    if tuple(term.items.shape) != (wanted,):
        raise ValueError(
            f"A loss term of unit '{term.unit}' needs unreduced items of shape ({wanted},); got "
            f"{tuple(term.items.shape)}. Return one item per unit and leave the mean to the step: "
            "it alone knows the global denominator."
        )


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
