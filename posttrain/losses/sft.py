"""Supervised fine-tuning: maximum likelihood of the trained tokens."""

from __future__ import annotations

from typing import Literal

from posttrain.types import Logps, LossOutput, loss


@loss(reference=False, couples_completions=False)
def sft(
    logps: Logps, *, aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
) -> LossOutput:
    """-log pi(y_t | x, y_<t) for every trained token; sum over tokens / trained tokens of the
    *global* batch.

    Ouyang et al. 2022, arXiv:2203.02155 section 3.5 (SFT). ``aggregation="sequence_mean"`` averages
    over the tokens of a completion first, so that short answers weigh as much as long ones. Uniform
    logits: exactly ln V.
    """
    return LossOutput(
        items=-logps.logps_T, aggregation=aggregation, metrics={"nll_nats": -logps.logps_T.detach()}
    )
