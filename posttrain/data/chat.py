"""Conversations become token ids and an exact loss mask: assistant content and the end of its turn,
nothing else.

The text is rendered by the tokenizer's own template. Which characters are trained comes from

1. the template's ``{% generation %}`` markers, if it has them;
2. else the training variant of the template that TRL ships, if it knows the template (it has
   markers, and keeps what some templates delete from earlier turns, such as reasoning);
3. else from prefixes: the conversation before an assistant turn with the generation prompt, and the
   one up to the turn's end, must both be prefixes of the whole text.

The text is cut at these characters and tokenised so that no token lies on both sides of a cut.
Where one of these steps cannot be exact, it is a ValueError, never a guess. Transformers'
``return_assistant_tokens_mask`` is not used: it loses the last bytes of a span that ends in a
character of several tokens (an emoji), and needs a fast tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.data.messages import THOUGHTS, located
from posttrain.types import Completion, PromptGroup

Messages = Sequence[Mapping[str, Any]]

_PROBE = "reply7"  # survives every template: no markup, no space at the ends
_OPENED = re.compile(r"<(?:think|thinking|thought|reasoning)>\s*\Z")
_GENERATION_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = "Put {% generation %} markers into the template and pass it with --data.chat_template"


class Span(NamedTuple):
    """Characters ``start:end`` of the rendered text that the model must produce."""

    start: int
    end: int


class ChatEncoder:
    """What is fixed for a tokenizer (template, stop tokens, where masks come from), found once and
    used for every row.

    Without a chat template only ``encode_text`` works.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template, self.mask_from = _training_template(tokenizer)
        self.stop_ids = stop_token_ids(tokenizer, self.template)
        self.stops = [tokenizer.decode([i], skip_special_tokens=False) for i in self.stop_ids]
        self._added = list(tokenizer.get_added_vocab())
        self._header_in_turn = self.mask_from == "prefixes" and self._ignores_generation_prompt()

    def encode(
        self,
        messages: Messages,
        *,
        trained: Sequence[bool] | None = None,
        tools: list[Any] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> PromptGroup:
        """The conversation as a group of one completion; see ``encode_conversation``. ``trained``:
        one flag per message, default every assistant message; ``meta``: ``file`` and ``row``."""
        flags = [m["role"] == "assistant" for m in messages] if trained is None else list(trained)
        with located(_where(meta)):
            ids, loss_mask = self._ids_and_mask(messages, tools, flags)
        first = loss_mask.index(1)
        completion = Completion(token_ids=ids[first:], loss_mask=loss_mask[first:])
        return PromptGroup(prompt_ids=ids[:first], completions=[completion], meta=dict(meta or {}))

    def encode_text(
        self, prompt: str, completion: str, *, meta: Mapping[str, Any] | None = None
    ) -> PromptGroup:
        """Raw text without turns, (BOS) prompt | completion EOS: trained is what follows the bar.
        BOS as the tokenizer does by itself."""
        eos = self.tokenizer.eos_token_id
        with located(_where(meta)):
            if eos is None:
                raise ValueError(
                    "the tokenizer has no EOS token, so no end is trained. Set tokenizer.eos_token"
                )
            (prompt_length, _), ids = _encode_pieces([prompt, completion], self.tokenizer)
            prompt_ids = leading_special(self.tokenizer) + ids[:prompt_length]
            if not prompt_ids:
                raise ValueError(
                    "the prompt is empty and the tokenizer adds no BOS token, so the first token "
                    "is predicted from nothing. Give the row a prompt"
                )
        token_ids = [*ids[prompt_length:], eos]
        group = Completion(token_ids=token_ids, loss_mask=[1] * len(token_ids))
        return PromptGroup(prompt_ids=prompt_ids, completions=[group], meta=dict(meta or {}))

    def _ids_and_mask(
        self, messages: Messages, tools: Any, trained: list[bool]
    ) -> tuple[list[int], list[int]]:
        if self.template is None:
            raise ValueError(
                "a conversation needs a chat template, and this tokenizer has none. Set "
                "--data.chat_template to a jinja file, or use the tokenizer of an instruct model"
            )
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        stop = next((s for s in self.stops if any(s in content for content in said)), None)
        if stop is not None:
            raise ValueError(
                f"an assistant message contains {stop!r}, the token that ends a turn; the chat "
                "template adds it. Remove it from the text: it would teach to stop early"
            )
        text, spans = self._spans(messages, tools, trained)
        check_rendered(messages, text)
        pieces, mask = _cut(text, [self._close(text, span) for span, keep in spans if keep])
        lengths, ids = _encode_pieces(pieces, self.tokenizer)
        loss_mask = [m for m, n in zip(mask, lengths, strict=True) for _ in range(n)]
        if 1 not in loss_mask or loss_mask[0] == 1:
            raise ValueError(
                "no prompt before the first trained token, or none trained. Check the template"
            )
        return ids, loss_mask

    def _render(self, messages: Messages, tools: Any = None, *, prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=self.template,
        )

    def _spans(
        self, messages: Messages, tools: Any, trained: list[bool]
    ) -> tuple[str, list[tuple[Span, bool]]]:
        """Rendered text, and the raw span of every assistant turn with whether it is trained."""
        flags = [t for m, t in zip(messages, trained, strict=True) if m["role"] == "assistant"]
        find = self._prefix_spans if self.mask_from == "prefixes" else self._marked_spans
        text, spans = _rendered(messages, tools, lambda: find(messages, tools), self._render)
        if len(spans) == len(flags):
            return text, list(zip(spans, flags, strict=True))
        if not spans or not all(flags):
            raise ValueError(
                f"the template marks {len(spans)} generated spans for {len(flags)} assistant "
                "turns: which to train is unknown. Put {% generation %} around each of these turns"
            )
        return text, [(span, True) for span in spans]

    def _marked_spans(self, messages: Messages, tools: Any) -> tuple[str, list[Span]]:
        """The template's marked spans less what the generation prompt gives to the model: some
        templates mark the header as generated.

        Where the generation prompt is no prefix, what comes before a <think> that it opens is taken
        off (the row has none, or goes on otherwise, and then trains it); else the special tokens it
        shares with the span.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # annotated as returning one string
        (text, *_), (marked, *_) = render(
            conversations=[list(messages)],
            tools=tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        ends = []
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            prompt = self._render(messages[:i], tools, prompt=True)
            shared, header = os.path.commonprefix([prompt, text]), _OPENED.sub("", prompt)
            special = max((shared.rfind(t) + len(t) for t in self._added if t in shared), default=0)
            whole = next((p for p in (prompt, header) if shared.startswith(p)), None)
            ends.append(special if whole is None else len(whole))
        spans = (Span(a, b) for a, b in sorted(marked) if a < b)
        return text, [
            Span(min((e for e in ends if s.start < e < s.end), default=s.start), s.end)
            for s in spans
        ]

    def _prefix_spans(self, messages: Messages, tools: Any) -> tuple[str, list[Span]]:
        text = self._render(messages, tools)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], tools, prompt=True)
            through = text if i + 1 == len(messages) else self._render(messages[: i + 1], tools)
            if not through.startswith(before):
                raise ValueError(
                    "the loss mask cannot be derived exactly: the generation prompt of the chat "
                    f"template is not how it begins message {i + 1} (it may open a <think> block "
                    f"that the row lacks). {_MARK}, or give the rows that beginning"
                )
            if not text.startswith(through):
                raise ValueError(
                    "the loss mask cannot be derived exactly: the chat template renders what is "
                    f"before the end of message {i + 1} differently when more follow (some delete "
                    f"earlier turns' reasoning). {_MARK}, or keep one assistant turn per row"
                )
            turn, content = through[len(before) :], message["content"].strip()
            lead = turn[: turn.find(content)] if content and content in turn else turn
            if self._header_in_turn and lead.strip():
                raise ValueError(
                    f"the chat template ignores add_generation_prompt, so the header {lead!r} of "
                    f"the assistant turn would be trained. {_MARK}"
                )
            spans.append(Span(len(before), len(through)))
        return text, spans

    def _close(self, text: str, span: Span) -> Span:
        """The span up to and with the token that ends the turn: without what the template writes
        after it."""
        body = text[span.start : span.end].rstrip()
        if body.endswith(tuple(self.stops)):
            return Span(span.start, span.start + len(body))
        after = len(text) - len(text[span.end :].lstrip())
        stop = next((s for s in self.stops if text.startswith(s, after)), None)
        return span if stop is None else Span(span.start, after + len(stop))

    def _ignores_generation_prompt(self) -> bool:
        from jinja2 import TemplateError

        user = [{"role": "user", "content": _PROBE}]
        try:
            return self._render(user) == self._render(user, prompt=True)
        except (TemplateError, TypeError):  # such a template fails on every row, and is named there
            return True


def encode_conversation(messages: Messages, tokenizer: Any, **options: Any) -> PromptGroup:
    """One conversation as a group with K = 1: prompt up to the first trained token, completion from
    there on.

    ``loss_mask`` is 1 on assistant content and on the token that ends the turn, 0 elsewhere.
    Options are those of ``ChatEncoder.encode``, which is for many rows. Raises ValueError where the
    mask cannot be exact.
    """
    return ChatEncoder(tokenizer).encode(messages, **options)


def render_prompt(tokenizer: Any, messages: Messages, tools: Any) -> str:
    """The messages with the header of the reply, by the tokenizer's own template. ValueError for
    what it refuses or leaves out, but for the thoughts of earlier turns: a model is not given those
    when it is served, either."""

    def render(messages: Messages, tools: Any = None) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=True
        )

    text, _ = _rendered(messages, tools, lambda: (render(messages, tools), []), render)
    check_rendered(messages, text, with_thoughts=False)
    return text


def set_chat_template(tokenizer: Any, path: str | Path) -> None:
    """Puts the jinja file's text into the tokenizer, so that it is saved and served with what it
    was trained with."""
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.chat_template={path}: cannot be read: {error}. Give the path of a jinja file."
        ) from error
    if "messages" not in template:
        raise ValueError(f"data.chat_template={path}: no chat template, it never reads `messages`.")
    tokenizer.chat_template = template


def stop_token_ids(tokenizer: Any, template: str | None = None) -> list[int]:
    """Ids that end a turn: EOS, and the special token that the chat template (default: the
    tokenizer's) writes after an assistant message."""
    from jinja2 import TemplateError

    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is None:
        return ids
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)
    except (TemplateError, TypeError):
        return ids
    _, found, tail = text.rpartition(_PROBE)
    added = {content: int(i) for content, i in tokenizer.get_added_vocab().items()}
    closing = [c for c in added if found and tail.strip().startswith(c)]
    return list(dict.fromkeys([*ids, *(added[c] for c in sorted(closing, key=len)[-1:])]))


def _training_template(tokenizer: Any) -> tuple[str | None, str]:
    """(template, where the mask comes from: "markers", "trl" or "prefixes")."""
    if tokenizer.chat_template is None:
        return None, "none"
    template = tokenizer.get_chat_template()
    if _GENERATION_MARKER.search(template):
        return template, "markers"
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    try:
        known = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, TemplateError):  # unknown to TRL, or its probes do not render
        known = None
    return (template, "prefixes") if known is None else (known, "trl")


