"""Rows that compare answers: pairs, two answers and a verdict, lists of answers that are ranked,
scored or verified."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posttrain.data.messages import (
    Message,
    after_colon,
    decoded,
    dialogue,
    from_json,
    is_dialogue,
    short,
)
from posttrain.data.row import (
    Answer,
    Row,
    Sample,
    is_nothing,
    names,
    number_of,
    prompt_name,
    prompt_of,
    truth_of,
)

_STEMS = ("response", "answer", "output", "completion", "conversation", "human_ref", "assistant")
_ALTERNATIVES = [
    (stem + a, stem + b)
    for stem in _STEMS
    for a, b in (("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"), ("1", "2"))
]
_WINS, _LOSES, _TIES, _BOTH_BAD = (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)


def pair_columns(row: Row) -> tuple[str, str] | None:
    """The columns of the better and the worse answer; one of them may hold an empty text."""
    for better, worse in zip(names.BETTER, names.WORSE, strict=True):
        if better in row.filled or worse in row.filled:
            if (
                row.all.get(better) is not None
                and row.all.get(worse) is not None
                and not row.carry & {better, worse}
            ):
                return better, worse
    return None


def alternatives(row: Row) -> tuple[str, str] | None:
    """The columns of two answers, in the order of their names."""
    return next((p for p in _ALTERNATIVES if p[0] in row.filled and p[1] in row.filled), None)


def answer_list(row: Row) -> str | None:
    """The column with several answers, unless it holds calls, which are one answer."""
    name = row.name(names.ANSWER_LISTS, (list, tuple))
    return None if name == "answers" and row.name(names.TOOLS) else name


def verified_columns(row: Row) -> list[str]:
    """Columns that are each a solution with a verdict."""
    return [n for n, v in row.filled.items() if isinstance(v, Mapping) and "is_correct" in v]


def read_pairs(row: Row) -> Sample:
    """A better and a worse answer, with their scores, a margin and a weight; or two answers and who
    wins."""
    columns = pair_columns(row)
    if columns is None:
        return _compared(row, row.needs(alternatives(row), "chosen and rejected"))
    prompt, sides, is_text = read_sides(row, [row.use(n) for n in columns])
    scores = [_side_score(row, n) for n in columns]
    margin, weight = row.number("margin"), row.number("weight")
    if weight is not None and weight < 0:
        raise ValueError(f"weight says how often the pair counts and must be >= 0; got {weight}")
    if margin is not None and margin < 0:
        raise ValueError(
            f"margin says how much better {columns[0]} is and must be >= 0; got {margin}"
        )
    if None not in scores and scores[0] < scores[1]:  # type: ignore[operator]
        raise ValueError(
            f"{columns[0]} scores {scores[0]:g}, less than {columns[1]} with {scores[1]:g}: which "
            "of them is better?"
        )
    answers = [
        Answer(messages=m, rank=k, score=s)
        for k, (m, s) in enumerate(zip(sides, scores, strict=True))
    ]
    return Sample(
        prompt=prompt,
        answers=answers,
        margin=margin,
        weight=1.0 if weight is None else weight,
        is_text=is_text,
    )


def _side_score(row: Row, side: str) -> float | None:
    return row.number(
        f"{side}_score",
        f"score_{side}",
        f"{side}_rating",
        f"rating_{side}",
        f"{side}-rating",
        f"{side}_reward",
    )


def _compared(row: Row, columns: tuple[str, str]) -> Sample:
    values = [row.use(n) for n in columns]
    listed = [_text_list(v) for v in (row.filled.get("prompt"), *values)]
    if all(listed):  # the texts of both sides' turns, as lists
        asked, *replies = listed
        if any(len(r or ()) != len(asked or ()) for r in replies):
            raise ValueError(
                f"prompt, {' and '.join(columns)} need one text for each turn; got "
                "lists of different lengths"
            )
        row.use("prompt")
        row.filled = {k: v for k, v in row.filled.items() if k != "prompt"}
        values = [
            [{"input": q, "output": a} for q, a in zip(asked or (), r or (), strict=True)]
            for r in replies
        ]
    prompt, sides, is_text = read_sides(row, values)
    stem = next(s for s in _STEMS if columns[0].startswith(s))
    ends = [n.removeprefix(stem).lstrip("_") for n in columns]
    scores = [row.number(f"score_{end}") for end in ends]
    ranks = _verdict(row, [end.lower() for end in ends], stem)
    if ranks is None and None not in scores:
        ranks = (-scores[0], -scores[1])  # type: ignore[operator]
    if ranks is None:
        raise ValueError(
            f"nothing says which of {' and '.join(columns)} is better: no "
            f"{', '.join((*names.WINNERS, *names.STRENGTHS))} and no scores. Name the column with "
            "the verdict so"
        )
    if ranks[0] != ranks[1]:
        _check_order(ranks, scores, "the verdict", "scores")
    label = False if ranks == _BOTH_BAD else None
    answers = [
        Answer(messages=m, rank=r, score=s, label=label)
        for m, r, s in zip(sides, ranks, scores, strict=True)
    ]
    return Sample(prompt=prompt, answers=answers, is_text=is_text)


def _check_order(
    ranks: Sequence[float | None], values: Sequence[float | None], what: str, other: str
) -> None:
    """ValueError where an answer of better rank (lower) has a worse value (lower)."""
    rated = [pair for pair in zip(ranks, values, strict=True) if None not in pair]
    if any(a[0] < b[0] and a[1] < b[1] for a in rated for b in rated):  # type: ignore[operator]
        raise ValueError(
            f"{what} and {other} contradict each other: {short(list(ranks))} (lower is better) and "
            f"{short(list(values))}"
        )


def _text_list(value: Any) -> list[str] | None:
    if not isinstance(value, str) or not value.lstrip().startswith('["'):
        return None
    try:
        listed = json.loads(value)
    except json.JSONDecodeError:
        return None
    return listed if all(isinstance(v, str) for v in listed) else None


def _verdict(row: Row, ends: list[str], stem: str) -> tuple[float, float] | None:
    """Ranks of two answers by every column that says something, which must agree; None if none
    does."""
    found = {
        name: _winner(name, row.use(name), ends, stem)
        for name in names.WINNERS
        if name in row.filled
    }
    for name in names.STRENGTHS:
        if (strength := row.number(name)) is not None:
            found[name] = _TIES if strength == 0 else _WINS if strength < 0 else _LOSES
    wins = [row.number(name) for name in ("winner_model_a", "winner_model_b", "winner_tie")]
    if any(w is not None for w in wins):
        if sorted(w or 0 for w in wins) != [0, 0, 1]:
            raise ValueError(
                "one of winner_model_a, winner_model_b, winner_tie is 1 and the "
                f"others are 0; got {wins}"
            )
        found["winner_model_a"] = _WINS if wins[0] else _LOSES if wins[1] else _TIES
    if stem == "human_ref" and "labels" in row.filled:
        found["labels"] = _WINS if truth_of("labels", row.use("labels")) else _LOSES
    if len(set(found.values())) > 1:
        raise ValueError(
            f"the verdicts {', '.join(found)} disagree. Choose one, and carry the "
            "others along by name"
        )
    return next(iter(found.values()), None)


def _winner(name: str, value: Any, ends: list[str], stem: str) -> tuple[float, float]:
    said = (
        str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).lower()
    )
    said = next(
        (said.removeprefix(p) for p in ("model_", f"{stem}_", stem) if said.startswith(p)), said
    )
    if "bad" in said and said.startswith(("tie", "both")):
        return _BOTH_BAD
    if said.startswith("tie") or said == "both":
        return _TIES
    if said not in ends:
        raise ValueError(
            f"{name} is {ends[0]}, {ends[1]} or tie (model_ or {stem}_ may be before "
            f"it); got {value!r}"
        )
    return _WINS if said == ends[0] else _LOSES


def read_ranked(row: Row) -> Sample:
    """A list of answers; ranks, scores and verdicts in parallel lists, or in the items."""
    name = answer_list(row)
    items = list(row.use(name)) if name else [row.use(n) for n in verified_columns(row)]
    row.needs(items, f"a list of answers ({', '.join(names.ANSWER_LISTS)})")
    if "labels" in row.filled:
        raise ValueError(
            f"labels beside {name} are of stepwise supervision (PRM): the steps of one solution "
            "are no alternatives, and nothing here trains on them. If they are verdicts on "
            "alternatives, name the column is_correct"
        )
    parts = [_item(row, name or "solutions", item) for item in items]
    ranks = [
        number_of("rank", v) for v in _parallel(row, names.RANK_LISTS, [p["rank"] for p in parts])
    ]
    scores = [
        number_of("score", v)
        for v in _parallel(row, names.SCORE_LISTS, [p["score"] for p in parts])
    ]
    labels = [
        truth_of("is_correct", v)
        for v in _parallel(row, names.VERDICT_LISTS, [p["label"] for p in parts])
    ]
    by_score = [None if s is None else -s for s in scores]
    by_label = [None if v is None else float(not v) for v in labels]
    order: Sequence[float | None] | None = next(
        (o for o in (ranks, by_score, by_label) if set(o) != {None}), None
    )
    if order is None and row.format != "ranked":
        raise ValueError(
            f"nothing says which of the {len(items)} {name} is better: no ranks, scores or "
            "is_correct. If they are best first, say so with --data.format ranked (prep: --format "
            "ranked)"
        )
    order = range(len(items)) if order is None else order
    _check_order(ranks, scores, "ranks", "scores")
    _check_order(
        order, [None if v is None else float(v) for v in labels], "the order", "is_correct"
    )
    prompt, sides, is_text = read_sides(row, [p["messages"] for p in parts])
    answers = [
        Answer(messages=m, rank=r, score=s, label=v)
        for m, r, s, v in zip(sides, order, scores, labels, strict=True)
    ]
    return Sample(prompt=prompt, answers=answers, is_text=is_text)


def _item(row: Row, column: str, item: Any) -> dict[str, Any]:
    """One of several answers: a text, messages, or an object that holds them with a rank, a score
    or a verdict."""
    if not isinstance(item, Mapping) or item.keys() & {"role", "from"}:
        return {"messages": item, "rank": None, "score": None, "label": None}
    kinds = {
        "messages": (*names.ANSWERS, "text", "content"),
        "rank": ("rank",),
        "score": names.SCORES,
        "label": names.LABELS,
    }
    taken = {
        kind: next((n for n in among if item.get(n) is not None), None)
        for kind, among in kinds.items()
    }
    for key, value in item.items():
        if key not in taken.values() and not is_nothing(value):
            row.leave(key, inside=column)
    return {kind: None if key is None else item[key] for kind, key in taken.items()}


def _parallel(row: Row, columns: Iterable[str], inside: list[Any]) -> list[Any]:
    """One value for each answer, of a column or of the answers themselves. None: not rated."""
    name = row.name(columns)
    if name is None:
        return inside
    values = decoded(row.use(name))
    values = from_json(values, name) if isinstance(values, str) else values
    if not isinstance(values, list) or len(values) != len(inside):
        raise ValueError(
            f"{name} needs one number per completion ({len(inside)}); got {short(values)}"
        )
    if any(own is not None and own != value for own, value in zip(inside, values, strict=True)):
        raise ValueError(
            f"{name} {short(values)} differs from what the answers say themselves, "
            f"{short(inside)}. Leave one out"
        )
    return values


def read_sides(row: Row, values: Sequence[Any]) -> tuple[list[Message], list[list[Message]], bool]:
    """(what all answers continue, how each goes on, whether all of it is text)."""
    values = [decoded(v) for v in values]
    values = [[v] if isinstance(v, Mapping) and v.keys() & {"role", "from"} else v for v in values]
    kinds = {type(v) for v in values}
    dialogues = {is_dialogue(v) for v in values}
    if kinds == {str} and dialogues == {True, False}:
        raise ValueError(
            "one answer is a whole dialogue (Human: ..., Assistant: ...) and another is not. "
            "Write both the same way"
        )
    if kinds == {str} and dialogues == {False}:
        prompt, name = prompt_of(row), prompt_name(row)
        asked = decoded(row.filled[name]) if name else None
        replies = [after_colon(v) for v in values] if is_dialogue(asked) else values
        is_text = isinstance(asked, str) and len(prompt) == 1 and not is_dialogue(asked)
        return prompt, [row.turns(v, "assistant") for v in replies], is_text
    if kinds not in ({str}, {list}):
        given = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"the answers must be all texts or all lists of messages; got {given}")
    sides = [dialogue(v) if isinstance(v, str) else row.turns(v, "assistant") for v in values]
    prompt = _shared(row, sides)
    plainer = [m for m in prompt if m["role"] != "system"]
    rest = [
        next((s[len(p) :] for p in (prompt, plainer) if p and s[: len(p)] == p), s) for s in sides
    ]
    if not prompt or prompt[0]["role"] == "assistant":
        raise ValueError(
            "no prompt, and the answers share no first message that could be one. Add a prompt"
        )
    for side in rest:
        if not side or side[0]["role"] != "assistant":
            raise ValueError(
                "the sides share no prompt: they differ before an assistant turn (one goes on "
                f"with no assistant turn but {[m['role'] for m in side]})"
            )
    return prompt, rest, False


def _shared(row: Row, sides: list[list[Message]]) -> list[Message]:
    """The prompt of conversations: the row's, or what all of them start with."""
    given = prompt_of(row) if row.name((*names.PROMPTS, *names.CONVERSATIONS)) else None
    plainer = [m for m in given or () if m["role"] != "system"]
    if given and any(
        s[0]["role"] == "assistant" or plainer == s[: len(plainer)] or given == s[: len(given)]
        for s in sides
    ):
        return given
    shared, longest = 0, min(map(len, sides)) - 1
    while shared < longest and all(s[shared] == sides[0][shared] for s in sides):
        shared += 1
    prompt = sides[0][:shared]
    if given and (
        len(given) > 1 or given[0]["content"].strip() not in {m["content"].strip() for m in prompt}
    ):
        raise ValueError(
            f"the prompt {short(given[-1]['content'])} is not in the turns that the answers share"
        )
    return prompt
