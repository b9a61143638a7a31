"""A pipeline for people: the graph of its stages, accuracy and length by stage.

A stage is plain values: ``{"name", "command", "state", "seconds", "needs", "folder", "figures"}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from posttrain.report.charts import THEME, encoded, plain, point_with_interval
from posttrain.report.page import Html, chart, duration, join, number, page, section, table, tag

Stage = Mapping[str, Any]
STATES = {
    "done": ("✓", "#3ca951"),
    "running": ("▶", "#4269d0"),
    "failed": ("✗", "#d9534f"),
    "waiting": ("○", "#9498a0"),
}
"""Sign and colour of each state."""
_WIDTH, _HEIGHT, _GAP_HEIGHT, _GAP_X, _GAP_Y = 168, 50, 8, 46, 18
FIGURES = {
    "accuracy": "accuracy",
    "mean_tokens": "tokens per answer",
    "format_rate": "right format",
}


def pipeline_page(
    name: str, stages: Sequence[Stage], *, links: Mapping[str, str], reload_s: float = 0
) -> str:
    """The whole page. ``links``: addresses of the stages' own reports by their name."""
    counts = [sum(s["state"] == state for s in stages) for state in STATES]
    said = ", ".join(f"{n} {state}" for n, state in zip(counts, STATES, strict=True) if n)
    spent = duration(sum(s.get("seconds") or 0 for s in stages))
    return page(
        name,
        section("Stages", chart(graph(stages, links=links), "Stages", "state and time", wide=True)),
        section("Results", stage_table(stages, links=links), _trade(stages)),
        intro=tag("p", f"A pipeline of {len(stages)} stages: {said}; {spent} of work."),
        reload_s=reload_s,
    )


def stage_table(stages: Sequence[Stage], *, links: Mapping[str, str]) -> Html:
    """One line for each stage, with every figure that one of them has."""
    known = dict.fromkeys(k for s in stages for k in s.get("figures") or {})
    names = [k for k in known if not k.endswith("_ci95")]
    header = [
        "stage",
        "command",
        "state",
        "time",
        *(FIGURES.get(k, k.replace("_", " ")) for k in names),
    ]
    return table(header, [_line(stage, names, links) for stage in stages], numbers_from=3)


def _line(stage: Stage, names: Sequence[str], links: Mapping[str, str]) -> list[Any]:
    found = stage.get("figures") or {}
    link = links.get(stage["name"])
    title = tag("a", stage["name"], href=link) if link else stage["name"]
    sign, _ = STATES[stage["state"]]
    state = tag("span", f"{sign} {stage['state']}", class_=f"state {stage['state']}")
    figures = [_figure(found.get(k), found.get(f"{k}_ci95"), k) for k in names]
    return [title, tag("code", stage["command"]), state, duration(stage.get("seconds")), *figures]


def _figure(value: Any, half_width: float | None, name: str) -> str:
    if value is None:
        return "–"
    if name in ("accuracy", "format_rate", "truncated"):
        interval = "" if half_width is None else f" ± {100 * half_width:.1f}"
        return f"{100 * value:.1f}{interval} %"
    return number(value) + ("" if half_width is None else f" ± {number(half_width)}")


def _trade(stages: Sequence[Stage]) -> Html:
    """Accuracy against tokens, where at least one stage was evaluated on held-out problems."""
    rows = []
    for stage in stages:
        found = stage.get("figures") or {}
        accuracy, tokens = found.get("accuracy"), found.get("mean_tokens")
        half = found.get("accuracy_ci95")
        if None not in (accuracy, tokens, half):
            row = {"stage": stage["name"], "tokens": tokens, "accuracy": accuracy, "ci95": half}
            rows.append(row)
    note = "held-out accuracy with its 95 % interval, against tokens per answer"
    spec = point_with_interval(rows) if rows else None
    return join(chart(spec, "Accuracy and length", note, wide=True))


