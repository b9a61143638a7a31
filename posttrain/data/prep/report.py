"""Rows in the terminal, with what differs between two answers."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.messages import Message, message_text
from posttrain.data.prep.rows import parts_of
from posttrain.data.readers import read_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")


def show(folder: Path, *, count: int, console: Console) -> None:
    """The first rows of ``folder``/train. ValueError if it is no output of `posttrain prep`."""
    from rich.panel import Panel
    from rich.text import Text

    files = sorted((folder / "train").glob("*.parquet"))
    if not files:
        raise ValueError(
            f"{folder} has no train/*.parquet; give a folder that `posttrain prep` wrote."
        )
    rows = (row.values for path in files for row in read_file(path))
    for values in itertools.islice(rows, count if count >= 0 else None):
        values = {k: v for k, v in values.items() if v is not None}
        prompt, answers = parts_of(values)
        place = f"{values['source']}:{values['row']}"
        console.print(Panel(Text(_join(prompt)), title="prompt", subtitle=place))
        sides = {title: Text(_join(side)) for title, side in answers.items()}
        if "chosen" in sides:
            marked = difference(sides["chosen"].plain, sides["rejected"].plain)
            margin = f" (margin {values['margin']:g})" if "margin" in values else ""
            sides = dict(zip((f"chosen{margin}", "rejected"), marked, strict=True))
        for title, side in sides.items():
            console.print(Panel(side, title=title))


def difference(chosen: str, rejected: str) -> tuple[Text, Text]:
    """Both texts; green in the first and red in the second is what the other has not."""
    from rich.text import Text

    a, b = _PIECES.findall(chosen), _PIECES.findall(rejected)
    left, right = Text(), Text()
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        left.append("".join(a[a0:a1]), style="" if kind == "equal" else "bold green")
        right.append("".join(b[b0:b1]), style="" if kind == "equal" else "bold red")
    return left, right


def _join(messages: list[Message]) -> str:
    return "\n\n".join(f"[{m['role']}] {message_text(m)}" for m in messages)
