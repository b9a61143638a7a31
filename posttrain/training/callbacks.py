"""transformers' callbacks around the loop, and the best held-out figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.training.config import TrainConfig
from posttrain.training.sharding import broadcast_object


@dataclass(frozen=True, kw_only=True)
class CallbackArguments:
    """What callbacks read of transformers' TrainingArguments, under its names."""

    output_dir: str
    logging_dir: str
    max_steps: int
    num_train_epochs: float
    logging_steps: int
    eval_steps: int
    save_steps: int
    seed: int
    metric_for_best_model: str
    greater_is_better: bool
    load_best_model_at_end: bool
    eval_strategy: str = "steps"
    save_strategy: str = "steps"


class Callbacks:
    """Calls ``transformers.TrainerCallback`` objects, in their order, and does what they set in
    ``control``.

    Called are ``on_train_begin``, ``on_step_begin``, ``on_step_end``, ``on_log``, ``on_evaluate``,
    ``on_save`` and ``on_train_end``. The main process decides for all ranks. The state, also that
    of callbacks with one (``ExportableState``), is part of every checkpoint.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        train: TrainConfig,
        accelerator: Any,
        *,
        num_steps: int,
        **known: Any,
    ) -> None:
        from transformers import TrainerControl, TrainerState

        self._callbacks, self._accelerator = list(callbacks), accelerator
        self._best, self._known = train.best_metric, known
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=num_steps,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )
        folder, metric = str(train.folder), train.best_metric or "eval_loss"
        self._args = CallbackArguments(
            output_dir=folder,
            logging_dir=folder,
            max_steps=num_steps,
            num_train_epochs=train.num_epochs,
            logging_steps=train.log_every,
            eval_steps=train.eval_every,
            save_steps=train.save_every,
            seed=train.seed,
            metric_for_best_model=metric,
            greater_is_better=not metric.endswith("loss"),
            load_best_model_at_end=bool(train.best_metric),
        )

    def call(self, event: str, **values: Any) -> None:
        """One event for every callback."""
        for callback in self._callbacks:
            control = getattr(callback, event)(
                self._args, self.state, self.control, **self._known, **values
            )
            self.control = self.control if control is None else control
        if self._callbacks and self._accelerator.num_processes > 1:
            self.control = broadcast_object(self._accelerator, self.control)

    def step_begins(self, step: int) -> None:
        """Step ``step`` is next."""
        self.control.should_save = self.control.should_evaluate = False
        self.state.global_step = step - 1
        self.call("on_step_begin")

    def step_ended(self, step: int, values: dict[str, Any]) -> None:
        """With what the step reports."""
        self.state.global_step = step
        self.call("on_step_end")
        self.logged(step, values)

    def logged(self, step: int, values: dict[str, Any]) -> None:
        """Figures that were written to metrics.jsonl."""
        if self._callbacks:
            self.state.log_history.append({"step": step, **values})
            self.call("on_log", logs=dict(values))

    def evaluated(self, step: int, values: dict[str, float]) -> bool:
        """Whether these held-out figures are the best yet. ValueError where ``train.best_metric``
        is not among them."""
        self.call("on_evaluate", metrics=dict(values))
        value = values.get(self._args.metric_for_best_model)
        if value is None and self._best:
            raise ValueError(
                f"train.best_metric is {self._best!r}; held out there is {', '.join(values)}."
            )
        best = self.state.best_metric
        better = value is not None and (
            best is None or (value > best if self._args.greater_is_better else value < best)
        )
        if better:
            self.state.best_metric, self.state.best_global_step = value, step
        return better and bool(self._best)

    @property
    def stateful(self) -> list[Any]:
        """Callbacks that have a state to keep."""
        from transformers.trainer_callback import ExportableState

        return [c for c in self._callbacks if isinstance(c, ExportableState)]

    def write(self, folder: Path, *, is_main: bool) -> None:
        """``callbacks.json``, from the main process."""
        if is_main:
            state = {
                "best_metric": self.state.best_metric,
                "best_global_step": self.state.best_global_step,
                "stop": self.control.should_training_stop,
                "log_history": self.state.log_history,
                "callbacks": [c.state()["attributes"] for c in self.stateful],
            }
            (folder / "callbacks.json").write_text(json.dumps(state), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """What ``write`` wrote; nothing where the run had no callbacks then."""
        file = folder / "callbacks.json"
        if not file.exists():
            return
        state = json.loads(file.read_bytes())
        self.control.should_training_stop = state["stop"]
        for name in ("best_metric", "best_global_step", "log_history"):
            setattr(self.state, name, state[name])
        for callback, attributes in zip(self.stateful, state["callbacks"], strict=False):
            vars(callback).update(attributes)
