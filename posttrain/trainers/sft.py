"""Supervised fine-tuning: K = 1, the loss on assistant tokens."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from posttrain.data.config import Purpose
from posttrain.losses.sft import sft
from posttrain.resolve import settings
from posttrain.trainers.base import BaseConfig, RunData, Trainer
from posttrain.training.loop import Loop


@settings
class SFTConfig(BaseConfig):
    """Everything that decides an SFT run."""

    loss: str = "posttrain.losses.sft.sft"
    """Dotted path of the loss function; any function (Logps, *, options) -> LossOutput."""
    loss_options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Keyword options of the loss, e.g. --loss_options.aggregation sequence_mean."""


class SFTTrainer(Trainer):
    """``SFTTrainer(model="smollm2-135m", train_dataset=rows).train()``.

    ``loss``: a function ``Logps -> LossOutput``. Held out is always the plain negative
    log-likelihood per trained token.
    """

    purpose: ClassVar[Purpose] = "sft"
    has_dropout = True
    config_class = SFTConfig
    loss_home = "posttrain.losses.sft"

    def _set_up(self, loop: Loop, data: RunData) -> None:
        loop.eval_loss = sft
