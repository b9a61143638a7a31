"""The one place where items become a number: ``weight * sum(items) / denominator``, with denominators of the whole step.

    token_mean       sum over tokens / trained tokens                     (default; every token counts the same)
    sequence_mean    mean over completions of their mean over tokens      (every completion counts the same)
    sequence_sum     mean over completions of their sum over tokens       (Kimi k1.5, arXiv:2501.12599 eq. 3)
    group_mean       mean over groups of the mean over their items        (InstructGPT's 1/C(K,2), arXiv:2203.02155 eq. 1)
    constant(L)      sum / (L * completions)                              (Dr. GRPO, arXiv:2503.20783)

Because the counts are those of the global batch, a micro-batch's contribution is the same wherever it is computed and
the gradient is the same under every split. (The mean of micro-batch means is not: 2.5 against 3.5 on ten tokens of mean
loss 2 beside two of mean loss 5.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.types import Counts, LossTerm, TokenLogps

if TYPE_CHECKING:
    from torch import Tensor


def reduce_term(term: LossTerm, logps: TokenLogps, counts: Counts) -> Tensor:
    """This micro-batch's share of a term: shares of all micro-batches and ranks add up to the term's value.

    ``term.items`` has one entry per trained token [T] (unit "token"), completion [S] ("completion"), or group or pair in
    this micro-batch. Raises ValueError for items of a wrong length or an aggregation that their unit does not have.
    """
    items = term.items
    _check_length(term, logps)
    if term.aggregation == "constant":
        if term.constant is None or term.constant <= 0:
            raise ValueError(f"aggregation='constant' needs LossTerm(constant=L) with L > 0; got {term.constant}.")
        return term.weight * items.sum() / (term.constant * counts.completions)
    if term.unit == "token":
        return term.weight * _reduce_tokens(items, term, logps, counts)
    if term.unit == "completion":
        return term.weight * _reduce_completions(items, term, logps, counts)
    if term.unit == "pair" and term.aggregation == "token_mean":
        return term.weight * items.sum() / max(counts.pairs, 1)
    if term.unit == "group" and term.aggregation in ("token_mean", "group_mean"):
        return term.weight * items.sum() / counts.groups
    raise _no_such(term)


def _reduce_tokens(items_T: Tensor, term: LossTerm, logps: TokenLogps, counts: Counts) -> Tensor:
    if term.aggregation == "token_mean":
        return items_T.sum() / counts.tokens
    if term.aggregation == "sequence_sum":
        return items_T.sum() / counts.completions
    tokens_S = logps.num_tokens_S.clamp(min=1)
    mean_S = logps.sum_by_sequence(items_T) / tokens_S
    if term.aggregation == "sequence_mean":
        return mean_S.sum() / counts.completions
    if term.aggregation == "group_mean":
        return (mean_S / logps.group_size_S.clamp(min=1)).sum() / counts.groups
    raise _no_such(term)


def _reduce_completions(items_S: Tensor, term: LossTerm, logps: TokenLogps, counts: Counts) -> Tensor:
    trained_S = items_S * (logps.num_tokens_S > 0)
    if term.aggregation in ("token_mean", "sequence_mean", "sequence_sum"):
        return trained_S.sum() / counts.completions
    if term.aggregation == "group_mean":
        return (trained_S / logps.group_size_S.clamp(min=1)).sum() / counts.groups
    raise _no_such(term)


def _check_length(term: LossTerm, logps: TokenLogps) -> None:
    wanted = {"token": logps.logps_T.shape[0], "completion": logps.group_S.shape[0]}.get(term.unit)
    got = tuple(term.items.shape)
    if len(got) != 1 or (wanted is not None and got != (wanted,)):
        raise ValueError(
            f"A loss term of unit '{term.unit}' needs unreduced items of shape ({'n' if wanted is None else wanted},); "
            f"got {got}. "
            "Return one item per unit and leave the mean to the step: it alone knows the global denominator."
        )


def _no_such(term: LossTerm) -> ValueError:
    return ValueError(
        f"aggregation='{term.aggregation}' is not defined for items of unit '{term.unit}'. "
        "Tokens and completions have token_mean, sequence_mean, sequence_sum, group_mean, constant; "
        "pairs have token_mean; groups group_mean."
    )
