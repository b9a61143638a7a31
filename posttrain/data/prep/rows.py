"""All samples of one prompt become output rows; what is left out is named with its reason."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from posttrain.data.config import PrepConfig, Strategy, TokenCounter
from posttrain.data.messages import Message, message_text
from posttrain.data.row import Answer, Sample

EMPTY, REPEATED_ANSWER, UNRATED = "empty answer", "repeated answer", "unrated answer"
NOTHING = "nothing to compare: one answer, or all tied"
NEAR_DUPLICATE, CONTAMINATED = "near-duplicate prompt", "shares an n-gram with the evaluation set"
EQUAL, REPEATED = "equal sides", "repeated pair"
CONTRADICTORY = "contradictory: both orders are preferred"
MARGIN, NO_MARGIN = "margin below the minimum", "no scores, so no margin"
LONG_CHARS, LONG_TOKENS = "longer than max_chars", "longer than max_tokens"
LONGER = 1.5
"""k1.5: a correct answer more than this many times as long as the shortest correct one is a
negative."""

Values = dict[str, Any]
"""A row as it is written: the columns of its layout, and where it is from."""
Located = tuple[Sample, Values]
"""A sample with the columns that are written beside it: source, row, prompt_id, and tools, weight
and carried columns where it has them."""
Drop = Callable[[Values, str], None]
"""Told of a sample or row that is left out, and why."""


def prompt_id(prompt: list[Message], tools: list[Any] | None = None) -> str:
    """16 hex digits, equal for equal prompts."""
    said: list[Any] = []
    for m in prompt:
        said.append([m["role"], m["content"]])
        if len(m) > 2:
            said[-1].append({k: v for k, v in sorted(m.items()) if k not in ("role", "content")})
    text = json.dumps([*said, tools] if tools else said, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def parts_of(values: Values) -> tuple[list[Message], dict[str, list[Message]]]:
    """(prompt, {what it is: answer}) of a row of any layout."""
    if "messages" in values:
        return values["messages"][:-1], {"answer": values["messages"][-1:]}
    if "completion" in values:
        title = "desirable" if values["label"] else "undesirable"
        return values["prompt"], {title: values["completion"]}
    if "completions" in values:
        ranked = zip(values["ranks"], values["completions"], strict=True)
        return values["prompt"], {f"{i}. rank {r}": c for i, (r, c) in enumerate(ranked, start=1)}
    return values["prompt"], {side: values[side] for side in ("chosen", "rejected")}


def rows_of(
    samples: list[Located], config: PrepConfig, drop: Drop, counts: dict[str, int]
) -> list[Values]:
    """Rows of one prompt, in the order of the data. Single answers are joined first."""
    rows: list[Values] = []
    for sample, place in _joined(samples):
        answers = list(_clean(sample, drop))
        built = [made | place for made in _LAYOUTS[config.layout](sample, answers, config, place)]
        counts["dropped_samples"] += not built
        if not built:
            drop(place, NOTHING)
        rows += built
        counts["samples"] += 1
        counts["built"] += len(built)
    return list(_checked_pairs(rows, config, drop)) if config.layout == "pairs" else rows


def _joined(samples: list[Located]) -> Iterator[Located]:
    """Single answers to one prompt as one sample, labelled and rated ones apart: their ranks are of
    different kinds."""
    for layout in ("labelled", "rated"):
        single = [s for s in samples if s[0].layout == layout]
        if single:
            (first, place), *_ = single
            yield replace(first, answers=[a for s, _ in single for a in s.answers]), place
    yield from (s for s in samples if s[0].layout not in ("labelled", "rated"))


def _clean(sample: Sample, drop: Drop) -> Iterator[Answer]:
    """Without empty and unrated answers, and without a second copy of the same answer with the same
    rank."""
    seen = set()
    for answer in sample.answers:
        said = [m for m in answer.messages if m["role"] == "assistant"]
        key = (answer.text, answer.rank)
        if not said or not all(m["content"].strip() or m.get("tool_calls") for m in said):
            drop({}, EMPTY)
        elif answer.rank is None:
            drop({}, UNRATED)
        elif key in seen:
            drop({}, REPEATED_ANSWER)
        else:
            seen.add(key)
            yield answer


def _rank(answer: Answer) -> float:
    assert answer.rank is not None, "unrated answers are left out before"
    return answer.rank


def index_pairs(
    answers: list[Answer], strategy: Strategy, *, seed: str, keep_ties: bool
) -> list[tuple[int, int]]:
    """(better, worse) indices by ``strategy``; ``seed`` decides what `random` draws. Ties come out
    only with ``keep_ties``."""
    if strategy == "long2short":
        return _long2short(answers)
    ranks = list(map(_rank, answers))
    order = sorted(range(len(answers)), key=ranks.__getitem__)
    pairs: Iterator[tuple[int, int]] = itertools.combinations(order, 2)
    if strategy == "best-worst":
        pairs = itertools.islice((p for p in pairs if ranks[p[1]] == max(ranks)), 1)
    elif strategy == "adjacent":
        pairs = itertools.pairwise(order)
    elif strategy == "random":
        every = list(pairs)
        different = [(i, j) for i, j in every if ranks[i] < ranks[j]]
        pairs = iter([random.Random(seed).choice(different or every)] if every else [])
    return [(i, j) for i, j in pairs if keep_ties or ranks[i] < ranks[j]]


def _long2short(answers: list[Answer]) -> list[tuple[int, int]]:
    """Kimi k1.5, arXiv:2501.12599 section 2.4: the shortest correct answer against wrong longer
    ones and against correct ones more than 1.5 times as long. Lengths in characters."""
    lengths = [len(a.text) for a in answers]
    correct = [i for i, a in enumerate(answers) if a.label]
    if not correct:
        return []
    best = min(correct, key=lengths.__getitem__)
    wrong = [j for j, a in enumerate(answers) if a.label is False and lengths[j] > lengths[best]]
    wordy = [j for j in correct if lengths[j] > LONGER * lengths[best]]
    return [(best, j) for j in sorted(wrong + wordy)]


def _pairs(
    sample: Sample, answers: list[Answer], config: PrepConfig, place: Values
) -> Iterator[Values]:
    seed = f"{config.seed}:{place['prompt_id']}"
    for i, j in index_pairs(answers, config.strategy, seed=seed, keep_ties=config.ties == "keep"):
        better, worse = answers[i], answers[j]
        is_tie = better.rank == worse.rank
        yield {
            "prompt": sample.prompt,
            "chosen": better.messages,
            "rejected": worse.messages,
            "margin": 0.0 if is_tie else sample.margin_of(better, worse),
            "chosen_score": better.score,
            "rejected_score": worse.score,
        }


def _group(sample: Sample, answers: list[Answer], *_: Any) -> Iterator[Values]:
    levels = sorted(set(map(_rank, answers)))
    if len(levels) < 2:
        return
    ordered = sorted(answers, key=_rank)
    scores: list[float | None] | None = [a.score for a in ordered]
    if None in (scores or ()):
        is_pair = sample.margin is not None and len(ordered) == 2
        scores = [sample.margin, 0.0] if is_pair else None
    yield {
        "prompt": sample.prompt,
        "completions": [a.messages for a in ordered],
        "ranks": [levels.index(_rank(a)) for a in ordered],
        "scores": scores,
    }


def _labelled(sample: Sample, answers: list[Answer], *_: Any) -> Iterator[Values]:
    ranks = list(map(_rank, answers))
    for answer, rank in zip(answers, ranks, strict=True):
        label = answer.label
        if label is None and min(ranks) < max(ranks) and rank in (min(ranks), max(ranks)):
            label = rank == min(ranks)
        if label is not None:
            yield {"prompt": sample.prompt, "completion": answer.messages, "label": label}


def _best(sample: Sample, answers: list[Answer], *_: Any) -> Iterator[Values]:
    good = [a for a in answers if a.label is not False]
    if good:
        yield {"messages": sample.prompt + min(good, key=_rank).messages}


_LAYOUTS: dict[str, Callable[..., Iterator[Values]]] = {
    "pairs": _pairs,
    "groups": _group,
    "labelled": _labelled,
    "sft": _best,
}


def _checked_pairs(rows: list[Values], config: PrepConfig, drop: Drop) -> Iterator[Values]:
    """Without equal sides, the same pair again, both orders of a pair, and small margins."""
    if len(rows) == 1 and config.min_margin is None and rows[0]["chosen"] != rows[0]["rejected"]:
        yield from rows  # nothing to compare it with
        return
    sides = [
        tuple(json.dumps(row[side], ensure_ascii=False) for side in ("chosen", "rejected"))
        for row in rows
    ]
    preferred, seen = set(sides), set[tuple[str, ...]]()
    for row, pair in zip(rows, sides, strict=True):
        margin, least = row["margin"], config.min_margin
        reason = None
        if pair[0] == pair[1]:
            reason = EQUAL
        elif pair[::-1] in preferred:
            reason = CONTRADICTORY
        elif pair in seen:
            reason = REPEATED
        elif least is not None and (margin is None or margin < least):
            reason = NO_MARGIN if margin is None else MARGIN
        seen.add(pair)
        if reason is None:
            yield row
        else:
            drop(row, reason)


def within_limits(
    rows: list[Values],
    config: PrepConfig,
    count_tokens: Callable[..., list[int]] | None,
    drop: Drop,
) -> list[Values]:
    """Rows whose prompt with each answer is short enough."""
    if config.max_chars is None and count_tokens is None:
        return rows
    split = [parts_of(row) for row in rows]
    whole = [[prompt + answer for answer in answers.values()] for prompt, answers in split]
    tools = [row.get("tools") for row in rows]
    counted = [(c, t) for several, t in zip(whole, tools, strict=True) for c in several]
    tokens = iter(_in_chunks(count_tokens, counted) if count_tokens else ())
    kept = []
    for row, several in zip(rows, whole, strict=True):
        longest = max(sum(len(message_text(m)) for m in c) for c in several)
        num_tokens = max(list(itertools.islice(tokens, len(several))), default=0)
        if config.max_chars is not None and longest > config.max_chars:
            drop(row, LONG_CHARS)
        elif config.max_tokens is not None and num_tokens > config.max_tokens:
            drop(row, LONG_TOKENS)
        else:
            kept.append(row)
    return kept


def _in_chunks(count_tokens: TokenCounter, counted: list[Any]) -> Iterator[int]:
    for at in range(0, len(counted), 512):
        yield from count_tokens(counted[at : at + 512])
