"""Charts as Vega-Lite specifications, made with altair. The page gives text and grid their colours,
for light and for dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

PALETTE = """
#4269d0 #e08a00 #ff725c #3ca951 #a463f2 #1fa3a3 #e25c9b #9c6b4e #7f8794 #6b8e23 #c9372c #7fb3f0
#d4b106 #5a4fcf
""".split()
"""Readable on white and on black."""
THEME: dict[str, Any] = {
    "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "range": {"category": PALETTE},
    "axis": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": 400, "tickSize": 4},
    "legend": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "labelLimit": 260,
        "title": None,
        "orient": "bottom",
        "columns": 3,
        "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
    },
    "view": {"stroke": "transparent"},
}
HEIGHT = 200
MOST_POINTS = 600
"""Of one line; of more, each point is the mean of as many steps as needed."""
Rows = Sequence[Mapping[str, Any]]


def encoded(rows: Rows) -> Any:
    """An empty chart over rows."""
    import altair as alt

    return alt.Chart(alt.Data(values=list(rows)))


def finished(chart: Any, *, height: int = HEIGHT) -> dict[str, Any]:
    """The specification, as wide as the place where it is shown, without altair's own colours and
    sizes; rows of several layers once."""
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)
    sets: list[Any] = []
    for part in (spec, *spec.get("layer", ())):
        values = part.get("data", {}).get("values")
        if values is not None:
            sets += [] if values in sets else [values]
            part["data"] = {"name": f"rows{sets.index(values)}"}
    return {**spec, "datasets": {f"rows{i}": values for i, values in enumerate(sets)}}


def point_with_interval(rows: Rows) -> dict[str, Any] | None:
    """Points with names: ``accuracy`` with its interval against ``mean_tokens``, of each
    ``stage``."""
    import altair as alt

    if not rows:
        return None
    stages = [row["stage"] for row in rows]
    # names of neighbours stand above and below, so that they do not cover each other
    ordered = sorted(rows, key=lambda row: row["mean_tokens"])
    rows = [{**row, "above": i % 2 == 0} for i, row in enumerate(ordered)]
    base = encoded(rows).transform_calculate(
        low="max(0, datum.accuracy - datum.accuracy_ci95)",
        high="min(1, datum.accuracy + datum.accuracy_ci95)",
    )
    x = alt.X("mean_tokens:Q").title("tokens per answer").scale(zero=False, padding=60)
    tips = [
        alt.Tooltip("stage:N"),
        alt.Tooltip("accuracy:Q", format=".1%"),
        alt.Tooltip("accuracy_ci95:Q", format=".1%", title="± (95 %)"),
        alt.Tooltip("mean_tokens:Q", format=",.4~g", title="tokens"),
    ]
    colour = alt.Color("stage:N").legend(None).scale(domain=stages)
    share = alt.Y("low:Q").title("accuracy").axis(format="~%").scale(zero=False, nice=True)
    rule = base.mark_rule(strokeWidth=1.5).encode(x=x, y=share, y2="high:Q", color=colour)
    point = base.mark_point(filled=True, size=80, opacity=1).encode(
        x=x, y=alt.Y("accuracy:Q").title("accuracy"), color=colour, tooltip=tips
    )
    names = [
        base.transform_filter(alt.datum.above == above)
        .mark_text(align="left", dx=8, dy=dy, fontSize=12)
        .encode(x=x, y="accuracy:Q", text="stage:N")
        for above, dy in ((True, -8), (False, 12))[: len(rows)]  # an empty layer is a warning
    ]
    return finished(alt.layer(rule, point, *names), height=280)


Points = Sequence[tuple[int, float, float | None]]
"""(step, value, half of its interval)."""


def thinned(points: Points) -> list[tuple[int, float, float | None]]:
    """At most ``MOST_POINTS`` points: means over neighbours."""
    size = max(1, -(-len(points) // MOST_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], fmean(value for _, value, _ in g), g[-1][2]) for g in groups]


def lines(
    series: Sequence[Mapping[str, Any]],
    *,
    unit: str = "",
    runs: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Curves over steps, with all values at a step when the pointer is near. None without a point.

    ``series``: ``{"run", "name", "held_out", "points": Points}``.
    ``unit``: of the values; a ``share`` is shown as per cent. ``runs``: of several runs,
    which then have the colours, and names have dashes; else names have colours.
    """
    import altair as alt

    by_run = len(runs) > 1
    share, y_title = unit == "share", "" if unit == "share" else unit
    rows = [row for n, s in enumerate(series) for row in _rows_of(s, f"s{n}", by_run=by_run)]
    if not rows:
        return None
    labels = list(runs if by_run else dict.fromkeys(r["label"] for r in rows))
    dashes = list(dict.fromkeys(r["dash"] for r in rows))
    base = encoded(rows)
    ticks, steps = alt.Axis(tickMinStep=1, format="~s"), {r["step"] for r in rows}
    if max(steps) - min(steps) < 8:
        ticks.values = list(range(int(min(steps)), int(max(steps)) + 1))
    x = alt.X("step:Q").title("step").axis(ticks).scale(nice=False, padding=6)
    largest = max(abs(r["value"]) for r in rows)
    axis = alt.Axis(format="~%" if share else ".3~g" if largest >= 1e-3 else ".2~e")
    scale = alt.Scale(zero=share)
    if share and largest == 0:
        scale = alt.Scale(domain=[0, 0.01])
    y = alt.Y("value:Q").title(y_title or None).axis(axis).scale(scale)
    legend = alt.Legend(columns=1 if max(map(len, labels)) > 22 else 2, symbolSize=60)
    shows_legend = len(labels) > 1 or (by_run and len(dashes) > 1)
    colour = alt.Color("label:N").scale(domain=labels).legend(legend if shows_legend else None)
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(x=x, y=y, color=colour, detail="id:N")
    if len(dashes) > 1:
        line = line.encode(strokeDash=alt.StrokeDash("dash:N").scale(domain=dashes))
    marks = [line]
    if any(r["dot"] for r in rows):
        points = base.transform_filter("datum.dot").mark_point(filled=True, size=46, opacity=1)
        marks.append(points.encode(x=x, y=y, color=colour))
    if any(r["low"] is not None for r in rows):
        bars = base.transform_filter("datum.low !== null").mark_rule(strokeWidth=1.4)
        low = alt.Y("low:Q").title(y_title or None).axis(axis)
        marks.append(bars.encode(x=x, y=low, y2="high:Q", color=colour))
    return finished(alt.layer(*marks, _crosshair(rows, x, share)))


