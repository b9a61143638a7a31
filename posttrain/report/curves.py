"""Which metrics share a chart, and what they are called there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.report.charts import lines, stacked, stacked_over_steps
from posttrain.report.page import Html, chart, tag
from posttrain.report.run import Run
from posttrain.types import is_held_out


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
    "entropy_nats": "entropy",
    "surprise_nats": "surprise",
    "nll_nats": "surprise (negative log-likelihood)",
    "clipped_low": "below",
    "clipped_high": "above",
    "sampler_ratio_above_2": "sampler's ratio above 2",
    "sampler_mismatch_nats": "mean gap",
    "tokens_per_s": "whole step",
    "rollout_tokens_per_s": "sampling",
    "update_tokens_per_s": "update",
    "grad_norm": "norm",
    "lr": "learning rate",
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
    half = f"{name}_ci95"
    return {
        "run": run.name,
        "name": label(name),
        "held_out": held,
        "points": [(s["step"], s[name]) for s in found],
        "ci95": {s["step"]: s[half] for s in found if s.get(half) is not None},
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
    total: dict[tuple[str, str], float] = {}
    by_step = []
    for run in runs:
        for step in run.steps:
            for phase, seconds in phases(step):
                key = (run.name, phase)
                total[key] = total.get(key, 0.0) + seconds
                by_step.append({"step": step["step"], "phase": phase, "seconds": seconds})
    order = [*PHASES.values(), "training step", "other"]
    rows = [
        {"run": run, "phase": phase, "seconds": s, "order": order.index(phase)}
        for (run, phase), s in total.items()
    ]
    used = [p for p in order if any(r["phase"] == p for r in rows)]
    bars = stacked(rows, x="seconds", y="run", part="phase", x_title="seconds", order=used)
    note = "of all logged steps; held-out evaluations and checkpoints are not in it"
    shown = [chart(bars, "Time by phase", note)]
    if len(runs) == 1 and len({r["step"] for r in by_step}) > 1:
        steps = stacked_over_steps(by_step, y_title="seconds")
        shown.append(chart(steps, "Time by step"))
    return shown


def memory_charts(runs: Sequence[Run]) -> list[Html]:
    """The plan by phase and item of each run, and what was measured."""
    shown = []
    for run in runs:
        memory = run.about.get("memory") or {}
        rows = [
            {"phase": phase, "item": item, "GB": n / 1e9, "order": i}
            for phase, items in (memory.get("planned_bytes") or {}).items()
            for i, (item, n) in enumerate(items.items())
            if n
        ]
        measured = memory.get("measured_bytes")
        at = None if measured is None else measured / 1e9
        spec = stacked(
            rows,
            x="GB",
            y="phase",
            part="item",
            x_title="GB (1e9 bytes) per process",
            mark=at,
            mark_text="" if at is None else f"measured {at:.2f} GB",
        )
        where = f"{run.name}: " if len(runs) > 1 else ""
        note = f"{where}the plan by phase and item, and the {memory.get('measured', 'peak')}"
        shown.append(chart(spec, "Memory planned and measured", note))
    return shown
