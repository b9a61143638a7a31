"""What a row says in turns becomes messages as chat templates read them, ``{role, content, ...}``; anything else is a ValueError.

Read are lists of {role, content} and {from, value}, {input, output} turns, one text, a dialogue written as one text
(``\\n\\nHuman: ... \\n\\nAssistant: ...``), and any of the lists as JSON text. Beside role and content a message keeps what
templates read (``tool_calls``, ``tool_call_id``, ``name``, ``reasoning_content``), and ``weight: 0`` where it is not trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Message = dict[str, Any]
Leave = Callable[[str], None]
"""Told of a key that is not read; raises ValueError where that could change what is trained."""

_ROLES = {
    alias: role
    for role, aliases in {
        "system": "system sys",
        "developer": "developer",
        "user": "user human prompter customer person",
        "assistant": "assistant gpt chatgpt bot model chatbot ai bing bard claude function_call tool_call",
        "tool": "tool observation function function_response tool_response tool_result ipython",
    }.items()
    for alias in aliases.split()
}
_NAMES = ("role", "from", "speaker", "content", "value", "text")
_CALLING = ("function_call", "tool_call")
_KEPT = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_TRAINED = ("weight", "train", "trainable", "loss", "loss_mask")
_MASKED = ("masked",)
"""Keys that say whether a message is trained, and whether it is not."""
_OF_CALLS = {"id", "type", "index", "function", "name", "arguments", "parameters"}
_TEXTS = ("text", "input_text", "output_text")
_PLAIN = ({"role", "content"}, {"from", "value"})
_FIRST_SPEAKER = re.compile(r"\s*Human:")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_TURNS_AS_TEXT = re.compile(r"\s*(?:\[\s*\{\s*['\"](?:role|from|content|value)|\{\s*['\"](?:role|from))['\"]\s*:")
_PARTS_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"]type['\"]\s*:\s*['\"](?:\w*text|image\w*)['\"]")


def turns(value: Any, role: str, leave: Leave) -> list[Message]:
    """A text as one message of ``role``; a list as the messages that it holds; one message as it is."""
    value = decoded(value)
    if isinstance(value, str):
        return [{"role": role, "content": checked(value)}]
    if isinstance(value, Mapping):
        return [_message(value, leave)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"a text or a non-empty list of messages is wanted; got {short(value)}")
    if all(isinstance(m, Mapping) and "input" in m and "output" in m for m in value):
        sides = (("user", "input"), ("assistant", "output"))
        value = [
            {**{k: v for k, v in m.items() if k not in ("input", "output")}, "role": r, "content": m[k]}
            for m in value
            for r, k in sides
        ]
    return [_message(m, leave) for m in value]


def decoded(value: Any) -> Any:
    """The value; messages written as JSON text, at any indentation, and arrays as lists."""
    if isinstance(value, tuple) or hasattr(value, "tolist"):
        return list(value) if isinstance(value, tuple) else value.tolist()
    if isinstance(value, str) and _TURNS_AS_TEXT.match(value):
        return from_json(value, "messages")
    return value


def from_json(text: str, what: str) -> Any:
    """The value of a JSON text; ValueError that says what Python's repr is."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{what} written as text must be JSON; got {short(text)} ({error}). Python's repr (single quotes, None, True) is "
            "not JSON: write them with json.dumps, or as a list"
        ) from error


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
                f"a text holds {text[error.start]!r} at character {error.start}, half of a surrogate pair: it was cut, or "
                "written in a wrong encoding"
            ) from error
    return text


def _message(raw: Any, leave: Leave) -> Message:
    if not isinstance(raw, Mapping):
        raise ValueError(f"a message is an object with role and content; got {short(raw)}")
    said = _either(raw, "role", "from", "speaker")
    lowered = str(said).lower()
    role = _ROLES.get(lowered)
    if role is None:
        raise ValueError(f"unknown role {said!r}; known are {', '.join(_ROLES)}. Rename it in the data")
    content = _either(raw, "content", "value", "text")
    if type(content) is str and raw.keys() in _PLAIN and lowered not in _CALLING:
        return {"role": role, "content": _text(role, content)}
    message: Message = {"role": role, "content": content, **_further(raw, role, leave)}
    if lowered in _CALLING:
        message |= {"tool_calls": _calls(content), "content": ""}
    elif content is None and message.get("tool_calls"):
        message["content"] = ""
    else:
        message["content"] = _text(role, content)
    if message.get("tool_calls") and role != "assistant":
        raise ValueError(f"a {role} message has tool_calls; only the assistant calls tools")
    return message


def _further(raw: Mapping[str, Any], role: str, leave: Leave) -> Message:
    """What a message has beside role and content."""
    found: Message = {}
    for key, value in raw.items():
        if value is None or key in _NAMES:
            continue
        if key in ("tool_calls", "function_call"):
            calls = _calls(value if key == "tool_calls" else [value])
            found |= {"tool_calls": calls} if calls else {}
        elif key in (*_TRAINED, *_MASKED):
            found |= {} if _is_trained(key, value, role) or role != "assistant" else {"weight": 0}
        elif key in _KEPT and isinstance(value, str):
            found[key] = checked(value)
        elif key in _KEPT:
            raise ValueError(f"{key} of the {role} message must be a text; got {short(value)}")
        elif not is_empty(value):
            leave(key)
    return found


