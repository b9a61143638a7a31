"""Sampled answers as rows of Parquet files, and back: to be chosen from, and judged again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.layouts import read_prompt
from posttrain.data.prompts import Prompt, with_answer
from posttrain.data.readers import read_rows
from posttrain.rewards import CompletionText
from posttrain.rewards.compose import Rewards
from posttrain.rl.evaluate import Evaluation
from posttrain.rl.trajectory import Trajectory, TrajectoryGroup


def sample_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row for each answer; ``row`` is its problem's, as JSON."""
    return [
        {
            "where": str(g.prompt.sample.get("_where", "")),
            "row": json.dumps(
                {k: v for k, v in g.prompt.sample.items() if k != "_where"}, default=str
            ),
            "completion": k,
            "text": str(t.text),
            "token_ids": t.token_ids.tolist(),
            "logps": t.logps.tolist(),
            "finish_reason": t.finish_reason,
            "correct": t.is_right,
            "reward": t.reward,
            "parts": [{"name": n, "value": v} for n, v in t.parts.items()],
        }
        for g in evaluation.groups
        for k, t in enumerate(g.trajectories)
    ]


def rescore(
    sources: Sequence[str], rewards: Rewards, problems: Mapping[str, Mapping[str, Any]]
) -> Evaluation:
    """Stored answers, judged by ``rewards``. ``problems``: rows by where they are from, for answers
    that are stored without them."""
    pairs, lengths = [], []
    for where, answers in stored_answers(sources):
        sample = problems.get(where) or json.loads(answers[0].get("row") or "null")
        if sample is None:
            raise ValueError(
                f"The answers to {where!r} are stored without their problem, and --task has no "
                "such row. Name the file of rows that was answered, as it was named then."
            )
        tokens = [a["tokens"] if "tokens" in a else len(a["token_ids"]) for a in answers]
        texts = [
            CompletionText(a["text"], num_tokens=n, finish_reason=a["finish_reason"] or "stop")
            for a, n in zip(answers, tokens, strict=True)
        ]
        values = {k: v for k, v in sample.items() if k != "_where"}
        pairs.append(({**with_answer(values, read_prompt(values)), "_where": where}, texts))
        lengths.append(tokens)
    scored = rewards.score(pairs)
    groups = [
        TrajectoryGroup(
            index=i,
            prompt=Prompt(ids=(), sample=sample),
            trajectories=[
                Trajectory(
                    seed=k,
                    token_ids=np.zeros(n, np.int64),
                    finish_reason=text.finish_reason,  # type: ignore[arg-type]
                    text=text,
                    **vars(s),
                )
                for k, (text, n, s) in enumerate(zip(texts, lengths[i], scored[i], strict=True))
            ],
        )
        for i, (sample, texts) in enumerate(pairs)
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
