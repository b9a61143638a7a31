"""Direct preference optimisation and its relatives: groups of K >= 2 compared completions (KTO: labelled ones)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from posttrain.data.config import DataConfig, Purpose
from posttrain.losses.preference_metrics import preference_metrics
from posttrain.trainers.base import BaseConfig, Loss, Trainer, run_reference
from posttrain.training.config import TrainConfig, declared_like
from posttrain.training.forward import needs_reference
from posttrain.training.loop import Loop
from posttrain.training.reference import ReferenceConfig
from posttrain.types import LossOutput, PairLogps, PromptGroup


@dataclass(frozen=True, kw_only=True)
class DPOConfig(BaseConfig):
    """Everything that decides a preference run."""

    data: DataConfig = field(default_factory=lambda: DataConfig(overlong="drop"))
    """Comparisons to train and evaluate on: pairs, ranked or labelled rows"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(name="dpo"))
    """Length, cadence and place of the run"""
    loss: str = "dpo"
    """A loss of posttrain.losses.preference (dpo, ipo, simpo, kto, ...), the dotted path of any function
    (PairLogps, *, options) -> LossOutput, or a weighted sum: dpo + 0.2*nll_chosen."""
    loss_options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Keyword options of the loss, e.g. --loss_options.beta 0.1."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The model that the policy is compared with"""


class DPOTrainer(Trainer):
    """``DPOTrainer(model="smollm2-135m", train_dataset=pairs, loss=ipo).train()``.

    Rafailov et al. 2023, arXiv:2305.18290. Datasets: prompt groups with ``pairs`` (or labelled completions, for KTO), or rows
    of the formats in ``posttrain.data.comparisons``. ``loss``: a function ``PairLogps -> LossOutput``. A loss that says
    ``needs_reference = False`` runs without one. All pairs of a group are trained with one forward of its prompt and of each
    completion.
    """

    purpose: ClassVar[Purpose] = "preference"
    config_class = DPOConfig
    loss_home = "posttrain.losses.preference"

    def _settle_loss(self) -> None:
        config, chosen = self.config, self.loss
        self.wants_reference = needs_reference(chosen)
        self.loss = with_preference_metrics(chosen, beta=float(config.loss_options.get("beta", 0.1)))
        if getattr(chosen, "batch_statistic", None) is not None and config.reference.cache:
            raise ValueError(
                f"loss {config.loss} reads the reference on sequences made from each batch (mismatched pairs), which no cache "
                "holds. Leave --reference.cache off."
            )
        if not needs_reference(chosen) and config.reference != ReferenceConfig():
            raise ValueError(f"loss {config.loss} reads no reference; the reference.* settings would be ignored. Leave them out.")

    def _set_up(self, loop: Loop, train: Sequence[PromptGroup], evaluation: Sequence[PromptGroup] | None) -> None:
        _check_feedback(self.loss, train, self.config.loss)
        if not needs_reference(self.loss):
            return
        loop.reference = run_reference(
            self.config.reference,
            loop,
            groups=[train, *([evaluation] if evaluation is not None else [])],
            show_progress=loop.accelerator.is_main_process,
        )


def with_preference_metrics(loss: Loss, *, beta: float) -> Loss:
    """The loss with the DPO authors' metrics beside its own."""

    def measured(logps: PairLogps) -> LossOutput:
        output = loss(logps)
        metrics: dict[str, Tensor] = preference_metrics(logps, beta=beta) if logps.pairs_B2.shape[0] else {}
        return LossOutput(terms=output.terms, metrics={**metrics, **output.metrics})

    return declared_like(loss, measured)


def _check_feedback(loss: Loss, train: Sequence[PromptGroup], name: str) -> None:
    """The first group must have what the loss compares: pairs, or labels."""
    group = train[0]
    labelled = any(c.label is not None for c in group.completions)
    if getattr(loss, "batch_statistic", None) is not None and not labelled:
        raise ValueError(
            f"loss {name} learns from labelled answers, but {group.where} has none. Give rows with prompt, completion and label, "
            "for instance from `posttrain prep pairs RAW --layout labelled`."
        )
    if getattr(loss, "batch_statistic", None) is None and labelled and not group.trained_pairs:
        raise ValueError(
            f"loss {name} compares answers, but {group.where} has one labelled answer. Use --loss kto, or pair the answers with "
            "`posttrain prep pairs`."
        )
