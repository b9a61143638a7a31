"""Prompts -> completions -> rewards, over all ranks: each samples and scores its share, then all
have everything."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from posttrain.algorithms import all_equal
from posttrain.data.chat import stop_token_ids
from posttrain.data.prompts import Prompt
from posttrain.rewards import CompletionText
from posttrain.rewards.compose import RewardError, Rewards, Scored
from posttrain.rollout.buffer import RolloutBuffer, TrajectoryGroup
from posttrain.rollout.engine import Engine, Request, Sampled, SamplingConfig
from posttrain.rollout.journal import Journal, digest, fingerprint, journalled
from posttrain.training.sharding import gather_object

_OPENING_TOKENS = 8  # enough for <think> and what follows it

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    """The finished completions of a prompt with their rewards."""

    group: TrajectoryGroup
    prompt: Prompt
    texts: tuple[CompletionText, ...]
    scores: tuple[Scored, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each reward function."""

    @property
    def totals(self) -> list[float | None]:
        """[completion] rewards."""
        return [s.total for s in self.scores]

    def has_signal(self, name: str = "") -> bool:
        """Whether two completions have different rewards: in all, or of the function ``name``."""
        values = [s.parts.get(name, s.total) for s in self.scores]
        return not all_equal([v for v in values if v is not None])


@dataclass(kw_only=True)
class Timing:
    """Seconds and tokens of one iteration, on this rank."""

    rollout_s: float = 0.0
    reward_s: float = 0.0
    tokens: int = 0


@dataclass(kw_only=True)
class Collector:
    """Samples and scores what the buffer holds. The same calls in the same order on every rank."""

    accelerator: Any
    engine: Engine
    rewards: Rewards
    prompts: Sequence[Prompt]
    tokenizer: Any
    sampling: SamplingConfig
    by_completion: bool
    """Whether the engine draws a completion differently the second time: its completions are then
    journalled one by one."""
    weights: Callable[[], Iterable[Tensor]] | None = None
    """The policy's parameters: a journal of other weights is not used again."""
    timing: Timing = field(default_factory=Timing)

    def roll(self, buffer: RolloutBuffer, journal: Journal | None) -> None:
        """Draws for every open completion of the buffer: to its end, or up to the iteration's
        budget."""
        began = time.perf_counter()
        wanted = buffer.requests([p.ids for p in self.prompts])
        mine = self._share(range(len(wanted)))

        def draw() -> list[tuple[int, list[Sampled]]]:
            requests: list[Request] = [wanted[i][0] for i in mine]
            if journal is None:
                return list(zip(mine, self.engine.generate(requests, self.sampling), strict=True))
            drawn = journalled(
                self.engine, journal, requests, self.sampling, by_completion=self.by_completion
            )
            return list(zip(mine, drawn, strict=True))

        for i, drawn in self._from_all(draw):
            for trajectory, sampled in zip(wanted[i][1], drawn, strict=True):
                trajectory.extend(sampled)
                self.timing.tokens += len(sampled.token_ids)
        self.timing.rollout_s += time.perf_counter() - began

    def score(
        self, groups: Sequence[TrajectoryGroup], journal: Journal | None, *, iteration: int
    ) -> list[ScoredGroup]:
        """Rewards of finished groups, in their order."""
        began = time.perf_counter()
        texts = [tuple(self._text(t, group.prompt) for t in group.trajectories) for group in groups]
        mine = self._share(range(len(groups)))

        def score() -> list[tuple[int, list[dict[str, Any]]]]:
            pairs = [(self.prompts[groups[i].prompt].sample, texts[i]) for i in mine]

            def compute() -> list[list[dict[str, Any]]]:
                return [
                    [vars(s) for s in row] for row in self.rewards.score(pairs, iteration=iteration)
                ]

            rows = (
                compute() if journal is None else journal.once(f"rewards {digest(pairs)}", compute)
            )
            return list(zip(mine, rows, strict=True))

        scored = dict(self._from_all(score))
        self.timing.reward_s += time.perf_counter() - began
        return [
            ScoredGroup(
                group=group,
                prompt=self.prompts[group.prompt],
                texts=texts[i],
                weights=self.rewards.weights_of(self.prompts[group.prompt].sample),
                scores=tuple(
                    Scored(**{**row, "problems": tuple(row["problems"])}) for row in scored[i]
                ),
            )
            for i, group in enumerate(groups)
        ]

    @cached_property
    def _ends(self) -> set[int | None]:
        return {
            *stop_token_ids(self.tokenizer),
            *getattr(self.engine, "stop_ids", ()),
            self.tokenizer.pad_token_id,
        }

    def _text(self, trajectory: Any, prompt: int | None = None) -> CompletionText:
        """Without the tokens that end it and padding; other special tokens (<think>, say) are part
        of the text."""
        kept = [i for i in trajectory.token_ids if i not in self._ends]
        text = self.tokenizer.decode(kept, skip_special_tokens=False)
        reason = trajectory.finish_reason or "budget"
        asked = () if prompt is None else self.prompts[prompt].ids[-_OPENING_TOKENS:]
        opening = self.tokenizer.decode(asked, skip_special_tokens=False)
        in_thought = opening.rstrip().endswith("<think>")
        return CompletionText(
            text,
            num_tokens=len(trajectory.token_ids),
            finish_reason=reason,
            in_thought=in_thought,
            kept_ids=trajectory.kept_ids,
        )

    def identity(self) -> str:
        """Of everything outside of the requests that decides completions and rewards: settings,
        ranks, the engine's weights."""
        settings = (
            self.sampling,
            self.rewards.config,
            self.rewards.names,
            type(self.engine).__name__,
        )
        weights = fingerprint(self.weights()) if self.weights is not None else ""
        return f"{digest(settings)} {self.accelerator.num_processes} {weights}"

    def _share(self, indices: Sequence[int]) -> list[int]:
        return list(indices)[self.accelerator.process_index :: self.accelerator.num_processes]

    def _from_all(self, compute: Callable[[], list[T]]) -> list[T]:
        """Joins what every rank computes. What one rank raises, all raise: none waits for another
        that is gone."""
        if self.accelerator.num_processes == 1:
            return compute()
        mine: tuple[list[T], str | None]
        try:
            mine = (compute(), None)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait
            log.exception("rank %d", self.accelerator.process_index)
            mine = ([], f"rank {self.accelerator.process_index}: {error}")
        gathered = gather_object(self.accelerator, mine)
        failed = next((problem for _, problem in gathered if problem), None)
        if failed is not None:
            raise RewardError(failed)
        return [item for items, _ in gathered for item in items]


def open_journal(folder: Path, *, iteration: int, rank: int, run: str) -> Journal:
    """The journal of an iteration on this rank."""
    return Journal(folder / f"iteration_{iteration:06d}_rank{rank}.jsonl", run=run)


def forget_journals(folder: Path, *, before: int) -> None:
    """Iterations before a checkpoint are not done again."""
    for path in folder.glob("iteration_*.jsonl"):
        if int(path.name.split("_")[1]) < before:
            path.unlink(missing_ok=True)
