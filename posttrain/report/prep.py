"""The page of rows that `posttrain prep` wrote: counts, lengths, margins, length bias, ten rows."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.messages import Message, message_text
from posttrain.data.prep.rows import Values, parts_of
from posttrain.report.charts import bars
from posttrain.report.page import Html, chart, columns_by_use, join, page, section, table, tag

MANIFEST = "manifest.json"
SHOWN = 10
LENGTH_BIAS = 0.1
"""Distance of 'the longer answer is chosen' from one half that is warned about, if it is beyond
three standard errors."""
_COUNTS = {
    "read": "rows read",
    "rejected": "rows that could not be read (rejects.jsonl says why)",
    "parsed": "rows understood",
    "prompts": "different prompts",
    "samples": "samples (a prompt with its answers)",
    "dropped_samples": "samples left out",
    "built": "rows built of the samples",
    "written_train": "rows written for training",
    "written_test": "rows written for testing",
}


def prep_page(folder: Path) -> str:
    """The whole page. Rows are drawn by the seed from the first file of train/, whose prompts are
    drawn by their hash."""
    import pyarrow.parquet

    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found = pyarrow.parquet.read_table(min((folder / "train").iterdir()))
    seed = manifest["options"]["seed"]
    drawn = random.Random(seed).sample(range(len(found)), min(SHOWN, len(found)))
    inputs = ", ".join(i["name"] for i in manifest["inputs"])
    return page(
        f"{folder.resolve().name}: {manifest['options']['layout']}",
        section("Counts", _counts(manifest)),
        section("Lengths and margins", *_statistics(manifest.get("statistics") or {})),
        section("Ten rows", *map(_row, found.take(drawn).to_pylist())),
        intro=tag("p", f"Made by posttrain prep of {inputs}"),
    )


def _counts(manifest: Mapping[str, Any]) -> Html:
    counts = manifest["counts"]
    found = {_COUNTS.get(n, n): counts[n] for n in [*_COUNTS, *counts] if n in counts}
    found |= {f"left out: {reason}": n for reason, n in manifest["dropped"].items()}
    found |= columns_by_use(manifest["columns"])
    return table((), found.items())


def _statistics(found: Mapping[str, Any]) -> list[Html]:
    """Nothing of layouts other than pairs, which have none."""
    if not found:
        return []
    lengths = [
        _bin(side, 2 ** int(b), 2 ** (int(b) + 1), n)
        for side, bins in found["characters"].items()
        for b, n in bins.items()
    ]
    margins = [_bin("", *given) for given in found["margins"]]
    by_length = bars(lengths, x_title="characters", y_title="answers", x_scale="log")
    by_margin = bars(margins, x_title="margin", y_title="pairs")
    return [
        _length_bias(found["longer_is_chosen"], found["pairs_of_unequal_length"]),
        tag(
            "div",
            chart(by_length, "Length", "of chosen and rejected answers, bins of powers of two"),
            chart(by_margin, "Margin", "score of the chosen answer less that of the rejected"),
            class_="charts",
        ),
    ]


def _bin(side: str, low: float, high: float, count: int) -> dict[str, Any]:
    place = {"low": low, "high": high, "said": f"{low:,g} to {high:,g}", "bottom": 0, "top": count}
    return {"part": side, "value": count, **place}


def length_bias(longer: int, pairs: int) -> tuple[float, bool]:
    """(share of pairs of unequal length whose longer side is chosen, whether that is far from one
    half)."""
    share = longer / pairs if pairs else 0.5
    return share, abs(share - 0.5) > max(LENGTH_BIAS, 1.5 / math.sqrt(max(pairs, 1)))


def _length_bias(longer: int, pairs: int) -> Html:
    share, far = length_bias(longer, pairs)
    text = (
        f"The longer answer is the chosen one in {share:.1%} of {pairs:,} pairs of unequal length."
    )
    if not far:
        return tag("p", text)
    advice = (
        " A model can learn length instead of quality: consider --strategy long2short, balanced "
        "data, or a loss with a length term (r_dpo, simpo, dpo_norm)."
    )
    return tag("p", tag("b", "Length bias. "), text + advice, class_="warn")


def _row(values: Values) -> Html:
    prompt, answers = parts_of({k: v for k, v in values.items() if v is not None})
    sides = [
        tag("div", tag("h3", title), _said(side))
        for title, side in itertools.islice(answers.items(), 2)
    ]
    place = tag("p", f"{values['source']}:{values['row']}", class_="note")
    return tag("div", place, _said(prompt), tag("div", *sides, class_="two"), class_="card")


def _said(messages: Sequence[Message]) -> Html:
    turns = [join(tag("b", m["role"]), f" {message_text(m)}") for m in messages]
    return tag("div", Html("\n\n".join(turns)), class_="text")
