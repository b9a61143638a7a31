"""Pairs in the terminal, with what differs between the two sides highlighted."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.messages import message_text
from posttrain.data.readers import read_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")


def show(folder: Path, *, count: int, console: Console) -> None:
    """The first rows of ``folder``/train. ValueError if it is no output of `posttrain prep`."""
    from rich.panel import Panel

    files = sorted((folder / "train").glob("*.parquet"))
    if not files:
        raise ValueError(
            f"{folder} has no train/*.parquet; give a folder that `posttrain prep` wrote."
        )
    for row in itertools.islice(
        (row for path in files for row in read_file(path)), count if count >= 0 else None
    ):
        values = row.values
        where = f"{values['source']}:{values['row']}"
        prompt = values.get("prompt") or values["messages"][:-1]
        console.print(Panel(_plain(prompt), title="prompt", subtitle=where))
        for title, side in _sides(values):
            console.print(Panel(side, title=title))


def _sides(values: dict[str, Any]) -> list[tuple[str, Text]]:
    if "chosen" in values:
        chosen, rejected = difference(_join(values["chosen"]), _join(values["rejected"]))
        margin = "" if values.get("margin") is None else f" (margin {values['margin']:g})"
        return [(f"chosen{margin}", chosen), ("rejected", rejected)]
    if "completions" in values:
        return [
            (f"rank {r}", _plain(c))
            for r, c in zip(values["ranks"], values["completions"], strict=True)
        ]
    if "completion" in values:
        return [("desirable" if values["label"] else "undesirable", _plain(values["completion"]))]
    return [("answer", _plain(values["messages"][-1:]))]


def difference(chosen: str, rejected: str) -> tuple[Text, Text]:
    """Both texts; green in the first and red in the second is what the other has not."""
    from rich.text import Text

    a, b = _PIECES.findall(chosen), _PIECES.findall(rejected)
    left, right = Text(), Text()
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        left.append("".join(a[a0:a1]), style="" if kind == "equal" else "bold green")
        right.append("".join(b[b0:b1]), style="" if kind == "equal" else "bold red")
    return left, right


def _join(messages: list[dict[str, str]]) -> str:
    if len(messages) == 1:
        return message_text(messages[0])
    return "\n\n".join(f"[{m['role']}] {message_text(m)}" for m in messages)


def _plain(messages: list[dict[str, str]]) -> Text:
    from rich.text import Text

    return Text("\n\n".join(f"[{m['role']}] {message_text(m)}" for m in messages))
