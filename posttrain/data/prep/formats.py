"""One raw row of any known format becomes one sample: a prompt and its answers, with ranks, scores, labels.

A format is recognised by the row's columns. Unknown columns beside those are ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

Message = dict[str, str]
Values = Mapping[str, Any]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "history", "input")
_ANSWER_COLUMNS = ("completion", "response", "answer", "output")
_SCORE_COLUMNS = ("score", "rating", "overall_score", "overall_rating", "helpfulness")


@dataclass(kw_only=True)
class Answer:
    """One completion of a prompt."""

    messages: list[Message]
    rank: float
    """Lower is better; equal ranks are ties. Only comparable inside one sample."""
    score: float | None = None
    label: bool | None = None
    """Correct, desirable, or preferred; None where the data only ranks."""

    @property
    def text(self) -> str:
        """Everything it says."""
        return "\n".join(m["content"] for m in self.messages)


@dataclass(kw_only=True)
class Sample:
    """What one row says about one prompt."""

    prompt: list[Message]
    answers: list[Answer]
    scattered: bool = False
    """Rows with the same prompt are parts of one sample (rated or labelled single answers)."""


def parse(values: Values, format: str = "auto") -> Sample:
    """The row as a sample. ValueError with the reason if it is no such row."""
    name = detect(values) if format == "auto" else format
    try:
        sample = FORMATS[name].parse(values)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a row of format {name}: {type(error).__name__} {error}") from error
    if not sample.prompt:
        raise ValueError("the prompt is empty")
    return sample


def detect(values: Values) -> str:
    """The first format whose columns the row has. ValueError that says what was seen and what is known."""
    present = {k for k, v in values.items() if v is not None}
    for name, format in FORMATS.items():
        if format.matches(present, values):
            return name
    known = "; ".join(f"{name}: {format.columns}" for name, format in FORMATS.items())
    raise ValueError(
        f"unknown format: columns {sorted(map(str, values))}. Known: {known}. Choose with --format, or rename columns"
    )


def messages(value: Any, role: str) -> list[Message]:
    """A text as one message of ``role``; a list of {role, content} or {from, value} as it is. ValueError for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
    if isinstance(value, str):
        return [{"role": role, "content": _valid(value)}] if value.strip() else []
    if not isinstance(value, list):
        raise ValueError(f"a text or a list of messages is wanted; got {type(value).__name__}")
    out = []
    for m in value:
        if not isinstance(m, Mapping):
            raise ValueError(f"a message is an object with role and content; got {type(m).__name__}")
        who, content = m.get("role", m.get("from")), m.get("content", m.get("value"))
        who = _ROLES.get(str(who).lower(), str(who).lower())
        if who not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
            raise ValueError(f"a message needs a known role and a text; got role {who!r}, content {type(content).__name__}")
        out.append({"role": who, "content": _valid(content)})
    return out


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair: cut, or of a wrong encoding") from error
    return text.strip()


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a score must be a number; got {str(value)[:40]!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"a score must be finite; got {number}")
    return number


def _first(values: Values, names: tuple[str, ...]) -> Any:
    return next((values[n] for n in names if values.get(n) is not None), None)


def _prompt(values: Values) -> list[Message]:
    value = _first(values, _PROMPT_COLUMNS)
    if value is None:
        raise ValueError(f"no prompt: none of the columns {', '.join(_PROMPT_COLUMNS)}")
    found = messages(value, "user")
    system = values.get("system") or values.get("system_prompt")
    return [*messages(system, "system"), *found] if isinstance(system, str) and system.strip() else found


def dialogue(text: str) -> list[Message]:
    """Anthropic's one text `\\n\\nHuman: ... \\n\\nAssistant: ...` as messages. ValueError if it is none."""
    pieces = _TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError("not a dialogue of \\n\\nHuman: and \\n\\nAssistant: turns")
    roles = ["user" if who == "Human" else "assistant" for who in pieces[1::2]]
    return [{"role": r, "content": _valid(c)} for r, c in zip(roles, pieces[2::2], strict=True)]


