"""Sampled answers as figures, as a table and as rows of Parquet files; read back, to be judged
again; and which of them become training data: rejection sampling (DeepSeek-R1, arXiv:2501.12948
section 2.3.3) and the data of long2short (Kimi k1.5, arXiv:2501.12599 section 2.4)."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from posttrain.data.layouts import read_prompt
from posttrain.data.prompts import Prompt, with_answer
from posttrain.data.readers import read_rows
from posttrain.files import whole_file
from posttrain.rewards import CompletionText
from posttrain.rewards.compose import Rewards
from posttrain.rewards.text import language_consistency, repetition_penalty, think_answer_format
from posttrain.rl.evaluate import Evaluation, figures, mean
from posttrain.rl.trajectory import Trajectory, TrajectoryGroup, to_row
from posttrain.types import Completion, PromptGroup


def rollout_metrics(scored: Sequence[TrajectoryGroup], *, cost: float) -> dict[str, float]:
    """Means over completions unless the name says otherwise."""
    drawn = [t for group in scored for t in group.trajectories]
    rewards = [t.reward for t in drawn if t.reward is not None]
    lengths = [len(t.token_ids) for t in drawn]
    metrics = {
        **figures(drawn),
        "reward_std": statistics.pstdev(rewards) if rewards else math.nan,
        "groups_without_signal": statistics.fmean(not g.has_signal() for g in scored),
        "unscored": statistics.fmean(t.reward is None for t in drawn),
        "length_min": float(min(lengths)),
        "length_max": float(max(lengths)),
        "length_of_ended": mean(len(t.token_ids) for t in drawn if t.finish_reason == "stop"),
        "repeated": statistics.fmean(t.finish_reason == "repeat" for t in drawn),
        "drawn_per_used": cost,
        "accuracy": mean(t.is_right for t in drawn),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def keep_rollouts(
    path: Path,
    pairs: Sequence[tuple[TrajectoryGroup, PromptGroup | None]],
    *,
    iteration: int,
) -> None:
    """One row for each completion; those of groups that are not trained have no advantage."""
    rows = [
        {
            "iteration": iteration,
            "prompt_ids": list(s.prompt.ids),
            "advantage": None if group is None else mean_advantage(group.completions[k]),
            **_row(s, k),
        }
        for s, group in pairs
        for k in range(len(s.trajectories))
    ]
    if rows:  # else fewer groups than processes
        write_rows(path, rows)


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """A Parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows)).replace_schema_metadata(metadata)
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def _row(group: TrajectoryGroup, k: int) -> dict[str, Any]:
    """Everything that is known of an answer."""
    t = group.trajectories[k]
    return {
        "where": str(group.prompt.sample.get("_where", "")),
        "completion": k,
        **to_row(t),
        "seed": f"{t.seed:016x}",
        "parts": [{"name": n, "value": v} for n, v in t.parts.items()],
    }


def show(scored: Sequence[TrajectoryGroup], *, iteration: int, count: int = 2) -> None:
    """A table: the best and the worst completion of the first groups."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"iteration {iteration}", show_lines=True)
    for column in ("question", "completion", "tokens", "reward"):
        table.add_column(column, overflow="fold")
    for s in scored[:count]:
        ranked = sorted(s.trajectories, key=lambda t: math.inf if t.reward is None else t.reward)
        names = ("question", "prompt", "_where")
        question = next((q for n in names if (q := s.prompt.sample.get(n))), "")
        for t in (ranked[-1], ranked[0])[: len(ranked)]:
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


_SAMPLED = "where completion text token_ids logps finish_reason reward parts".split()


def sample_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row for each answer; ``row`` is its problem's, as JSON."""
    rows = []
    for group in evaluation.groups:
        values = {k: v for k, v in group.prompt.sample.items() if k != "_where"}
        problem = {"row": json.dumps(values, default=str)}
        for k, t in enumerate(group.trajectories):
            known = _row(group, k)
            rows.append({**problem, "correct": t.is_right, **{n: known[n] for n in _SAMPLED}})
    return rows


