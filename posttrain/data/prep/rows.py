"""All samples of one prompt become output rows; what is left out is named with its reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.data.messages import Message, message_text
from posttrain.data.prep.build import index_pairs
from posttrain.data.prep.options import PrepConfig
from posttrain.data.row import Answer, Sample

EMPTY, REPEATED_ANSWER, UNRATED = "empty answer", "repeated answer", "unrated answer"
NOTHING = "nothing to compare: one answer, or all tied"
NEAR_DUPLICATE, CONTAMINATED = "near-duplicate prompt", "shares an n-gram with the evaluation set"
EQUAL, REPEATED, CONTRADICTORY = (
    "equal sides",
    "repeated pair",
    ("contradictory: both orders are preferred"),
)
MARGIN, NO_MARGIN = "margin below the minimum", "no scores, so no margin"
LONG_CHARS, LONG_TOKENS = "longer than max_chars", "longer than max_tokens"


@dataclass(kw_only=True)
class Located:
    """A sample and where it comes from."""

    sample: Sample
    source: str
    row: int
    carried: dict[str, Any] = field(default_factory=dict)
    """Columns that ``--carry`` names, as they are written."""


@dataclass(kw_only=True)
class OutRow:
    """One candidate for the output."""

    values: dict[str, Any]
    """Columns of the layout."""
    conversations: list[list[Message]]
    """Prompt with each side: what the length limits are for."""
    located: Located


@dataclass(kw_only=True)
class Outcome:
    """What became of one prompt."""

    rows: list[OutRow] = field(default_factory=list)
    dropped: list[tuple[Located, str]] = field(default_factory=list)
    """Samples and rows left out; (where, reason)."""
    num_samples: int = 0
    num_built: int = 0
    """Rows before they were checked; built = rows + dropped rows."""
    num_dropped_samples: int = 0
    dropped_answers: list[str] = field(default_factory=list)


def prompt_id(prompt: list[Message], tools: list[Any] | None = None) -> str:
    """16 hex digits, equal for equal prompts."""
    said = [[m["role"], m["content"], *([more] if (more := _more(m)) else [])] for m in prompt]
    text = json.dumps([*said, tools] if tools else said, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _more(message: Message) -> dict[str, Any]:
    return (
        {k: v for k, v in sorted(message.items()) if k not in ("role", "content")}
        if len(message) > 2
        else {}
    )


def outcome_of(identity: str, samples: list[Located], config: PrepConfig) -> Outcome:
    """Rows of one prompt, in the order of the data. Scattered samples are joined first."""
    outcome = Outcome()
    for located in _joined(samples):
        outcome.num_samples += 1
        answers = _clean(located.sample, outcome.dropped_answers)
        built = list(_LAYOUTS[config.layout](identity, located, answers, config))
        if not built:
            outcome.num_dropped_samples += 1
            outcome.dropped.append((located, NOTHING))
        outcome.num_built += len(built)
        outcome.rows.extend(built)
    only = outcome.rows[0].values if len(outcome.rows) == 1 and config.min_margin is None else None
    if config.layout == "pairs" and not (
        only and only["chosen"] != only["rejected"]
    ):  # nothing to compare one row with
        _check_pairs(outcome, config)
    return outcome


def keep_short(outcome: Outcome, config: PrepConfig, lengths: dict[int, int]) -> None:
    """Rows over a limit leave; ``lengths``: tokens of the longest conversation by id() of the
    row."""
    kept = []
    for row in outcome.rows:
        chars = max(sum(len(message_text(m)) for m in c) for c in row.conversations)
        if config.max_chars is not None and chars > config.max_chars:
            outcome.dropped.append((row.located, LONG_CHARS))
        elif config.max_tokens is not None and lengths[id(row)] > config.max_tokens:
            outcome.dropped.append((row.located, LONG_TOKENS))
        else:
            kept.append(row)
    outcome.rows = kept


def _joined(samples: list[Located]) -> Iterator[Located]:
    """Single answers to one prompt as one sample, labelled and rated ones apart: their ranks are of
    different kinds."""
    for layout in ("labelled", "rated"):
        scattered = [s for s in samples if s.sample.layout == layout]
        if scattered:
            answers = [a for s in scattered for a in s.sample.answers]
            yield replace(scattered[0], sample=replace(scattered[0].sample, answers=answers))
    yield from (s for s in samples if not s.sample.is_scattered)


def _clean(sample: Sample, dropped: list[str]) -> list[Answer]:
    """Without empty and unrated answers, and without a second copy of the same answer with the same
    rank."""
    kept, seen = [], set()
    for answer in sample.answers:
        said = [m for m in answer.messages if m["role"] == "assistant"]
        key = (answer.text, answer.rank)
        if not said or not all(m["content"].strip() or m.get("tool_calls") for m in said):
            dropped.append(EMPTY)
        elif answer.rank is None:
            dropped.append(UNRATED)
        elif key in seen:
            dropped.append(REPEATED_ANSWER)
        else:
            seen.add(key)
            kept.append(answer)
    return kept


def _meta(identity: str, located: Located) -> dict[str, Any]:
    tools = {"tools": located.sample.tools} if located.sample.tools else {}
    return {
        "source": located.source,
        "row": located.row,
        "prompt_id": identity,
        **tools,
        **located.carried,
    }


def _pair_rows(
    identity: str, located: Located, answers: list[Answer], config: PrepConfig
) -> Iterator[OutRow]:
    prompt = located.sample.prompt
    seed = f"{config.seed}:{identity}"
    for i, j in index_pairs(answers, config.strategy, seed=seed, keep_ties=config.ties == "keep"):
        better, worse = answers[i], answers[j]
        by_score = (
            None if better.score is None or worse.score is None else better.score - worse.score
        )
        sample = located.sample
        margin = by_score if sample.margin is None else sample.margin
        margin = 0.0 if better.rank == worse.rank else margin
        values = {
            "prompt": prompt,
            "chosen": better.messages,
            "rejected": worse.messages,
            "margin": margin,
            "chosen_score": better.score,
            "rejected_score": worse.score,
            **_meta(identity, located),
            **({"weight": sample.weight} if sample.weight != 1 else {}),
        }
        yield OutRow(
            values=values,
            conversations=[prompt + better.messages, prompt + worse.messages],
            located=located,
        )


def _group_rows(
    identity: str, located: Located, answers: list[Answer], _: PrepConfig
) -> Iterator[OutRow]:
    levels = sorted({a.rank for a in answers})
    if len(levels) < 2:
        return
    ordered = sorted(answers, key=lambda a: a.rank)
    scores = [a.score for a in ordered]
    if located.sample.margin is not None and len(ordered) == 2 and None in scores:
        scores = [located.sample.margin, 0.0]
    values = {
        "prompt": located.sample.prompt,
        "completions": [a.messages for a in ordered],
        "ranks": [levels.index(a.rank) for a in ordered],
        "scores": None if None in scores else scores,
        **_meta(identity, located),
    }
    yield OutRow(
        values=values,
        conversations=[located.sample.prompt + a.messages for a in ordered],
        located=located,
    )


def _labelled_rows(
    identity: str, located: Located, answers: list[Answer], _: PrepConfig
) -> Iterator[OutRow]:
    ranks = [a.rank for a in answers]
    for answer in answers:
        label = answer.label
        if label is None and len(set(ranks)) > 1 and answer.rank in (min(ranks), max(ranks)):
            label = answer.rank == min(ranks)
        if label is not None:
            values = {
                "prompt": located.sample.prompt,
                "completion": answer.messages,
                "label": label,
                **_meta(identity, located),
            }
            yield OutRow(
                values=values,
                conversations=[located.sample.prompt + answer.messages],
                located=located,
            )


def _sft_rows(
    identity: str, located: Located, answers: list[Answer], _: PrepConfig
) -> Iterator[OutRow]:
    good = [a for a in answers if a.label is not False]
    if good:
        best = min(good, key=lambda a: a.rank)
        conversation = located.sample.prompt + best.messages
        yield OutRow(
            values={"messages": conversation, **_meta(identity, located)},
            conversations=[conversation],
            located=located,
        )


_LAYOUTS = {
    "pairs": _pair_rows,
    "groups": _group_rows,
    "labelled": _labelled_rows,
    "sft": _sft_rows,
}


def _check_pairs(outcome: Outcome, config: PrepConfig) -> None:
    """Equal sides, the same pair again, both orders of a pair, small margins."""

    def sides(row: OutRow) -> tuple[str, str]:
        return tuple(json.dumps(row.values[n], ensure_ascii=False) for n in ("chosen", "rejected"))  # type: ignore[return-value]

    ordered = [sides(row) for row in outcome.rows]
    preferred = set(ordered)
    kept, seen = [], set()
    for row, (chosen, rejected) in zip(outcome.rows, ordered, strict=True):
        margin = row.values["margin"]
        reason = None
        if chosen == rejected:
            reason = EQUAL
        elif (rejected, chosen) in preferred:
            reason = CONTRADICTORY
        elif (chosen, rejected) in seen:
            reason = REPEATED
        elif config.min_margin is not None and margin is None:
            reason = NO_MARGIN
        elif config.min_margin is not None and margin < config.min_margin:
            reason = MARGIN
        seen.add((chosen, rejected))
        if reason is None:
            kept.append(row)
        else:
            outcome.dropped.append((row.located, reason))
    outcome.rows = kept
