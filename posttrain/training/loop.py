"""The loop of every method: global batch -> plan -> step gradient -> check -> optimizer -> metrics,
evaluation, checkpoint.

What differs between methods comes in from outside: where a step's groups come from (a pure function
of the step), the loss, and what is evaluated.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from posttrain.models.load import save_model
from posttrain.models.policy import Policy, has_adapters
from posttrain.models.sharding import whole_state
from posttrain.packing.plan import PackingConfig, StepPlan, count_units
from posttrain.precision import PrecisionPlan
from posttrain.resolve import flat
from posttrain.training import sharding
from posttrain.training.callbacks import Callbacks
from posttrain.training.config import TrainConfig
from posttrain.training.forward import ForwardPlan, Report, batch_mean, evaluate
from posttrain.training.launch import FreedMemory
from posttrain.training.metrics import MetricsLog, measure_matmul_peak, model_flops
from posttrain.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    build_schedule,
    refuse_sharded,
)
from posttrain.training.reference import RunReference
from posttrain.training.run_folder import Extra, RunFolder, save_whole
from posttrain.training.selfcheck import self_check
from posttrain.training.step import (
    NonFiniteError,
    StepResult,
    clip_and_check,
    step_gradient,
)
from posttrain.types import Counts, Loss, PromptGroup, as_loss, is_held_out

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one optimizer step trains, where that is more than a list of groups (reinforcement
    learning)."""

    groups: Sequence[PromptGroup]
    counts: Counts | None = None
    """Denominators; None: counted over ``groups``. Groups without a learning signal may be left out
    and still count here."""
    fresh_optimizer: bool = False
    """The optimizer forgets its state before this step (Kimi k1.5)."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Further entries of the step's line in metrics.jsonl, put before the step's own."""


class Batches(Protocol):
    """An iterator of batches that depend on the policy; its state is part of every checkpoint."""

    def __next__(self) -> StepBatch:
        """The global batch of the next step, the same on every rank."""

    def check(self, metrics: Mapping[str, float]) -> None:
        """After a step's gradient and before its update: raise to stop the run."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out figures, named eval_*."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values; each rank saves and gets back its own."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""

    def saved(self) -> None:
        """A checkpoint with the present state is in place."""


@dataclass(frozen=True)
class _BatchState:
    """``Batches`` as a part of the checkpoint."""

    batches: Batches
    rank: int

    def write(self, folder: Path, *, is_main: bool) -> None:
        """A file for each process: it has the tokens that the process holds."""
        text = json.dumps(self.batches.state_dict())
        (folder / f"rollouts_{self.rank}.json").write_text(text, encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Load the state saved by ``write``."""
        text = (folder / f"rollouts_{self.rank}.json").read_bytes()
        self.batches.load_state_dict(json.loads(text))


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    folder: Path
    """The run folder."""
    final: Path
    """The trained model or adapter."""
    step: int
    """Optimizer steps done in total."""
    metrics: dict[str, Any]
    """The last step's metrics and the last evaluation's."""
    longest_row: int
    """Tokens of the longest row that was trained; 0 where none was."""