def rescore(
    sources: Sequence[str], rewards: Rewards, problems: Mapping[str, Mapping[str, Any]]
) -> Evaluation:
    """Stored answers, judged by ``rewards``. ``problems``: rows by where they are from, for answers
    that are stored without them."""
    pairs = []
    for where, answers in stored_answers(sources):
        sample = problems.get(where) or json.loads(answers[0].get("row") or "null")
        if sample is None:
            raise ValueError(
                f"The answers to {where!r} are stored without their problem, and --task has no "
                "such row. Name the file of rows that was answered, as it was named then."
            )
        texts = [
            CompletionText(
                a["text"],
                num_tokens=a["tokens"] if "tokens" in a else len(a["token_ids"]),
                finish_reason=a["finish_reason"] or "stop",
            )
            for a in answers
        ]
        values = {k: v for k, v in sample.items() if k != "_where"}
        pairs.append(({**with_answer(values, read_prompt(values)), "_where": where}, texts))
    groups = [
        TrajectoryGroup(
            index=i,
            prompt=Prompt(ids=(), sample=sample),
            trajectories=[
                Trajectory(
                    seed=k,
                    token_ids=np.zeros(text.num_tokens, np.int64),
                    finish_reason=text.finish_reason,  # type: ignore[arg-type]
                    text=text,
                    **vars(scored),
                )
                for k, (text, scored) in enumerate(zip(texts, row, strict=True))
            ],
        )
        for i, ((sample, texts), row) in enumerate(zip(pairs, rewards.score(pairs), strict=True))
    ]
    return Evaluation(groups=groups)


