"""One raw row becomes one sample: a prompt, its answers, and what is known of them. Everything that
reads rows reads them here.

Layouts, by the first that fits:

* ``pairs``: ``chosen`` and ``rejected``; or two answers (``response_a``, ``response_b``, ...) and a
  verdict or scores.
* ``ranked``: a list of answers with ranks, scores or verdicts; ``format="ranked"`` says that a bare
  list is best first.
* ``labelled``: one answer and ``label`` (true: desirable). ``rated``: one answer and a score.
* ``messages``: a conversation. ``prompt_completion``: a prompt and an answer, Alpaca's columns
  among them.

A prompt has the row's system message and earlier turns before it, and inputs after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.data.comparisons import (
    alternatives,
    answer_list,
    pair_columns,
    read_pairs,
    read_ranked,
    read_sides,
    verified_columns,
)
from posttrain.data.messages import Message, decoded, from_json, message_text, short
from posttrain.data.row import (
    MEDIA,
    Answer,
    Row,
    Sample,
    Values,
    conversation_name,
    conversation_of,
    is_nothing,
    names,
    prompt_name,
    prompt_of,
    settle,
    system_and_tools,
    truth_of,
)

_PROMPT, _ANSWER, _LISTS, _TURNS = (
    ", ".join(listed)
    for listed in (names.PROMPTS, names.ANSWERS, names.ANSWER_LISTS, names.CONVERSATIONS)
)
KNOWN = (
    "pairs: chosen, rejected; or two answers and a verdict; ranked: a prompt and a list of "
    f"answers ({_LISTS}) with ranks, scores or verdicts; labelled: a prompt, an answer, label; "
    f"rated: a prompt, an answer, score; messages: {_TURNS}; prompt_completion: a prompt "
    f"({_PROMPT}) and an answer ({_ANSWER})"
)


def read_sample(
    values: Values,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    carry: Collection[str] = (),
) -> Sample:
    """The row as a sample. ``columns``: {column of a layout: column of the row}; ``carry``: columns
    that are not read ("*": all that no layout needs). ValueError with the reason where the row fits
    no layout, or a column is left over."""
    layout = SAME.get(format, format)
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"format is auto, {', '.join((*LAYOUTS, *SAME))}; got {format!r}")
    if not isinstance(values, Mapping):
        raise ValueError(f"a row is an object with columns; got {short(values)}")
    try:
        row = Row(values, columns, carry, format=layout)
        layout = _layout(row) if layout == "auto" else layout
        sample = LAYOUTS[layout](row)
        system_and_tools(row, sample)
        sample.layout = layout
        settle(row, sample)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"not a row of layout {layout}: {type(error).__name__} {error}") from error
    return sample


@dataclass(kw_only=True, frozen=True)
class ReadPrompt:
    """A row to sample from."""

    messages: list[Message]
    tools: list[Any] | None
    answer: str | None
    """What the row itself says is right: the last assistant turn of its conversation, or
    ``reward_model.ground_truth``."""
    columns: Mapping[str, str]
    """Column to ``used`` or ``for the rewards``."""


def read_prompt(
    values: Values, *, column: str | None = None, carry: Collection[str] = ()
) -> ReadPrompt:
    """The prompt is ``column``, else the row's prompt as in every layout, else its conversation
    without the last assistant turn; what is not used is for the rewards, unless it would belong to
    the prompt. ValueError with the reason."""
    try:
        return _read_prompt(values, column, carry)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"not a row with a prompt: {type(error).__name__} {error}") from error


def _read_prompt(values: Values, column: str | None, carry: Collection[str]) -> ReadPrompt:
    if column is not None and is_nothing(values.get(column)):
        raise ValueError(
            f"no prompt in column {column!r}; the row has {sorted(map(str, values))}. "
            "Set --data.prompt_column"
        )
    if column is not None and column not in (*names.PROMPTS, *names.CONVERSATIONS):
        values = {**{k: v for k, v in values.items() if k != column}, "prompt": values[column]}
        column = "prompt"
    row = Row(values, None, carry)
    answer = None
    name = (
        column
        if column in names.CONVERSATIONS
        else None
        if column or prompt_name(row)
        else conversation_name(row)
    )
    if name is not None:
        prompt, answer = _asked_and_answered(row, name)
    elif column or prompt_name(row):
        prompt = prompt_of(row, first=column)
        other = None if column else conversation_name(row)
        if other is not None:  # says the same, or more
            whole, answer = _asked_and_answered(row, other)
            if prompt[-1] not in whole:
                raise ValueError(
                    f"{short(prompt[-1]['content'])} is not in {other}. Which is the prompt? Set "
                    "--data.prompt_column"
                )
            prompt = whole if len(whole) > len(prompt) else prompt
    else:
        prompt = LAYOUTS[_layout(row)](row).prompt
    sample = Sample(prompt=prompt, answers=[])
    system_and_tools(row, sample)
    _check_left(row)
    answer = _ground_truth(values.get("reward_model")) or answer
    return ReadPrompt(
        messages=sample.prompt,
        tools=sample.tools,
        answer=answer,
        columns={k: row.seen.get(k, "for the rewards") for k in row.filled},
    )


def _asked_and_answered(row: Row, name: str) -> tuple[list[Message], str | None]:
    prompt = row.turns(conversation_of(row.use(name)), "user")
    answer = message_text(prompt.pop()) if prompt[-1]["role"] == "assistant" else None
    if not prompt or prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{name} has no user turn before its last assistant turn, so there is nothing to answer"
        )
    return prompt, answer


def _check_left(row: Row) -> None:
    """What belongs to a prompt is not left to the rewards."""
    belongs = {*names.PARTS, *names.SYSTEM, *names.TOOLS, "history", *MEDIA}
    lost = [n for n in row.filled if n not in row.seen and str(n).lower() in belongs]
    if lost:
        raise ValueError(
            f"nothing reads {', '.join(lost)}, which would belong to the prompt (inputs follow a "
            "prompt of one text; names are in lower case; pictures are not trained on). What is "
            f"for the rewards alone: --data.carry '[{', '.join(lost)}]'"
        )


def _ground_truth(value: Any) -> str | None:
    """verl's ``reward_model``: {ground_truth}, also as JSON text."""
    value = (
        from_json(value, "reward_model")
        if isinstance(value, str) and value.lstrip().startswith("{")
        else value
    )
    truth = decoded(value.get("ground_truth")) if isinstance(value, Mapping) else None
    truth = truth[0] if isinstance(truth, list) and len(truth) == 1 else truth
    return str(truth) if isinstance(truth, str | int | float) else None


