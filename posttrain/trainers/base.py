"""What every trainer does around the loop: settings, model and tokenizer, groups, checks. The
methods add what is theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn

from posttrain.data import (
    DataConfig,
    GroupData,
    StreamedGroups,
    batch_indices,
    check_stop_trained,
    groups_from_rows,
    highlight_sample,
    load_groups,
    set_chat_template,
    stop_token_ids,
)
from posttrain.data.config import Purpose
from posttrain.data.tokenise import digest_of_groups
from posttrain.models.adapters import with_adapters
from posttrain.models.load import (
    ModelConfig,
    base_name,
    check_vocabulary,
    load_model,
    load_tokenizer,
    set_dropout,
)
from posttrain.packing.plan import PackingConfig
from posttrain.plan.check import MemoryCheck
from posttrain.precision import PrecisionPlan, torch_dtype
from posttrain.resolve import settings
from posttrain.trainers.card import before_and_after, upload, write_card
from posttrain.training.config import TrainConfig, choose_loss, to_dict
from posttrain.training.forward import Report
from posttrain.training.identity import (
    FRESH,
    code_digest,
    sampled_weights_digest,
    source_digest,
)
from posttrain.training.launch import make_accelerator
from posttrain.training.loop import Loop, TrainResult
from posttrain.training.optimizer import OptimizerConfig
from posttrain.training.reference import ReferenceConfig, RunReference
from posttrain.training.run_folder import note
from posttrain.training.sharding import unwrapped
from posttrain.types import Loss, LossOutput, PromptGroup


@settings
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

    @property
    def options(self) -> dict[str, Any]:
        """Of the loss, all that are set."""
        return dict(getattr(self, "loss_options", {}))


METHODS: dict[Purpose, Any] = {"sft": "sft", "preference": "dpo", "reward": "reward"}


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything that a run reads."""

    train: Any
    """Groups, or prompts of reinforcement learning."""
    eval: Mapping[str, Any]
    """Held-out ones by the name of their set; empty where there are none."""
    counts: dict[str, Any]
    """Rows read, kept, cut and dropped."""
    sizes: Sequence[int]
    """Groups of each source."""
    digest: str


