"""What a row says in turns becomes messages as chat templates read them, ``{role, content, ...}``;
anything else is a ValueError.

Read are lists of {role, content} and {from, value}, {input, output} turns, one text, a dialogue
written as one text (``\\n\\nHuman: ... \\n\\nAssistant: ...``), and any of the lists as JSON text.
Beside role and content a message keeps what templates read (``tool_calls``, ``tool_call_id``,
``name``, ``reasoning_content``), and ``weight: 0`` where it is not trained.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Message = dict[str, Any]
Leave = Callable[[str], None]
"""Told of a key that is not read; raises ValueError where that could change what is trained."""

_ALIASES = """
system sys
developer
user human prompter customer person
assistant gpt chatgpt bot model chatbot ai bing bard claude function_call tool_call
tool observation function function_response tool_response tool_result ipython
"""
_ROLES = {
    alias: aliases[0]
    for aliases in map(str.split, _ALIASES.strip().splitlines())
    for alias in aliases
}
_ROLE, _CONTENT = ("role", "from", "speaker"), ("content", "value", "text")
_CALLING = ("function_call", "tool_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_KEPT = ("name", "tool_call_id", *THOUGHTS)
_FLAGS = ("weight", "train", "trainable", "loss", "loss_mask", "masked")
"""Keys that say whether a message is trained; the last, whether it is not."""
_KEYS = {*_ROLE, *_CONTENT, *_KEPT, *_FLAGS, "tool_calls", "function_call"}
_OF_CALLS = {"id", "type", "index", "function", "name", "arguments", "parameters"}
_PLAIN = ({"role", "content"}, {"from", "value"})
_FIRST_SPEAKER = re.compile(r"\s*Human:")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_TURNS_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")
_PARTS_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"]type['\"]\s*:\s*['\"](?:\w*text|image\w*)['\"]")


def turns(value: Any, role: str, leave: Leave) -> list[Message]:
    """A text as one message of ``role``; a list as the messages that it holds; one message as it
    is."""
    value = decoded(value)
    if isinstance(value, str):
        return [{"role": role, "content": checked(value)}]
    if isinstance(value, Mapping):
        return [_message(value, leave)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"a text or a non-empty list of messages is wanted; got {short(value)}")
    messages = []
    for raw in value:
        if isinstance(raw, Mapping) and "input" in raw and "output" in raw:
            for key in raw.keys() - {"input", "output"}:
                leave(key)
            asked, answered = raw["input"], raw["output"]
            messages += [_message({"role": "user", "content": asked}, leave)]
            raw = {"role": "assistant", "content": answered}
        messages.append(_message(raw, leave))
    return messages


def decoded(value: Any) -> Any:
    """The value; a list of messages written as JSON text, at any indentation, and arrays as
    lists."""
    if isinstance(value, tuple) or hasattr(value, "tolist"):
        return list(value) if isinstance(value, tuple) else value.tolist()
    if not isinstance(value, str) or not _TURNS_AS_TEXT.match(value):
        return value
    try:
        found = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        if _is_conversation(_literal(value)):
            from_json(value, "messages")
        return value  # a text about such things
    return found if _is_conversation(found) else value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_conversation(value: Any) -> bool:
    """Whether every element has a known role and says something."""
    return isinstance(value, list) and all(
        isinstance(m, Mapping)
        and str(m.get("role", m.get("from"))).lower() in _ROLES
        and m.keys() & {"content", "value", "tool_calls"}
        for m in value
    )


def from_json(text: str, what: str) -> Any:
    """The value of a JSON text; ValueError that says what Python's repr is."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{what} written as text must be JSON; got {short(text)} ({error}). Python's repr "
            "(single quotes, None, True) is not JSON: write them with json.dumps, or as a list"
        ) from error


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts file and row before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error


def short(value: Any) -> str:
    """The value for a message of 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked(text: str) -> str:
    """The text; ValueError where it is none."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a text holds {text[error.start]!r} at character {error.start}, half of a "
                "surrogate pair: it was cut, or written in a wrong encoding"
            ) from error
    return text


