"""The page of one run, or of several on top of each other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.curves import curves, grid, memory_charts, phases, time_charts
from posttrain.report.page import (
    Html,
    duration,
    fold,
    join,
    number,
    packed,
    page,
    section,
    table,
    tag,
)
from posttrain.report.run import Run
from posttrain.report.samples import read_samples

_KEY_FIGURES = {
    "eval_pass@1": "held-out accuracy",
    "eval_accuracy": "held-out accuracy",
    "rewards_eval/accuracies": "held-out accuracy",
    "eval_loss": "held-out loss",
    "reward": "reward",
    "loss": "loss",
}
"""What a run is judged by: the first that it has."""
ALL = 1000
"""No column of numbers."""
_OWN = ("train.name", "train.run_dir")
_COUNTS = {
    "read": "rows read",
    "kept": "kept",
    "truncated": "completions cut",
    "dropped": "rejected",
    "tokens": "tokens",
    "trained_tokens": "tokens trained",
    "too long": "rejected: prompt longer than data.max_prompt_length",
}
_USES = {
    "used": "columns used",
    "carried": "columns carried along, not read",
    "for the rewards": "columns for the rewards",
}


def runs_page(runs: Sequence[Run], *, reload_s: float | None = None) -> str:
    """The whole page."""
    samples = read_samples(runs)
    names = [run.name for run in runs]
    known, others = curves(runs)
    viewer, scripts = Html(""), []
    if samples.rows:
        viewer = tag("div", packed(samples.packed(names), name="packed-samples"), id="viewer")
        scripts = ["viewer.js"]
    costs = grid([*time_charts(runs), *memory_charts(runs)], " costs")
    return page(
        ", ".join(names) if len(names) < 4 else f"{len(names)} runs",
        section("Curves", known, fold("more curves", others)),
        section("Time and memory", costs),
        section("Samples", viewer),
        section("Settings", *_settings(runs)),
        section("Data", *_data(runs)),
        section("Environment", _environment(runs)),
        intro=_intro(runs),
        scripts=scripts,
        reload_s=reload_s,
    )


def _intro(runs: Sequence[Run]) -> Html:
    written = tag("p", f"Written {time.strftime('%Y-%m-%d %H:%M:%S')}", class_="note")
    if len(runs) > 1:
        header = ["run", "what", "state", "figure", "first", "last", "time in steps", "peak memory"]
        return join(table(header, [_summary(run) for run in runs], numbers_from=4), written)
    (run,) = runs
    _, what, state, name, first, last, spent, memory = _summary(run)
    tiles = {
        "state": state,
        f"{name}, first": first,
        f"{name}, last": last,
        "time in steps": spent,
        "peak memory, measured": memory,
    }
    shown = [tag("div", tag("span", k), tag("b", v), class_="tile") for k, v in tiles.items() if v]
    return join(tag("p", what), tag("div", *shown, class_="tiles"), written)


def _summary(run: Run) -> list[Any]:
    """Name, what was done, state, key figure, its first and last value, seconds, memory."""
    of = f" of {run.num_steps:,}" if run.num_steps and not run.is_done else ""
    state = f"{'done' if run.is_done else 'not done'}, {run.last_step:,}{of} steps"
    lines = (*run.steps, *run.held_out)
    name = next((n for n in _KEY_FIGURES if any(n in line for line in lines)), "loss")
    values = [line for line in sorted(lines, key=lambda s: s["step"]) if line.get(name) is not None]
    first, last = (_figure(name, line) for line in (values[0], values[-1])) if values else ("", "")
    spent = sum(s for step in run.steps for _, s in phases(step))
    measured = (run.about.get("memory") or {}).get("measured_bytes")
    return [
        run.name,
        " of ".join(filter(None, [run.about.get("method"), run.settings.get("model.name")])),
        state,
        _KEY_FIGURES[name],
        first,
        last,
        duration(spent),
        f"{measured / 1e9:.2f} GB" if measured else None,
    ]


def _figure(name: str, line: Mapping[str, Any]) -> str:
    value, half = line[name], line.get(f"{name}_ci95")
    if name.endswith("loss") or name == "reward":
        return number(value)
    return f"{100 * value:.1f}{'' if half is None else f' ± {100 * half:.1f}'} %"


def _settings(runs: Sequence[Run]) -> list[Html]:
    keys = list(dict.fromkeys(k for run in runs for k in run.settings))
    rows = {k: [_value(run.settings.get(k, "–")) for run in runs] for k in keys}
    header = ["setting", *(run.name for run in runs)]
    listed = [[tag("code", k), *values] for k, values in rows.items()]
    if len(runs) == 1:
        return [fold(f"all {len(rows)} settings", table(header, listed, numbers_from=ALL))]
    differ = [k for k, values in rows.items() if len(set(values)) > 1 and k not in _OWN]
    shown = [[tag("code", k), *rows[k]] for k in differ]
    same = tag("p", "All settings are the same.")
    return [
        tag("h3", "What differs"),
        table(header, shown, numbers_from=ALL) or same,
        fold(f"all {len(rows)} settings", table(header, listed, numbers_from=ALL)),
    ]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def _data(runs: Sequence[Run]) -> list[Html]:
    """Rows of counts: read, kept, rejected by reason; columns by use."""
    counts: list[dict[str, Any]] = []
    for run in runs:
        found: dict[str, Any] = {}
        for name, value in run.data.items():
            if name == "dropped_by":
                found |= {f"rejected: {reason}": n for reason, n in value.items()}
            elif name == "columns":
                for use, columns in value.items():
                    said = ", ".join(f"{column} ({n:,})" for column, n in columns.items())
                    found[_USES.get(use, use)] = said or None
            else:
                found[_COUNTS.get(name, name)] = value
        counts.append(found)
    names = list(dict.fromkeys(n for found in counts for n in found))
    header = ["", *(run.name for run in runs)]
    return [table(header, [[n, *(found.get(n) for found in counts)] for n in names])]


def _environment(runs: Sequence[Run]) -> Html:
    known = [run.about.get("environment") or {} for run in runs]
    names = list(dict.fromkeys(n for found in known for n in found))
    said = {"num_processes": "processes", "num_threads": "threads of each"}
    rows = [
        [said.get(n, n.replace("version of ", "")), *(str(found.get(n, "–")) for found in known)]
        for n in names
    ]
    return table(["", *(run.name for run in runs)], rows, numbers_from=ALL)
