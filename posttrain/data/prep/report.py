"""report.html: what the rows look like, in pictures. One file, no network, every text escaped."""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from pathlib import Path
from typing import Any

from posttrain.data.messages import message_text
from posttrain.data.prep.partition import Statistics

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;
max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}
td,th{padding:.15rem .8rem;text-align:left;border-bottom:1px solid #ddd}
td.n{text-align:right}
.warn{background:#fff3cd;border-left:4px solid #e0a800;padding:.6rem 1rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.pair div,.prompt{background:#f6f6f6;padding:.6rem;white-space:pre-wrap;overflow-wrap:anywhere}
.pair div:first-child{border-top:3px solid #2a7}
.pair div:last-child{border-top:3px solid #c44}
svg text{font:12px sans-serif}"""

LENGTH_BIAS = 0.1
"""Distance of 'the longer answer is chosen' from one half that is warned about, if it is beyond
three standard errors."""


def write_report(
    path: Path, manifest: dict[str, Any], statistics: Statistics, *, layout: str
) -> None:
    """Counts, lengths, margins, length bias, ten rows drawn by the seed."""
    parts = [f"<h1>{layout}</h1>", _counts(manifest)]
    if layout == "pairs":
        parts += [_length_bias(statistics), _lengths(statistics), _margins(statistics.margins)]
    parts += ["<h2>Ten rows</h2>", *(_row(values) for _, values in statistics.shown)]
    page = (
        f"<!doctype html><meta charset='utf-8'><title>posttrain prep</title><style>{_STYLE}</style>"
    ) + "\n".join(parts)
    path.write_text(page + "\n", encoding="utf-8")


def _counts(manifest: dict[str, Any]) -> str:
    lines = {
        **manifest["counts"],
        **{f"dropped: {reason}": n for reason, n in manifest["dropped"].items()},
    }
    lines |= {
        f"column {name}: {use}": n
        for use, names in manifest["columns"].items()
        for name, n in names.items()
    }
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td class='n'>{v:,}</td></tr>" for k, v in lines.items()
    )
    return f"<table>{rows}</table>"


def length_bias(statistics: Statistics) -> tuple[float, bool]:
    """(share of pairs of unequal length whose longer side is chosen, whether that is far from one
    half)."""
    n = statistics.unequal_lengths
    share = statistics.longer_chosen / n if n else 0.5
    return share, abs(share - 0.5) > max(LENGTH_BIAS, 1.5 / math.sqrt(max(n, 1)))


def _length_bias(statistics: Statistics) -> str:
    share, far = length_bias(statistics)
    text = (
        f"The longer answer is the chosen one in {share:.1%} of {statistics.unequal_lengths:,} "
        "pairs of unequal length."
    )
    if not far:
        return f"<p>{text}</p>"
    return (
        f"<p class='warn'><b>Length bias.</b> {text} A model can learn length instead of quality: "
        "consider --strategy long2short, balanced data, or a loss with a length term (r_dpo, "
        "simpo, dpo_norm).</p>"
    )


def _lengths(statistics: Statistics) -> str:
    chosen, rejected = statistics.chosen_lengths, statistics.rejected_lengths
    bins = chosen.keys() | rejected.keys()
    every = range(min(bins), max(bins) + 1) if bins else range(0)
    labels = [f"{2**b:,}" for b in every]
    series = [
        (colour, [lengths[b] for b in every])
        for colour, lengths in (("#2a7", chosen), ("#c44", rejected))
    ]
    return "<h2>Length, characters (green chosen, red rejected; from 2^b)</h2>" + _bars(
        labels, series
    )


def _margins(margins: Counter[float]) -> str:
    if not margins:
        return ""
    low, high = min(margins), max(margins)
    width = (high - low) / 20 or 1.0
    bins = [0] * 20
    for value, n in margins.items():
        bins[min(19, int((value - low) / width))] += n
    return "<h2>Margin</h2>" + _bars(
        [f"{low + i * width:.3g}" for i in range(20)], [("#47a", bins)]
    )


def _bars(labels: list[str], series: list[tuple[str, list[int]]]) -> str:
    """Bars side by side, their heights in proportion."""
    if not labels:
        return "<p>no rows</p>"
    step, height = 44, 160
    top = max(max(values) for _, values in series) or 1
    width = (step - 8) / len(series)
    shapes = []
    for s, (colour, values) in enumerate(series):
        for i, n in enumerate(values):
            h = n / top * height
            x = i * step + s * width
            shapes.append(
                f"<rect x='{x:.1f}' y='{height - h:.1f}' width='{width:.1f}' height='{h:.1f}' "
                f"fill='{colour}'><title>{n:,}</title></rect>"
            )
    texts = [
        f"<text x='{i * step}' y='{height + 16}'>{escape(label)}</text>"
        for i, label in enumerate(labels)
    ]
    return (
        f"<svg width='{len(labels) * step}' height='{height + 24}' "
        f"role='img'>{''.join(shapes + texts)}</svg>"
    )


def _say(messages: list[dict[str, str]]) -> str:
    return "\n\n".join(f"<b>{escape(m['role'])}</b> {escape(message_text(m))}" for m in messages)


def _row(values: dict[str, Any]) -> str:
    where = f"<p>{escape(values['source'])}:{values['row']}</p>"
    if "messages" in values:
        return f"{where}<div class='prompt'>{_say(values['messages'])}</div>"
    sides = [values[n] for n in ("chosen", "rejected", "completion") if n in values] or values[
        "completions"
    ][:2]
    divs = "".join(f"<div>{_say(side)}</div>" for side in sides)
    return (
        f"{where}<div class='prompt'>{_say(values['prompt'])}</div><div class='pair'>{divs}</div>"
    )
