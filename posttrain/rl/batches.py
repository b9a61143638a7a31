"""Where reinforcement learning's batches come from: rollouts under the present policy, scored,
split into updates; and which prompts an iteration samples from.

iteration = prompts -> completions -> rewards -> advantages -> ``updates`` mini-batches, ``epochs``
times. The choice of prompts is a function of the seed, of how many were drawn, and of the success
rates seen so far; all of it is in the checkpoint. Kimi k1.5, arXiv:2501.12599 section 2.3.4:
curriculum (easy to hard), and prioritized sampling proportional to 1 - success rate.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from torch import nn

from posttrain.data.prompts import Prompt
from posttrain.files import whole_file, write_json_lines
from posttrain.packing.plan import count_units
from posttrain.resolve import check_rules, settings
from posttrain.rl.algorithms import Algorithm
from posttrain.rl.credit import CreditConfig, has_signal, trained_groups
from posttrain.rl.evaluate import EvaluationConfig, evaluate_prompts
from posttrain.rl.rollouts import Collector, Journal, RolloutBuffer, digest, fingerprint
from posttrain.rl.samples import keep_rollouts, rollout_metrics, show
from posttrain.rl.trajectory import TrajectoryGroup, from_row, to_row
from posttrain.training.config import UserFacingError
from posttrain.training.forward import ForwardPlan
from posttrain.training.loop import StepBatch
from posttrain.training.step import Reference
from posttrain.types import PromptGroup


@settings
class CurriculumConfig:
    """The order of prompts."""

    order: Literal["uniform", "curriculum", "prioritized"] = "uniform"
    """uniform: shuffled epochs. curriculum: uniform up to ``hard_from``, then only the hard ones;
    without ``hard_from`` from easy to hard. prioritized: drawn with probability proportional to 1 -
    success rate + floor."""
    difficulty_column: str = "difficulty"
    """Column with the difficulty (``posttrain prep difficulty`` writes it): higher is harder, 1 -
    pass rate for example."""
    hard_from: int = 0
    """Curriculum: iteration from which only prompts of at least the median difficulty are drawn
    (k1.5's ablation: 24)."""
    floor: float = 0.05
    """Prioritized: added to 1 - success rate, so that a solved prompt is not lost forever."""
    prior: float = 0.5
    """Prioritized: success rate of a prompt that was not sampled yet."""

    def __post_init__(self) -> None:
        check_rules("curriculum", self, "floor >= 0", "0 <= prior <= 1")


class PromptSampler:
    """``next(count, iteration)`` -> indices of prompts; ``update`` tells what came of them."""

    def __init__(
        self, config: CurriculumConfig, samples: Sequence[Mapping[str, Any]], *, seed: int
    ) -> None:
        self._config, self._seed, self._size = config, seed, len(samples)
        self._drawn = 0
        self._counts = np.zeros((self._size, 2))
        """[prompts] (completions, how many were right)"""
        self._by_difficulty = np.arange(self._size)
        if config.order == "curriculum":
            missing = next((s for s in samples if s.get(config.difficulty_column) is None), None)
            if missing is not None:
                raise ValueError(
                    f"{missing.get('_where', 'a sample')} has no column "
                    f"{config.difficulty_column!r}. Estimate it with `posttrain prep difficulty`, "
                    "or set --curriculum.order uniform."
                )
            difficulty = np.array([float(s[config.difficulty_column]) for s in samples])
            self._by_difficulty = np.argsort(difficulty, kind="stable")
            self._hard = np.flatnonzero(difficulty >= np.median(difficulty))

    def next(self, count: int, *, iteration: int) -> list[int]:
        """``count`` indices. A prompt comes twice in one call only where a pass over the data ends
        in it, or of fewer prompts than ``count``."""
        config = self._config
        if config.order == "prioritized":
            weights = priorities(self.success_rates(), floor=config.floor)
            draws = np.random.default_rng([self._seed, 1, self._drawn])
            chosen: list[int] = []
            while len(chosen) < count:
                # the smallest win: without replacement
                keys = -np.log(draws.random(self._size)) / np.maximum(weights, 1e-300)
                chosen += [int(i) for i in np.argsort(keys, kind="stable")[: count - len(chosen)]]
        elif config.order == "curriculum" and config.hard_from == 0:
            at = (self._drawn + np.arange(count)) % self._size
            chosen = self._by_difficulty[at].tolist()
        else:
            is_hard = config.order == "curriculum" and iteration >= config.hard_from
            pool = self._hard if is_hard else np.arange(self._size)
            chosen = [self._shuffled(pool, self._drawn + i) for i in range(count)]
        self._drawn += count
        return chosen

    def _shuffled(self, pool: np.ndarray, position: int) -> int:
        epoch, at = divmod(position, len(pool))
        order = np.random.default_rng([self._seed, 2, epoch, len(pool)]).permutation(len(pool))
        return int(pool[order[at]])

    def update(self, prompt: int, *, tries: int, successes: float) -> None:
        """Counts the completions of a prompt and how many were right."""
        self._counts[prompt] += (tries, successes)

    def success_rates(self) -> np.ndarray:
        """[prompts] share of right completions so far; the prior where there are none."""
        tries, successes = self._counts.T
        return np.where(tries > 0, successes / np.maximum(tries, 1), self._config.prior)

    def state_dict(self) -> dict[str, Any]:
        """As JSON has it; only prompts that were sampled."""
        seen = np.flatnonzero(self._counts[:, 0])
        return {"drawn": self._drawn, "seen": [[int(i), *self._counts[i].tolist()] for i in seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self._drawn = int(state["drawn"])
        self._counts[:] = 0
        for i, *counts in state["seen"]:
            self._counts[i] = counts


def priorities(success_rates: Sequence[float] | np.ndarray, *, floor: float = 0.0) -> np.ndarray:
    """Probabilities proportional to 1 - s_i + floor (k1.5 has none: what is solved never comes
    again); uniform if all are 0."""
    weights = 1.0 - np.asarray(success_rates, dtype=np.float64) + floor
    return weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))


@settings
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
    signal_reward: str = ""
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
        check_rules(
            "rollout", self, "group_size >= 1", "updates >= 1", "epochs >= 1", "oversample >= 1"
        )


class MismatchError(UserFacingError):
    """Sampler and trainer disagree about the probabilities of the same tokens."""


@dataclass(kw_only=True)
class RolloutBatches:
    """An iterator of ``StepBatch`` that the loop pulls from (``training.loop.Batches``): it samples
    an iteration when its mini-batches are used up. Built when policy and reference are ready."""

    config: RolloutConfig
    algorithm: Algorithm
    batch_size: int
    """Prompts per optimizer step."""
    seed: int
    prompts: Sequence[Prompt]
    curriculum: CurriculumConfig
    collector: Collector
    policy: nn.Module
    reference: Reference | None
    plan: ForwardPlan
    folder: Path
    """For the kept rollouts, held-out answers and journals."""
    held_out: Sequence[Prompt] | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        self._step = self._iteration = 0
        self._pending: list[StepBatch] = []
        collector, names = self.collector, self.collector.rewards.names
        self._buffer = RolloutBuffer(self.prompts, ranks=collector.accelerator.num_processes)
        samples = [p.sample for p in self.prompts]
        self._sampler = PromptSampler(self.curriculum, samples, seed=self.seed)
        if self.config.signal_reward and self.config.signal_reward not in names:
            raise UserFacingError(
                f"rollout.signal_reward is one of the rewards {', '.join(names)}; got "
                f"{self.config.signal_reward!r}."
            )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatch:
        """The next mini-batch, with the tokens of what this rank computes of it; a new iteration
        when there is none."""
        if not self._pending:
            self._pending = self._iterate(version=self._step)
            self._iteration += 1
        self._step += 1
        batch, loss = self._pending.pop(0), self.algorithm.objective
        groups = self.plan.deliver(
            batch.groups,
            coupled=loss.couples_completions,
            everything=loss.statistic is not None,
        )
        return replace(batch, groups=groups)

    def _iterate(self, *, version: int) -> list[StepBatch]:
        self.collector.engine.refresh(version)
        spent = self.collector.spent
        spent.clear()
        scored, rejected = self._collect()
        began = time.perf_counter()
        groups = trained_groups(
            scored,
            algorithm=self.algorithm,
            config=self.config,
            version=version,
            proximal=self.config.updates * self.config.epochs > 1,
            policy=self.policy,
            reference=self.reference,
            plan=self.plan,
        )
        prepare_s = time.perf_counter() - began
        every = [*zip(scored, groups, strict=True), *((s, None) for s in rejected)]
        mine = [(s, group) for s, group in every if s.rank == self.collector.rank]
        path = self._path("iteration", self._iteration, ".parquet")
        keep_rollouts(path, mine, iteration=self._iteration)
        shows = self.config.show_every and self._iteration % self.config.show_every == 0
        if shows and self.collector.rank == 0:
            show([s for s in scored if s.rank == 0], iteration=self._iteration)
        drawn = [*scored, *rejected]
        metrics = rollout_metrics(drawn, cost=len(drawn) / len(scored))
        timed = {
            "rollout_s": spent["rollout_s"],
            "reward_s": spent["reward_s"],
            "prepare_s": prepare_s,
            "rollout_tokens_per_s": spent["tokens"] / max(spent["rollout_s"], 1e-9),
            "scores_per_s": sum(len(s.trajectories) for s in drawn) / max(spent["reward_s"], 1e-9),
        }
        trained = [g for g in groups if g.num_trained]
        if not trained:
            raise UserFacingError(
                f"Iteration {self._iteration}: no completion can be trained (all unscored, "
                f"truncated or from older iterations). Look at {self.folder}, raise "
                "sampling.max_tokens, or turn rollout.mask_truncated off."
            )
        first, *others = self._mini_batches(trained, {"iteration": self._iteration, **metrics})
        fresh = self.algorithm.fresh_optimizer
        return [replace(first, metrics={**first.metrics, **timed}, fresh_optimizer=fresh), *others]

    def _path(self, what: str, number: int, suffix: str) -> Path:
        """Of what this process keeps: the first one's files have no rank in their name."""
        part = f"_rank{self.collector.rank}" if self.collector.rank else ""
        return self.folder / f"{what}_{number:06d}{part}{suffix}"

    def identity(self) -> str:
        """A digest of everything outside of the requests that decides completions and rewards:
        settings, ranks, the policy's weights."""
        c = self.collector
        settings = (c.sampling, c.rewards.config, c.rewards.names, type(c.engine).__name__)
        weights = fingerprint(self.policy.parameters())
        return f"{digest(settings)} {c.accelerator.num_processes} {weights}"

    def _collect(self) -> tuple[list[TrajectoryGroup], list[TrajectoryGroup]]:
        """(groups to train, groups that dynamic sampling leaves out)."""
        wanted = self.batch_size * self.config.updates
        dynamic = self.algorithm.dynamic_sampling
        limit = int(self.config.oversample * wanted) if dynamic else wanted
        kept: list[TrajectoryGroup] = []
        rejected: list[TrajectoryGroup] = []
        begun = 0
        run = f"{self.seed} {self._iteration} {self.identity()}"
        path = self.folder / f"iteration_{self._iteration:06d}_rank{self.collector.rank}.jsonl"
        with closing(Journal(path, run=run)) as journal:
            while begun < limit or self._buffer.groups:
                fresh = max(min(wanted - len(kept), limit - begun) - len(self._buffer.groups), 0)
                self._buffer.begin(
                    self._sampler.next(fresh, iteration=self._iteration),
                    iteration=self._iteration,
                    round=begun,
                    group_size=self.config.group_size,
                    seed=self.seed,
                )
                begun += fresh
                self.collector.roll(self._buffer, journal)
                finished = self._buffer.take_finished()
                for s in self.collector.score(finished, journal, iteration=self._iteration):
                    known = [t.is_right for t in s.trajectories if t.is_right is not None]
                    self._sampler.update(s.index, tries=len(known), successes=sum(known))
                    is_kept = not dynamic or s.has_signal(self.config.signal_reward)
                    (kept if is_kept else rejected).append(s)
                if len(kept) >= (wanted if dynamic else self.config.updates):
                    break
        if not kept:  # dynamic sampling found no group with a signal: its step moves nothing
            kept, rejected = rejected[-wanted:], rejected[:-wanted]
        return kept, rejected

    def _mini_batches(
        self, groups: Sequence[PromptGroup], metrics: dict[str, Any]
    ) -> list[StepBatch]:
        """Groups in a random order, cut into ``updates`` parts; groups without a signal are left
        out where that is exact."""
        batches: list[StepBatch] = []
        for epoch in range(self.config.epochs):
            draws = np.random.default_rng([self.seed, 3, self._iteration, epoch])
            order = draws.permutation(len(groups))
            for part in np.array_split(order, min(self.config.updates, len(groups))):
                used = whole = [groups[i] for i in part]
                if self.algorithm.skips(first_update=not batches):
                    # where the gradient is 0, a step needs a group all the same
                    least = min(whole, key=lambda g: g.num_tokens_shared)
                    used = [g for g in whole if has_signal(g)] or [least]
                batches.append(StepBatch(groups=used, counts=count_units(whole), metrics=metrics))
        return batches

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raise MismatchError where sampler and trainer disagree about a step's tokens."""
        mean, limit = metrics.get("sampler_mismatch_nats", 0.0), self.config.max_mismatch_nats
        if limit and not self.config.keep_old_segments and not mean <= limit:
            raise MismatchError(
                f"Sampler and trainer differ by {mean:.3g} nats on the mean token (limit "
                f"{limit:g}): they do not have the same weights or temperature, or the sampler "
                "truncates without saying so. Compare --sampling with the engine's settings; "
                "rollout.max_mismatch_nats 0 turns this check off."
            )

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out figures under the present weights; the answers are kept."""
        if self.held_out is None:
            return {}
        self.collector.engine.refresh(step)
        found = evaluate_prompts(self.collector, self.held_out, self.evaluation, seed=self.seed)
        if self.collector.rank == 0:
            with whole_file(self._path("held_out", step, ".jsonl")) as partial:
                write_json_lines(partial, found.rows())
        return found.metrics(powers=self.evaluation.pass_at_powers)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next, and the mini-batches that are still to be
        trained, in plain values; each rank has its own tokens in it."""
        return {
            "step": self._step,
            "iteration": self._iteration,
            "sampler": self._sampler.state_dict(),
            "buffer": self._buffer.state_dict(),
            "pending": to_row(self._pending),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave, also after a trip through JSON."""
        self._step, self._iteration = int(state["step"]), int(state["iteration"])
        self._sampler.load_state_dict(state["sampler"])
        self._buffer.load_state_dict(state["buffer"])
        self._pending = [from_row(StepBatch, batch) for batch in state["pending"]]

    def saved(self) -> None:
        """A checkpoint with the present state is in place: what was drawn before is not needed."""
        journals = self.folder.glob("iteration_*.jsonl") if self.collector.rank == 0 else ()
        for path in journals:
            if int(path.name.split("_")[1]) < self._iteration:
                path.unlink(missing_ok=True)
