"""Rows of four formats become one record: a conversation, and which of its messages are trained.

* ``messages``: column ``messages``, a list of {role, content}; every assistant message is trained.
* ``sharegpt``: column ``conversations``, a list of {from, value} or {role, content}; every assistant message.
* ``prompt_completion``: ``prompt`` and ``completion``, two strings or two lists of messages; the assistant messages of
  the completion, not those of the prompt.
* ``alpaca``: ``instruction``, ``output``, and where there ``input``, ``system``, ``history`` ([instruction, answer]
  pairs); the output and the answers of the history.

Two strings are one user turn and one assistant turn if the tokenizer has a chat template, else raw text: prompt,
completion, end-of-sequence token. An assistant message with ``"weight": 0`` is context and not trained. A ``tools``
column goes to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.config import Format
from posttrain.data.readers import Row

Message = dict[str, Any]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}


@dataclass(kw_only=True, frozen=True)
class Conversation:
    """One row, normalised."""

    messages: list[Message]
    """{role, content, ...} with a role of system, developer, user, assistant, tool."""

    trained: list[bool]
    """One entry per message: whether its tokens enter the loss. Only assistant messages are True."""

    text: tuple[str, str] | None = None
    """(prompt, completion) of a row of two strings, for a tokenizer without chat template. Default None: has turns."""

    tools: list[Any] | None = None
    """JSON schemas for the chat template. Default None."""


def detect_format(
    row: Row, columns: Mapping[str, str] | None = None, required: Mapping[Format, tuple[str, ...]] | None = None
) -> Format:
    """The one format of ``required`` (default: those of SFT) whose columns the row has. ValueError if none or several match,
    saying which."""
    required = required or REQUIRED
    values = rename(row, columns)
    found: list[Format] = [
        f for f, needed in required.items() if all(c in values for c in needed) and (not columns or set(columns) & set(needed))
    ]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{f}: {', '.join(needed)}" for f, needed in required.items())
    if found:
        raise ValueError(
            f"{row.where}: the columns {sorted(row.values)} fit several formats: {', '.join(found)}. Choose with --data.format."
        )
    raise ValueError(
        f"{row.where}: no known format has the columns {sorted(row.values)}. Known formats and what they need: "
        f"{known}. Name the columns with --data.columns '{{prompt: <yours>, completion: <yours>}}', or choose with "
        "--data.format."
    )


def rename(row: Row, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The row's values under the names of the format. ValueError if a mapped column is missing."""
    if not columns:
        return row.values
    missing = [c for c in columns.values() if c not in row.values]
    if missing:
        raise ValueError(
            f"{row.where}: --data.columns names {missing}, which this row lacks; it has {sorted(row.values)}. Correct "
            "the mapping."
        )
    values = {k: v for k, v in row.values.items() if k not in columns.values()}
    return values | {ours: row.values[theirs] for ours, theirs in columns.items()}


def required_values(row: Row, columns: Mapping[str, str] | None, what: str, needed: Sequence[str], advice: str) -> dict[str, Any]:
    """``rename``; ValueError if one of the needed columns is missing or empty."""
    values = rename(row, columns)
    missing = [c for c in needed if values.get(c) is None]
    if missing:
        raise ValueError(
            f"{row.where}: {what} needs {', '.join(needed)}; this row lacks {', '.join(missing)} and has "
            f"{sorted(row.values)}. {advice}"
        )
    return values


def normalise(row: Row, format: Format, columns: Mapping[str, str] | None = None) -> Conversation:
    """The row as a conversation. ValueError naming file and row if there is nothing to train or a field is
    malformed."""
    advice = "All rows of a source have one format; correct the row or set --data.format."
    values = required_values(row, columns, f"format {format}", REQUIRED[format], advice)
    text = None
    context: list[Message] = []
    if format == "prompt_completion":
        context, messages, text = _prompt_completion(row, values)
    elif format == "alpaca":
        messages = _alpaca(row, values)
    else:
        messages = message_list(row, REQUIRED[format][0], values[REQUIRED[format][0]])
    _check_turns(row, context, messages)
    trained = [False] * len(context) + [m["role"] == "assistant" and _weight(row, m) for m in messages]
    if not any(trained):
        raise ValueError(f"{row.where}: every assistant message has weight 0: nothing to train. Remove the row.")
    clean = [{k: v for k, v in m.items() if k != "weight"} for m in context + messages]
    return Conversation(messages=clean, trained=trained, text=text, tools=_tools(row, values))


