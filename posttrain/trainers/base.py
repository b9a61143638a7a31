"""What every trainer does around the loop: settings, model and tokenizer, groups, checks. The
methods add what is theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from posttrain.data import (
    DataConfig,
    GroupData,
    batch_indices,
    check_stop_trained,
    groups_from_rows,
    highlight_sample,
    load_groups,
    set_chat_template,
    stop_token_ids,
)
from posttrain.data.config import Purpose
from posttrain.models.load import (
    ModelConfig,
    check_vocabulary,
    load_model,
    load_tokenizer,
    set_dropout,
)
from posttrain.packing.plan import PackingConfig
from posttrain.plan.check import MemoryCheck
from posttrain.precision import PrecisionPlan, torch_dtype
from posttrain.training.config import TrainConfig, choose_loss, to_dict
from posttrain.training.launch import make_accelerator
from posttrain.training.loop import Loop, TrainResult
from posttrain.training.metrics import is_held_out, read_metrics
from posttrain.training.optimizer import OptimizerConfig
from posttrain.training.reference import ReferenceConfig, RunReference, sequence_key
from posttrain.types import Loss, LossOutput, PromptGroup


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What every method's settings have."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model, full or LoRA"""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows to train and evaluate on"""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """Micro-batches: memory and speed, never the gradient"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, cadence and place of the run"""


Rows = Sequence[PromptGroup] | Sequence[Mapping[str, Any]]
METHODS: dict[Purpose, Any] = {"sft": "sft", "preference": "dpo", "reward": "reward"}


