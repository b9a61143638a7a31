"""One HTML file that needs no network: text that is escaped, Vega charts, scripts known by hash."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from posttrain.report.charts import THEME

INSTALL = "posttrain report needs altair and vl-convert: pip install 'posttrain[report]'"


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """``<name ...>children</name>``; ``class_`` is the attribute class. None is left out."""
    given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    written = "".join(f' {k}="{escape(v)}"' for k, v in given.items() if v is not None)
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """All children in a row."""
    return Html("".join(escape(child) for child in children if child is not None))


def escape(value: Any) -> str:
    """The value as text that no parser takes for HTML."""
    return value if isinstance(value, Html) else html.escape(str(value))


def section(title: str, *children: Any) -> Html:
    """A part of the page with a heading that the navigation leads to; empty without children."""
    if not any(children):
        return Html("")
    anchor = title.lower().replace(" ", "-")
    return tag("section", tag("h2", title), *children, id=anchor)


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], *, numbers_from: int = 1) -> Html:
    """A table that scrolls by itself where it is too wide. Columns from ``numbers_from`` on are
    aligned to the right."""

    def line(kind: str, cells: Sequence[Any]) -> Html:
        sides = ["number" if i >= numbers_from else None for i in range(len(cells))]
        return tag(
            "tr", *(tag(kind, number(c), class_=s) for c, s in zip(cells, sides, strict=True))
        )

    body = [line("td", row) for row in rows]
    if not body:
        return Html("")
    head = tag("thead", line("th", header)) if header else None
    return tag("div", tag("table", head, tag("tbody", *body)), class_="wide")


def fold(title: str, *children: Any) -> Html:
    """Shown when its title is clicked."""
    return tag("details", tag("summary", title), *children) if any(children) else Html("")


def chart(
    spec: Mapping[str, Any] | None, title: str, note: str = "", *, wide: bool = False
) -> Html:
    """A Vega-Lite chart under its title, drawn when it comes into view; nothing without one."""
    if spec is None:
        return Html("")
    inside = json_script(spec, class_="spec")
    figure = tag("div", class_="chart", aria_label=f"chart: {title}", role="img")
    head = tag("figcaption", tag("b", title), note and tag("span", f" {note}"))
    return tag("figure", head, figure, inside, class_="all" if wide else None)


def json_script(value: Any, **attributes: Any) -> Html:
    """Data for scripts; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return tag("script", Html(text), type="application/json", **attributes)


def packed(data: bytes, *, name: str) -> Html:
    """Bytes as an element: gzip, then base64."""
    text = base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
    return tag("script", Html(text), type="application/octet-stream", id=name)


@cache
def _vega() -> str:
    """vega, vega-lite and vega-embed in one script, from vl-convert."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return str(vl_convert.javascript_bundle("window.vegaEmbed=vegaEmbed;", vl_version=version))


def _asset(name: str) -> str:
    return (files("posttrain.report") / name).read_text(encoding="utf-8")


def page(
    title: str,
    *body: Any,
    intro: Any = "",
    scripts: Sequence[str] = (),
    reload_s: float | None = None,
) -> str:
    """The whole file. ``scripts``: further files of this package that run. Nothing else may run and
    nothing may be loaded: the Content-Security-Policy has the hashes of the scripts."""
    sources = [_vega(), _asset("page.js"), *map(_asset, scripts)]
    sources = [text.replace("</script", "<\\/script") for text in sources]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in sources
    )
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    parts = [part for part in body if part]
    head = join(
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        tag("title", title),
        tag("style", Html(_asset("page.css"))),
    )
    main = tag("main", tag("header", tag("h1", title), intro), tag("nav", id="nav"), *parts)
    run = [tag("script", Html(s)) for s in sources]
    theme = json_script(THEME, id="theme")
    shown = tag("body", main, theme, *run, data_reload=reload_s)
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}{shown}</html>\n'


def check_installed() -> None:
    """ValueError where the libraries of the charts are missing."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{INSTALL} ({error})") from error


def number(value: Any) -> str:
    """A figure for people: ``1,234``, ``0.0123``, ``–`` for None; texts stay as they are."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, str) else str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def with_interval(value: Any, half_width: float | None, *, is_share: bool) -> str:
    """``12.5 ± 5.0 %`` of a share, ``1.23 ± 0.4`` of anything else."""
    if value is not None and is_share:
        half = "" if half_width is None else f" ± {100 * half_width:.1f}"
        return f"{100 * value:.1f}{half} %"
    return number(value) + ("" if half_width is None else f" ± {number(half_width)}")


def columns_by_use(columns: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """What is said of the columns that were used, carried, ..., with their numbers of rows."""
    uses = {
        "used": "columns used",
        "carried": "columns carried along, not read",
        "for the rewards": "columns for the rewards",
    }
    return {
        uses.get(use, use): ", ".join(f"{name} ({n:,})" for name, n in counts.items())
        for use, counts in columns.items()
    }


def duration(seconds: float | None) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``4.1 s``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"