class Trainer:
    """``SomeTrainer(model=..., train_dataset=rows, config=...).train()``.

    ``model``: an embedded name, folder or hub id, or a loaded transformers model (then give
    ``processing_class``, its tokenizer). ``train_dataset``: rows in any layout that
    ``posttrain.data`` reads for this method (a list, ``datasets.Dataset``, or a stream such as
    ``datasets.IterableDataset`` with ``train.max_steps``), or prompt groups. ``eval_dataset``: the
    same, or a dict of several by name. Without them ``config.data`` says where the rows are.
    ``loss``: a function ``logps -> LossOutput``; without it ``config.loss``. ``peft_config``: any
    adapters of peft. ``callbacks``: ``transformers.TrainerCallback`` objects. ``compute_metrics``:
    a function of ``posttrain.Evaluated`` that returns further held-out figures. ``args`` and
    ``tokenizer`` are other names of ``config`` and ``processing_class``.
    """

    purpose: ClassVar[Purpose]
    """What the rows are read for."""
    config_class: ClassVar[Any]
    loss_home: ClassVar[str] = ""
    """Module of the losses that ``config.loss`` names without a path."""
    has_dropout: ClassVar[bool] = False
    """Whether the model's own dropout is on unless ``model.dropout`` says otherwise."""
    wants_reference: bool = False
    """Whether the loss reads a reference model."""

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        config: Any = None,
        loss: Callable[..., LossOutput] | None = None,
        peft_config: Any = None,
        callbacks: Sequence[Any] = (),
        compute_metrics: Report | None = None,
    ) -> None:
        self._name = type(self).__name__
        config = self._only_one("config", config, "args", args) or self.config_class()
        self._tokenizer = self._only_one(
            "processing_class", processing_class, "tokenizer", tokenizer
        )
        self.config, self._model = _named_model(self._name, config, model)
        if self._model is not None and self._tokenizer is None:
            raise ValueError(
                f"{self._name}(model=<a loaded model>) needs its tokenizer too: pass "
                "processing_class=..."
            )
        _refuse_ignored(
            self._name,
            self.config,
            model=self._model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
        )
        self._train_dataset: Any = train_dataset
        self._eval_datasets = (
            eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        )
        self._peft_config, self._callbacks = peft_config, list(callbacks)
        self._compute_metrics = compute_metrics
        self._loop: Loop | None = None
        self._choose_loss(loss)

    def _only_one(self, name: str, value: Any, other_name: str, other: Any) -> Any:
        if value is not None and other is not None:
            raise ValueError(f"{self._name}: {other_name} is {name} by another name; give one.")
        return value if other is None else other

    def _choose_loss(self, given: Callable[..., LossOutput] | None) -> None:
        """Sets ``self.loss``, and what the method asks of it."""
        self.loss: Loss = choose_loss(
            self.config, given, home=self.loss_home, default=self.config_class.loss
        )

    # -- what users call ---------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Runs to the end, or continues where the run folder's newest valid checkpoint stopped."""
        loop = self._prepared()
        result = self._run(loop)
        report_end(result, self._memory, loop.accelerator)
        if loop.accelerator.is_main_process:
            write_card(self, result)
        return result

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Held-out figures of the present weights: those of the model before ``train``, the trained
        ones after. ``eval_dataset``: others than the trainer's own."""
        loop = self._prepared()
        loop.prepare()
        if eval_dataset is None:
            found = self._evaluate(loop)
        else:
            given = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
            own, loop.eval_groups = loop.eval_groups, self._as_sets(given, loop.tokenizer)
            try:
                found = self._evaluate(loop)
            finally:
                loop.eval_groups = own
        if not found:
            raise ValueError("There is nothing to evaluate on: give an eval_dataset, or data.eval.")
        return found

    @property
    def model(self) -> Any:
        """The model, with its adapters; trained after ``train``."""
        loop = self._prepared()
        return unwrapped(loop.policy).model if hasattr(loop, "policy") else loop.model

    @property
    def is_named(self) -> bool:
        """Whether the settings name the model; else it was given loaded."""
        return self._model is None

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"{self._name.removesuffix('Trainer')} ({self.loss.name})"

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self._prepared().tokenizer

    @property
    def tokenizer(self) -> Any:
        """The same."""
        return self.processing_class

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Writes the present weights and the tokenizer; without a folder to the run's ``final``."""
        loop = self._prepared()
        loop.prepare()
        return loop.save(Path(output_dir) if output_dir else self.config.train.folder / "final")

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Uploads the run's ``final`` folder with its model card; returns the address."""
        final = self.config.train.folder / "final"
        if not final.is_dir():
            raise ValueError(f"There is no {final} to upload: call train() or save_model() first.")
        if not PartialState().is_main_process:
            return repo_id
        return upload(final, repo_id, private=private, token=token)

    # -- how a run is made -------------------------------------------------------------------------

    def _prepared(self) -> Loop:
        """The loop, made once: data, memory, model, in this order."""
        if self._loop is None:
            self._loop = self._make_loop()
        return self._loop

    def _make_loop(self) -> Loop:
        config = self.config
        accelerator, precision = make_accelerator(
            precision=config.train.precision,
            trackers=config.train.trackers,
            project_dir=config.train.folder,
        )
        self._check_launch(accelerator)
        torch.manual_seed(config.train.seed)
        tokenizer = self._tokenizer or load_tokenizer(config.model)
        with accelerator.main_process_first():
            data = self._read(tokenizer, is_main=accelerator.is_main_process)
        model = self._model
        if self._peft_config is not None:
            with accelerator.main_process_first():
                model = self._load_model(tokenizer, precision) if model is None else model
            base = getattr(model, "name_or_path", "") if self._model else base_name(config.model)
            model = with_adapters(model, self._peft_config, base=base)
        self._memory = self._plan_memory(data, accelerator, precision, model)
        if model is None:
            with accelerator.main_process_first():
                model = self._load_model(tokenizer, precision)
        set_dropout(model, config.model, default=self.has_dropout)
        check_vocabulary(model, tokenizer)
        if self._model is not None:
            _check_dtype(model, precision)
        loop = Loop(
            accelerator=accelerator,
            precision=precision,
            model=model,
            tokenizer=tokenizer,
            train=config.train,
            optimizer_config=config.optimizer,
            packing=config.packing,
            settings=to_dict(config),
            data_counts=data.counts,
            about={"method": self.method, "memory": self._memory.planned()},
            callbacks=self._callbacks,
            compute_metrics=self._compute_metrics,
            identity={
                "data": data.digest,
                "model": sampled_weights_digest(
                    model, skip=FRESH if self.is_named or self._peft_config else ()
                ),
                "loss": code_digest(self.loss),
                **self._identity(),
            },
            **self._trained(data, tokenizer, is_main=accelerator.is_main_process),
        )
        self._set_up(loop, data)
        return loop

    def _check_launch(self, accelerator: Any) -> None:
        """Refuses what the method cannot run under."""

    def _plan_memory(
        self, data: RunData, accelerator: Any, precision: PrecisionPlan, model: Any
    ) -> MemoryCheck:
        return MemoryCheck.start(
            self.config,
            METHODS[self.purpose],
            accelerator,
            precision,
            model=model,
            wants_reference=self.wants_reference,
        )

    def _load_model(self, tokenizer: Any, precision: PrecisionPlan) -> nn.Module:
        """The model that is trained."""
        return load_model(
            self.config.model, dtype=precision.load_dtype, compute=torch_dtype(precision.compute)
        )

    def _identity(self) -> dict[str, Any]:
        """Digests of what the method reads beside data and model."""
        known: dict[str, Any] = {}
        if self._peft_config is not None:
            known["adapters"] = code_digest(self._peft_config.to_dict())
        reference = getattr(self.config, "reference", None)
        if reference is not None and reference.model is not None:
            known["reference"] = source_digest(reference.model)
        return known

    def _trained(self, data: RunData, tokenizer: Any, *, is_main: bool) -> dict[str, Any]:
        """What the loop is given of the data: batches, their number, the loss."""
        config, train = self.config, data.train
        if config.train.eval_every and not data.eval:
            raise ValueError(
                "train.eval_every is set, but there is nothing to evaluate on. Set --data.eval or "
                "--data.eval_fraction."
            )
        known = {"loss": self.loss, "eval_groups": data.eval}
        if isinstance(train, StreamedGroups):
            return known | {
                "batches": train.batch,
                "num_steps": config.train.max_steps,
                "stream": train,
            }
        if self._train_dataset is not None and self.purpose != "reward":
            check_stop_trained(train, stop_token_ids(tokenizer))
        for groups in (train, *data.eval.values()):
            check_budget(groups, config.packing)
        if is_main:
            _show_sample(train[0], tokenizer)

        def batches(step: int) -> list[PromptGroup]:
            picked = batch_indices(
                step,
                seed=config.train.seed,
                batch_size=config.train.batch_size,
                sizes=data.sizes,
                weights=config.data.weights,
            )
            return [train.at(d, i) if hasattr(train, "at") else train[i] for d, i in picked]

        return known | {"batches": batches, "num_steps": config.train.num_steps(len(train))}

    def _set_up(self, loop: Loop, data: RunData) -> None:
        """What the method adds to the loop."""

    def _run(self, loop: Loop) -> TrainResult:
        return loop.run()

    def _evaluate(self, loop: Loop) -> dict[str, float]:
        return loop.evaluate(0)

    def _read(self, tokenizer: Any, *, is_main: bool) -> RunData:
        """The groups of a run."""
        if self._train_dataset is None:
            data: GroupData = load_groups(
                self.config.data, tokenizer, purpose=self.purpose, progress=is_main
            )
            if is_main:
                Console().print(data.report.render())
            return RunData(
                train=data.train,
                eval={} if data.eval is None else {"": data.eval},
                counts={
                    **data.report.counts(),
                    "dropped_by": data.report.dropped(),
                    "columns": data.report.columns(),
                },
                sizes=data.train.sizes,
                digest=digest_of(data.train),
            )
        evaluation = self._as_sets(self._eval_datasets, tokenizer)
        if not hasattr(self._train_dataset, "__len__"):
            return self._read_stream(tokenizer, evaluation)
        read = len(self._train_dataset)
        train = self._as_groups(self._train_dataset, tokenizer)
        return RunData(
            train=train,
            eval=evaluation,
            counts={"read": read, "kept": len(train), "dropped": read - len(train)},
            sizes=[len(train)],
            digest=digest_of(train),
        )

    def _read_stream(self, tokenizer: Any, evaluation: Mapping[str, Any]) -> RunData:
        train = self.config.train
        if not train.max_steps:
            raise ValueError(
                f"{self._name}: a stream of rows has no length, so the run needs one: set "
                "train.max_steps."
            )
        self._set_template(tokenizer)
        stream = StreamedGroups(
            self._train_dataset,
            tokenizer,
            config=self.config.data,
            purpose=self.purpose,
            batch_size=train.batch_size,
            check=lambda groups: check_budget(groups, self.config.packing),
        )
        return RunData(
            train=stream, eval=evaluation, counts={"kind": "stream"}, sizes=[], digest="stream"
        )

    def _as_sets(self, sets: Mapping[str, Any], tokenizer: Any) -> dict[str, list[PromptGroup]]:
        return {
            name: self._as_groups(rows, tokenizer)
            for name, rows in sets.items()
            if rows is not None
        }

    def _as_groups(self, rows: Any, tokenizer: Any) -> list[PromptGroup]:
        rows = rows if hasattr(rows, "__len__") else list(rows)
        if len(rows) and isinstance(rows[0], PromptGroup):
            return list(rows)
        self._set_template(tokenizer)
        return groups_from_rows(rows, tokenizer, config=self.config.data, purpose=self.purpose)

    def _set_template(self, tokenizer: Any) -> None:
        if self.config.data.chat_template is not None:
            set_chat_template(tokenizer, self.config.data.chat_template)


