"""The metrics of the DPO authors' code, under their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.types import Logps

if TYPE_CHECKING:
    from torch import Tensor


def preference_metrics(logps: Logps, *, beta: float) -> dict[str, Tensor]:
    """[B] each, detached: rewards_train/{chosen,rejected,accuracies,margins},
    logps_train/{chosen,rejected}.

    The implicit reward is beta (log pi - log pi_ref) (Rafailov et al. 2023, arXiv:2305.18290 eq.
    5), beta log pi without a reference. An accuracy is strict: 0 where the two rewards are equal,
    as at the start.
    """
    reward_S = (logps.logps_S if logps.reference_T is None else logps.logratio_S) * beta
    return {
        **reward_metrics(logps.of_chosen(reward_S), logps.of_rejected(reward_S)),
        "logps_train/chosen": logps.chosen_logps_B.detach(),
        "logps_train/rejected": logps.rejected_logps_B.detach(),
    }


def reward_metrics(chosen_B: Tensor, rejected_B: Tensor) -> dict[str, Tensor]:
    """The rewards under their names. A loss whose implicit reward is not beta (log pi - log pi_ref)
    gives its own."""
    chosen, rejected = chosen_B.detach(), rejected_B.detach()
    return {
        "rewards_train/chosen": chosen,
        "rewards_train/rejected": rejected,
        "rewards_train/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards_train/margins": chosen - rejected,
    }
