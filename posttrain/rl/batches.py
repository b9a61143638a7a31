"""Where reinforcement learning's batches come from: rollouts under the present policy, scored,
split into updates.

iteration = prompts -> completions -> rewards -> advantages -> ``updates`` mini-batches, ``epochs``
times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.packing.plan import count_units
from posttrain.rl.algorithms import Algorithm
from posttrain.rl.credit import CreditConfig, has_signal, trained_groups
from posttrain.rl.curriculum import PromptSampler
from posttrain.rl.evaluate import Evaluation
from posttrain.rl.log import RolloutLog, rollout_metrics
from posttrain.rl.rollouts import Collector, ScoredGroup, Timing, forget_journals, open_journal
from posttrain.rl.trajectory import RolloutBuffer
from posttrain.training.config import UserFacingError
from posttrain.training.loop import Loop, StepBatch
from posttrain.training.sharding import gather_object
from posttrain.types import Completion, Counts, Logps, Loss, LossOutput, PromptGroup, Ragged


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(CreditConfig):
    """How an iteration is made."""

    group_size: int = 8
    """Completions of each prompt."""
    updates: int = 1
    """Optimizer steps on the rollouts of an iteration, each on train.batch_size prompts.
    DeepSeek-R1: 16."""
    epochs: int = 1
    """Passes over the rollouts of an iteration."""
    oversample: float = 3.0
    """Dynamic sampling: at most this many times the prompts that are needed."""
    signal: str = ""
    """Dynamic sampling keeps prompts whose completions differ in this reward (DAPO: the accuracy,
    so that 0 < right < G, Yu et al. 2025, arXiv:2503.14476 eq. 11); empty: in the weighted sum,
    where a reward for length lets prompts pass that are all right."""
    max_mismatch_nats: float = 0.5
    """The run stops when sampler and trainer disagree by more than this on the mean token's
    log-prob; 0: never. With keep_old_segments it does not: tokens of older policies differ, as they
    should."""
    show_every: int = 10
    """Iterations between tables of samples; 0: none."""

    def __post_init__(self) -> None:
        if min(self.group_size, self.updates, self.epochs) < 1 or self.oversample < 1:
            raise ValueError(
                "rollout.group_size, updates, epochs and oversample are >= 1; got "
                f"{self.group_size}, {self.updates}, {self.epochs}, {self.oversample}."
            )


class MismatchError(UserFacingError):
    """Sampler and trainer disagree about the probabilities of the same tokens."""


@dataclass(kw_only=True)
class RolloutSource:
    """The ``Source`` of ``training/loop.py``. ``make_collector`` is called when the policy is
    ready."""

    config: RolloutConfig
    algorithm: Algorithm
    batch_size: int
    """Prompts per optimizer step."""
    seed: int
    sampler: PromptSampler
    make_collector: Callable[[Loop], Collector]
    evaluator: Callable[[Collector], Evaluation] | None
    folder: Path
    """For the kept rollouts, held-out answers and journals."""
    pass_at_powers: bool = False
    """Held-out pass@k for k = 2, 4, 8, ... below the samples too."""

    def __post_init__(self) -> None:
        self._iteration = self._saved_iteration = 0
        self._pending: list[StepBatch] = []
        self._buffer = RolloutBuffer()
        self._differences: list[torch.Tensor] = []

    def start(self, loop: Loop) -> None:
        """Once, when policy and reference are ready."""
        self._loop = loop
        self._collector = self.make_collector(loop)
        if self._collector.sampling.truncates and not self._collector.engine.returns_kept_ids:
            raise UserFacingError(
                "top-k, top-p or min-p leave a part of the vocabulary, and this engine does not "
                "say which: the trainer could not renormalise its log-probs. Sample from the "
                "whole distribution, or use --engine local."
            )
        names = self._collector.rewards.names
        if self.config.signal and self.config.signal not in names:
            raise UserFacingError(
                f"rollout.signal is one of the rewards {', '.join(names)}; got "
                f"{self.config.signal!r}."
            )
        self._log = RolloutLog(self.folder, is_main=loop.accelerator.is_main_process)

    def watched(self, loss: Loss) -> Loss:
        """The loss; what it is given is compared with the sampler's log-probs (``check``)."""

        def watching(logps: Logps) -> LossOutput:
            if "sampler_logps" in logps and logps.logps_T.numel():
                difference = logps.proximal_T.detach() - logps["sampler_logps"]
                self._differences.append(difference.double().cpu())
            return loss(logps)

        watching.__name__ = watching.__qualname__ = loss.name
        return replace(loss, function=watching, options={})

    def batch(self, step: int) -> StepBatch:
        """The next mini-batch; a new iteration when there is none."""
        if not self._pending:
            self._pending = self._iterate(version=step)
            self._iteration += 1
        return self._pending.pop(0)

    def _iterate(self, *, version: int) -> list[StepBatch]:
        self._collector.engine.refresh(version)
        self._collector.timing = Timing()
        scored, rejected = self._collect()
        began = time.perf_counter()
        groups = trained_groups(
            scored,
            algorithm=self.algorithm,
            config=self.config,
            version=version,
            proximal=self.config.updates * self.config.epochs > 1,
            policy=self._loop.policy,
            reference=self._loop.reference,
            plan=self._loop.forward_plan,
        )
        prepare_s = time.perf_counter() - began
        self._log.keep(scored, groups, rejected, iteration=self._iteration)
        if self.config.show_every and self._iteration % self.config.show_every == 0:
            self._log.show(scored, iteration=self._iteration)
        drawn = [*scored, *rejected]
        metrics = rollout_metrics(drawn, cost=len(drawn) / len(scored))
        timing = self._collector.timing
        timed = {
            "rollout_s": timing.rollout_s,
            "reward_s": timing.reward_s,
            "prepare_s": prepare_s,
            "rollout_tokens_per_s": timing.tokens / max(timing.rollout_s, 1e-9),
            "scores_per_s": sum(len(s.scores) for s in drawn) / max(timing.reward_s, 1e-9),
        }
        batches = self._mini_batches([g for g in groups if g.num_trained])
        if not batches:
            raise UserFacingError(
                f"Iteration {self._iteration}: no completion can be trained (all unscored, "
                f"truncated or from older iterations). Look at {self.folder}, raise "
                "sampling.max_tokens, or turn rollout.mask_truncated off."
            )
        batches = [replace(b, metrics={"iteration": self._iteration, **metrics}) for b in batches]
        batches[0] = replace(
            batches[0],
            metrics={**batches[0].metrics, **timed},
            fresh_optimizer=self.algorithm.fresh_optimizer,
        )
        return batches

    def _collect(self) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """(groups to train, groups that dynamic sampling leaves out)."""
        wanted = self.batch_size * self.config.updates
        kept: list[ScoredGroup] = []
        rejected: list[ScoredGroup] = []
        begun = 0
        limit = int(self.config.oversample * wanted) if self.algorithm.dynamic_sampling else wanted
        accelerator = self._loop.accelerator
        journal = open_journal(
            self.folder,
            iteration=self._iteration,
            rank=accelerator.process_index,
            run=f"{self.seed} {self._iteration} {self._collector.identity()}",
        )
        try:
            while True:
                fresh = max(min(wanted - len(kept), limit - begun) - len(self._buffer.groups), 0)
                picked = self.sampler.next(fresh, iteration=self._iteration) if fresh else []
                self._buffer.begin(
                    picked,
                    iteration=self._iteration,
                    round=begun,
                    group_size=self.config.group_size,
                    seed=self.seed,
                )
                begun += fresh
                self._collector.roll(self._buffer, journal)
                scored = self._collector.score(
                    self._buffer.take_finished(), journal, iteration=self._iteration
                )
                self._learn_rates(scored)
                for s in scored:
                    (
                        kept
                        if not self.algorithm.dynamic_sampling or s.has_signal(self.config.signal)
                        else rejected
                    ).append(s)
                enough = len(kept) >= (
                    wanted if self.algorithm.dynamic_sampling else self.config.updates
                )
                if enough or (begun >= limit and not self._buffer.groups):
                    break
        finally:
            journal.close()
        if not kept:  # dynamic sampling found no group with a signal: its step moves nothing
            kept, rejected = rejected[-wanted:], rejected[:-wanted]
        return kept, rejected

    def _learn_rates(self, scored: Sequence[ScoredGroup]) -> None:
        for s in scored:
            known = [score.verdict for score in s.scores if score.verdict is not None]
            self.sampler.update(
                s.group.prompt, tries=len(known), successes=sum(v > 0 for v in known)
            )

    def _mini_batches(self, groups: Sequence[PromptGroup]) -> list[StepBatch]:
        """Groups in a random order, cut into ``updates`` parts; groups without a signal are left
        out where that is exact."""
        batches: list[StepBatch] = []
        if not groups:
            return batches
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.seed, 3, self._iteration, epoch]).permutation(
                len(groups)
            )
            for part in np.array_split(order, min(self.config.updates, len(groups))):
                whole = [groups[i] for i in part]
                first = not batches
                used = (
                    [g for g in whole if has_signal(g)]
                    if self.algorithm.skips(first_update=first)
                    else whole
                )
                used = used or [
                    min(whole, key=lambda g: g.num_tokens_shared)
                ]  # its gradient is 0; a step needs a group
                batches.append(StepBatch(groups=used, counts=count_units(whole)))
        return batches

    def check(self) -> dict[str, Any]:
        """Sampler against trainer, over all ranks. Raises MismatchError."""
        mine = torch.cat(self._differences).numpy() if self._differences else np.zeros(0)
        self._differences = []
        every = np.abs(np.concatenate(gather_object(self._loop.accelerator, mine)))
        if not len(every):
            return {}
        mean, ratios = float(every.mean()), np.exp(every)
        limit = self.config.max_mismatch_nats
        if limit and not self.config.keep_old_segments and not mean <= limit:
            raise MismatchError(
                f"Sampler and trainer differ by {mean:.3g} nats on the mean token (limit "
                f"{limit:g}): they do not have the same weights or temperature, or the sampler "
                "truncates without saying so. Compare --sampling with the engine's settings; "
                "rollout.max_mismatch_nats 0 turns this check off."
            )
        return {
            "sampler_mismatch_nats": mean,
            "sampler_ratio_p99": float(np.quantile(ratios, 0.99)),
            "sampler_ratio_max": float(ratios.max()),
        }

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out figures under the present weights; the answers are kept."""
        if self.evaluator is None:
            return {}
        self._collector.engine.refresh(step)
        evaluation = self.evaluator(self._collector)
        self._log.keep_answers(evaluation, step=step)
        return evaluation.metrics(powers=self.pass_at_powers)

    def write(self, folder: Path, *, is_main: bool) -> None:
        """Everything that decides what comes next, and the mini-batches that are still to be
        trained; the same on all ranks."""
        if not is_main:
            return
        state = {
            "iteration": self._iteration,
            "sampler": self.sampler.state_dict(),
            "buffer": self._buffer.state_dict(),
            "pending": [_batch_to_json(b) for b in self._pending],
        }
        (folder / "rollouts.json").write_text(json.dumps(state), encoding="utf-8")
        forget_journals(
            self.folder, before=self._saved_iteration
        )  # this checkpoint is not in place yet: the last one is
        self._saved_iteration = self._iteration

    def read(self, folder: Path) -> None:
        """What ``write`` wrote."""
        state = json.loads((folder / "rollouts.json").read_text(encoding="utf-8"))
        self._iteration = self._saved_iteration = int(state["iteration"])
        self.sampler.load_state_dict(state["sampler"])
        self._buffer.load_state_dict(state["buffer"])
        self._pending = [_batch_from_json(b) for b in state["pending"]]


def _batch_to_json(batch: StepBatch) -> dict[str, Any]:
    def column(value: Any) -> Any:
        if isinstance(value, Ragged):
            return {"values": value.values.tolist(), "ends": value.ends.tolist()}
        return value if isinstance(value, float) else value.tolist()

    groups = [
        {
            "prompt_ids": g.prompt_ids.tolist(),
            "completions": [
                {
                    "token_ids": c.token_ids.tolist(),
                    "loss_mask": c.loss_mask.tolist(),
                    "columns": {name: column(value) for name, value in c.columns.items()},
                }
                for c in g.completions
            ],
            "meta": dict(g.meta),
        }
        for g in batch.groups
    ]
    return {**vars(batch), "groups": groups, "counts": batch.counts and asdict(batch.counts)}


def _batch_from_json(entry: dict[str, Any]) -> StepBatch:
    def column(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return Ragged(values=np.asarray(value["values"]), ends=np.asarray(value["ends"]))

    groups = [
        PromptGroup(
            prompt_ids=g["prompt_ids"],
            completions=[
                Completion(
                    token_ids=c["token_ids"],
                    loss_mask=c["loss_mask"],
                    columns={name: column(value) for name, value in c["columns"].items()},
                )
                for c in g["completions"]
            ],
            pairs=(),
            meta=g["meta"],
        )
        for g in entry["groups"]
    ]
    counts = Counts(**entry["counts"]) if entry["counts"] else None
    return StepBatch(**{**entry, "groups": groups, "counts": counts})