def stored_answers(sources: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(where, answers) of each problem in files or folders of eval, sample or a run's rollouts; the
    answers of a problem stand together in a file."""
    for source in sources:
        path = Path(source)
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{source} holds no answers: it has no *.parquet.")
        for file in files:
            rows = (dict(row.values) for row in read_rows(str(file)))
            for where, answers in groupby(rows, key=lambda row: row.get("where")):
                yield str(where), list(answers)


Answer = Mapping[str, Any]
"""A row that `posttrain sample` wrote."""
Take = Literal["correct", "shortest", "best", "pairs"]
LONGER = 1.5
"""A right answer is the worse one of a pair where it is more than this many times as long."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What an answer must be to be chosen; None and False: whatever it is."""

    ended: bool = False
    """It ended by itself."""
    format: bool = False
    """``think_answer_format`` gives 1."""
    language: str | None = None
    """Every word of its thought is of this language's script."""
    min_reward: float | None = None
    """Least value of the reward ``by``."""
    max_tokens: int | None = None
    """Longest."""
    max_paragraph: int | None = None
    """Most characters of a paragraph."""
    no_code: bool = False
    """No block of code."""
    max_repeated: float | None = None
    """Largest share of 3-grams of words that occurred before."""

    def reason(self, answer: Answer, by: str) -> str:
        """Why the answer is left out; empty where it is not."""
        text = CompletionText(answer["text"], num_tokens=num_tokens(answer))
        if broken := is_broken(answer):
            return broken
        longest = max(map(len, re.split(r"\n\s*\n", text)))
        value = value_of(answer, by)
        checks = {
            "did not end by itself": self.ended and answer["finish_reason"] != "stop",
            "other format": self.format and not think_answer_format(text, {}),
            "mixed languages": self.language is not None
            and language_consistency(text, {}, language=self.language) < 1,
            "too long": self.max_tokens is not None and num_tokens(answer) > self.max_tokens,
            "long paragraphs": self.max_paragraph is not None and longest > self.max_paragraph,
            "code blocks": self.no_code and "```" in text,
            "repeated": self.max_repeated is not None
            and -repetition_penalty(text, {}) > self.max_repeated,
            "low reward": self.min_reward is not None
            and (value is None or value < self.min_reward),
        }
        return next((why for why, holds in checks.items() if holds), "")


def is_broken(answer: Answer) -> str:
    """Why nobody should train on the answer, chosen or rejected; empty where nothing is wrong."""
    checks = {
        "empty": not answer["text"].strip(),
        "unreadable characters": "\ufffd" in answer["text"],
        "repeated": answer["finish_reason"] == "repeat",
    }
    return next((why for why, holds in checks.items() if holds), "")


def num_tokens(answer: Answer) -> int:
    """Of the answer, the stop token included."""
    return len(answer["token_ids"])


def value_of(answer: Answer, by: str) -> float | None:
    """The reward ``by``; the sum for an empty name. None: not scored. ValueError lists those that
    there are."""
    if not by:
        return answer["reward"]
    parts = {part["name"]: part["value"] for part in answer["parts"]}
    if by not in parts:
        raise ValueError(f"The answers have no reward {by!r}; they have {', '.join(parts)}.")
    return parts[by]


def select(
    answers: Sequence[Answer],
    take: Take,
    *,
    by: str = "",
    at_most: int = 0,
    filters: Filters,
    counts: Counter[str],
) -> list[Answer] | list[tuple[Answer, Answer]]:
    """The chosen of one problem's answers, or pairs (chosen, rejected); ``at_most``: 0 is all.
    ``counts``: where what was left out is counted, by reason.

    correct: right answers in the order in which they were drawn. shortest: the right answer with
    fewest tokens. best: the one with the highest reward ``by``, the first of several; right or not.
    pairs: the shortest right answer against every longer wrong one and every right one that is more
    than 1.5 times as long (k1.5's DPO for long2short). The filters hold for what is chosen, and
    not for what is rejected, which is only never broken.
    """
    if take == "pairs":
        return _pairs(answers, by, at_most, filters, counts)

    def unfit(answer: Answer) -> str:
        judged = {True: "", False: "wrong", None: "not judged"}[answer["correct"]]
        if take != "best":
            return judged or filters.reason(answer, by)
        scored = value_of(answer, by) is not None
        return filters.reason(answer, by) or ("" if scored else "not scored")

    fit = _left(answers, unfit, counts)
    if take == "shortest":
        fit.sort(key=num_tokens)
    elif take == "best":
        fit.sort(key=lambda a: -(value_of(a, by) or 0.0))
    limit = at_most or (len(fit) if take == "correct" else 1)
    counts["another was taken"] += len(fit[limit:])
    return fit[:limit]


def _left(
    answers: Sequence[Answer], reason: Callable[[Answer], str], counts: Counter[str]
) -> list[Answer]:
    """Those without a reason against them; the others are counted by it."""
    reasons = [reason(answer) for answer in answers]
    counts.update(why for why in reasons if why)
    return [answer for answer, why in zip(answers, reasons, strict=True) if not why]


def _pairs(
    answers: Sequence[Answer], by: str, at_most: int, filters: Filters, counts: Counter[str]
) -> list[tuple[Answer, Answer]]:
    whole = _left(answers, lambda a: "not judged" if a["correct"] is None else is_broken(a), counts)
    fit = [a for a in whole if a["correct"] and not filters.reason(a, by)]
    if not fit:
        counts["of a problem without a right answer that fits"] += len(whole)
        return []
    shortest = min(fit, key=num_tokens)
    length = num_tokens(shortest)
    longer = [a for a in whole if num_tokens(a) > (LONGER if a["correct"] else 1) * length]
    longer.sort(key=lambda a: bool(a["correct"]))
    counts["not longer than the shortest right one"] += len(whole) - 1 - len(longer)
    taken = longer[: at_most or None]
    counts["another was taken"] += len(longer) - len(taken)
    return [(shortest, a) for a in taken]
