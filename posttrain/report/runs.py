"""The page of one run, or of several on top of each other."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.report.charts import bars, lines, stacked
from posttrain.report.page import (
    Html,
    chart,
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
from posttrain.report.run import Run, is_done, read_samples
from posttrain.types import is_held_out

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
    "truncated": "completions cut",
    "dropped": "rejected",
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
    measured = (run.about.get("memory", {})).get("measured_bytes")
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


class Curve(NamedTuple):
    """A chart of all metrics whose whole name matches."""

    title: str
    pattern: str
    unit: str = ""
    """of the values; ``share``: they are between 0 and 1, shown as per cent."""
    note: str = ""


_NATS = "nats per token"
CURVES = (
    Curve("Loss", r"(eval_(.+_)?)?loss"),
    Curve(
        "Reward",
        r"(eval_)?reward|(eval_)?reward/.+|eval_.+_reward",
        note="mean over completions; all, and by component",
    ),
    Curve(
        "Implicit reward",
        r".*rewards(_train|_eval)?/(chosen|rejected|margins?)",
        note="of chosen and rejected answers, and their margin",
    ),
    Curve(
        "Accuracy",
        r"accuracy|eval_(.+_)?(pass|cons)@\d+|.*accurac(y|ies)",
        "share",
        "held out with its 95 % interval where there is one",
    ),
    Curve("Length", r"(eval_(.+_)?)?length(_min|_max|_of_ended)?", "tokens", "of completions"),
    Curve(
        "How completions end",
        r"(eval_)?(truncated|unscored|repeated)|groups_without_signal",
        "share",
        "cut, repeating, not scored; groups that teach nothing",
    ),
    Curve("KL divergence", r"(eval_)?(kl|divergence|logratio).*", _NATS, "to reference or teacher"),
    Curve(
        "Entropy",
        r"entropy_nats|surprise_nats|(eval_)?nll_nats",
        _NATS,
        "surprise: −log p of what was sampled, whose mean is the entropy",
    ),
    Curve(
        "Clip fractions",
        r"clipped(_low|_high)?|sampler_ratio_above_2",
        "share",
        "of trained tokens",
    ),
    Curve(
        "Sampler mismatch",
        "sampler_mismatch_nats",
        _NATS,
        "sampler's log-probs against trainer's",
    ),
    Curve("Gradient norm", "grad_norm", note="before clipping"),
    Curve("Learning rate", "lr"),
    Curve("Log-probs", r".*logps(_train|_eval)?/(chosen|rejected)", "nats", "of whole answers"),
    Curve("Tokens per second", r"(rollout_|update_)?tokens_per_s", "tokens/s", "by phase"),
)
_NAMES = {
    "reward": "all",
    "loss": "training",
    "accuracy": "training",
    "length": "mean",
    "length_min": "shortest",
    "length_max": "longest",
    "length_of_ended": "mean of those that end",
    "truncated": "cut at the limit",
    "repeated": "ended for repetition",
    "groups_without_signal": "groups with equal rewards",
    "kl_reference_nats": "to the reference",
    "divergence/teacher_nats": "to the teacher",
    "nll_nats": "surprise (negative log-likelihood)",
    "tokens_per_s": "whole step",
    "rollout_tokens_per_s": "sampling",
    "update_tokens_per_s": "update",
}
PHASES = {
    "rollout_s": "sampling",
    "reward_s": "rewards",
    "prepare_s": "log-probs and credit",
    "update_s": "update",
}
_NO_CURVE = re.compile(r"step_s|.*_ci95|step|iteration|" + "|".join(PHASES))


def label(name: str) -> str:
    """What a metric is called in its chart."""
    said = _NAMES.get(name.removeprefix("eval_"))
    held = is_held_out(name)
    if said is not None:
        return said if not held else "held out" if said == "training" else f"held out, {said}"
    bare = name.removeprefix("eval_").replace("_eval/", "/").replace("_train/", "/")
    bare = re.sub(r"^(reward|rewards|logps)/", "", bare)
    bare = re.sub(r"_nats$", "", bare).replace("_", " ").replace("pass@", "pass at ")
    return f"held out, {bare}" if held else bare


def curves(runs: Sequence[Run]) -> tuple[Html, Html]:
    """(the charts of ``CURVES``, those of all other metrics)."""
    names = list(dict.fromkeys(n for r in runs for s in (*r.steps, *r.held_out) for n in s))
    known, others = [], []
    left = [n for n in names if not _NO_CURVE.fullmatch(n)]
    for curve in CURVES:
        mine = [n for n in left if re.fullmatch(curve.pattern, n)]
        left = [n for n in left if n not in mine]
        known.append(_chart(curve, mine, runs))
    for name in left:
        others.append(_chart(Curve(label(name).capitalize(), "", note=name), [name], runs))
    return grid(known), grid(others)


def grid(charts: Sequence[Html], more: str = "") -> Html:
    """Charts side by side; nothing without one."""
    return tag("div", *charts, class_=f"charts{more}") if any(charts) else Html("")


def _chart(curve: Curve, names: Sequence[str], runs: Sequence[Run]) -> Html:
    series = [s for run in runs for name in names if (s := _series(run, name))["points"]]
    if curve.title == "Reward":  # a single component is all of it
        whole = [s["points"] for s in series if s["name"] == label("reward")]
        series = [s for s in series if s["name"] == label("reward") or s["points"] not in whole]
    spec = lines(series, unit=curve.unit, runs=[run.name for run in runs])
    return chart(spec, curve.title, curve.note)


def _series(run: Run, name: str) -> dict[str, Any]:
    held = is_held_out(name)
    found = [s for s in (run.held_out if held else run.steps) if _is_number(s.get(name))]
    return {
        "run": run.name,
        "name": label(name),
        "held_out": held,
        "points": [(s["step"], s[name], s.get(f"{name}_ci95")) for s in found],
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def phases(step: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(phase, seconds) of a step; what no phase measured is ``other``."""
    parts = [(said, step[name]) for name, said in PHASES.items() if step.get(name) is not None]
    yield from parts
    rest = (step.get("step_s") or 0.0) - sum(seconds for _, seconds in parts)
    if not parts:
        yield "training step", rest
    elif rest > 0:
        yield "other", rest


