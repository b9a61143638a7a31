"""What rows look like: report.html (one file, no network, every text escaped), and rows in the
terminal."""

from __future__ import annotations

import difflib
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.messages import Message, message_text
from posttrain.data.prep.rows import Values, parts_of
from posttrain.data.readers import read_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from posttrain.data.prep.pipeline import Statistics

_HEAD = """<!doctype html><meta charset='utf-8'><title>posttrain prep</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;color:#222}
td,th{padding:.15rem .8rem;border-bottom:1px solid #ddd}
.warn{background:#fff3cd;border-left:4px solid #e0a800;padding:.6rem 1rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.pair div,.prompt{background:#f6f6f6;padding:.6rem;white-space:pre-wrap;overflow-wrap:anywhere}
</style>"""
SHOWN = 10
LENGTH_BIAS = 0.1
"""Distance of 'the longer answer is chosen' from one half that is warned about, if it is beyond
three standard errors."""
_PIECES = re.compile(r"\s+|\w+|[^\w\s]")


def write_report(folder: Path, manifest: dict[str, Any], statistics: Statistics) -> None:
    """Counts, lengths, margins, length bias, ten rows drawn by the seed (of the first file, whose
    prompts are drawn by their hash)."""
    import pyarrow.parquet

    layout, seed = manifest["options"]["layout"], manifest["options"]["seed"]
    dropped = {f"dropped: {reason}": n for reason, n in manifest["dropped"].items()}
    columns = {
        f"column {name}: {use}": n
        for use, names in manifest["columns"].items()
        for name, n in names.items()
    }
    counts = manifest["counts"] | dropped | columns
    parts = [_HEAD, f"<h1>{layout}</h1>", _table([(k, f"{n:,}") for k, n in counts.items()])]
    if layout == "pairs":
        parts += [_length_bias(statistics), "<h2>Length, characters: chosen, rejected</h2>"]
        sides = (statistics.chosen_lengths, statistics.rejected_lengths)
        bins = sorted(set().union(*sides))
        parts.append(_bars({f"from {2**b:,}": [side[b] for side in sides] for b in bins}))
        parts += ["<h2>Margin</h2>", _bars(_margins(statistics.margins))]
    table = pyarrow.parquet.read_table(min((folder / "train").iterdir()))
    drawn = random.Random(seed).sample(range(len(table)), min(SHOWN, len(table)))
    parts += ["<h2>Ten rows</h2>", *map(_row, table.take(drawn).to_pylist())]
    (folder / "report.html").write_text("\n".join([*parts, ""]), encoding="utf-8")


def _table(lines: Sequence[Sequence[str]]) -> str:
    rows = ("".join(f"<td>{cell}</td>" for cell in line) for line in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _bars(bins: Mapping[str, Sequence[int]]) -> str:
    """One line for each bin, with a bar for each of its numbers."""
    top = max((n for numbers in bins.values() for n in numbers), default=0)
    return _table(
        [
            (label, *(f"<meter max='{top}' value='{n}'></meter> {n:,}" for n in numbers))
            for label, numbers in bins.items()
        ]
    )


def _margins(margins: Counter[float]) -> dict[str, list[int]]:
    if not margins:
        return {}
    heights, edges = np.histogram(list(margins), bins=20, weights=list(margins.values()))
    return {f"from {low:.3g}": [int(n)] for low, n in zip(edges, heights, strict=False)}


def length_bias(statistics: Statistics) -> tuple[float, bool]:
    """(share of pairs of unequal length whose longer side is chosen, whether that is far from one
    half)."""
    n = statistics.longer_chosen.total()
    share = statistics.longer_chosen[True] / n if n else 0.5
    return share, abs(share - 0.5) > max(LENGTH_BIAS, 1.5 / math.sqrt(max(n, 1)))


def _length_bias(statistics: Statistics) -> str:
    share, far = length_bias(statistics)
    n = statistics.longer_chosen.total()
    text = f"The longer answer is the chosen one in {share:.1%} of {n:,} pairs of unequal length."
    if not far:
        return f"<p>{text}</p>"
    return (
        f"<p class='warn'><b>Length bias.</b> {text} A model can learn length instead of quality: "
        "consider --strategy long2short, balanced data, or a loss with a length term (r_dpo, "
        "simpo, dpo_norm).</p>"
    )


def _row(values: Values) -> str:
    def say(messages: list[Message]) -> str:
        lines = (f"<b>{escape(m['role'])}</b> {escape(message_text(m))}" for m in messages)
        return "\n\n".join(lines)

    prompt, answers = parts_of(values)
    sides = "".join(f"<div>{say(side)}</div>" for side in itertools.islice(answers.values(), 2))
    return (
        f"<p>{escape(values['source'])}:{values['row']}</p><div class='prompt'>{say(prompt)}</div>"
        f"<div class='pair'>{sides}</div>"
    )


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
