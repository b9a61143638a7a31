"""What a chat template leaves out: an error before training, never a silent loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


def render_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, *, where: str
) -> str:
    """The messages with the header of the reply, by the tokenizer's own template. ValueError for
    what it refuses or leaves out, but for the thoughts of earlier turns: a model is not given those
    when it is served, either."""
    from jinja2 import TemplateError

    def render(tools: Any) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=True
        )

    try:
        text = render(tools)
        check_tools_rendered(tools, text, lambda: render(None), where)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{where}: {refusal(messages, error)}") from error
    check_rendered(messages, text, where, with_thoughts=False)
    return text


def check_rendered(
    messages: Sequence[Mapping[str, Any]], text: str, where: str, *, with_thoughts: bool = True
) -> None:
    """All that the messages say must stand in the text, up to white space; what the assistant says
    in its order.

    Others may be moved (some templates put the system message elsewhere) or written as JSON
    (results of tools).
    """
    squeezed = _squeezed(text)
    at = 0
    for message in messages:
        for part in _said(message, with_thoughts):
            wanted = _squeezed(part)
            if message["role"] == "assistant":
                found = squeezed.find(wanted, at)
                at = found + len(wanted) if part is message["content"] else at
                is_there = found >= 0
            else:
                as_json = (
                    _squeezed(json.dumps(part, ensure_ascii=ascii)[1:-1]) for ascii in (True, False)
                )
                is_there = wanted in squeezed or any(written in squeezed for written in as_json)
            if not is_there:
                raise ValueError(
                    f"{where}: the chat template does not render all that the {message['role']} "
                    f"message says; would be lost: {part[:60]!r}. Some templates have no branch "
                    "for a role, know no tool calls, or delete <think> blocks, at least those of "
                    "earlier turns: set --data.chat_template to one that keeps them, or change "
                    "the row's turns."
                )


def check_tools_rendered(
    tools: Any, text: str, render_without: Callable[[], str], where: str
) -> None:
    """ValueError if the text is the same without the tools."""
    if tools and render_without() == text:
        raise ValueError(
            f"{where}: the chat template writes nothing of the row's {len(tools)} tools, so the "
            "model would not see them. Set --data.chat_template to one that does, or leave the "
            "column out with --data.carry."
        )


def refusal(messages: Sequence[Mapping[str, Any]], error: Exception) -> str:
    """What to say of a template that raised an error."""
    roles = [m["role"] for m in messages]
    return (
        f"the chat template refuses the roles {roles}: {error}. Change the row's turns, or set "
        "--data.chat_template."
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _said(message: Mapping[str, Any], with_thoughts: bool) -> Iterator[str]:
    """Reasoning, called functions and, last, content."""
    if with_thoughts:
        yield from (
            str(message[k])
            for k in ("reasoning_content", "reasoning", "thinking")
            if message.get(k)
        )
    yield from (
        str((call.get("function") or call).get("name", ""))
        for call in message.get("tool_calls") or ()
    )
    yield message["content"] if with_thoughts else message["content"].rpartition("</think>")[2]
