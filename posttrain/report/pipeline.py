"""A pipeline for people: the graph of its stages, accuracy and length by stage.

A stage is plain values, as ``pipeline.json`` has them: ``{"name", "command", "state", "seconds",
"needs", "folder", "figures"}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.files import is_locked, replace_text
from posttrain.report.charts import THEME, point_with_interval
from posttrain.report.page import (
    Html,
    chart,
    duration,
    page,
    section,
    table,
    tag,
    with_interval,
)
from posttrain.report.run import METRICS, read_runs
from posttrain.report.runs import runs_page

PIPELINE = "pipeline.json"
Stage = Mapping[str, Any]
STATES = {
    "done": ("✓", "#3ca951"),
    "running": ("▶", "#4269d0"),
    "failed": ("✗", "#d9534f"),
    "waiting": ("○", "#9498a0"),
}
"""Sign and colour of each state."""
_WIDTH, _HEIGHT, _LANE, _GAP_X, _GAP_Y = 168, 46, 8, 18, 34
FIGURES = {
    "accuracy": "accuracy",
    "mean_tokens": "tokens per answer",
    "format_rate": "right format",
}


def pipeline_page(folder: Path, out: Path, *, reload_s: float | None = None) -> str:
    """The whole page, with links to the stages' own as seen from ``out``; those of runs are
    written, too."""
    described = _read(folder)
    name, stages = described["name"], described["stages"]
    links: dict[str, str] = {}
    for stage in stages:
        own = folder / stage["folder"]
        report = own / "report.html"
        if (own / METRICS).exists() and _is_behind(report, own):
            replace_text(report, runs_page(read_runs([own])))
        if report.exists():
            links[stage["name"]] = os.path.relpath(report, out.parent)
    counts = {state: sum(s["state"] == state for s in stages) for state in STATES}
    said = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    spent = duration(sum(s["seconds"] or 0 for s in stages))
    return page(
        name,
        section("Stages", tag("figure", tag("div", graph(stages, links), class_="chart"))),
        section("Results", stage_table(stages, links=links), _trade(stages)),
        intro=tag("p", f"A pipeline of {len(stages)} stages: {said}; {spent} of work."),
        reload_s=reload_s,
    )


def is_finished(folder: Path) -> bool:
    """Whether nothing will be added any more: all is done, or a stage failed or was killed, and
    none is being run."""
    stages = _read(folder)["stages"]
    states = {stage["state"] for stage in stages}
    running = (s["name"] for s in stages if s["state"] == "running")
    if any(is_locked(folder / ".stages" / f"{name}.lock") for name in running):
        return False
    return states == {"done"} or not states.isdisjoint(("failed", "running"))


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / PIPELINE).read_text(encoding="utf-8")))


def _is_behind(report: Path, run: Path) -> bool:
    """Whether the run wrote metrics or its model after its page."""
    written = [p.stat().st_mtime for p in (run / METRICS, run / "final") if p.exists()]
    return not report.exists() or report.stat().st_mtime < max(written)


def stage_table(stages: Sequence[Stage], *, links: Mapping[str, str]) -> Html:
    """One line for each stage, with every figure that one of them has."""
    known = dict.fromkeys(k for s in stages for k in s["figures"])
    names = [k for k in known if not k.endswith("_ci95")]
    header = ["stage", "command", "state", "time"]
    header += [FIGURES.get(k, k.replace("_", " ")) for k in names]
    return table(header, [_line(stage, names, links) for stage in stages], numbers_from=3)


def _line(stage: Stage, names: Sequence[str], links: Mapping[str, str]) -> list[Any]:
    found, link = stage["figures"], links.get(stage["name"])
    title = tag("a", stage["name"], href=link) if link else stage["name"]
    sign, _ = STATES[stage["state"]]
    state = tag("span", f"{sign} {stage['state']}", class_=f"state {stage['state']}")
    shares = ("accuracy", "format_rate", "truncated")
    figures = [
        with_interval(found.get(k), found.get(f"{k}_ci95"), is_share=k in shares) for k in names
    ]
    return [title, tag("code", stage["command"]), state, duration(stage["seconds"]), *figures]


def _trade(stages: Sequence[Stage]) -> Html:
    """Accuracy against tokens of the stages that were evaluated on held-out problems."""
    wanted = {"accuracy", "accuracy_ci95", "mean_tokens"}
    rows = [{"stage": s["name"], **s["figures"]} for s in stages if wanted <= s["figures"].keys()]
    note = "held-out accuracy with its 95 % interval, against tokens per answer"
    return chart(point_with_interval(rows), "Accuracy and length", note, wide=True)


Thing = str | tuple[str, str, int]
"""A stage, or a lane: where an arrow (need, stage) goes through a row between the two."""
Place = tuple[float, float]
"""Middle and upper end, in pixels."""


def graph(stages: Sequence[Stage], links: Mapping[str, str], *, style: str | None = None) -> Html:
    """SVG of the stages in rows, with arrows from what a stage needs to it; without those to a
    stage that is needed by another of its needs as well."""
    row: dict[Thing, int] = {}
    behind: dict[str, set[str]] = {}
    ways: list[list[Thing]] = []
    for stage in stages:  # each comes after all that it needs
        name, needs = stage["name"], stage["needs"]
        row[name] = max((row[n] + 1 for n in needs), default=0)
        behind[name] = set(needs).union(*(behind[n] for n in needs))
        for need in needs:
            if not any(need in behind[other] for other in needs):
                between = range(row[need] + 1, row[name])
                ways.append([need, *((need, name, i) for i in between), name])
    row |= {lane: lane[2] for way in ways for lane in way if not isinstance(lane, str)}
    places = _places(row, ways)
    middles = [x for x, _ in places.values()]
    left, right = min(middles), max(middles)
    width = right - left + _WIDTH + 4
    height = max(row.values()) * (_HEIGHT + _GAP_Y) + _HEIGHT + 4
    boxes = [_box(s, places[s["name"]], links.get(s["name"])) for s in stages]
    return tag(
        "svg",
        *(_arrow(way, [places[thing] for thing in way]) for way in ways),
        *boxes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"{left - _WIDTH / 2 - 2} -2 {width} {height}",
        width=width,
        height=height,
        font_family=THEME["font"],
        style=style,
    )


def _places(row: Mapping[Thing, int], ways: Sequence[Sequence[Thing]]) -> dict[Thing, Place]:
    """In a row, things are ordered as what they need is."""
    before: dict[Thing, list[Thing]] = {thing: [] for thing in row}
    for way in ways:
        for here, there in pairwise(way):
            before[there].append(here)
    places: dict[Thing, Place] = {}
    for i in range(max(row.values()) + 1):
        things = [thing for thing, own in row.items() if own == i]
        things.sort(key=lambda thing: fmean([places[b][0] for b in before[thing]] or [0.0]))
        wide = {thing: _WIDTH if isinstance(thing, str) else _LANE for thing in things}
        left = -(sum(wide.values()) + _GAP_X * (len(wide) - 1)) / 2
        for thing, width in wide.items():
            places[thing] = (left + width / 2, i * (_HEIGHT + _GAP_Y))
            left += width + _GAP_X
    return places


def _arrow(way: Sequence[Thing], places: Sequence[Place]) -> Html:
    (x, y), *stops = places
    line = f"M{x} {y + _HEIGHT}"
    for there, y in stops:
        bend = y - _GAP_Y / 2
        line += f"V{bend - 12}C{x} {bend} {there} {bend} {there} {bend + 12}"
        x = there
    line += f"V{y - 2}m-4 -6l4 6l4 -6"
    title = tag("title", f"{way[0]} → {way[-1]}")
    return tag("path", title, d=line, fill="none", stroke="#8a8f98", stroke_width=1.5)


def _box(stage: Stage, place: Place, link: str | None) -> Html:
    (x, y), name, seconds = place, stage["name"], stage["seconds"]
    sign, colour = STATES[stage["state"]]
    state = f"{sign} {stage['state']}" + ("" if seconds is None else f", {duration(seconds)}")
    text = {"x": x, "text_anchor": "middle", "fill": "currentColor"}
    return tag(
        "a" if link else "g",
        tag("title", f"{name}: {stage['command']}"),
        tag(
            "rect",
            x=x - _WIDTH / 2,
            y=y,
            width=_WIDTH,
            height=_HEIGHT,
            rx=7,
            fill=colour,
            fill_opacity=0.16,
            stroke=colour,
            stroke_width=1.5,
        ),
        tag("text", _short(name), y=y + _HEIGHT / 2 - 4, font_size=13, font_weight=600, **text),
        tag("text", state, y=y + _HEIGHT / 2 + 14, font_size=11.5, opacity=0.8, **text),
        href=link,
    )


def _short(text: str, most: int = 23) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
