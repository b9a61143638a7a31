"""Held-out problems, sampled and verified: pass@1, unbiased pass@k, majority vote, length. Of a run
and of `posttrain eval`."""

from __future__ import annotations

import math
import statistics
from collections import ChainMap, Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.data.prompts import Prompt
from posttrain.resolve import check_rules, settings
from posttrain.rewards.answers import final_answer
from posttrain.rewards.compose import Rewards
from posttrain.rl.rollouts import Collector, RolloutBuffer
from posttrain.rl.trajectory import Trajectory, TrajectoryGroup
from posttrain.rollout.engine import SamplingConfig
from posttrain.training.sharding import gather_object


@settings
class EvaluationConfig:
    """How held-out problems are answered and judged."""

    samples: int = 1
    """Answers of each problem."""
    temperature: float = 0.0
    """0: greedy. DeepSeek-R1 reports 0.6 with top_p 0.95."""
    top_p: float = 1.0
    """Nucleus of the answers."""
    max_tokens: int = 0
    """Longest answer; 0: sampling.max_tokens."""
    prompts: int = 200
    """Problems (the first ones); 0: all."""
    correct_reward: str | None = None
    """Name of the reward that tells right (1 or more) from wrong. None: the one verifier among the
    rewards, or the only reward."""
    pass_at_powers: bool = False
    """Report pass@k for k = 2, 4, 8, ... below ``samples`` too."""

    def __post_init__(self) -> None:
        check_rules(
            "evaluation",
            self,
            "samples >= 1",
            "temperature >= 0",
            "temperature > 0 or samples == 1",
        )

    def sampling(self, training: SamplingConfig) -> SamplingConfig:
        """What is drawn with."""
        return SamplingConfig(
            max_tokens=self.max_tokens or training.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop_strings=training.stop_strings,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came of it; ``groups`` in the order of the problems."""

    groups: Sequence[TrajectoryGroup]
    said: Sequence[Sequence[str]] | None = None
    """[problem][answer] what it votes for; None: ``final_answer`` of its text."""

    @property
    def correct(self) -> list[list[bool | None]]:
        """[problem][answer]; None: could not be judged, and is in no figure of right answers."""
        return [[t.is_right for t in g.trajectories] for g in self.groups]

    def rows(self) -> list[dict[str, Any]]:
        """One for each answer: where its problem is from, what was said, and how it was judged."""
        return [
            {
                "where": g.prompt.sample.get("_where"),
                "prompt_ids": list(g.prompt.ids),
                "text": str(t.text),
                "tokens": len(t.token_ids),
                "finish_reason": t.finish_reason,
                "correct": t.is_right,
                "reward": t.reward,
                "rewards": dict(t.parts),
            }
            for g in self.groups
            for t in g.trajectories
        ]

    def metrics(self, *, powers: bool = False) -> dict[str, float]:
        """eval_pass@1 with half the width of its 95 % interval, eval_pass@k and eval_cons@k for k =
        samples > 1, eval_length in tokens, eval_reward, eval_reward/NAME of each of several,
        eval_truncated, and where there are such eval_unscored, the share of answers that could not
        be judged. ``powers``: eval_pass@k for k = 2, 4, 8, ... < samples too. Raises ValueError
        where none could be judged."""
        n, known = len(self.correct[0]), [[x for x in row if x is not None] for row in self.correct]
        judged = [row for row in known if row]
        if not judged:
            where = self.groups[0].prompt.sample.get("_where", "the first problem")
            raise ValueError(
                f"No answer could be judged: the verifier gave None for all, the first in {where}. "
                "Look at its answers."
            )
        shares = [statistics.fmean(row) for row in judged]
        drawn = [t for g in self.groups for t in g.trajectories]
        metrics = {"pass@1": statistics.fmean(shares), "pass@1_ci95": half_width(shares, samples=n)}
        below = [2**i for i in range(1, (n - 1).bit_length())] if powers else []
        for k in [*below, n] if n > 1 else []:
            metrics[f"pass@{k}"] = statistics.fmean(
                pass_at_k(len(r), sum(r), min(k, len(r))) for r in judged
            )
        if n > 1:
            said = self.said or [[final_answer(text) for text in g.texts] for g in self.groups]
            votes = [
                (s, row) for s, row in zip(said, self.correct, strict=True) if set(row) != {None}
            ]
            metrics[f"cons@{n}"] = statistics.fmean(majority_is_right(s, row) for s, row in votes)
        means = figures(drawn)
        if len(drawn[0].parts) < 2:
            means = {name: value for name, value in means.items() if "/" not in name}
        unscored = statistics.fmean(t.verdict is None for t in drawn)
        metrics |= means | ({"unscored": unscored} if unscored else {})
        return {f"eval_{name}": v for name, v in metrics.items() if not math.isnan(v)}


def mean(values: Iterable[float | None]) -> float:
    """Of those that are not None; nan of none."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else math.nan


def figures(drawn: Sequence[Trajectory]) -> dict[str, float]:
    """Means over completions: what they got in all and of each reward, tokens, and the share that
    was cut off."""
    names = dict.fromkeys(name for t in drawn for name in t.parts)
    return {
        "reward": mean(t.reward for t in drawn),
        **{f"reward/{name}": mean(t.parts.get(name) for t in drawn) for name in names},
        "length": statistics.fmean(len(t.token_ids) for t in drawn),
        "truncated": statistics.fmean(t.finish_reason == "length" for t in drawn),
    }


def evaluate_prompts(
    collector: Collector, prompts: Sequence[Prompt], config: EvaluationConfig, *, seed: int = 0
) -> Evaluation:
    """Answers the problems with the collector's engine, over all ranks, and judges them with its
    rewards."""
    chosen = prompts[: config.prompts or len(prompts)]
    sampling = config.sampling(collector.sampling)
    for prompt in chosen:
        collector.rewards.needs_verifier(prompt.sample, "a held-out evaluation")
    buffer = RolloutBuffer(chosen, ranks=collector.accelerator.num_processes)
    buffer.begin(range(len(chosen)), iteration=-1, group_size=config.samples, seed=seed)
    mine = replace(collector, sampling=sampling)
    mine.roll(buffer, None)
    groups = mine.score(buffer.take_finished(), None, iteration=2**62)
    votes = {
        i: (_votes(g, collector.rewards), g.texts)
        for i, g in enumerate(groups)
        if g.rank == collector.rank
    }
    votes = dict(ChainMap(*gather_object(collector.accelerator, votes)))
    for i, group in enumerate(groups):
        for trajectory, text in zip(group.trajectories, votes[i][1], strict=True):
            trajectory.text = text
    return Evaluation(groups=groups, said=[votes[i][0] for i in range(len(groups))])


def _votes(group: TrajectoryGroup, rewards: Rewards) -> list[str]:
    """What each answer votes for: by the task's own verifier where that can change who wins, else
    as it is written."""
    judged = Counter(t.is_right for t in group.trajectories)
    if 0 < judged[True] <= judged[False] and judged[False] > 1:
        return rewards.alike(group.prompt.sample, group.texts)
    return [final_answer(text) for text in group.texts]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k answers, drawn without replacement from n (c right), is right: 1 -
    C(n-c, k) / C(n, k).

    Chen et al. 2021, arXiv:2107.03374 eq. 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_is_right(said: Sequence[str], correct: Sequence[bool | None]) -> float:
    """Whether the most frequent answer is right (cons@k, Wang et al. 2022, arXiv:2203.11171); a tie
    of m answers with it: 1/m.

    Right answers are one answer, however they are written (1/2, 0.5); wrong ones are told apart by
    what they say.
    """
    wrong = Counter(answer for answer, right in zip(said, correct, strict=True) if right is False)
    votes = sum(right is True for right in correct)
    if not votes or votes < max(wrong.values(), default=0):
        return 0.0
    return 1 / (1 + list(wrong.values()).count(votes))


def half_width(shares: Sequence[float], *, samples: int = 1) -> float:
    """Half the 95 % interval of a mean over problems of shares of right answers, each of
    ``samples`` answers.

    From the spread over problems, and at least Wilson's (1927) interval for as many independent
    answers: problems that happen to have equal shares do not make the mean exact. Where every share
    is 0 or 1, Wilson's for as many problems.
    """
    n, mean = len(shares), statistics.fmean(shares)
    if set(shares) <= {0.0, 1.0}:
        return _wilson(mean, n)
    spread = 1.96 * statistics.stdev(shares) / math.sqrt(n) if n > 1 else 1.0
    return max(spread, _wilson(mean, n * samples))


def _wilson(mean: float, n: int) -> float:
    z = 1.96
    return z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
