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
        "assistant": (
            "assistant gpt chatgpt bot model chatbot ai bing bard claude function_call tool_call"
        ),
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
            raw = (
                {"role": "user", "content": raw["input"]},
                {"role": "assistant", "content": raw["output"]},
            )
        messages += [_message(m, leave) for m in (raw if isinstance(raw, tuple) else (raw,))]
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
        if value.rstrip().endswith("]") and _is_conversation(_literal(value)):
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
    if not isinstance(raw, Mapping):
        raise ValueError(f"a message is an object with role and content; got {short(raw)}")
    given = [str(raw[n]).lower() for n in ("role", "from", "speaker") if raw.get(n) is not None]
    roles = {_ROLES.get(name) for name in given}
    if len(roles) != 1 or None in roles:
        raise ValueError(
            f"unknown role {' and '.join(given) or None!r}; known are "
            f"{', '.join(_ROLES)}. Rename it in the data"
        )
    lowered, (role,) = given[0], roles
    content = _either(raw, "content", "value", "text")
    if type(content) is str and raw.keys() in _PLAIN and lowered not in _CALLING:
        return {"role": role, "content": _text(role, content)}
    message: Message = {"role": role, "content": content, **_further(raw, role, leave)}
    if lowered in _CALLING and "tool_calls" in message:
        raise ValueError(
            f"a {lowered} turn says its call in its content and in tool_calls; leave "
            "one of them out"
        )
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
    flags = set()
    for key, value in raw.items():
        if value is None or key in _NAMES:
            continue
        if key in ("tool_calls", "function_call"):
            calls = _calls(value if key == "tool_calls" else [value])
            if calls and "tool_calls" in found:
                raise ValueError(
                    "a message has both tool_calls and function_call; leave one of them out"
                )
            found |= {"tool_calls": calls} if calls else {}
        elif key in (*_TRAINED, *_MASKED):
            flags.add(_is_trained(key, value, role))
        elif key in _KEPT and isinstance(value, str):
            found[key] = checked(value)
        elif key in _KEPT:
            raise ValueError(f"{key} of the {role} message must be a text; got {short(value)}")
        elif not is_empty(value):
            leave(key)
    if len(flags) > 1:
        raise ValueError(
            f"the {role} message's flags contradict each other: "
            f"{short({k: raw[k] for k in raw if k in (*_TRAINED, *_MASKED)})}"
        )
    return found | ({"weight": 0} if flags == {False} and role == "assistant" else {})


def is_empty(value: Any) -> bool:
    """Whether a column or key holds nothing: null, an empty text, list or object, and lists and
    objects of such."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return (
        value is None
        or (isinstance(value, str) and not value)
        or (isinstance(value, list | tuple) and all(map(is_empty, value)))
    )


def _either(raw: Mapping[str, Any], *names: str) -> Any:
    """What stands under the one of the names that is there; ValueError if two differ."""
    found = [raw[n] for n in names if raw.get(n) is not None]
    if any(value != found[0] for value in found[1:]):
        raise ValueError(
            f"{' and '.join(n for n in names if raw.get(n) is not None)} of a message "
            "differ; leave one of them out"
        )
    return found[0] if found else None


def _text(role: str, content: Any) -> str:
    if (
        isinstance(content, str)
        and role in ("user", "system", "developer")
        and _PARTS_AS_TEXT.match(content)
    ):
        parts = _literal(content) if "'" in content[:12] else None
        content = (
            from_json(content, "parts of a message")
            if parts is not None or content.rstrip().endswith("]")
            else content
        )
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise ValueError(
            f"the content of the {role} message must be text (a string, or a list of text parts); "
            f"got {short(content)}. Images, sounds and numbers are not trained on here"
        )
    return checked(content)


def _is_text_part(part: Any) -> bool:
    keys = (
        {k for k, v in part.items() if not is_empty(v)} | {"text"}
        if isinstance(part, Mapping)
        else set()
    )
    return keys == {"type", "text"} and part["type"] in _TEXTS and isinstance(part.get("text"), str)


def _is_trained(key: str, value: Any, role: str) -> bool:
    if value not in (0, 1):
        raise ValueError(
            f"{key} of a message is 0 or 1 (false or true); got {value!r}. Shares of "
            "a weight are not supported"
        )
    trained = bool(value) == (key in _TRAINED)
    if trained and role != "assistant" and key in _TRAINED:
        raise ValueError(
            f"the {role} message says {key}: {value!r}, but only assistant messages "
            "are trained. Take it out"
        )
    return trained


def _objects(value: Any, what: str) -> list[Any]:
    """A list of objects, each of which may be JSON text, as all of it may be; [] for nothing."""
    if isinstance(value, str) and not value.strip():
        return []
    value = from_json(value, what) if isinstance(value, str) else decoded(value)
    listed = [value] if isinstance(value, Mapping) else [] if value is None else value
    if not isinstance(listed, list):
        raise ValueError(f"{what} must be a list of objects; got {short(value)}")
    made = [
        (from_json(raw, what), True) if isinstance(raw, str) else (raw, False) for raw in listed
    ]
    if any(not isinstance(m, Mapping) for m, _ in made):
        raise ValueError(f"{what} must be a list of objects; got {short(value)}")
    return [plain(m, keep_nulls=is_text) for m, is_text in made]


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
            arguments = plain(
                from_json(arguments or "{}", "arguments of a tool call"), keep_nulls=True
            )
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"arguments of a tool call are an object (or its JSON text); got {short(arguments)}"
            )
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append(
            {
                **identity,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
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
        tools.append(
            tool if is_builtin or function is not tool else {"type": "function", "function": tool}
        )
    return tools or None


def plain(value: Any, *, keep_nulls: bool = False) -> Any:
    """The value in JSON's types. Objects lose the keys that are null, at every depth, unless
    ``keep_nulls``: Arrow gives each object of a table the keys of all others."""
    if isinstance(value, Mapping):
        return {
            checked(str(k)): plain(v, keep_nulls=keep_nulls)
            for k, v in value.items()
            if v is not None or keep_nulls
        }
    value = decoded(value) if not isinstance(value, str) else checked(value)
    if isinstance(value, list):
        return [plain(v, keep_nulls=keep_nulls) for v in value]
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{short(value)} is no value of JSON, so no template can write it")
    return value


def is_dialogue(value: Any) -> bool:
    """Whether a text is Anthropic's ``Human: ... \n\nAssistant: ...``, from its start."""
    return (
        isinstance(value, str)
        and _FIRST_SPEAKER.match(value) is not None
        and "\n\nAssistant:" in value
    )


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
    return (
        messages[:-1]
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"]
        else messages
    )


def after_colon(said: str) -> str:
    """Without the one space or line break that follows a speaker's colon."""
    return said[1:] if said[:1] in (" ", "\n") else said


def message_text(message: Mapping[str, Any]) -> str:
    """Everything a message says: reasoning, content, and calls as JSON."""
    if len(message) == 2:
        return message["content"]
    calls = message.get("tool_calls")
    written = (
        calls
        if isinstance(calls, str)
        else json.dumps(calls, ensure_ascii=False)
        if calls
        else None
    )
    parts = [
        *(message.get(k) for k in ("reasoning_content", "reasoning", "thinking")),
        message["content"],
        written,
    ]
    return "\n".join(p for p in parts if p)