def _rows_of(s: Mapping[str, Any], name: str, *, by_run: bool) -> list[dict[str, Any]]:
    points = thinned(s["points"])
    label, dash = (s["run"], s["name"]) if by_run else (s["name"], "")
    return [
        {
            "id": name,
            "step": step,
            "value": value,
            "label": label,
            "dash": dash,
            "said": f"{s['run']}: {s['name']}" if by_run else s["name"],
            "dot": s["held_out"] or len(points) == 1,
            "low": None if half is None else value - half,
            "high": None if half is None else value + half,
        }
        for step, value, half in points
    ]


def _crosshair(rows: Rows, x: Any, share: bool) -> Any:
    """A rule at the step next to the pointer, and what every series is there. Series go by ids
    (their names may hold dots, which Vega would read as fields of fields)."""
    import altair as alt

    named = {r["id"]: r["said"] for r in rows}
    near = alt.selection_point(
        fields=["step"], nearest=True, on="pointermove", empty=False, clear="pointerout"
    )
    digits = ".1%" if share else ".4~g"
    tips = [alt.Tooltip("step:Q", format=",")]
    tips += [alt.Tooltip(f"{k}:Q", title=v, format=digits) for k, v in list(named.items())[:12]]
    shown = alt.when(near).then(alt.value(0.7)).otherwise(alt.value(0))
    return (
        encoded(rows)
        .transform_pivot("id", value="value", groupby=["step"])
        .mark_rule(color="#8a8f98")
        .encode(x=x, opacity=shown, tooltip=tips)
        .add_params(near)
    )


def stacked(
    rows: Rows, *, x_title: str, mark: tuple[float, str] | None = None
) -> dict[str, Any] | None:
    """Horizontal bars: each ``bar`` has parts of some ``value``, in some ``order``. ``mark``: where
    there is a rule, and what it says."""
    import altair as alt

    if not rows:
        return None
    parts = dict.fromkeys(r["part"] for r in sorted(rows, key=lambda r: r["order"]))
    names = list(dict.fromkeys(r["bar"] for r in rows))
    axis = alt.Axis(ticks=False, domain=False, labelLimit=150)
    bars = (
        encoded(rows)
        .mark_bar(height=16)
        .encode(
            x=alt.X("value:Q").title(x_title).axis(format=",.3~g"),
            y=alt.Y("bar:N").title(None).sort(names).axis(axis),
            color=alt.Color("part:N").scale(domain=list(parts)),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("bar:N", title="of"),
                alt.Tooltip("part:N"),
                alt.Tooltip("value:Q", title=x_title, format=",.3~g"),
            ],
        )
    )
    marks = [bars]
    if mark is not None:
        at = encoded([{"at": mark[0], "said": mark[1]}])
        rule = at.mark_rule(strokeDash=[4, 3], strokeWidth=1.6, color="#d9534f")
        text = at.mark_text(align="right", dx=-5, dy=-4, baseline="bottom", color="#d9534f")
        marks += [rule.encode(x="at:Q"), text.encode(x="at:Q", y=alt.value(0), text="said:N")]
    return finished(alt.layer(*marks), height=30 * len(names) + 8)


def bars(
    rows: Rows, *, x_title: str, y_title: str, is_by_step: bool = False, x_scale: str = "linear"
) -> dict[str, Any] | None:
    """Bars from ``low`` to ``high``, which is ``said``, and from ``bottom`` to ``top``, of a
    ``value``, in the colour of their ``part``."""
    import altair as alt

    if not rows:
        return None
    parts = list(dict.fromkeys(r["part"] for r in rows))
    axis = alt.Axis(format=",~g", labelOverlap=True)
    if x_scale == "log":
        axis.values = sorted({r["low"] for r in rows})
    scale = alt.Scale(type=x_scale, nice=False)  # type: ignore[arg-type]
    if is_by_step:
        axis.tickMinStep, scale.zero = 1, False
    return finished(
        encoded(rows)
        .mark_bar(opacity=1 if is_by_step else 0.55, strokeWidth=1)
        .encode(
            x=alt.X("low:Q").title(x_title).scale(scale).axis(axis),
            x2="high:Q",
            y=alt.Y("bottom:Q").title(y_title).axis(format="~s"),
            y2="top:Q",
            color=alt.Color("part:N")
            .scale(domain=parts)
            .legend(alt.Legend() if len(parts) > 1 else None),
            tooltip=[
                alt.Tooltip("part:N"),
                alt.Tooltip("said:N", title=x_title),
                alt.Tooltip("value:Q", title=y_title, format=",.3~g"),
            ],
        )
    )
