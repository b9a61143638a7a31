"""Which page a folder gets."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.report.page import write
from posttrain.report.pipeline import pipeline_page

PIPELINE = "pipeline.json"


def write_report(folders: Sequence[Path], out: Path, *, reload_s: float = 0) -> None:
    """The page of a pipeline's folder. ValueError for a folder that is none of these."""
    (folder,) = folders
    write(out, _pipeline(folder, out, reload_s))


def is_done(folders: Sequence[Path]) -> bool:
    """Whether nothing will be added any more."""
    return all(_is_done(folder) for folder in folders)


def _is_done(folder: Path) -> bool:
    if (folder / PIPELINE).exists():
        return all(s["state"] in ("done", "failed") for s in _read(folder)["stages"])
    return (folder / "final").exists()


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / PIPELINE).read_text(encoding="utf-8")))


def _pipeline(folder: Path, out: Path, reload_s: float) -> str:
    """With links to the stages' reports, as seen from ``out``."""
    found = _read(folder)
    links = {
        stage["name"]: os.path.relpath(report, out.parent)
        for stage in found["stages"]
        if (report := stage_folder(folder, stage) / "report.html").exists()
    }
    return pipeline_page(found["name"], found["stages"], links=links, reload_s=reload_s)


def stage_folder(pipeline: Path, stage: Mapping[str, Any]) -> Path:
    """A stage's own folder: as it is written, or below the pipeline's."""
    named = Path(stage.get("folder") or ".")
    inside = pipeline / named
    return inside if inside.exists() or not named.exists() else named
