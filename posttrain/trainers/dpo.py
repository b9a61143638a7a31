"""Direct preference optimisation and its relatives: groups of K >= 2 compared completions (KTO:
labelled ones)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import field, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from posttrain.data import StreamedGroups, batch_indices
from posttrain.data.config import DataConfig, Purpose
from posttrain.data.dataset import num_labels
from posttrain.data.tokenise import prompt_hash
from posttrain.losses.preference import preference_metrics
from posttrain.resolve import settings
from posttrain.trainers.base import BaseConfig, RunData, Trainer, run_reference
from posttrain.training.config import TrainConfig, set_options
from posttrain.training.loop import Loop
from posttrain.training.reference import ReferenceConfig
from posttrain.types import Logps, Loss, LossOutput

log = logging.getLogger(__name__)


@settings
class DPOConfig(BaseConfig):
    """Everything that decides a preference run."""

    data: DataConfig = field(default_factory=lambda: DataConfig(overlong="drop"))
    """Comparisons to train and evaluate on: pairs, ranked or labelled rows"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(name="dpo"))
    """Length, cadence and place of the run"""
    loss: str = "dpo"
    """A loss of posttrain.losses.preference (dpo, ipo, simpo, kto, ...), the dotted path of any
    function (Logps, *, options) -> LossOutput, or a weighted sum: dpo + 0.2*nll_chosen."""
    beta: float | None = None
    """Scale of the implicit reward beta log(pi / pi_ref). Default: the loss's own (dpo 0.1, simpo
    2, dpo_norm 5)."""
    label_smoothing: float | None = None
    """Share of pairs taken to be labelled the wrong way round (cdpo, robust, exo). Default: the
    loss's own."""
    gamma: float | None = None
    """simpo: the margin that the chosen answer must win by. Default 1."""
    loss_options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Further keyword options of the loss, e.g. --loss_options.f_divergence js."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The model that the policy is compared with"""

    @property
    def options(self) -> dict[str, Any]:
        """Of the loss, all that are set."""
        return set_options(self, ("beta", "label_smoothing", "gamma"), self.loss_options)


class DPOTrainer(Trainer):
    """``DPOTrainer(model="smollm2-135m", train_dataset=pairs, loss=ipo).train()``.

    Rafailov et al. 2023, arXiv:2305.18290. Datasets: prompt groups with ``pairs`` (or labelled
    completions, for KTO), or rows of the layouts in ``posttrain.data.layouts``. ``loss``: a
    function ``Logps -> LossOutput``. A loss that says ``reference=False`` runs without
    one. All pairs of a group are trained with one forward of its prompt and of each completion.
    """

    purpose: ClassVar[Purpose] = "preference"
    config_class = DPOConfig
    loss_home = "posttrain.losses.preference"

    def _choose_loss(self, given: Callable[..., LossOutput] | None) -> None:
        super()._choose_loss(given)
        config, chosen = self.config, self.loss
        self.wants_reference = chosen.reference
        self.loss = with_preference_metrics(chosen)
        if chosen.statistic is not None and config.reference.cache:
            raise ValueError(
                f"loss {config.loss} reads the reference on sequences made from each batch "
                "(mismatched pairs), which no cache holds. Leave --reference.cache off."
            )
        if not chosen.reference and config.reference != ReferenceConfig():
            raise ValueError(
                f"loss {config.loss} reads no reference; the reference.* settings "
                "would be ignored. Leave them out."
            )

    def _set_up(self, loop: Loop, data: RunData) -> None:
        wants_labels = self.loss.statistic is not None
        for groups in every_set(data):
            check_feedback(groups, wants_labels=wants_labels, what=f"loss {self.config.loss}")
        if wants_labels and not isinstance(data.train, StreamedGroups):
            check_mismatched(data.train, self.config)
        if not self.loss.reference:
            return
        if self.config.reference.cache and isinstance(data.train, StreamedGroups):
            raise ValueError("reference.cache needs all rows at once; a stream has none. Leave it.")
        loop.reference = run_reference(
            self.config.reference,
            loop,
            groups=list(every_set(data)),
            show_progress=loop.accelerator.is_main_process,
        )


def every_set(data: RunData) -> list[Any]:
    """Training groups (of a stream, its first batch) and all held-out ones."""
    train = data.train.batch(0) if isinstance(data.train, StreamedGroups) else data.train
    return [train, *data.eval.values()]


def with_preference_metrics(loss: Loss) -> Loss:
    """The loss with the DPO authors' metrics beside its own."""

    def measured(logps: Logps) -> LossOutput:
        output = loss(logps)
        metrics: dict[str, Tensor] = (
            preference_metrics(logps, beta=loss.beta) if logps.pairs_B2.shape[0] else {}
        )
        return LossOutput(terms=output.terms, metrics={**metrics, **output.metrics})

    measured.__name__ = measured.__qualname__ = loss.name
    return replace(loss, function=measured, options={}, implicit_beta=loss.beta)


def check_feedback(train: Any, *, wants_labels: bool, what: str) -> None:
    """Every group must have what is learned from, pairs or labels; said before the first step, with
    how many have not."""
    if hasattr(train, "column"):
        pairs, labels = train.column("num_pairs"), train.column("num_labels")
    else:
        pairs = np.asarray([len(g.trained_pairs) for g in train])
        labels = np.asarray([num_labels(g) for g in train])
    missing = np.flatnonzero((labels if wants_labels else pairs) == 0)
    if not len(missing):
        return
    other = int(((pairs if wants_labels else labels)[missing] > 0).sum())
    wanted, had, advice = (
        (
            "labelled answers",
            "pairs",
            "Give rows with prompt, completion and label: `posttrain prep pairs RAW --layout "
            "labelled`.",
        )
        if wants_labels
        else (
            "compared answers",
            "labels",
            "Use --loss kto for labelled answers, or pair them with `posttrain prep pairs`.",
        )
    )
    raise ValueError(
        f"{what} learns from {wanted}, but {len(missing)} of {len(train)} groups have none "
        f"({other} of them have {had} instead), the first {train[int(missing[0])].where}: they "
        f"would be in the batches and train nothing. {advice}"
    )


def check_mismatched(train: Any, config: DPOConfig) -> None:
    """For losses that estimate their reference point from answers to other prompts: says before the
    first step in how many steps there are none. ValueError if that is in all."""
    size, steps = config.train.batch_size, config.train.num_steps(len(train))
    hashes = (
        train.column("prompt_hash")
        if hasattr(train, "column")
        else np.asarray([prompt_hash(g) for g in train])
    )
    counts = np.unique(hashes, return_counts=True)[1]
    if 2 * counts.max() < size and config.data.weights is None:
        return
    sizes = getattr(train, "sizes", [len(train)])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    lone = 0
    for step in range(steps):
        picked = batch_indices(
            step, seed=config.train.seed, batch_size=size, sizes=sizes, weights=config.data.weights
        )
        lone += len({int(hashes[starts[source] + index]) for source, index in picked}) == 1
    if lone == steps:
        raise ValueError(
            f"loss {config.loss} estimates its reference point from answers to other prompts of "
            f"the batch, and no batch of {size} has two different prompts ({len(counts)} in the "
            "data). Raise --train.batch_size, or give more prompts."
        )
    if lone:
        log.warning(
            "in %d of %d steps all %d answers belong to one prompt: loss %s has no answers to "
            "others to estimate its reference point from and takes its least value, 0. A larger "
            "--train.batch_size avoids that.",
            lone,
            steps,
            size,
            config.loss,
        )