def layers(stages: Sequence[Stage]) -> dict[str, int]:
    """Layer of each stage: the longest way to it. ValueError for a need that is no stage, or a
    circle."""
    needs = {s["name"]: list(s.get("needs") or ()) for s in stages}
    unknown = sorted({n for wanted in needs.values() for n in wanted} - needs.keys())
    if unknown:
        raise ValueError(f"Stages need {', '.join(unknown)}, but there are {', '.join(needs)}.")
    found: dict[str, int] = {}
    while len(found) < len(needs):
        ready = [n for n, w in needs.items() if n not in found and set(w) <= found.keys()]
        if not ready:
            left = ", ".join(n for n in needs if n not in found)
            raise ValueError(f"Stages that need one another in a circle, or behind one: {left}.")
        found |= {n: max((found[w] + 1 for w in needs[n]), default=0) for n in ready}
    return found


def _without_shortcuts(stages: Sequence[Stage]) -> list[Stage]:
    """Without the needs that another need has as well, at some distance."""
    layer = layers(stages)
    needs = {s["name"]: list(s.get("needs") or ()) for s in stages}
    behind: dict[str, set[str]] = {}
    for name in sorted(needs, key=layer.__getitem__):
        behind[name] = set(needs[name]).union(*(behind[n] for n in needs[name]))
    return [
        {**s, "needs": [n for n in wanted if not any(n in behind[other] for other in wanted)]}
        for s, wanted in zip(stages, needs.values(), strict=True)
    ]


Box = tuple[float, float, float]
"""Left, top and height in pixels."""