def time_charts(runs: Sequence[Run]) -> list[Html]:
    """Seconds of each phase: in all by run, and by step of a single run."""
    total: dict[tuple[str, str], float] = defaultdict(float)
    by_step = []
    for run in runs:
        for step in run.steps:
            at, bottom = step["step"], 0.0
            for phase, seconds in phases(step):
                total[run.name, phase] += seconds
                place = {"low": at - 0.4, "high": at + 0.4, "said": at, "bottom": bottom}
                bottom += seconds
                by_step.append({"part": phase, "value": seconds, "top": bottom, **place})
    order = [*PHASES.values(), "training step", "other"]
    rows = [
        {"bar": run, "part": phase, "value": s, "order": order.index(phase)}
        for (run, phase), s in total.items()
    ]
    note = "of all logged steps; held-out evaluations and checkpoints are not in it"
    shown = [chart(stacked(rows, x_title="seconds"), "Time by phase", note)]
    if len(runs) == 1 and len({r["said"] for r in by_step}) > 1:
        steps = bars(by_step, x_title="step", y_title="seconds", is_by_step=True)
        shown.append(chart(steps, "Time by step"))
    return shown


def memory_charts(runs: Sequence[Run]) -> list[Html]:
    """The plan by phase and item of each run, and what was measured."""
    shown = []
    for run in runs:
        memory = run.about.get("memory", {})
        rows = [
            {"bar": phase, "part": item, "value": n / 1e9, "order": i}
            for phase, items in memory.get("planned_bytes", {}).items()
            for i, (item, n) in enumerate(items.items())
            if n
        ]
        measured = memory.get("measured_bytes")
        mark = (measured / 1e9, f"measured {measured / 1e9:.2f} GB") if measured else None
        spec = stacked(rows, x_title="GB (1e9 bytes) per process", mark=mark)
        where = f"{run.name}: " if len(runs) > 1 else ""
        note = f"{where}the plan by phase and item, and the {memory.get('measured', 'peak')}"
        shown.append(chart(spec, "Memory planned and measured", note))
    return shown
