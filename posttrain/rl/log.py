"""Rollouts for people: figures of an iteration, a table of samples, and all of them as Parquet."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from posttrain.files import whole_file
from posttrain.rl.evaluate import Evaluation
from posttrain.rl.rollouts import ScoredGroup
from posttrain.types import Completion, PromptGroup


def rollout_metrics(scored: Sequence[ScoredGroup], *, cost: float) -> dict[str, float]:
    """Means over completions unless the name says otherwise."""
    scores = [s for group in scored for s in group.scores]
    totals = [s.total for s in scores if s.total is not None]
    texts = [t for group in scored for t in group.texts]
    lengths = [t.num_tokens for t in texts]
    ended = [t.num_tokens for t in texts if t.finish_reason == "stop"]
    metrics = {
        "reward": statistics.fmean(totals) if totals else math.nan,
        "reward_std": statistics.pstdev(totals) if totals else math.nan,
        "groups_without_signal": statistics.fmean(not g.has_signal() for g in scored),
        "unscored": statistics.fmean(s.total is None for s in scores),
        "length": statistics.fmean(lengths),
        "length_min": float(min(lengths)),
        "length_max": float(max(lengths)),
        "length_of_ended": statistics.fmean(ended) if ended else math.nan,
        "truncated": statistics.fmean(t.finish_reason == "length" for t in texts),
        "repeated": statistics.fmean(t.finish_reason == "repeat" for t in texts),
        "drawn_per_used": cost,
    }
    for name in dict.fromkeys(name for s in scores for name in s.parts):
        known = [v for s in scores if (v := s.parts.get(name)) is not None]
        metrics[f"reward/{name}"] = statistics.fmean(known) if known else math.nan
    judged = [s.verdict > 0 for s in scores if s.verdict is not None]
    metrics["accuracy"] = statistics.fmean(judged) if judged else math.nan
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


class RolloutLog:
    """Writes on the main process only."""

    def __init__(self, folder: Path, *, is_main: bool) -> None:
        self._folder, self._is_main = folder, is_main
        folder.mkdir(parents=True, exist_ok=True)

    def keep(
        self,
        scored: Sequence[ScoredGroup],
        groups: Sequence[PromptGroup],
        rejected: Sequence[ScoredGroup],
        *,
        iteration: int,
    ) -> None:
        """iteration_N.parquet: one row for each completion; those of ``rejected`` groups have no
        advantage."""
        if not self._is_main:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "iteration": iteration,
                "where": str(s.prompt.sample.get("_where", "")),
                "completion": k,
                "text": str(text),
                "token_ids": list(trajectory.token_ids),
                "logps": list(trajectory.logps),
                "finish_reason": trajectory.finish_reason,
                "versions": [version for _, version in trajectory.segments],
                "reward": score.total,
                "parts": [{"name": n, "value": v} for n, v in score.parts.items()],
                "advantage": None if group is None else mean_advantage(group.completions[k]),
                "problems": list(score.problems),
            }
            for s, group in [*zip(scored, groups, strict=True), *((s, None) for s in rejected)]
            for k, (trajectory, text, score) in enumerate(
                zip(s.group.trajectories, s.texts, s.scores, strict=True)
            )
        ]
        path = self._folder / f"iteration_{iteration:06d}.parquet"
        with whole_file(path) as partial:
            pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")

    def keep_answers(self, evaluation: Evaluation, *, step: int) -> None:
        """held_out_STEP.jsonl: every answer to a held-out problem after ``step`` steps."""
        if not self._is_main:
            return
        path = self._folder / f"held_out_{step:06d}.jsonl"
        with whole_file(path) as partial:
            partial.write_text(
                "".join(json.dumps(row) + "\n" for row in evaluation.rows()), encoding="utf-8"
            )

    def show(self, scored: Sequence[ScoredGroup], *, iteration: int, count: int = 4) -> None:
        """A table: a best and a worst completion of the first groups."""
        if not self._is_main:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"iteration {iteration}", show_lines=True)
        for column in ("question", "completion", "tokens", "reward"):
            table.add_column(column, overflow="fold")
        for s in scored[: count // 2]:
            order = sorted(
                range(len(s.texts)),
                key=lambda k: s.scores[k].total if s.scores[k].total is not None else math.inf,
            )
            for k in dict.fromkeys((order[-1], order[0])):
                parts = ", ".join(
                    f"{n} {v:.3g}" if v is not None else f"{n} -"
                    for n, v in s.scores[k].parts.items()
                )
                question = str(
                    s.prompt.sample.get("question")
                    or s.prompt.sample.get("prompt")
                    or s.prompt.sample.get("_where")
                )
                table.add_row(
                    Text(question[-200:]),
                    Text(str(s.texts[k])[-400:]),
                    str(s.texts[k].num_tokens),
                    parts,
                )
        Console().print(table)


def mean_advantage(completion: Completion) -> float:
    """The completion's advantage; the mean over its trained tokens where they have their own."""
    value = completion.columns.get("advantage", 0.0)
    if isinstance(value, float):
        return value
    return float(value[completion.trained].mean()) if completion.num_trained else 0.0