def _rendered(
    messages: Messages,
    tools: Any,
    find: Callable[[], tuple[str, list[Span]]],
    render: Callable[[Messages], str],
) -> tuple[str, list[Span]]:
    """What ``find`` returns; ValueError where the template raises an error, or writes the same
    without the tools."""
    from jinja2 import TemplateError

    try:
        text, spans = find()
        lost = bool(tools) and render(messages) == text
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template refuses the roles {[m['role'] for m in messages]}: {error}. Change "
            "the row's turns, or set --data.chat_template"
        ) from error
    if lost:
        raise ValueError(
            f"the chat template writes nothing of the row's {len(tools)} tools. Set "
            "--data.chat_template to one that does, or leave the column out with --data.carry"
        )
    return text, spans


def check_rendered(messages: Messages, text: str, *, with_thoughts: bool = True) -> None:
    """All that the messages say must stand in the text, up to white space; what the assistant says
    in its order.

    Others may be moved (some templates put the system message elsewhere) or written as JSON
    (results of tools).
    """
    squeezed = _squeezed(text)
    at = 0
    for message in messages:
        is_assistant = message["role"] == "assistant"
        for part in _said(message, with_thoughts):
            wanted = _squeezed(part)
            found = squeezed.find(wanted, at if is_assistant else 0)
            if is_assistant and part is message["content"]:
                at = found + len(wanted)
            if found >= 0:
                continue
            as_json = (json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
            if is_assistant or not any(_squeezed(written) in squeezed for written in as_json):
                raise ValueError(
                    f"the chat template does not render all that the {message['role']} message "
                    f"says; would be lost: {part[:60]!r}. Some templates write no turns of a role, "
                    "no calls, or no <think> blocks of earlier turns: set --data.chat_template to "
                    "one that keeps them, or change the row's turns"
                )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _said(message: Mapping[str, Any], with_thoughts: bool) -> Iterator[str]:
    """Reasoning, called functions and, last, content."""
    if with_thoughts:
        yield from (str(message[k]) for k in THOUGHTS if message.get(k))
    for call in message.get("tool_calls") or ():
        yield str((call.get("function") or call).get("name", ""))
    yield message["content"] if with_thoughts else message["content"].rpartition("</think>")[2]


def _cut(text: str, spans: Sequence[Span]) -> tuple[list[str], list[int]]:
    """The text between and inside the spans, in order, and 1 for the pieces inside."""
    borders = [0, *(place for span in spans for place in span), len(text)]
    pieces = [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    return pieces, [i % 2 for i in range(len(pieces))]


def _encode_pieces(pieces: list[str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens per piece, and the ids of all. The first piece always gets the ids it has alone, as
    when it is a prompt.

    Tried in this order: the pieces' ids, laid end to end, are the ids of the whole text; the ids of
    each beginning are a beginning of the whole's (tokenizers that add a space to every text); the
    whole has a token across a cut (an answer that starts with a line break), but the pieces' ids
    still decode to the same text: these are what a model produces after the prompt. Else
    ValueError.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    whole, *parts = encode(["".join(pieces), *pieces])
    joined = [i for part in parts for i in part]
    if joined == whole:
        return [len(part) for part in parts], whole
    beginnings = encode(["".join(pieces[: k + 1]) for k in range(len(pieces))])
    if all(whole[: len(b)] == b for b in beginnings):
        ends = [0, *map(len, beginnings)]
        return [b - a for a, b in zip(ends, ends[1:], strict=False)], whole
    if decode(joined) == decode(whole):
        return [len(part) for part in parts], joined
    raise ValueError(
        "the loss mask cannot be exact: a token lies across the border of an assistant turn, and "
        "the tokenizer does not encode the parts alone. Remove white space from the start and end "
        "of the message, or change the template"
    )


def leading_special(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before a text by itself: BOS for most, none for GPT-2."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    full = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return list(full[:at])


def _where(meta: Mapping[str, Any] | None) -> str:
    meta = meta or {}
    return f"{meta.get('file', '<memory>')}:{meta.get('row', '?')}"