def _message(raw: Any, leave: Leave) -> Message:
    alias, content = _alias(raw), _content(raw)
    role, is_call = _ROLES[alias], alias in _CALLING
    if type(content) is str and raw.keys() in _PLAIN and not is_call:
        return {"role": role, "content": _text(role, content)}
    given = {"tool_calls": raw.get("tool_calls")}
    given["function_call"] = [raw["function_call"]] if raw.get("function_call") else None
    calls = {key: made for key, value in given.items() if (made := _calls(value))}
    if is_call and content:
        calls["content"] = [] if calls else _calls(content)
    if len(calls) > 1:
        raise ValueError(f"a message has both {' and '.join(calls)}; leave one of them out")
    if calls and role != "assistant":
        raise ValueError(f"a {role} message has tool_calls; only the assistant calls tools")
    further: Message = dict(zip(["tool_calls"], calls.values(), strict=False))
    for key, value in raw.items():
        if key in _KEPT and value is not None:
            if not isinstance(value, str):
                raise ValueError(f"{key} of the {role} message must be a text; got {short(value)}")
            further[key] = checked(value)
        elif key not in _KEYS and not is_empty(value):
            leave(key)
    says_nothing = is_call or (content is None and calls)
    text = "" if says_nothing else _text(role, content)
    return {"role": role, "content": text, **further, **_weight(raw, role)}


def _alias(raw: Any) -> str:
    """How a message calls its role."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"a message is an object with role and content; got {short(raw)}")
    given = [str(raw[n]).lower() for n in _ROLE if raw.get(n) is not None]
    roles = {_ROLES.get(name) for name in given}
    if len(roles) != 1 or None in roles:
        raise ValueError(
            f"unknown role {' and '.join(given) or None!r}; known are {', '.join(_ROLES)}. "
            "Rename it"
        )
    return given[0]


def _weight(raw: Mapping[str, Any], role: str) -> Message:
    """``weight: 0`` of an assistant's message that is not trained."""
    flags = {key: raw[key] for key in _FLAGS if raw.get(key) is not None}
    trained = {bool(value) == (key != "masked") for key, value in flags.items()}
    for key, value in flags.items():
        if value not in (0, 1):
            raise ValueError(f"{key} of a message is 0 or 1 (false or true); got {value!r}")
        if value and role != "assistant" and key != "masked":
            raise ValueError(
                f"the {role} message says {key}: {value!r}, but only assistant messages are trained"
            )
    if len(trained) > 1:
        raise ValueError(f"the {role} message's flags contradict each other: {short(flags)}")
    return {"weight": 0} if trained == {False} and role == "assistant" else {}


def is_trained(message: Message) -> bool:
    """Whether the assistant says it and its weight is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def is_empty(value: Any) -> bool:
    """Whether a column or key holds nothing: null, an empty text, list or object, and lists and
    objects of such."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(is_empty, value.values() if isinstance(value, Mapping) else value))
    return value is None or (not hasattr(value, "tolist") and bool(value == ""))


def _content(raw: Mapping[str, Any]) -> Any:
    found = {n: raw[n] for n in _CONTENT if raw.get(n) is not None}
    content, *others = found.values() or (None,)
    if any(other != content for other in others):
        raise ValueError(f"{' and '.join(found)} of a message differ; leave one of them out")
    return content


def _text(role: str, content: Any) -> str:
    is_text = isinstance(content, str)
    if is_text and role in ("user", "system", "developer") and _PARTS_AS_TEXT.match(content):
        if content.rstrip().endswith("]"):
            content = from_json(content, "parts of a message")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise ValueError(
            f"the content of the {role} message must be text (a string, or a list of text parts); "
            f"got {short(content)}. Images, sounds and numbers are not trained on here"
        )
    return checked(content)


def _is_text_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        return False
    keys = {k for k, v in part.items() if not is_empty(v)} | {"text"}
    return keys == {"type", "text"} and part["type"] in ("text", "input_text", "output_text")