def _positions(stages: Sequence[Stage]) -> tuple[dict[str, Box], dict[tuple[str, str], list[Box]]]:
    """Boxes of the stages, and of each arrow the gaps that it goes through in the layers between.
    In a layer, things are ordered as what they need is."""
    layer = layers(stages)
    columns: list[list[Any]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    before: dict[Any, list[Any]] = {}
    for stage in stages:
        name, needs = stage["name"], list(stage.get("needs") or ())
        columns[layer[name]].append(name)
        before[name] = [
            (n, name, layer[name] - 1) if layer[name] - layer[n] > 1 else n for n in needs
        ]
        for need in needs:
            for i in range(layer[need] + 1, layer[name]):
                columns[i].append((need, name, i))
                before[need, name, i] = [need if layer[need] == i - 1 else (need, name, i - 1)]
    boxes: dict[Any, Box] = {}
    tall = {thing: _HEIGHT if isinstance(thing, str) else _GAP_HEIGHT for thing in before}
    total = [sum(tall[t] for t in c) + _GAP_Y * (len(c) - 1) for c in columns]
    for i, column in enumerate(columns):
        top = (max(total) - total[i]) / 2

        def height(thing: Any) -> float:
            wanted = [boxes[b][1] + boxes[b][2] / 2 for b in before[thing]]
            return sum(wanted) / max(len(wanted), 1)

        for thing in sorted(column, key=height):
            boxes[thing] = (i * (_WIDTH + _GAP_X), top, tall[thing])
            top += tall[thing] + _GAP_Y
    ways: dict[tuple[str, str], list[Box]] = {}
    for thing, box in boxes.items():
        if not isinstance(thing, str):
            ways.setdefault(thing[:2], []).append(box)
    return {t: b for t, b in boxes.items() if isinstance(t, str)}, ways


def _short(text: str, most: int = 23) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _node(
    stage: Stage, left: float, top: float, height: float, links: Mapping[str, str]
) -> dict[str, Any]:
    state, seconds = stage["state"], stage.get("seconds")
    took = "" if seconds is None else f", {duration(seconds)}"
    return {
        "left": left,
        "right": left + _WIDTH,
        "top": top,
        "bottom": top + height,
        "middle": left + _WIDTH / 2,
        "name_y": top + 17,
        "state_y": top + 35,
        "label": _short(stage["name"]),
        "said": f"{STATES[state][0]} {state}{took}",
        "link": links.get(stage["name"]),
        **{key: stage[key] for key in ("name", "state", "command")},
    }


def graph(stages: Sequence[Stage], *, links: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A Vega-Lite chart of the stages in layers, with arrows from what a stage needs to it."""
    import altair as alt

    stages = _without_shortcuts(stages)
    boxes, ways = _positions(stages)
    nodes = [_node(stage, *boxes[stage["name"]], links or {}) for stage in stages]
    width = max(n["right"] for n in nodes)
    height = max(n["bottom"] for n in nodes)

    def x(field: str) -> Any:
        return alt.X(f"{field}:Q", scale=alt.Scale(domain=[0, width]), axis=None)

    def y(field: str) -> Any:
        return alt.Y(f"{field}:Q", scale=alt.Scale(domain=[height, 0]), axis=None)

    scale = alt.Scale(domain=list(STATES), range=[c for _, c in STATES.values()])
    paint = {
        "color": alt.Color("state:N", legend=None, scale=scale),
        "stroke": alt.Stroke("state:N", legend=None, scale=scale),
    }
    base = encoded(nodes)
    tips = [alt.Tooltip(f"{k}:N", title=t) for k, t in (("name", "stage"), ("command",) * 2)]
    box = base.mark_rect(cornerRadius=7, fillOpacity=0.16, strokeWidth=1.5).encode(
        x=x("left"),
        x2="right",
        y=y("top"),
        y2="bottom",
        tooltip=tips,
        href="link:N",
        **paint,
    )
    title = base.mark_text(fontWeight=600, fontSize=13).encode(
        x=x("middle"), y=y("name_y"), text="label:N", href="link:N", tooltip=tips
    )
    state = base.mark_text(fontSize=11.5, opacity=0.8).encode(
        x=x("middle"), y=y("state_y"), text="said:N"
    )
    needs = [(need, s["name"]) for s in stages for need in s.get("needs") or ()]
    parts = (*_arrows(boxes, ways, needs, x, y), box, title, state)
    return plain(alt.layer(*parts).properties(width=width, height=height))


def _arrows(
    boxes: Mapping[str, Box],
    ways: Mapping[tuple[str, str], Sequence[Box]],
    needs: Any,
    x: Any,
    y: Any,
) -> list[Any]:
    """Bent lines, and the heads where they end."""
    lines, heads = [], []
    for need, name in needs:
        stops = [boxes[need], *ways.get((need, name), ()), boxes[name]]
        points: list[tuple[float, float]] = []
        for here, there in pairwise(stops):
            y0, y1 = here[1] + here[2] / 2, there[1] + there[2] / 2
            x0, x1 = here[0] + _WIDTH, there[0] - (7 if there is stops[-1] else 0)
            middle = (x0 + x1) / 2
            points += [(x0, y0), (middle - 10, y0), (middle + 10, y1), (x1, y1)]
        edge = {"edge": f"{need} → {name}"}
        lines += [{**edge, "n": n, "px": a, "py": b} for n, (a, b) in enumerate(points)]
        heads.append({"px": points[-1][0] + 1, "py": points[-1][1]})
    if not lines:
        return []
    line = encoded(lines).mark_line(
        color="#8a8f98", strokeWidth=1.5, interpolate="monotone", opacity=0.9
    )
    head = encoded(heads).mark_point(
        shape="triangle-right", filled=True, size=70, color="#8a8f98", opacity=1
    )
    return [
        line.encode(x=x("px"), y=y("py"), detail="edge:N", order="n:Q"),
        head.encode(x=x("px"), y=y("py")),
    ]


def graph_svg(stages: Sequence[Stage]) -> str:
    """The graph as a picture, on white."""
    import vl_convert

    spec = {**graph(stages), "config": {**THEME, "background": "white"}}
    return str(vl_convert.vegalite_to_svg(spec))