class Trainer:
    """``SomeTrainer(model=..., train_dataset=rows, config=...).train()``.

    ``model``: an embedded name, folder or hub id, or a loaded transformers model (then give
    ``tokenizer``). Datasets: prompt groups, or rows in any format that ``posttrain.data`` reads for
    this method; without them ``config.data`` says where the rows are. ``loss``: a function ``logps
    -> LossOutput``; without it ``config.loss``.
    """

    purpose: ClassVar[Purpose]
    """What the rows are read for."""
    config_class: ClassVar[Any]
    loss_home: ClassVar[str]
    """Module of the losses that ``config.loss`` names without a path."""
    has_dropout: ClassVar[bool] = False
    """Whether the model's own dropout is on unless ``model.dropout`` says otherwise."""
    wants_reference: bool = False
    """Whether the loss reads a reference model."""

    def __init__(
        self,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        config: Any = None,
        loss: Callable[..., LossOutput] | None = None,
    ) -> None:
        name, config = type(self).__name__, config or self.config_class()
        if isinstance(model, str):
            config, model = replace(config, model=replace(config.model, name=model)), None
        if model is not None and tokenizer is None:
            raise ValueError(
                f"{name}(model=<a loaded model>) needs its tokenizer too: pass tokenizer=..."
            )
        _refuse_ignored(
            name, config, model=model, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        self.config = config
        self._model, self._tokenizer = model, tokenizer
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        self.loss: Loss = choose_loss(
            config, loss, home=self.loss_home, default=self.config_class.loss
        )
        self._settle_loss()

    def train(self) -> TrainResult:
        """Runs to the end, or continues where the run folder's newest valid checkpoint stopped."""
        config = self.config
        accelerator, precision = make_accelerator(
            precision=config.train.precision,
            trackers=config.train.trackers,
            project_dir=config.train.folder,
        )
        memory = MemoryCheck.start(
            config,
            METHODS[self.purpose],
            accelerator,
            precision,
            model=self._model,
            wants_reference=self.wants_reference,
        )
        torch.manual_seed(config.train.seed)
        tokenizer = self._tokenizer or load_tokenizer(config.model)
        with accelerator.main_process_first():
            train, evaluation, counts, sizes = self._groups(
                tokenizer, is_main=accelerator.is_main_process
            )
            model = (
                self._model if self._model is not None else self._load_model(tokenizer, precision)
            )
        set_dropout(model, config.model, default=self.has_dropout)
        check_vocabulary(model, tokenizer)
        if self._model is not None:
            _check_dtype(model, precision)
        if config.train.eval_every and evaluation is None:
            raise ValueError(
                "train.eval_every is set, but there is nothing to evaluate on. Set --data.eval or "
                "--data.eval_fraction."
            )
        if self._train_dataset is not None and self.purpose != "reward":
            check_stop_trained(train, stop_token_ids(tokenizer))
        _check_budget(train, evaluation, config.packing)
        if accelerator.is_main_process:
            _show_sample(train[0], tokenizer)

        def batches(step: int) -> list[PromptGroup]:
            picked = batch_indices(
                step,
                seed=config.train.seed,
                batch_size=config.train.batch_size,
                sizes=sizes,
                weights=config.data.weights,
            )
            return [train.at(d, i) if hasattr(train, "at") else train[i] for d, i in picked]

        loop = Loop(
            accelerator=accelerator,
            precision=precision,
            model=model,
            tokenizer=tokenizer,
            loss=self.loss,
            batches=batches,
            num_steps=config.train.num_steps(len(train)),
            train=config.train,
            optimizer_config=config.optimizer,
            packing=config.packing,
            eval_groups=evaluation,
            settings=to_dict(config),
            data_counts=counts,
            identity={
                "loss": self.loss.name,
                "data": digest_of(train),
            },
        )
        self._set_up(loop, train, evaluation)
        result = loop.run()
        report_end(result, memory, accelerator)
        return result

    def _settle_loss(self) -> None:
        """What the method makes of its loss, and asks of it."""

    def _load_model(self, tokenizer: Any, precision: PrecisionPlan) -> nn.Module:
        """The model that is trained."""
        return load_model(
            self.config.model, dtype=precision.load_dtype, compute=torch_dtype(precision.compute)
        )

    def _set_up(
        self, loop: Loop, train: Sequence[PromptGroup], evaluation: Sequence[PromptGroup] | None
    ) -> None:
        """What the method adds to the loop."""

    def _groups(
        self, tokenizer: Any, *, is_main: bool
    ) -> tuple[Any, Any, dict[str, Any], list[int]]:
        """(training groups, evaluation groups or None, counts, sizes of the sources)."""
        if self._train_dataset is None:
            data: GroupData = load_groups(
                self.config.data, tokenizer, purpose=self.purpose, progress=is_main
            )
            if is_main:
                from rich.console import Console

                Console().print(data.report.render())
            return (
                data.train,
                data.eval,
                {**data.report.counts(), "dropped_by": data.report.dropped()},
                data.train.sizes,
            )
        train = self._as_groups(self._train_dataset, tokenizer)
        evaluation = (
            None if self._eval_dataset is None else self._as_groups(self._eval_dataset, tokenizer)
        )
        counts = {
            "read": len(self._train_dataset),
            "kept": len(train),
            "dropped": len(self._train_dataset) - len(train),
        }
        return train, evaluation, counts, [len(train)]

    def _as_groups(self, rows: Rows, tokenizer: Any) -> list[PromptGroup]:
        if len(rows) and isinstance(rows[0], PromptGroup):
            return list(rows)  # type: ignore[arg-type]
        if self.config.data.chat_template is not None:
            set_chat_template(tokenizer, self.config.data.chat_template)
        return groups_from_rows(rows, tokenizer, config=self.config.data, purpose=self.purpose)  # type: ignore[arg-type]


def _refuse_ignored(
    trainer: str,
    config: BaseConfig,
    *,
    model: Any,
    train_dataset: Rows | None,
    eval_dataset: Rows | None,
) -> None:
    """Two sources for the same thing, of which one would be ignored."""
    data, rows = config.data, train_dataset is not None
    adapts = config.model.lora.rank > 0 or config.model.gradient_checkpointing
    wrong = {
        "eval_dataset without train_dataset; give both, or data.eval": eval_dataset is not None
        and not rows,
        "data.train beside train_dataset": rows and bool(data.train),
        "data.eval or data.eval_fraction beside train_dataset; give eval_dataset": rows
        and bool(data.eval or data.eval_fraction),
        "data.weights beside train_dataset": rows and data.weights is not None,
        "model.lora or gradient_checkpointing beside a loaded model; apply them to it": model
        is not None
        and adapts,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{trainer} would ignore something: {what}.")


def _check_dtype(model: Any, precision: PrecisionPlan) -> None:
    """transformers loads a checkpoint in the dtype it was saved in, often bfloat16, where small
    updates round away."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    wrong = sorted(str(d) for d in trained - {precision.load_dtype, torch.float32})
    if wrong:
        raise ValueError(
            f"The loaded model's trainable weights are {', '.join(wrong)}, but precision "
            f"{precision.name} keeps them in {precision.weight}. Load it with from_pretrained(..., "
            f"dtype=torch.{precision.weight}), or set precision bf16-pure."
        )


def digest_of(groups: Any) -> str:
    """16 hex digits of all groups in their order, to know other data on resume."""
    if hasattr(groups, "digest"):
        return groups.digest()
    content = hashlib.sha256()
    for g in groups:
        for c in g.completions:
            content.update(sequence_key(g, c))
            labels = {n: v for n, v in c.columns.items() if isinstance(v, float)}
            content.update(repr(labels).encode())
        content.update(repr(g.pairs and list(g.pairs)).encode())
    return content.hexdigest()[:16]


def _check_budget(train: Any, evaluation: Any, packing: PackingConfig) -> None:
    """The longest sequence must fit into one row: said before training, with its place."""
    for groups in (train, evaluation):
        if groups is None:
            continue
        longest, where = _longest_sequence(groups)
        if longest - 1 > packing.max_tokens:
            raise ValueError(
                f"One sequence must fit into packing.max_tokens; the longest has {longest} tokens "
                f"({where}), the budget is {packing.max_tokens}. Raise --packing.max_tokens or "
                "lower --data.max_length."
            )


def _longest_sequence(groups: Any) -> tuple[int, str]:
    """Tokens (the last one only a target) and place of the longest prompt + completion, to compare
    with the token budget."""
    if hasattr(groups, "longest"):
        index = int(groups.longest.argmax())
        return int(groups.longest[index]), groups[index].where
    lengths = [len(g.prompt_ids) + max(c.num_inputs for c in g.completions) + 1 for g in groups]
    return max(lengths), groups[lengths.index(max(lengths))].where


def _show_sample(group: PromptGroup, tokenizer: Any) -> None:
    from rich.console import Console
    from rich.panel import Panel

    title = "first sample: trained tokens are highlighted"
    Console().print(Panel(highlight_sample(group, tokenizer), title=title, subtitle=group.where))


def run_reference(settings: ReferenceConfig, loop: Loop, **options: Any) -> RunReference:
    """The reference of a run: the model that ``settings`` names, else the policy as it starts."""

    def load_other() -> nn.Module:
        model = load_model(ModelConfig(name=str(settings.model)), dtype=loop.precision.load_dtype)
        check_vocabulary(model, loop.tokenizer)
        return model

    other = load_other if settings.model is not None else None
    return RunReference(settings, precision=loop.precision, load_other=other, **options)


def report_end(result: TrainResult, memory: MemoryCheck, accelerator: Any) -> None:
    """Memory, held-out figures, and where everything is."""
    memory.finish(accelerator, longest_row=result.longest_row)
    if accelerator.is_main_process:
        show_held_out(result)
        print(
            f"done: {result.step} steps; model in {result.final}, metrics in "
            f"{result.folder / 'metrics.jsonl'}"
        )


def show_held_out(result: TrainResult) -> None:
    """Held-out figures at the start and at the end, where there are two."""
    from rich.console import Console
    from rich.table import Table

    lines = [
        m
        for m in read_metrics(result.folder / "metrics.jsonl")
        if any(is_held_out(name) for name in m)
    ]
    if len(lines) < 2:
        return
    before, after = lines[0], lines[-1]
    table = Table(title=f"held out, before and after {after['step'] - before['step']} steps")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name in (n for n in after if is_held_out(n)):
        table.add_row(name, *(_figure(line.get(name)) for line in (before, after)))
    Console().print(table)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