def _objects(value: Any, what: str) -> list[Any]:
    """A list of objects, each of which may be JSON text, as all of it may be; [] for nothing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    value = from_json(value, what) if isinstance(value, str) else decoded(value)
    listed = [value] if isinstance(value, Mapping) else [] if value is None else value
    is_list = isinstance(listed, list)
    made = [from_json(m, what) if isinstance(m, str) else m for m in listed] if is_list else [None]
    if any(not isinstance(m, Mapping) for m in made):
        raise ValueError(f"{what} must be a list of objects; got {short(value)}")
    return [plain(m, keep_nulls=m is not raw) for m, raw in zip(made, listed, strict=True)]


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as {type, function: {name, arguments}} with arguments as an object; [] for
    none."""
    calls = []
    for call in _objects(value, "tool_calls"):
        function = call.get("function", call)
        function = function if isinstance(function, Mapping) else {}
        outside = call.keys() & {"name", "arguments", "parameters"} if "function" in call else set()
        unknown = (call.keys() | function.keys()) - _OF_CALLS
        given = [function[n] for n in ("arguments", "parameters") if function.get(n) is not None]
        texts = isinstance(function.get("name"), str) and isinstance(call.get("id", ""), str)
        if not texts or unknown or outside or len(given) > 1:
            raise ValueError(
                "a tool call has an id (a text), a type, and a function with a name and one "
                f"arguments; got {short(call)}"
            )
        arguments = given[0] if given else {}
        if isinstance(arguments, str):
            arguments = from_json(arguments or "{}", "arguments of a tool call")
            arguments = plain(arguments, keep_nulls=True)
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"arguments of a tool call are an object (or its JSON text); got {short(arguments)}"
            )
        identity = {"id": call["id"]} if call.get("id") else {}
        named = {"name": function["name"], "arguments": arguments}
        calls.append({**identity, "type": "function", "function": named})
    return calls


def tool_schemas(value: Any) -> list[Any] | None:
    """Schemas for the chat template, each as {type, function}; JSON text is read, of the list or of
    each. None for none."""
    tools = []
    for tool in _objects(value, "tools"):
        function = tool.get("function", tool)
        is_builtin = tool.get("type") not in (None, "function")
        is_function = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if not is_builtin and (not is_function or (function is not tool and "name" in tool)):
            raise ValueError(f"tools are a list of JSON schemas with a name; got {short(tool)}")
        is_whole = is_builtin or function is not tool
        tools.append(tool if is_whole else {"type": "function", "function": tool})
    return tools or None


def plain(value: Any, *, keep_nulls: bool = False) -> Any:
    """The value in JSON's types. Objects lose the keys that are null, at every depth, unless
    ``keep_nulls``: Arrow gives each object of a table the keys of all others."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if v is not None or keep_nulls}
        return {checked(str(k)): plain(v, keep_nulls=keep_nulls) for k, v in kept.items()}
    value = checked(value) if isinstance(value, str) else decoded(value)
    if isinstance(value, list):
        return [plain(v, keep_nulls=keep_nulls) for v in value]
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{short(value)} is no value of JSON, so no template can write it")
    return value


def is_dialogue(value: Any) -> bool:
    """Whether a text is Anthropic's ``Human: ... \n\nAssistant: ...``, from its start."""
    is_text = isinstance(value, str)
    return is_text and _FIRST_SPEAKER.match(value) is not None and "\n\nAssistant:" in value


def dialogue(text: str) -> list[Message]:
    """The turns of such a text. One space or line break after the colon is not content; an empty
    last turn is left out."""
    pieces = _SPEAKER.split(f"\n\n{checked(text).lstrip()}")
    if pieces[0] or len(pieces) < 4:
        raise ValueError("not a dialogue of \n\nHuman: and \n\nAssistant: turns, from its start")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": after_colon(said).rstrip()}
        for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return messages[: -1 if messages[-1] == {"role": "assistant", "content": ""} else None]


def after_colon(said: str) -> str:
    """Without the one space or line break that follows a speaker's colon."""
    return said[1:] if said[:1] in (" ", "\n") else said


def message_text(message: Mapping[str, Any]) -> str:
    """Everything a message says: reasoning, content, and calls as JSON."""
    if len(message) == 2:
        return message["content"]
    calls = message.get("tool_calls")
    if calls and not isinstance(calls, str):
        calls = json.dumps(calls, ensure_ascii=False)
    return "\n".join(p for p in (*map(message.get, THOUGHTS), message["content"], calls) if p)