def _layout(row: Row) -> str:
    """The first layout that has what it needs in this row."""
    is_meant = not row.mapped or row.mapped & {*names.CONVERSATIONS, *names.SYSTEM, *names.TOOLS}
    conversation = conversation_name(row) if is_meant else None
    prompt = conversation or prompt_name(row)
    if pair_columns(row) or alternatives(row):
        return "pairs"
    if prompt and (answer_list(row) or verified_columns(row)):
        return "ranked"
    if conversation or (prompt and row.name((*names.ANSWERS, "answers"))):
        if row.name(names.LABELS):
            return "labelled"
        return (
            "rated"
            if row.name(names.SCORES)
            else "messages"
            if conversation
            else "prompt_completion"
        )
    empty = [k for k in row.all if k not in row.filled and k not in row.seen]
    columns = f"{sorted(map(str, row.all))}{f' (empty: {empty})' if empty else ''}"
    raise ValueError(
        f"unknown format: the columns {columns} fit no layout. Known: {KNOWN}. Name the columns "
        "(--data.columns '{prompt: <yours>, completion: <yours>}'), or rename them"
    )


def _messages(row: Row) -> Sample:
    """The answer is what follows the last user or tool turn."""
    value = row.needs(row.take(*names.CONVERSATIONS), f"one of {_TURNS}")
    messages = row.turns(conversation_of(value), "user")
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise ValueError(
            f"no assistant turn, so nothing to train; roles are {roles}. Remove the "
            "row or correct its roles"
        )
    if roles[0] == "assistant":
        raise ValueError(
            "starts with an assistant turn, which answers nothing. Put a user or "
            "system message before it"
        )
    start = len(roles) - 1 - roles[::-1].index("assistant")
    while roles[start - 1] == "assistant":
        start -= 1
    return Sample(prompt=messages[:start], answers=[Answer(messages=messages[start:], rank=0)])


def _single(row: Row) -> Sample:
    """A prompt and one answer."""
    if not row.name(names.ANSWERS) and row.name(names.CONVERSATIONS):
        return _messages(row)
    answer = row.take(*names.ANSWERS)
    if (
        answer is None and row.name(names.TOOLS) and row.name(("answers",))
    ):  # xLAM: its answers are calls, all of one turn
        answer = [{"role": "assistant", "content": "", "tool_calls": row.use("answers")}]
    answer = row.needs(answer, f"an answer ({_ANSWER})")
    prompt, (messages,), is_text = read_sides(row, [answer])
    return Sample(prompt=prompt, answers=[Answer(messages=messages, rank=0)], is_text=is_text)


def _prompt_completion(row: Row) -> Sample:
    sample = _single(row)
    if (
        "history" not in row.seen
    ):  # whose answers are trained, as Alpaca's are; else what the prompt says is not
        sample.prompt = [
            {**m, "weight": 0} if m["role"] == "assistant" else m for m in sample.prompt
        ]
    return sample


def _labelled(row: Row) -> Sample:
    label = truth_of("label", row.needs(row.take(*names.LABELS), "label"))
    sample = _single(row)
    sample.answers[0].label, sample.answers[0].rank = label, float(not label)
    return sample


def _rated(row: Row) -> Sample:
    score = row.needs(row.number(*names.SCORES), f"a score ({', '.join(names.SCORES)})")
    sample = _single(row)
    sample.answers[0].score, sample.answers[0].rank = score, -score
    return sample


LAYOUTS: dict[str, Callable[[Row], Sample]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "pairs": read_pairs,
    "ranked": read_ranked,
    "labelled": _labelled,
    "rated": _rated,
}
SAME = {"sharegpt": "messages", "alpaca": "prompt_completion"}
"""Names that others give to a layout."""
