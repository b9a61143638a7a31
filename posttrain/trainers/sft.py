"""Supervised fine-tuning: K = 1, the loss on assistant tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from posttrain.data.config import Purpose
from posttrain.losses.sft import sft
from posttrain.trainers.base import BaseConfig, Loss, Rows, Trainer
from posttrain.training.config import choose_loss
from posttrain.training.loop import Loop
from posttrain.types import PromptGroup


@dataclass(frozen=True, kw_only=True)
class SFTConfig(BaseConfig):
    """Everything that decides an SFT run."""

    loss: str = "posttrain.losses.sft.sft"
    """Dotted path of the loss function; any function (TokenLogps, *, options) -> LossOutput."""
    loss_options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Keyword options of the loss, e.g. --loss_options.aggregation sequence_mean."""


class SFTTrainer(Trainer):
    """``SFTTrainer(model="smollm2-135m", train_dataset=rows).train()``.

    ``model``: an embedded name, folder or hub id, or a loaded transformers model (then give ``tokenizer``). Datasets: prompt
    groups, or rows in any format that ``posttrain.data`` reads; without them ``config.data`` says where the rows are.
    ``loss``: a function ``TokenLogps -> LossOutput``; without it ``config.loss``. Held out is always the plain negative
    log-likelihood per trained token.
    """

    purpose: ClassVar[Purpose] = "sft"

    def __init__(
        self,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        config: SFTConfig | None = None,
        loss: Loss | None = None,
    ) -> None:
        config = config or SFTConfig()
        super().__init__(config=config, model=model, tokenizer=tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
        self.loss = choose_loss(config, loss, home="posttrain.losses.sft", default=SFTConfig.loss)

    def _set_up(self, loop: Loop, train: Sequence[PromptGroup], evaluation: Sequence[PromptGroup] | None) -> None:
        loop.eval_loss = sft