def _named_model(trainer: str, config: Any, model: Any) -> tuple[Any, Any]:
    """(the settings with the model's name, a loaded model or None)."""
    if not isinstance(model, str):
        return config, model
    if config.model.name not in (ModelConfig().name, model):
        raise ValueError(
            f"{trainer}(model={model!r}) and config.model.name={config.model.name!r} are two "
            "models; give one of them."
        )
    return replace(config, model=replace(config.model, name=model)), None


def _refuse_ignored(
    trainer: str,
    config: BaseConfig,
    *,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    peft_config: Any,
) -> None:
    """Two sources for the same thing, of which one would be ignored."""
    data, rows = config.data, train_dataset is not None
    lora = config.model.lora.rank > 0
    adapts = lora or config.model.gradient_checkpointing
    wrong = {
        "eval_dataset without train_dataset; give both, or data.eval": eval_dataset is not None
        and not rows,
        "data.train beside train_dataset": rows and bool(data.train),
        "data.eval or data.eval_fraction beside train_dataset; give eval_dataset": rows
        and bool(data.eval or getattr(data, "eval_fraction", 0)),
        "data.weights beside train_dataset": rows and getattr(data, "weights", None) is not None,
        "model.lora beside peft_config": lora and peft_config is not None,
        "model.lora or gradient_checkpointing beside a loaded model; apply them to it": model
        is not None
        and adapts,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{trainer} would ignore one of two: {what}.")


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
    return groups.digest() if hasattr(groups, "digest") else digest_of_groups(groups)


def check_budget(groups: Any, packing: PackingConfig) -> None:
    """The longest sequence must fit into one row: said before training, with its place."""
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
    measured = memory.finish(accelerator, longest_row=result.longest_row)
    if accelerator.is_main_process:
        note(result.folder, memory=memory.planned() | measured)
        show_held_out(result)
        print(
            f"done: {result.step} steps; model in {result.final}, metrics in "
            f"{result.folder / 'metrics.jsonl'}"
        )


def show_held_out(result: TrainResult) -> None:
    """Held-out figures at the start and at the end, where there are two."""
    from rich.table import Table

    steps, rows = before_and_after(result.folder)
    if not rows:
        return
    table = Table(title=f"held out, before and after {steps} steps")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
