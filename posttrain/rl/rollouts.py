"""Prompts -> trajectories -> rewards, over all ranks: each samples and scores its share and keeps
its tokens and texts; all know the lengths and rewards of all.

What cannot be computed again the same way is written to a journal as it comes: rollouts of a
server, results of rewards. A run that was killed finds in it what the iteration already had and
goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from posttrain.data.prompts import Prompt
from posttrain.rewards.compose import RewardError, Rewards
from posttrain.rl.trajectory import Environment, Trajectory, TrajectoryGroup, from_row, to_row
from posttrain.rollout.engine import Engine, Request, Sampled, SamplingConfig
from posttrain.training.sharding import gather_object

log = logging.getLogger(__name__)
T = TypeVar("T")


class Journal:
    """``once(key, compute)``: the value written under the key, else computed now and written. One
    file of JSON lines per iteration and rank; the last line may be torn: it is dropped."""

    def __init__(self, path: Path, *, run: str) -> None:
        """``run`` names what decides the values (settings, ranks, weights): a journal of another is
        discarded."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, Any] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        good = 0
        for line in lines[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if good == 0 and entry != {"run": run}:
                break
            if good:
                self._values[entry["key"]] = entry["value"]
            good += len(line) + 1
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._write({"run": run})

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def get(self, key: str) -> Any | None:
        """The value under the key, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Written before it returns: a killed process loses nothing that was put."""
        self._values[key] = value
        self._write({"key": key, "value": value})

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value under the key; computed and put the first time. As JSON has it, also the first
        time."""
        if key not in self._values:
            self.put(key, json.loads(json.dumps(compute())))
        return self._values[key]

    def close(self) -> None:
        """Ends writing."""
        self._file.close()


def digest(value: Any) -> str:
    """Return a digest of ``repr(value)``."""
    return hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def fingerprint(weights: Iterable[Tensor], *, per_tensor: int = 64) -> str:
    """A digest of some elements of every tensor: an update of the weights changes it, and it needs
    no pass over them."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in weights:
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // per_tensor)].cpu().contiguous()
        found.update(picked.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def journalled(
    engine: Engine,
    journal: Journal | None,
    requests: Sequence[Request],
    sampling: SamplingConfig,
) -> list[list[Sampled]]:
    """``engine.generate``, with what the journal has taken from there.

    A call of a reproducible engine is written as a whole. A killed one is repeated whole: only the
    same batch gives the same bits. Of another engine each completion is written when finished.
    """
    if journal is None:
        return engine.generate(requests, sampling)
    if engine.is_reproducible:
        entries = journal.once(
            f"generate {digest(requests)}",
            lambda: to_row(engine.generate(requests, sampling)),
        )
        return [[Sampled(**entry) for entry in row] for row in entries]

    def key(request: Request, k: int) -> str:
        known = digest((request.prompt_ids, request.prefixes[k]))
        return f"completion {request.seeds[k]} {known}"

    left: list[Request] = []
    for request in requests:
        wanted = [k for k in range(len(request.seeds)) if journal.get(key(request, k)) is None]
        if wanted:
            prefixes = tuple(request.prefixes[k] for k in wanted)
            seeds = tuple(request.seeds[k] for k in wanted)
            left.append(Request(prompt_ids=request.prompt_ids, seeds=seeds, prefixes=prefixes))
    if left:
        engine.generate(
            left,
            sampling,
            on_finished=lambda i, k, drawn: journal.put(key(left[i], k), to_row(drawn)),
        )
    return [[Sampled(**journal.get(key(r, k))) for k in range(len(r.seeds))] for r in requests]  # type: ignore[arg-type]


def stream_seed(seed: int, *, iteration: int, round: int, prompt: int, sample: int) -> int:
    """The 64-bit key of one completion's random stream: its tokens do not depend on what else is in
    the batch."""
    text = f"{seed}:{iteration}:{round}:{prompt}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def request_of(group: TrajectoryGroup, trajectories: Sequence[Trajectory]) -> Request:
    """For what comes next in some of a group's trajectories."""
    return Request(
        prompt_ids=tuple(group.prompt.ids),
        seeds=tuple(t.seed for t in trajectories),
        prefixes=tuple(tuple(t.token_ids.tolist()) for t in trajectories),
    )


class RolloutBuffer:
    """Groups that are not finished, oldest first: they wait here until all of their completions
    are, over iterations if need be."""

    def __init__(self, prompts: Sequence[Prompt], *, ranks: int = 1) -> None:
        self.groups: list[TrajectoryGroup] = []
        self._prompts, self._ranks = prompts, range(ranks)

    def begin(
        self, indices: Sequence[int], *, iteration: int, group_size: int, seed: int, round: int = 0
    ) -> None:
        """Add a group without tokens for each prompt, on the rank that has fewest. ``round``: how
        many prompts the iteration has begun before (a prompt that comes twice is drawn anew)."""
        held = Counter(group.rank for group in self.groups)
        for number, index in enumerate(indices):
            at = {"iteration": iteration, "round": round + number, "prompt": index}
            trajectories = [
                Trajectory(seed=stream_seed(seed, sample=k, **at)) for k in range(group_size)
            ]
            rank = min(self._ranks, key=held.__getitem__)
            held[rank] += 1
            prompt = self._prompts[index]
            self.groups.append(
                TrajectoryGroup(index=index, prompt=prompt, trajectories=trajectories, rank=rank)
            )

    def of_rank(self, rank: int) -> list[TrajectoryGroup]:
        """The groups that ``rank`` holds."""
        return [group for group in self.groups if group.rank == rank]

    def take_finished(self) -> list[TrajectoryGroup]:
        """The groups that are finished; they leave the buffer."""
        finished = [g for g in self.groups if g.is_finished]
        self.groups = [g for g in self.groups if not g.is_finished]
        return finished

    def state_dict(self) -> list[dict[str, Any]]:
        """The groups in plain values, without their prompts; those of other ranks without
        tokens."""
        return [
            {"index": g.index, "rank": g.rank, "trajectories": to_row(g.trajectories)}
            for g in self.groups
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over what ``state_dict`` gave, also after a trip through JSON."""
        self.groups = [
            from_row(TrajectoryGroup, {**row, "prompt": self._prompts[row["index"]]})
            for row in state
        ]


@dataclass(kw_only=True)
class Collector:
    """Samples and scores what the buffer holds. The same calls in the same order on every rank."""

    accelerator: Any
    engine: Engine
    environment: Environment
    rewards: Rewards
    sampling: SamplingConfig
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """rollout_s and reward_s on this rank, tokens on all."""

    @property
    def rank(self) -> int:
        """Which process this is; it draws and scores the groups of this ``rank``."""
        return int(self.accelerator.process_index)

    def roll(self, buffer: RolloutBuffer, journal: Journal | None) -> None:
        """Draw for every open completion of the buffer: to its end, or up to the iteration's
        budget. Those that the environment answers are drawn on."""
        began = time.perf_counter()
        others = [t for g in buffer.groups if g.rank != self.rank for t in g.trajectories]
        for tokens, progress in self._from_all(lambda: [self._draw(buffer, journal)]):
            self.spent["tokens"] += tokens
            for trajectory in others:
                if trajectory.seed in progress:
                    trajectory.follow(*progress[trajectory.seed])
        self.spent["rollout_s"] += time.perf_counter() - began

    def _draw(self, buffer: RolloutBuffer, journal: Journal | None) -> tuple[int, dict[int, Any]]:
        """This rank's part of ``roll``: (tokens that were drawn, {seed: progress})."""
        mine = buffer.of_rank(self.rank)
        tokens, going = 0, [(g, t) for g in mine for t in g.trajectories if not t.finish_reason]
        while going:
            by_group = groupby(going, key=itemgetter(0))
            asked = [request_of(group, [t for _, t in pairs]) for group, pairs in by_group]
            drawn = journalled(self.engine, journal, asked, self.sampling)
            for (_, trajectory), sampled in zip(going, chain(*drawn), strict=True):
                trajectory.extend(sampled)
                tokens += len(sampled.token_ids)
            going = [(group, t) for group, t in going if self._goes_on(t, group.prompt)]
        return tokens, {t.seed: t.progress() for g in mine for t in g.trajectories}

    def _goes_on(self, trajectory: Trajectory, prompt: Prompt) -> bool:
        """Whether the environment answers; a finished trajectory gets its mask."""
        if trajectory.finish_reason is None:
            return False
        if trajectory.finish_reason == "stop":
            answer = self.environment.step(trajectory, prompt)
            if answer is not None:
                if len(trajectory.token_ids) + len(answer) < self.sampling.max_tokens:
                    trajectory.observe(answer)
                    return True
                trajectory.finish_reason = "length"
        trajectory.trained = self.environment.trained(trajectory) & trajectory.sampled
        return False

    def score(
        self, groups: Sequence[TrajectoryGroup], journal: Journal | None, *, iteration: int
    ) -> Sequence[TrajectoryGroup]:
        """The finished groups with their texts and rewards."""
        began = time.perf_counter()

        def score() -> list[tuple[int, list[dict[str, Any]]]]:
            mine = [i for i, group in enumerate(groups) if group.rank == self.rank]
            pairs = []
            for group in (groups[i] for i in mine):
                for t in group.trajectories:
                    t.text = self.environment.text(t, group.prompt)
                pairs.append((group.prompt.sample, tuple(group.texts)))

            def compute() -> Any:
                return to_row(self.rewards.score(pairs, iteration=iteration))

            rows = journal.once(f"rewards {digest(pairs)}", compute) if journal else compute()
            return list(zip(mine, rows, strict=True))

        for i, rows in self._from_all(score):
            groups[i].weights = self.rewards.weights_of(groups[i].prompt.sample)
            for trajectory, row in zip(groups[i].trajectories, rows, strict=True):
                vars(trajectory).update(row)
        self.spent["reward_s"] += time.perf_counter() - began
        return groups

    def _from_all(self, compute: Callable[[], list[T]]) -> list[T]:
        """Join what every rank computes. What one rank raises, all raise: none waits for another
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


_LOOKED_AT = 1000


def report_prompts(counts: Mapping[str, Any], prompts: Sequence[Prompt], rewards: Rewards) -> None:
    """Prints how many prompts there are, which columns were read, and answers that no verifier can
    read (of 1,000 prompts)."""
    used, left = (
        ", ".join(counts["columns"].get(use, {})) or "none" for use in ("used", "for the rewards")
    )
    print(
        f"{counts['kept']:,} prompts ({counts['too long']:,} left out as too long); read: "
        f"{used}; for the rewards: {left}"
    )
    some = prompts[:: max(1, len(prompts) // _LOOKED_AT)][:_LOOKED_AT]
    for name, places in rewards.unreadable([p.sample for p in some]).items():
        if len(places) == len(some):
            raise ValueError(
                f"{name} can read the answer of no prompt, the first {places[0]}. Is "
                "the answer in another column?"
            )
        print(
            f"{name} cannot read the answers of {len(places):,} of {len(some):,} prompts, the "
            f"first {places[0]}. Their completions are unscored unless they say the very same."
        )
