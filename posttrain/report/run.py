"""A run folder as plain values, also of a run that goes on or was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain.resolve import flat

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    """Flat: ``optimizer.lr``."""
    about: Mapping[str, Any]
    """about.json: environment, memory, method; empty for runs before there was one."""
    data: Mapping[str, Any]
    """Counts of rows."""
    steps: Sequence[Mapping[str, Any]]
    """Metrics of training steps, in order."""
    held_out: Sequence[Mapping[str, Any]]
    """The same for evaluations."""

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run; None where it is not known."""
        return self.about.get("num_steps") or self.settings.get("train.max_steps") or None

    def step_of(self, iteration: int) -> int:
        """The first optimizer step on what an iteration sampled; where it was not logged, counted
        by the updates of each iteration."""
        found = (s["step"] for s in self.steps if s.get("iteration") == iteration)
        updates = self.settings.get("rollout.updates", 1) * self.settings.get("rollout.epochs", 1)
        return next(found, iteration * updates + 1)


def is_done(folder: Path) -> bool:
    """Whether a run folder has a final model, and no metrics that came a minute after
    it: a run that goes on writes these."""
    final, metrics = folder / "final", folder / METRICS
    return final.exists() and metrics.stat().st_mtime < final.stat().st_mtime + 60


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs; those of one name have their parents' too. ValueError for a folder that is none."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else os.fspath(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> Run:
    """ValueError where there are no metrics."""
    if not (folder / METRICS).exists():
        raise ValueError(
            f"{folder} has no {METRICS}: it is no folder of a run, of a pipeline or of "
            "`posttrain prep`. Give one, such as runs/sft."
        )
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, dict[str, Any]] = {}
    data: dict[str, Any] = {}
    for line in json_lines(folder / METRICS):
        data = line.pop("data", data)
        # a run that goes on from a checkpoint may repeat steps: the last ones count
        of = steps if "loss" in line else held_out
        if len(line) > 1:
            of[line["step"]] = line
    config, about = folder / "config.yaml", folder / "about.json"
    return Run(
        name=name,
        folder=folder,
        settings=dict(flat(yaml.safe_load(config.read_text("utf-8")))) if config.exists() else {},
        about=json.loads(about.read_bytes()) if about.exists() else {},
        data=data,
        steps=[steps[s] for s in sorted(steps)],
        held_out=[held_out[s] for s in sorted(held_out)],
    )


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines; a line that is torn (the last one of a run that was killed,
    or writes it just now) is left out."""
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
