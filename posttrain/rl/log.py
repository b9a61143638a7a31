"""Rollouts for people: figures of an iteration, a table of samples, and all of them as Parquet."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from posttrain.files import whole_file
from posttrain.rl.evaluate import Evaluation
from posttrain.rl.trajectory import TrajectoryGroup, to_row
from posttrain.types import Completion, PromptGroup


def rollout_metrics(scored: Sequence[TrajectoryGroup], *, cost: float) -> dict[str, float]:
    """Means over completions unless the name says otherwise."""
    drawn = [t for group in scored for t in group.trajectories]
    rewards = [t.reward for t in drawn if t.reward is not None]
    lengths = [len(t.token_ids) for t in drawn]
    ended = [len(t.token_ids) for t in drawn if t.finish_reason == "stop"]
    metrics = {
        "reward": statistics.fmean(rewards) if rewards else math.nan,
        "reward_std": statistics.pstdev(rewards) if rewards else math.nan,
        "groups_without_signal": statistics.fmean(not g.has_signal() for g in scored),
        "unscored": statistics.fmean(t.reward is None for t in drawn),
        "length": statistics.fmean(lengths),
        "length_min": float(min(lengths)),
        "length_max": float(max(lengths)),
        "length_of_ended": statistics.fmean(ended) if ended else math.nan,
        "truncated": statistics.fmean(t.finish_reason == "length" for t in drawn),
        "repeated": statistics.fmean(t.finish_reason == "repeat" for t in drawn),
        "drawn_per_used": cost,
    }
    for name in dict.fromkeys(name for t in drawn for name in t.parts):
        known = [v for t in drawn if (v := t.parts.get(name)) is not None]
        metrics[f"reward/{name}"] = statistics.fmean(known) if known else math.nan
    judged = [t.is_right for t in drawn if t.is_right is not None]
    metrics["accuracy"] = statistics.fmean(judged) if judged else math.nan
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


class RolloutLog:
    """Each process keeps the rollouts that it holds; the first shows some, and keeps answers."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._folder, self._rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)

    def keep(
        self,
        scored: Sequence[TrajectoryGroup],
        groups: Sequence[PromptGroup],
        rejected: Sequence[TrajectoryGroup],
        *,
        iteration: int,
    ) -> None:
        """iteration_N.parquet, of further processes iteration_N_rankR.parquet: one row for each
        completion; those of ``rejected`` groups have no advantage."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "iteration": iteration,
                "where": str(s.prompt.sample.get("_where", "")),
                "completion": k,
                "prompt_ids": list(s.prompt.ids),
                "advantage": None if group is None else mean_advantage(group.completions[k]),
                **to_row(t),
                "seed": f"{t.seed:016x}",
                "parts": [{"name": n, "value": v} for n, v in t.parts.items()],
            }
            for s, group in [*zip(scored, groups, strict=True), *((s, None) for s in rejected)]
            if s.rank == self._rank
            for k, t in enumerate(s.trajectories)
        ]
        part = f"_rank{self._rank}" if self._rank else ""
        path = self._folder / f"iteration_{iteration:06d}{part}.parquet"
        if not rows:  # fewer groups than processes
            return
        with whole_file(path) as partial:
            pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")

    def keep_answers(self, evaluation: Evaluation, *, step: int) -> None:
        """held_out_STEP.jsonl: every answer to a held-out problem after ``step`` steps."""
        if self._rank:
            return
        path = self._folder / f"held_out_{step:06d}.jsonl"
        with whole_file(path) as partial:
            partial.write_text(
                "".join(json.dumps(row) + "\n" for row in evaluation.rows()), encoding="utf-8"
            )

    def show(self, scored: Sequence[TrajectoryGroup], *, iteration: int, count: int = 4) -> None:
        """A table: a best and a worst completion of the first groups."""
        if self._rank:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"iteration {iteration}", show_lines=True)
        for column in ("question", "completion", "tokens", "reward"):
            table.add_column(column, overflow="fold")
        for s in [s for s in scored if s.rank == self._rank][: count // 2]:
            best_last = sorted(
                s.trajectories, key=lambda t: math.inf if t.reward is None else t.reward
            )
            question = next(
                (q for n in ("question", "prompt", "_where") if (q := s.prompt.sample.get(n))), ""
            )
            for t in (best_last[-1], best_last[0])[: len(best_last)]:
                parts = (f"{n} {v:.3g}" if v is not None else f"{n} -" for n, v in t.parts.items())
                table.add_row(
                    Text(str(question)[-200:]),
                    Text(str(t.text)[-400:]),
                    str(len(t.token_ids)),
                    ", ".join(parts),
                )
        Console().print(table)


def mean_advantage(completion: Completion) -> float:
    """The completion's advantage; the mean over its trained tokens where they have their own."""
    value = completion.columns.get("advantage", 0.0)
    if isinstance(value, float):
        return value
    return float(value[completion.trained].mean()) if completion.num_trained else 0.0
