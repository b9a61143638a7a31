"""Reward models: a score per completion, trained by the pairs of each group (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import nn

from posttrain.data.config import DataConfig, Purpose
from posttrain.losses.reward import pair_report
from posttrain.models.heads import Scorer, load_reward_model
from posttrain.precision import PrecisionPlan, torch_dtype
from posttrain.resolve import settings
from posttrain.trainers.base import BaseConfig, RunData, Trainer
from posttrain.trainers.dpo import check_feedback, every_set
from posttrain.training.config import TrainConfig, set_options
from posttrain.training.forward import Ref
from posttrain.training.loop import Loop
from posttrain.types import PromptGroup


@settings
class RewardConfig(BaseConfig):
    """Everything that decides a reward-model run."""

    data: DataConfig = field(default_factory=lambda: DataConfig(overlong="drop"))
    """Comparisons to train and evaluate on: pairs or ranked rows"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(name="reward"))
    """Length, cadence and place of the run"""
    loss: str = "bradley_terry"
    """bradley_terry, or the dotted path of any function (Logps, *, options) -> LossOutput;
    logps_S are the scores."""
    centering: float | None = None
    """Weight of the squared sum of a pair's scores, which keeps them around 0. Default 0."""
    loss_options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Further keyword options of the loss."""

    @property
    def options(self) -> dict[str, Any]:
        """Of the loss, all that are set."""
        return set_options(self, ("centering",), self.loss_options)


class RewardTrainer(Trainer):
    """``RewardTrainer(model="smollm2-135m", train_dataset=pairs).train()``.

    Ouyang et al. 2022, arXiv:2203.02155 eq. 1: all C(K, 2) pairs of a prompt together, the prompt
    computed once and each completion once. The score is read at the last token of the whole text.
    The result is an ``AutoModelForSequenceClassification`` with one label that gives the same
    scores in plain transformers, also on padded batches: its pad token is one that no text holds.
    """

    purpose: ClassVar[Purpose] = "reward"
    config_class = RewardConfig
    loss_home = "posttrain.losses.reward"

    def _load_model(self, tokenizer: Any, precision: PrecisionPlan) -> nn.Module:
        return load_reward_model(
            self.config.model,
            tokenizer,
            dtype=precision.load_dtype,
            compute=torch_dtype(precision.compute),
            seed=self.config.train.seed,
        )

    def _set_up(self, loop: Loop, data: RunData) -> None:
        for groups in every_set(data):
            check_feedback(groups, wants_labels=False, what="a reward model")
        loop.policy_class = Scorer
        loop.eval_report = lambda held_out: held_out_report(held_out.groups, held_out.sums)


def held_out_report(groups: Sequence[PromptGroup], scores: Mapping[Ref, float]) -> dict[str, float]:
    """``losses.reward.pair_report`` over all pairs of the groups; lengths are tokens of the
    completion."""
    pairs = [(g, pair) for g in range(len(groups)) for pair in groups[g].trained_pairs]
    lengths = {(g, k): len(groups[g].completions[k].token_ids) - 1 for g, k in scores}

    def column(values: Mapping[Ref, Any], side: str) -> torch.Tensor:
        return torch.tensor(
            [float(values[g, getattr(pair, side)]) for g, pair in pairs], dtype=torch.float64
        )

    report = pair_report(
        column(scores, "chosen"),
        column(scores, "rejected"),
        column(lengths, "chosen"),
        column(lengths, "rejected"),
        torch.tensor([scores[ref] for ref in sorted(scores)], dtype=torch.float64),
        torch.tensor([float(lengths[ref]) for ref in sorted(scores)], dtype=torch.float64),
    )
    return {f"eval_{name}": value for name, value in report.items()}
