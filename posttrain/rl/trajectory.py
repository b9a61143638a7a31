"""Completions in the making: groups wait here until all of their completions are finished, over
iterations if need be.

Kimi k1.5, arXiv:2501.12599 section 2.6 (partial rollouts): an iteration spends at most
``sampling.budget_tokens`` on a completion; an unfinished one keeps its tokens, with the policy
version that drew each segment, and is continued in the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from posttrain.rollout.engine import FinishReason, Request, Sampled


def stream_seed(seed: int, *, iteration: int, round: int, prompt: int, sample: int) -> int:
    """The 64-bit key of one completion's random stream: its tokens do not depend on what else is in
    the batch."""
    text = f"{seed}:{iteration}:{round}:{prompt}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(kw_only=True)
class Trajectory:
    """One completion and how it came about."""

    seed: int
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    kept_ids: list[list[int]] | None = None
    segments: list[tuple[int, int]] = field(default_factory=list)
    """(end, policy version) of each stretch of tokens, in order."""
    finish_reason: FinishReason | None = None
    """None: to be continued."""

    def extend(self, drawn: Sampled) -> None:
        """Appends what an engine drew."""
        self.token_ids += drawn.token_ids
        self.logps += drawn.logps
        if drawn.kept_ids is not None:
            self.kept_ids = [*(self.kept_ids or []), *(list(ids) for ids in drawn.kept_ids)]
        self.segments.append((len(self.token_ids), drawn.policy_version))
        self.finish_reason = None if drawn.finish_reason == "budget" else drawn.finish_reason

    def tokens_before(self, version: int) -> int:
        """Tokens drawn by policies older than ``version``: they come first."""
        return max((end for end, drawn_by in self.segments if drawn_by < version), default=0)


@dataclass(kw_only=True)
class TrajectoryGroup:
    """The completions of one prompt."""

    prompt: int
    """Index of the prompt in the data."""
    iteration: int
    """In which it was begun."""
    trajectories: list[Trajectory]

    @property
    def is_finished(self) -> bool:
        """Whether every completion is."""
        return all(t.finish_reason is not None for t in self.trajectories)


class RolloutBuffer:
    """Groups that are not finished, oldest first."""

    def __init__(self) -> None:
        self.groups: list[TrajectoryGroup] = []

    def begin(
        self, prompts: Sequence[int], *, iteration: int, group_size: int, seed: int, round: int = 0
    ) -> None:
        """Adds a group without tokens for each prompt. ``round``: how many prompts the iteration
        has begun before (a prompt that comes twice is drawn anew)."""
        for number, prompt in enumerate(prompts):
            seeds = [
                stream_seed(
                    seed, iteration=iteration, round=round + number, prompt=prompt, sample=k
                )
                for k in range(group_size)
            ]
            group = TrajectoryGroup(
                prompt=prompt, iteration=iteration, trajectories=[Trajectory(seed=s) for s in seeds]
            )
            self.groups.append(group)

    def requests(
        self, prompt_ids: Sequence[Sequence[int]]
    ) -> list[tuple[Request, list[Trajectory]]]:
        """What to draw next, group by group, and where it goes."""
        found = []
        for group in self.groups:
            open_ones = [t for t in group.trajectories if t.finish_reason is None]
            request = Request(
                prompt_ids=tuple(prompt_ids[group.prompt]),
                seeds=tuple(t.seed for t in open_ones),
                prefixes=tuple(tuple(t.token_ids) for t in open_ones)
                if any(t.token_ids for t in open_ones)
                else (),
            )
            found.append((request, open_ones))
        return found

    def take_finished(self) -> list[TrajectoryGroup]:
        """The groups that are finished; they leave the buffer."""
        finished = [g for g in self.groups if g.is_finished]
        self.groups = [g for g in self.groups if not g.is_finished]
        return finished

    def state_dict(self) -> list[dict[str, Any]]:
        """As JSON has it."""
        return [asdict(group) for group in self.groups]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """What ``state_dict`` gave, also after a trip through JSON."""
        self.groups = [group_from_dict(values) for values in state]


def group_from_dict(values: dict[str, Any]) -> TrajectoryGroup:
    """The inverse of ``dataclasses.asdict``."""
    trajectories = []
    for entry in values["trajectories"]:
        segments = [(int(end), int(version)) for end, version in entry["segments"]]
        trajectories.append(Trajectory(**{**entry, "segments": segments}))
    return TrajectoryGroup(**{**values, "trajectories": trajectories})
