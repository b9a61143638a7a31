"""The page of one run, or of several on top of each other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report.curves import curves, grid, memory_charts, phases, time_charts
from posttrain.report.page import (
    Html,
    columns_by_use,
    duration,
    fold,
    join,
    packed,
    page,
    section,
    table,
    tag,
    with_interval,
)
from posttrain.report.run import Run, is_done
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
        section("Data", _side_by_side(runs, list(map(_data, runs)), numbers_from=1)),
        section("Environment", _side_by_side(runs, list(map(_environment, runs)))),
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
    lines = sorted((*run.steps, *run.held_out), key=lambda line: line["step"])
    step, done = lines[-1]["step"] if lines else 0, is_done(run.folder)
    of = f" of {run.num_steps:,}" if run.num_steps and not done else ""
    state = f"{'done' if done else 'not done'}, {step:,}{of} steps"
    name = next((n for n in _KEY_FIGURES if any(n in line for line in lines)), "loss")
    values = [line for line in lines if line.get(name) is not None]
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
    is_share = not name.endswith("loss") and name != "reward"
    return with_interval(line[name], line.get(f"{name}_ci95"), is_share=is_share)


def _side_by_side(
    runs: Sequence[Run], columns: Sequence[Mapping[Any, Any]], *, numbers_from: int = ALL
) -> Html:
    """A line for each name that one of the columns has, a column for each run."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name) for column in columns)] for name in names]
    return table(["", *(run.name for run in runs)], rows, numbers_from=numbers_from)


def _settings(runs: Sequence[Run]) -> list[Html]:
    columns = [{tag("code", k): _value(v) for k, v in run.settings.items()} for run in runs]
    count = len(set().union(*columns))
    listed = fold(f"all {count} settings", _side_by_side(runs, columns))
    if len(runs) == 1:
        return [listed]
    own = {tag("code", name) for name in _OWN}
    differ = [
        {k: v for k, v in column.items() if k not in own and any(c.get(k) != v for c in columns)}
        for column in columns
    ]
    same = tag("p", "All settings are the same.")
    return [tag("h3", "What differs"), _side_by_side(runs, differ) or same, listed]


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def _data(run: Run) -> dict[str, Any]:
    """Counts of rows: read, kept, rejected by reason; columns by use."""
    found: dict[str, Any] = {}
    for name, value in run.data.items():
        if name == "dropped_by":
            found |= {f"rejected: {reason}": n for reason, n in value.items()}
        elif name == "columns":
            found |= columns_by_use(value)
        else:
            found[_COUNTS.get(name, name)] = value
    return found


def _environment(run: Run) -> dict[str, Any]:
    said = {"num_processes": "processes", "num_threads": "threads of each"}
    known = run.about.get("environment", {})
    return {said.get(n, n.removeprefix("version of ")): v for n, v in known.items()}
