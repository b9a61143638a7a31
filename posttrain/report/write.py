"""Which page a folder gets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.report.page import write
from posttrain.report.pipeline import pipeline_page
from posttrain.report.prep import MANIFEST, prep_page
from posttrain.report.run import METRICS, is_done, read_runs
from posttrain.report.runs import runs_page

PIPELINE = "pipeline.json"


def write_report(folders: Sequence[Path], out: Path, *, reload_s: float = 0) -> None:
    """The page of one run or several, or of a pipeline. ValueError for any other folder."""
    if (folders[0] / PIPELINE).exists():
        if len(folders) > 1:
            raise ValueError(
                f"{folders[0]} is a pipeline; a page shows one pipeline, or several runs. Give it "
                "alone, or give the folders of its stages."
            )
        write(out, _pipeline(folders[0], out, reload_s))
    elif (folders[0] / MANIFEST).exists() and len(folders) == 1:
        write(out, prep_page(folders[0]))
    else:
        write(out, runs_page(read_runs(folders), reload_s=reload_s))


def is_finished(folders: Sequence[Path]) -> bool:
    """Whether nothing will be added any more."""
    return all(map(_is_finished, folders))


def _is_finished(folder: Path) -> bool:
    if (folder / PIPELINE).exists():
        states = [stage["state"] for stage in _read(folder)["stages"]]
        return set(states) == {"done"} or ("failed" in states and "running" not in states)
    return (folder / MANIFEST).exists() or is_done(folder)


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / PIPELINE).read_text(encoding="utf-8")))


def _pipeline(folder: Path, out: Path, reload_s: float) -> str:
    """With links to the stages' reports, as seen from ``out``; those of runs are written, too."""
    found = _read(folder)
    links = {}
    for stage in found["stages"]:
        own = stage_folder(folder, stage)
        report = own / "report.html"
        if (own / METRICS).exists() and own.resolve() != folder.resolve():
            write(report, runs_page(read_runs([own])))
        if own.resolve() != folder.resolve() and report.exists():
            links[stage["name"]] = os.path.relpath(report, out.parent)
    return pipeline_page(found["name"], found["stages"], links=links, reload_s=reload_s)


def stage_folder(pipeline: Path, stage: Mapping[str, Any]) -> Path:
    """A stage's own folder: as it is written, or below the pipeline's."""
    named = Path(stage.get("folder") or ".")
    inside = pipeline / named
    return inside if inside.exists() or not named.exists() else named