def _split_shared(sides: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """What all sides start with, and how each goes on, from an assistant turn."""
    shared = 0
    while all(len(s) > shared + 1 for s in sides) and all(s[shared] == sides[0][shared] for s in sides):
        shared += 1
    rest = [s[shared:] for s in sides]
    if any(not s or s[0]["role"] != "assistant" for s in rest):
        raise ValueError("the sides differ before an assistant turn, so they share no prompt")
    return sides[0][:shared], rest


def _hh(values: Values) -> Sample:
    prompt, (chosen, rejected) = _split_shared([dialogue(values["chosen"]), dialogue(values["rejected"])])
    return Sample(prompt=prompt, answers=[Answer(messages=chosen, rank=0), Answer(messages=rejected, rank=1)])


def _pairs(values: Values) -> Sample:
    sides = [messages(values[name], "assistant") for name in ("chosen", "rejected")]
    only_answers = all(not s or s[0]["role"] == "assistant" for s in sides)
    has_prompt = _first(values, _PROMPT_COLUMNS) is not None
    if all(isinstance(values[n], str) for n in ("chosen", "rejected")) or (has_prompt and only_answers):
        prompt = _prompt(values)
    else:
        prompt, sides = _split_shared(sides)
    scores = [
        _number(_first(values, names)) for names in (("chosen_score", "score_chosen"), ("rejected_score", "score_rejected"))
    ]
    answers = [Answer(messages=m, rank=k, score=scores[k]) for k, m in enumerate(sides)]
    if None in scores and (margin := _number(values.get("margin"))) is not None:
        answers[0].score, answers[1].score = margin, 0.0
    return Sample(prompt=prompt, answers=answers)


def _answer_list(column: str, values: Values) -> Sample:
    """Lists of texts, or of objects with a text and a score or rank."""
    answers = []
    scores, ranks = values.get("scores"), values.get("ranks")
    for k, item in enumerate(values[column]):
        score = _number(scores[k]) if scores else None
        rank = float(ranks[k]) if ranks else None
        content = item
        if isinstance(item, Mapping):
            content = _first(item, (*_ANSWER_COLUMNS, "text", "content"))
            score = _number(_first(item, _SCORE_COLUMNS)) if score is None else score
            rank = float(item["rank"]) if item.get("rank") is not None else rank
        found = messages(content, "assistant")
        answers.append(Answer(messages=found, rank=-score if rank is None and score is not None else k if rank is None else rank))
        answers[-1].score = score
    return Sample(prompt=_prompt(values), answers=answers)


def _shp(values: Values) -> Sample:
    sides = [messages(values["human_ref_A"], "assistant"), messages(values["human_ref_B"], "assistant")]
    scores = [_number(values.get("score_A")), _number(values.get("score_B"))]
    first_wins = int(values["labels"]) == 1
    return Sample(
        prompt=messages(values["history"], "user"),
        answers=[
            Answer(messages=m, rank=(k == 0) != first_wins, score=s) for k, (m, s) in enumerate(zip(sides, scores, strict=True))
        ],
    )


def _arena(values: Values) -> Sample:
    prompt, sides = _split_shared([messages(values[f"conversation_{x}"], "user") for x in "ab"])
    winner = str(values["winner"])
    if winner not in ("model_a", "model_b") and not winner.startswith("tie"):
        raise ValueError(f"winner is model_a, model_b, tie or tie (bothbad); got {winner!r}")
    ranks = {"model_a": (0, 1), "model_b": (1, 0)}.get(winner, (0, 0))
    return Sample(prompt=prompt, answers=[Answer(messages=m, rank=r) for m, r in zip(sides, ranks, strict=True)])


def _labelled(values: Values) -> Sample:
    label = {"true": True, "false": False, "1": True, "0": False}.get(str(values["label"]).lower())
    if label is None:
        raise ValueError(f"label is true (desirable) or false; got {values['label']!r}")
    answer = Answer(messages=messages(values["completion"], "assistant"), rank=0 if label else 1, label=label)
    return Sample(prompt=_prompt(values), answers=[answer], scattered=True)


def _rated(values: Values) -> Sample:
    score = _number(_first(values, _SCORE_COLUMNS))
    if score is None:
        raise ValueError(f"no score: none of the columns {', '.join(_SCORE_COLUMNS)} holds a number")
    answer = Answer(messages=messages(_first(values, _ANSWER_COLUMNS), "assistant"), rank=-score, score=score)
    return Sample(prompt=_prompt(values), answers=[answer], scattered=True)


def _solutions(values: Values) -> list[Mapping[str, Any]]:
    listed = values.get("solutions")
    found = listed if isinstance(listed, list) else list(values.values())
    return [s for s in found if isinstance(s, Mapping) and "is_correct" in s]


def _verifier(values: Values) -> Sample:
    answers = []
    for s in _solutions(values):
        if not isinstance(s["is_correct"], bool):
            raise ValueError(f"is_correct is true or false; got {s['is_correct']!r}")
        text = _first(s, ("solution", *_ANSWER_COLUMNS, "text"))
        answers.append(Answer(messages=messages(text, "assistant"), rank=0 if s["is_correct"] else 1, label=s["is_correct"]))
    return Sample(prompt=_prompt(values), answers=answers)


def _correction(values: Values) -> Sample:
    parts = [messages(values[c], "user") for c in ("instruction", "state", "observation") if values.get(c) is not None]
    before = values.get("history")
    head = messages(before, "user") if isinstance(before, list) else []
    text = "\n\n".join(m["content"] for part in parts for m in part)
    prompt = [*head, {"role": "user", "content": text}] if text else head
    sides = [messages(values[c], "assistant") for c in ("corrected_action", "wrong_action")]
    return Sample(prompt=prompt, answers=[Answer(messages=m, rank=k, label=k == 0) for k, m in enumerate(sides)])


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a format is recognised and read."""

    columns: str
    """For messages."""
    matches: Callable[[set[str], Values], bool]
    parse: Callable[[Values], Sample]


def _has(*names: str) -> Callable[[set[str], Values], bool]:
    return lambda present, _: present.issuperset(names)


def _is_dialogue(present: set[str], values: Values) -> bool:
    sides = [values.get("chosen"), values.get("rejected")]
    return not present & set(_PROMPT_COLUMNS) and all(isinstance(s, str) and _TURN.search(s) for s in sides)


def _has_list(column: str) -> Callable[[set[str], Values], bool]:
    return lambda present, values: bool(present & set(_PROMPT_COLUMNS)) and isinstance(values.get(column), list)


def _is_rated(present: set[str], _: Values) -> bool:
    return all(present & set(names) for names in (_PROMPT_COLUMNS, _ANSWER_COLUMNS, _SCORE_COLUMNS))


FORMATS: dict[str, Format] = {
    "correction": Format(
        columns="wrong_action, corrected_action, and instruction/state/history", matches=_has("wrong_action", "corrected_action"),
        parse=_correction,
    ),
    "hh": Format(columns="chosen, rejected as \\n\\nHuman:/\\n\\nAssistant: texts", matches=_is_dialogue, parse=_hh),
    "pairs": Format(
        columns="chosen, rejected, and prompt unless both are dialogues", matches=_has("chosen", "rejected"), parse=_pairs
    ),
    "shp": Format(
        columns="history, human_ref_A, human_ref_B, labels", matches=_has("history", "human_ref_A", "human_ref_B", "labels"),
        parse=_shp,
    ),
    "arena": Format(
        columns="conversation_a, conversation_b, winner", matches=_has("conversation_a", "conversation_b", "winner"), parse=_arena
    ),
    **{
        column: Format(
            columns=f"prompt, {column} (texts best first, or with {more})", matches=_has_list(column),
            parse=partial(_answer_list, column),
        )
        for column, more in (("completions", "scores, ranks"), ("answers", "rank"), ("responses", "scores"))
    },
    "labelled": Format(columns="prompt, completion, label", matches=_has("prompt", "completion", "label"), parse=_labelled),
    "verifier": Format(
        columns="question, and solutions with is_correct", parse=_verifier,
        matches=lambda present, values: bool(present & set(_PROMPT_COLUMNS)) and bool(_solutions(values)),
    ),
    "rated": Format(columns="prompt, response, score", matches=_is_rated, parse=_rated),
}  # fmt: skip
"""By name, in the order in which they are tried."""