def is_empty(value: Any) -> bool:
    """Whether a column or key holds nothing: null, an empty text, list or object, and lists and objects of such."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return (
        value is None or (isinstance(value, str) and not value) or (isinstance(value, list | tuple) and all(map(is_empty, value)))
    )


def _either(raw: Mapping[str, Any], *names: str) -> Any:
    """What stands under the one of the names that is there; ValueError if two differ."""
    found = [raw[n] for n in names if raw.get(n) is not None]
    if any(value != found[0] for value in found[1:]):
        raise ValueError(f"{' and '.join(n for n in names if raw.get(n) is not None)} of a message differ; leave one of them out")
    return found[0] if found else None


def _text(role: str, content: Any) -> str:
    if isinstance(content, str) and _PARTS_AS_TEXT.match(content):
        content = from_json(content, "parts of a message")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise ValueError(
            f"the content of the {role} message must be text (a string, or a list of text parts); got {short(content)}. Images, "
            "sounds and numbers are not trained on here"
        )
    return checked(content)


def _is_text_part(part: Any) -> bool:
    keys = {k for k, v in part.items() if not is_empty(v)} | {"text"} if isinstance(part, Mapping) else set()
    return keys == {"type", "text"} and part["type"] in _TEXTS and isinstance(part.get("text"), str)


def _is_trained(key: str, value: Any, role: str) -> bool:
    if value not in (0, 1):
        raise ValueError(f"{key} of a message is 0 or 1 (false or true); got {value!r}. Shares of a weight are not supported")
    trained = bool(value) == (key in _TRAINED)
    if trained and role != "assistant" and key in _TRAINED:
        raise ValueError(f"the {role} message says {key}: {value!r}, but only assistant messages are trained. Take it out")
    return trained


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as {type, function: {name, arguments}} with arguments as an object; [] for none."""
    value = from_json(value, "tool_calls") if isinstance(value, str) else decoded(value)
    calls = []
    for raw in [value] if isinstance(value, Mapping) else value or []:
        call = from_json(raw, "a tool call") if isinstance(raw, str) else raw
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call has a function with a name; got {short(raw)}")
        unknown = (call.keys() | function.keys()) - _OF_CALLS
        if unknown or not isinstance(call.get("id", ""), str | None):
            raise ValueError(f"a tool call has an id (a text), a type, and a function with name and arguments; got {short(raw)}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = from_json(arguments or "{}", "arguments of a tool call")
        else:
            arguments = without_nulls(arguments or {})
        if not isinstance(arguments, Mapping):
            raise ValueError(f"arguments of a tool call are an object (or its JSON text); got {short(arguments)}")
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def tool_schemas(value: Any) -> list[Any] | None:
    """Schemas for the chat template, each as {type, function}; JSON text is read, of the list or of each. None for none."""
    value = from_json(value, "tools") if isinstance(value, str) and value.strip() else decoded(value)
    tools = []
    for raw in [value] if isinstance(value, Mapping) else value or []:
        tool = from_json(raw, "a tool") if isinstance(raw, str) else raw
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        is_builtin = isinstance(tool, Mapping) and tool.get("type") not in (None, "function")
        if not is_builtin and not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise ValueError(f"tools are a list of JSON schemas with a name; got {short(raw)}")
        tool = tool if isinstance(raw, str) else without_nulls(tool)
        tools.append({"type": "function", "function": tool} if "name" in tool and "type" not in tool else tool)
    return tools or None


def without_nulls(value: Any) -> Any:
    """Objects without the keys that are null, at every depth: Arrow gives each object of a table the keys of all others."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def is_dialogue(value: Any) -> bool:
    """Whether a text is Anthropic's ``Human: ... \n\nAssistant: ...``, from its start."""
    return isinstance(value, str) and _FIRST_SPEAKER.match(value) is not None and "\n\nAssistant:" in value


def dialogue(text: str) -> list[Message]:
    """The turns of such a text. One space or line break after the colon is not content; an empty last turn is left out."""
    pieces = _SPEAKER.split(f"\n\n{checked(text).lstrip()}")
    if pieces[0] or len(pieces) < 4:
        raise ValueError("not a dialogue of \n\nHuman: and \n\nAssistant: turns, from its start")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [
        {"role": roles[who], "content": after_colon(said).rstrip()} for who, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return messages[:-1] if messages[-1]["role"] == "assistant" and not messages[-1]["content"] else messages


def after_colon(said: str) -> str:
    """Without the one space or line break that follows a speaker's colon."""
    return said[1:] if said[:1] in (" ", "\n") else said


def message_text(message: Mapping[str, Any]) -> str:
    """Everything a message says: reasoning, content, and calls as JSON."""
    if len(message) == 2:
        return message["content"]
    calls = message.get("tool_calls")
    written = calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False) if calls else None
    parts = [*(message.get(k) for k in ("reasoning_content", "reasoning", "thinking")), message["content"], written]
    return "\n".join(p for p in parts if p)
