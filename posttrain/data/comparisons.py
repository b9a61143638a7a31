"""Rows of preference data become one record: a prompt, K completions, and which was preferred to which.

* ``pairs``: ``chosen`` and ``rejected``, with ``prompt``, or without where both are conversations (what they share at the
  start is the prompt); where there, ``margin`` and ``weight`` of the pair.
* ``ranked``: ``prompt`` and ``completions``, best first; or in any order with ``ranks`` (0 is best, equal ranks are ties and
  not compared) or ``scores`` (higher is better; their differences are the margins).
* ``labelled``: ``prompt``, ``completion`` and ``label`` (true: desirable), for losses over single answers (KTO).

A side is a string or a list of messages. What `posttrain prep` writes has one of these formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.config import Format
from posttrain.data.readers import Row
from posttrain.data.schema import Message, message_list, required_values, single_message
from posttrain.types import Pair

PREFERENCE_REQUIRED: dict[Format, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "ranked": ("prompt", "completions"),
    "labelled": ("prompt", "completion", "label"),
}


@dataclass(kw_only=True, frozen=True)
class Comparison:
    """One row, normalised."""

    prompt: list[Message]
    """Messages that all completions continue."""

    completions: list[list[Message]]
    """K continuations, each with at least one assistant message, whose tokens are trained."""

    pairs: list[Pair] | None
    """Comparisons; None: all pairs, best first. Empty for labelled rows."""

    labels: list[bool | None]
    """One per completion; None where the row is a comparison."""

    text: tuple[str, list[str]] | None = None
    """(prompt, completions) of a row of strings, for a tokenizer without chat template. Default None: has turns."""


def normalise_comparison(row: Row, format: Format, columns: dict[str, str] | None = None) -> Comparison:
    """The row as a comparison. ValueError naming file and row if a field is missing or malformed."""
    advice = "Correct the row, or make training data of raw files with `posttrain prep pairs`."
    values = required_values(row, columns, f"format {format}", PREFERENCE_REQUIRED[format], advice)
    if format == "pairs":
        return _pairs(row, values)
    if format == "ranked":
        return _ranked(row, values)
    if not isinstance(values["label"], bool | int) or values["label"] not in (0, 1):
        raise ValueError(f"{row.where}: label is true (desirable) or false; got {values['label']!r}. Correct the row.")
    prompt, sides, text = _sides(row, values["prompt"], [values["completion"]])
    return Comparison(prompt=prompt, completions=sides, pairs=[], labels=[bool(values["label"])], text=text)


def _pairs(row: Row, values: dict[str, Any]) -> Comparison:
    prompt, sides, text = _sides(row, values.get("prompt"), [values["chosen"], values["rejected"]])
    margin, weight = _number(row, "margin", values.get("margin"), 0.0), _number(row, "weight", values.get("weight"), 1.0)
    if weight < 0:
        raise ValueError(f"{row.where}: weight says how often the pair counts and must be >= 0; got {weight}. Correct the row.")
    pair = Pair(chosen=0, rejected=1, margin=margin, weight=weight)
    return Comparison(prompt=prompt, completions=sides, pairs=[pair], labels=[None, None], text=text)


def _ranked(row: Row, values: dict[str, Any]) -> Comparison:
    completions = values["completions"]
    if not isinstance(completions, list | tuple) or len(completions) < 2:
        raise ValueError(f"{row.where}: completions is a list of at least two answers; got {completions!r}. Correct the row.")
    prompt, sides, text = _sides(row, values["prompt"], list(completions))
    scores = _numbers(row, "scores", values.get("scores"), len(sides))
    ranks = _numbers(row, "ranks", values.get("ranks"), len(sides))
    order = ranks if ranks is not None else [-s for s in scores] if scores is not None else list(range(len(sides)))
    pairs = [
        Pair(chosen=i, rejected=j, margin=scores[i] - scores[j] if scores is not None else 0.0)
        for i in range(len(sides))
        for j in range(len(sides))
        if order[i] < order[j]
    ]
    return Comparison(prompt=prompt, completions=sides, pairs=pairs, labels=[None] * len(sides), text=text)


def _sides(
    row: Row, prompt: Any, sides: Sequence[Any]
) -> tuple[list[Message], list[list[Message]], tuple[str, list[str]] | None]:
    """(prompt messages, completions as messages, the strings where all are strings)."""
    if all(isinstance(side, str) for side in sides):
        if isinstance(prompt, list):
            return message_list(row, "prompt", prompt), [_answer(row, side) for side in sides], None
        if not isinstance(prompt, str):
            raise ValueError(
                f"{row.where}: chosen and rejected are texts, so the prompt must be given apart; got prompt={prompt!r}. "
                "Dialogues written as one text (Anthropic HH) are split by `posttrain prep pairs FILE --out DIR`."
            )
        user = single_message(row, "user", prompt)
        return [user], [_answer(row, side) for side in sides], (prompt, [str(side) for side in sides])
    messages = [message_list(row, "completion", side) for side in sides]
    shared = 0
    while all(len(m) > shared + 1 for m in messages) and all(m[shared] == messages[0][shared] for m in messages):
        shared += 1
    if prompt is None or (isinstance(prompt, str) and shared):
        head = messages[0][:shared]
    else:
        head = [single_message(row, "user", prompt)] if isinstance(prompt, str) else message_list(row, "prompt", prompt)
        starts_again = all(m[: len(head)] == head and len(m) > len(head) for m in messages)
        shared = len(head) if starts_again else 0
    completions = [m[shared:] for m in messages]
    if not head:
        raise ValueError(f"{row.where}: no prompt, and the completions share no first message that could be one. Add a prompt.")
    for completion in completions:
        if not any(m["role"] == "assistant" for m in completion):
            raise ValueError(
                f"{row.where}: a completion has no assistant turn after the shared prompt; its roles are "
                f"{[m['role'] for m in completion]}. Correct the row."
            )
    return head, completions, None


def _answer(row: Row, text: str) -> list[Message]:
    return [single_message(row, "assistant", text)]


def _number(row: Row, name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{row.where}: {name} must be a finite number; got {value!r}. Correct the row, or remove the column.")
    return number


def _numbers(row: Row, name: str, value: Any, count: int) -> list[float] | None:
    """None where the column is missing or holds no number at all (an optional column of a table)."""
    if value is None or (isinstance(value, list | tuple) and value and all(v is None for v in value)):
        return None
    if not isinstance(value, list | tuple) or len(value) != count or any(v is None for v in value):
        raise ValueError(f"{row.where}: {name} needs one number per completion ({count}); got {value!r}. Correct the row.")
    return [_number(row, name, v, 0.0) for v in value]