def _prompt_completion(row: Row, values: dict[str, Any]) -> tuple[list[Message], list[Message], tuple[str, str] | None]:
    prompt, completion = (_parsed_list(values[c]) for c in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        system = [single_message(row, "system", values["system"])] if values.get("system") else []
        user, answer = _turn(row, prompt, completion)
        return [*system, user], [answer], None if system else (prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return message_list(row, "prompt", prompt), message_list(row, "completion", completion), None
    raise ValueError(
        f"{row.where}: prompt and completion must be two strings or two lists of messages; got "
        f"{type(prompt).__name__} and {type(completion).__name__}. Write both the same way."
    )


def _alpaca(row: Row, values: dict[str, Any]) -> list[Message]:
    messages = [single_message(row, "system", values["system"])] if values.get("system") else []
    for turn in values.get("history") or ():
        if not (isinstance(turn, list | tuple) and len(turn) == 2):
            raise ValueError(f"{row.where}: history is a list of [instruction, answer] pairs; got {turn!r}. Correct the row.")
        messages += _turn(row, *turn)
    instruction, extra = values["instruction"], values.get("input") or ""
    if not (isinstance(instruction, str) and isinstance(extra, str)):
        raise ValueError(f"{row.where}: instruction and input must be strings; got {instruction!r} and {extra!r}.")
    return messages + _turn(row, f"{instruction}\n\n{extra}" if extra.strip() else instruction, values["output"])


def single_message(row: Row, role: str, content: Any) -> Message:
    """One message with text; ValueError naming the row."""
    return _message(row, {"role": role, "content": content})


def _turn(row: Row, user: Any, assistant: Any) -> list[Message]:
    return [single_message(row, "user", user), single_message(row, "assistant", assistant)]


def message_list(row: Row, column: str, value: Any) -> list[Message]:
    """A list of {role, content} with known roles and text; ValueError naming the row."""
    value = _parsed_list(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{row.where}: {column} must be a non-empty list of messages; got {value!r}. Correct the row.")
    return [_message(row, m) for m in value]


def _parsed_list(value: Any) -> Any:
    """A list written as a JSON string, which is how CSV holds it; anything else as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith("[{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _message(row: Row, raw: Any) -> Message:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{row.where}: a message is an object with role and content; got {raw!r}. Correct the row.")
    message = {k: v for k, v in raw.items() if v is not None and k not in ("from", "value")}
    role = raw.get("role", raw.get("from"))
    lowered = str(role).lower()
    message["role"] = _ROLE_ALIASES.get(lowered, lowered)
    if message["role"] not in _ROLES:
        raise ValueError(
            f"{row.where}: unknown role {role!r}; known are {', '.join(_ROLES)}, and {', '.join(_ROLE_ALIASES)}, "
            "which are renamed. Rename it in the data."
        )
    content = raw.get("content", raw.get("value"))
    if content is None and message.get("tool_calls"):
        return message | {"content": ""}
    message["content"] = _text(row, message["role"], content)
    return message


def _text(row: Row, role: str, content: Any) -> str:
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    if not isinstance(content, str):
        raise ValueError(
            f"{row.where}: the content of the {role} message must be text (a string, or a list of text parts); got "
            f"{content!r}. Images and numbers are not trained on here."
        )
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{row.where}: the {role} message holds {content[error.start]!r} at character {error.start}, half of a "
            "surrogate pair, which is no text. The file was cut or written in a wrong encoding; correct the row."
        ) from error
    return content


def _check_turns(row: Row, context: list[Message], messages: list[Message]) -> None:
    assistants = [m for m in messages if m["role"] == "assistant"]
    if not assistants:
        raise ValueError(
            f"{row.where}: no assistant turn{' in the completion' if context else ''}, so nothing to train; roles are "
            f"{[m['role'] for m in messages]}. Remove the row or correct its roles."
        )
    if (context + messages)[0]["role"] == "assistant":
        raise ValueError(
            f"{row.where}: starts with an assistant turn, which answers nothing. Put a user or system message before "
            "it, or remove it."
        )
    if any(not m["content"].strip() and not m.get("tool_calls") for m in assistants):
        raise ValueError(
            f"{row.where}: an assistant turn is empty; training on it teaches the model to say nothing. Remove the "
            "row or fill it."
        )


def _weight(row: Row, message: Message) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"{row.where}: an assistant message's weight is 0 (context) or 1 (trained); got {weight!r}.")
    return bool(weight)


def _tools(row: Row, values: dict[str, Any]) -> list[Any] | None:
    tools = _parsed_list(values.get("tools"))
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        raise ValueError(f"{row.where}: tools must be a list of JSON schemas; got {tools!r}. Correct the row.")
    return [dict(t) for t in tools]