@dataclass(kw_only=True)
class Loop:
    """One training run. ``batches(step)`` is the global batch of a step, the same on every rank, a
    pure function of the step; where ``run`` is given others, ``batches(0)`` is only what the
    self-check compares."""

    accelerator: Any
    precision: PrecisionPlan
    model: nn.Module
    tokenizer: Any
    loss: Loss
    batches: Callable[[int], Sequence[PromptGroup]]
    num_steps: int
    train: TrainConfig
    optimizer_config: OptimizerConfig
    packing: PackingConfig
    eval_groups: Mapping[str, Sequence[PromptGroup]] = field(default_factory=dict)
    """Held-out groups by name; the name of the only set may be empty."""
    eval_loss: Loss | None = None
    """What is evaluated; None: the training loss."""
    eval_report: Report | None = None
    """Further held-out figures of a method."""
    compute_metrics: Report | None = None
    """The user's."""
    callbacks: Sequence[Any] = ()
    """transformers.TrainerCallback objects."""
    stream: Extra | None = None
    """Training rows that come in a stream, which a resumed run reads again up to its step."""
    policy_class: type[Policy] = Policy
    """The packed forward: log-probs, or scores of a reward model."""
    reference: RunReference | None = None
    """The reference model of preference losses and KL terms."""
    temperature: float = 1.0
    """Log-probs are those of the logits divided by it."""
    shown: Sequence[str] = ("loss", "lr", "tokens_per_s")
    """Metrics of the live line."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Resolved settings, saved beside every checkpoint."""
    data_counts: dict[str, Any] = field(default_factory=dict)
    """Read, kept, truncated and dropped samples; the first line of metrics.jsonl."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else the run folder's about.json says: the method, the plan of the memory."""

    longest_row: int = field(default=0, init=False)
    """Tokens of the longest row so far."""

    identity: dict[str, Any] = field(default_factory=dict)
    """Digests of what decides the weights beside the settings (data, model, loss); a run is not
    continued with others."""

    def __post_init__(self) -> None:
        self._is_prepared = False
        self._sampled: Batches | None = None
        self._callbacks: Callbacks | None = None
        self._freed = FreedMemory()
        self.loss = as_loss(self.loss)
        self.eval_loss = self.eval_loss and as_loss(self.eval_loss)

    def run(self, batches: Batches | None = None) -> TrainResult:
        """Trains to ``num_steps``, from the newest valid checkpoint if there is one; writes the run
        folder. ``batches``: what is trained, where it is sampled from the policy (``prepare``)."""
        self._sampled = batches
        with RunFolder(
            self.train,
            self.accelerator,
            self.settings,
            num_steps=self.num_steps,
            about=self.about,
        ) as folder:
            return self._run(folder)

    def _run(self, folder: RunFolder) -> TrainResult:
        if self.train.trackers:
            plain = {
                k: v if isinstance(v, (int, float, str, bool)) else str(v)
                for k, v in flat(self.settings)
            }
            self.accelerator.init_trackers("posttrain", config=plain)
        self.prepare()
        self._callbacks = Callbacks(
            self.callbacks,
            self.train,
            self.accelerator,
            num_steps=self.num_steps,
            model=sharding.unwrapped(self.policy).model,
            processing_class=self.tokenizer,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
        )
        start = folder.resume(
            self.policy,
            self.optimizer,
            self.schedule,
            identity=self.identity,
            machine={
                "mode": self.mode,
                "precision": self.precision.name,
                "sharding": sharding.kind(self.accelerator),
            },
            extras=self._extras,
        )
        if start > self.num_steps:
            raise ValueError(
                f"{folder.path} is at step {start}, past the {self.num_steps} steps asked for. Set "
                "--train.max_steps higher, or another --train.name."
            )
        metrics = MetricsLog(
            folder.metrics_path,
            num_steps=self.num_steps,
            start=start,
            accelerator=self.accelerator,
            log_every=self.train.log_every,
            shown=self.shown,
        )
        try:
            step, last = self._steps(folder, metrics, self._callbacks, start)
        finally:
            metrics.close()
        final = self.save(folder.path / "final")
        if self.train.trackers:
            self.accelerator.end_training()
        return TrainResult(
            folder=folder.path,
            final=final,
            step=step,
            metrics=last,
            longest_row=self.longest_row,
        )

    def _steps(
        self, folder: RunFolder, metrics: MetricsLog, callbacks: Callbacks, start: int
    ) -> tuple[int, dict[str, Any]]:
        """Steps to the end, or to where a callback stops; the last one and its metrics."""
        last, control = folder.last_metrics(), callbacks.control
        callbacks.call("on_train_begin")
        if start == 0:
            metrics.evaluation(0, {"data": self.data_counts, **self.evaluate(0)})
        step, is_end = start, start == self.num_steps or control.should_training_stop
        while not is_end:
            step += 1
            callbacks.step_begins(step)
            values = self.step(step)
            metrics.step(step, values)
            callbacks.step_ended(step, values)
            last = {"step": step, **values, **{k: v for k, v in last.items() if is_held_out(k)}}
            is_end = step == self.num_steps or callbacks.control.should_training_stop
            if is_end or _is_due(step, self.train.eval_every, callbacks.control.should_evaluate):
                last |= self._evaluated(step, folder, metrics, callbacks)
                is_end = is_end or callbacks.control.should_training_stop
            if is_end or _is_due(step, self.train.save_every, callbacks.control.should_save):
                folder.save(step, self.policy, self.optimizer, self.schedule, extras=self._extras)
                if self._sampled is not None:
                    self._sampled.saved()
                callbacks.call("on_save")
        callbacks.call("on_train_end")
        return step, last

    def _evaluated(
        self, step: int, folder: RunFolder, metrics: MetricsLog, callbacks: Callbacks
    ) -> dict[str, float]:
        """Held-out figures, written; where they are the best, so are the weights."""
        values = self.evaluate(step)
        if values:
            metrics.evaluation(step, values)
            callbacks.logged(step, values)
            if callbacks.evaluated(step, values):
                self.save(folder.path / "best")
        return values

    def prepare(self) -> None:
        """Policy, self-check, optimizer, and what accelerate makes of them. ``run`` calls it unless
        it was called before."""
        if self._is_prepared:
            return
        self._is_prepared = True
        device = self.accelerator.device
        # Weights that are gathered in forward only can be compared only then; others before
        # accelerate puts autocast around the forward, in their own precision.
        gathers = sharding.shards_weights(self.accelerator)
        if not gathers:  # else each process moves only its part
            self.model.to(device)
        policy = self.policy_class(
            self.model, self.packing, device_type=device.type, temperature=self.temperature
        )
        if self.train.self_check and not gathers:
            self._self_check(policy)
        self.mode, limit = policy.forward_mode.mode, policy.forward_mode.length_limit
        self.forward_plan = ForwardPlan(
            accelerator=self.accelerator,
            mode=self.mode,
            max_tokens=self.packing.max_tokens,
            length_limit=limit,
        )
        self.flops = model_flops(self.model)
        self.peak_flops = measure_matmul_peak(device, getattr(torch, self.precision.compute))
        if self.reference is not None:
            self.reference.build(policy, self.accelerator)
        refuse_sharded(self.optimizer_config, sharding.kind(self.accelerator))
        optimizer = build_optimizer(policy, self.optimizer_config, plan=self.precision)
        self.schedule = build_schedule(optimizer, self.optimizer_config, self.num_steps)
        self.policy, self.optimizer = sharding.prepare(self.accelerator, policy, optimizer)
        if (
            sharding.base_optimizer(self.optimizer) is not optimizer
        ):  # DeepSpeed's own, for an optimizer on the CPU
            self.schedule = build_schedule(
                sharding.base_optimizer(self.optimizer), self.optimizer_config, self.num_steps
            )
        if self.train.self_check and gathers:
            self._self_check(policy)
            self.mode = policy.forward_mode.mode
            self.forward_plan = replace(self.forward_plan, mode=self.mode)
        torch.manual_seed(self.train.seed + self.accelerator.process_index)
        self.policy.train()
        if self.reference is not None:
            self.reference.start(self.policy, self.forward_plan)

    def _self_check(self, policy: Policy) -> None:
        """Every process compares the same two groups."""
        first = [g for g in self.batches(0) if g.num_trained]
        both = [first[0], max(first, key=lambda g: g.num_tokens_shared)] if first else []
        lowered = (
            sharding.kind(self.accelerator) == "fsdp2"
            and self.precision.compute != self.precision.weight
        )
        compute = getattr(torch, self.precision.compute) if lowered else None
        rms = self_check(policy, both, max_tokens=self.packing.max_tokens, compute=compute)
        if self.accelerator.is_main_process:
            how = f"{policy.forward_mode.mode}: {policy.forward_mode.reason}"
            print(f"self-check passed: packed and plain log-probs agree to {rms:.1e} nats ({how})")

    def save(self, folder: Path) -> Path:
        """Writes the model (or adapters) and the tokenizer, whole or not at all, over what is
        there. Sharded weights are gathered by all processes; one writes."""
        model, state = sharding.unwrapped(self.policy).model, None
        if sharding.shards_weights(self.accelerator):
            state = whole_state(
                model, keep=self.accelerator.is_main_process, only_trained=has_adapters(model)
            )
        return save_whole(
            folder,
            self.accelerator,
            lambda path: save_model(model, self.tokenizer, path, state=state),  # type: ignore[arg-type]
        )

    @property
    def _extras(self) -> list[Extra]:
        rank = self.accelerator.process_index
        state = None if self._sampled is None else _BatchState(self._sampled, rank)
        keeps = self._callbacks if self.callbacks or self.train.best_metric else None
        every = (self.reference, state, keeps, self.stream)
        return [extra for extra in every if extra is not None]

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step: the whole of training, top to bottom."""
        began = time.perf_counter()
        if self._sampled is None:
            self._freed.check()
            batch = StepBatch(groups=self.batches(step - 1))
        else:
            self._freed.give_back()
            batch = next(self._sampled)
            self._freed.give_back()
        groups = batch.groups
        sampled = time.perf_counter()
        plan = self.forward_plan.split(groups, coupled=self.loss.couples_completions)
        plan = replace(plan, counts=batch.counts or plan.counts)
        self.longest_row = max(
            self.longest_row,
            *(m.num_tokens for rank in plan.ranks for m in rank if not m.is_dummy),
            0,
        )
        result = step_gradient(
            self.accelerator,
            self.policy,
            groups,
            plan,
            self.loss,
            mode=self.mode,
            reference=self.reference if self.loss.reference else None,
            batch_mean=batch_mean(
                self.forward_plan, self.policy, self.reference, self.loss, groups
            ),
        )
        if self._sampled is not None:
            self._sampled.check(result.metrics)
        grad_norm = clip_and_check(
            self.accelerator,
            self.policy,
            result,
            groups,
            max_grad_norm=self.optimizer_config.max_grad_norm,
            step=step,
        )
        lr = float(self.schedule.get_last_lr()[0])
        if batch.fresh_optimizer:
            sharding.forget_moments(self.accelerator, self.optimizer)
        sharding.take_step(self.accelerator, self.policy, self.optimizer)
        if self.reference is not None:
            self.reference.after_step(step, self.policy)
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        if not skipped:
            self.schedule.step()
        elif self.accelerator.scaler.get_scale() < 1.0:
            raise NonFiniteError(
                f"Step {step}: the gradient overflows at every loss scale down to 1. Use "
                "--train.precision bf16 or fp32."
            )
        ended = time.perf_counter()
        own = self._metrics(
            result, plan, grad_norm=grad_norm, lr=lr, skipped=skipped, seconds=ended - began
        )
        update_s = ended - sampled
        phase = (
            {}
            if self._sampled is None
            else {"update_s": update_s, "update_tokens_per_s": plan.counts.tokens / update_s}
        )
        return {**batch.metrics, **own, **phase}

    def _metrics(
        self,
        result: StepResult,
        plan: StepPlan,
        *,
        grad_norm: float,
        lr: float,
        skipped: bool,
        seconds: float,
    ) -> dict[str, Any]:
        """One line of metrics.jsonl; names with their unit, timings last
        (``metrics.TIMING_KEYS``)."""
        micro_batches = [m for rank in plan.ranks for m in rank if not m.is_dummy]
        computed = sum(m.num_tokens for m in micro_batches)
        mine = [
            self.flops.step(b.layout, num_trained=int(b.targets_T.shape[0]))
            for b, _ in result.batches
        ]
        flops_per_s = sum(mine) / seconds
        return {
            **result.metrics,
            "loss": result.loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "trained_tokens": plan.counts.tokens,
            "computed_tokens": computed,
            "micro_batches": len(micro_batches),
            **({"skipped_step": 1} if skipped else {}),
            "step_s": seconds,
            "tokens_per_s": plan.counts.tokens / seconds,
            "tflops_per_s": flops_per_s / 1e12,
            "peak_fraction": flops_per_s / self.peak_flops,
        }

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out figures of the present weights, named eval_*; of several sets, eval_<set>_*."""
        if self._sampled is not None:
            return self._sampled.evaluate(step)
        found: dict[str, float] = {}
        for name, groups in self.eval_groups.items():
            found |= named(name, self._evaluate(groups))
        return found

    def _evaluate(self, groups: Sequence[PromptGroup]) -> dict[str, float]:
        return evaluate(
            self.forward_plan,
            self.policy,
            groups,
            self.eval_loss or self.loss,
            reference=self.reference,
            counts=count_units(groups),
            reports=[r for r in (self.eval_report, self.compute_metrics) if r is not None],
        )


def named(name: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Figures of the held-out set ``name``: eval_loss is eval_<name>_loss, rewards_eval/margins is
    eval_<name>_rewards/margins."""
    if not name:
        return dict(figures)
    return {
        f"eval_{name}_{key.removeprefix('eval_').replace('_eval/', '/')}": value
        for key, value in figures.items()
    }


def _is_due(step: int, every: int, asked: bool) -> bool:
    return asked or (every > 0 and step % every == 0)
