"""`posttrain chat`: talk to a model, or to two checkpoints side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

COMMANDS = "/reset forgets the conversation, /system TEXT sets the system message, /quit ends"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of `chat`; imports nothing heavy."""
    add = parser.add_argument
    model = "run folder (its final/), model or adapter folder, embedded model or hub id"
    add("models", metavar="MODEL", nargs="+", help=f"{model}; two: side by side")
    add("--prompt", metavar="TEXT", help="answer this and end; without it, lines are read")
    add("--system", help="system message")
    add("--max-tokens", type=int, default=512, help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.7, help="0: greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)


@dataclass(kw_only=True)
class Speaker:
    """A model with its own side of the conversation."""

    name: str
    model: Any
    tokenizer: Any
    history: list[dict[str, str]] = field(default_factory=list)

    def answer(
        self, question: str, arguments: argparse.Namespace, show: Callable[[str], None]
    ) -> str:
        """The answer; ``show`` is given all of it so far after each token."""
        import torch

        from posttrain.data.chat import render_prompt
        from posttrain.models.load import end_token_ids

        self.history.append({"role": "user", "content": question})
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        text = render_prompt(self.tokenizer, [*system, *self.history], None)
        encoded = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids = encoded["input_ids"].to(self.model.device)
        ends = end_token_ids(self.model, self.tokenizer)
        sampling = {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
        stream = _Stream(self.tokenizer, ends, show)
        torch.manual_seed(arguments.seed + len(self.history))
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=arguments.max_tokens,
            do_sample=arguments.temperature > 0,
            **(sampling if arguments.temperature > 0 else {}),
            eos_token_id=ends or None,
            pad_token_id=self.tokenizer.pad_token_id or (ends or [0])[0],
            streamer=stream,
        )
        said = stream.text
        self.history.append({"role": "assistant", "content": said})
        return said


class _Stream:
    """Text of the tokens that transformers' generate puts in; the first it puts is the prompt."""

    def __init__(self, tokenizer: Any, ends: list[int], show: Callable[[str], None]) -> None:
        self._tokenizer, self._ends, self._show = tokenizer, ends, show
        self._ids: list[int] | None = None
        self.text = ""

    def put(self, value: Any) -> None:
        """One token; a character whose bytes are not all there yet is not shown."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += [i for i in value.reshape(-1).tolist() if i not in self._ends]
        self.text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if not self.text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(self.text)

    def end(self) -> None:
        """Show also what ends within a character."""
        self._show(self.text)


def styled(text: str) -> Any:
    """Rich text with thoughts (<think> ... </think>) dim."""
    from rich.text import Text

    before, opened, rest = text.partition("<think>")
    thought, closed, after = rest.partition("</think>")
    return Text.assemble(before, (opened + thought + closed, "dim"), after)


def run(arguments: argparse.Namespace) -> None:
    """Reads turns until the end of the input; answers each."""
    _check(arguments)
    speakers = [_load(name) for name in arguments.models]
    for turn in _turns(arguments.prompt):
        command, _, rest = turn.partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command in ("/reset", "/system"):
            arguments.system = rest if command == "/system" else arguments.system
            for speaker in speakers:
                speaker.history.clear()
        elif command.startswith("/"):
            print(f"{command} is no command. {COMMANDS}.", file=sys.stderr)
        else:
            _answer_all(speakers, turn, arguments)


def _check(arguments: argparse.Namespace) -> None:
    if len(arguments.models) > 2:
        raise ValueError(f"chat shows one or two models; got {len(arguments.models)}. Name fewer.")
    if arguments.max_tokens < 1 or arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        raise ValueError(
            "chat needs --max-tokens >= 1, --temperature >= 0 and 0 < --top-p <= 1; got "
            f"{arguments.max_tokens}, {arguments.temperature} and {arguments.top_p}."
        )


def _load(name: str) -> Speaker:
    from posttrain.models.merge import load_here

    model, tokenizer, _ = load_here(name)
    if tokenizer.chat_template is None:
        raise ValueError(f"{name} has no chat template, so it knows no turns. Train it on chats.")
    return Speaker(name=name, model=model, tokenizer=tokenizer)


def _turns(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(COMMANDS)
    while True:
        try:
            turn = (input("> ") if is_terminal else input()).strip()
        except EOFError:
            return
        if turn:
            yield turn


def _answer_all(speakers: list[Speaker], turn: str, arguments: argparse.Namespace) -> None:
    """Streams on a terminal; elsewhere whole answers, each under its model's name if there are
    two."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console, said = Console(), [""] * len(speakers)

    def table() -> Any:
        if len(speakers) == 1:
            return styled(said[0])
        columns = Table(expand=True)
        for speaker in speakers:
            columns.add_column(speaker.name, ratio=1)
        columns.add_row(*map(styled, said))
        return columns

    if not console.is_terminal:
        for speaker in speakers:
            text = speaker.answer(turn, arguments, lambda _: None)
            print(f"{speaker.name}: {text}" if len(speakers) > 1 else text, flush=True)
        return
    with Live(table(), console=console, vertical_overflow="visible") as live:
        for place, speaker in enumerate(speakers):

            def show(text: str, place: int = place) -> None:
                said[place] = text
                live.update(table())

            speaker.answer(turn, arguments, show)
