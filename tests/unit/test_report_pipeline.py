"""The page of a pipeline: its graph, its table, its links."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

pytest.importorskip("vl_convert")

from posttrain.cli.main import main
from posttrain.report.pipeline import graph, is_finished
from tests.report_folders import run_folder


def stage(name: str, *needs: str, state: str = "done", **more) -> dict:
    known = {"command": f"posttrain sft --train.name {name}", "seconds": 61.0, "folder": name}
    return {"name": name, "state": state, "needs": list(needs), "figures": {}, **known, **more}


EVIL = '</script><img src=x onerror="alert(1)">'
STAGES = [
    stage("prep"),
    stage("cold", "prep", figures={"accuracy": 0.125, "accuracy_ci95": 0.05, "mean_tokens": 14.0}),
    stage("rl", "cold", state="running", figures={"accuracy": 0.0, "mean_tokens": 30.0}),
    stage("other", "cold", state="failed"),
    stage(EVIL, "rl", "prep", state="waiting", seconds=None, folder="evil"),
]


def picture(stages: list[dict]) -> tuple[dict[str, dict], dict[str, list]]:
    """({stage: its box}, {arrow: points of its line}) of the SVG."""
    boxes, lines = {}, {}
    for element in ElementTree.fromstring(graph(stages, {})).iter():
        tag, title = element.tag.partition("}")[2], element.findtext("{*}title", "")
        if tag == "path":
            lines[title] = list(points(element.get("d")))
        elif tag in ("a", "g"):
            box = {k: float(element.find("{*}rect").get(k)) for k in ("x", "y", "width", "height")}
            boxes[title.partition(": ")[0]] = box
    return boxes, lines


def points(line: str) -> Iterator[tuple[float, float]]:
    """Along a path of M, V and C up to its head, curves at nine places."""
    x = y = 0.0
    for command, given in re.findall(r"([MVC])([^A-Za-z]*)", line.partition("m")[0]):
        numbers = [float(n) for n in given.split()]
        if command == "C":
            xs, ys = [x, *numbers[::2]], [y, *numbers[1::2]]
            for t in (i / 8 for i in range(9)):
                share = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
                yield tuple(sum(s * v for s, v in zip(share, vs, strict=True)) for vs in (xs, ys))
        elif command == "V":
            yield from ((x, y + (numbers[0] - y) * i / 8) for i in range(9))
        x, y = numbers[-2:] if command != "V" else (x, numbers[0])


def test_a_stage_is_one_row_below_the_last_that_it_needs():
    tops = {name: box["y"] for name, box in picture(STAGES)[0].items()}
    rows = sorted(set(tops.values()))
    found = {name: rows.index(y) for name, y in tops.items()}
    assert found == {"prep": 0, "cold": 1, "rl": 2, "other": 2, EVIL: 3}


def test_boxes_do_not_overlap_and_arrows_go_around_them():
    stages = [*STAGES, stage("second", "rl"), stage("last", "prep", "other", EVIL)]
    boxes, lines = picture(stages)
    assert len(boxes) == len(stages)
    for a in boxes.values():
        for b in boxes.values():
            apart = [a[k] + a[size] <= b[k] for k, size in (("x", "width"), ("y", "height"))]
            apart += [b[k] + b[size] <= a[k] for k, size in (("x", "width"), ("y", "height"))]
            assert a is b or any(apart)
    shortcuts = {f"prep → {EVIL}", "prep → last"}  # what they need as well is behind prep
    assert lines.keys() == {f"{n} → {s['name']}" for s in stages for n in s["needs"]} - shortcuts
    for arrow, way in lines.items():
        first, last = (boxes[name] for name in arrow.split(" → "))
        assert way[0] == (first["x"] + first["width"] / 2, first["y"] + first["height"])
        assert way[-1] == (last["x"] + last["width"] / 2, last["y"] - 2)
        for box in boxes.values():
            for x, y in way:
                is_beside = not box["x"] < x < box["x"] + box["width"]
                assert is_beside or not box["y"] < y < box["y"] + box["height"]


def test_the_picture_names_every_stage_and_is_valid_xml():
    root = ElementTree.fromstring(graph(STAGES, {}))
    said = " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("text"))
    assert "prep" in said and "✓ done, 1 min 01 s" in said and "○ waiting" in said
    assert EVIL[:22] in said, "shortened, as text"


def write_pipeline(folder: Path) -> Path:
    folder.mkdir()
    (folder / "pipeline.json").write_text(json.dumps({"name": "mine", "stages": STAGES}))
    (folder / "rl").mkdir()
    (folder / "rl" / "report.html").write_text("the stage's own page")
    return folder


def test_the_command_writes_table_figures_and_links(tmp_path):
    folder = write_pipeline(tmp_path / "p")
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "12.5 ± 5.0 %" in page and "0.0 %" in page and "1 min 01 s" in page
    assert re.findall(r'<a href="([^"]*)">', page) == 2 * ["p/rl/report.html"], (
        "of its box and of its line"
    )
    assert EVIL not in page and EVIL.replace("</", "\\u003c/") not in page
    assert "&lt;/script&gt;&lt;img" in page


@pytest.mark.parametrize(
    ("states", "finished"),
    [("done done", True), ("done running", False), ("failed waiting", True), ("waiting", False)],
)
def test_a_pipeline_that_failed_and_runs_nothing_is_watched_no_longer(tmp_path, states, finished):
    stages = [stage(f"s{i}", state=state) for i, state in enumerate(states.split())]
    (tmp_path / "pipeline.json").write_text(json.dumps({"name": "mine", "stages": stages}))
    with FileLock(tmp_path / ".stages/s1.lock"):
        assert is_finished(tmp_path) == finished
    if "running" in states:
        assert is_finished(tmp_path), "it was killed: nothing holds its lock"


def test_the_page_of_a_stage_is_written_again_once_its_run_went_on(tmp_path):
    folder = write_pipeline(tmp_path / "p")
    run_folder(folder / "cold", done=False)
    own = folder / "cold/report.html"
    for change in (None, "metrics.jsonl", "final"):
        if change == "final":
            (folder / "cold/final").mkdir()
        elif change:
            os.utime(folder / "cold" / change)
        assert main(["report", str(folder)]) == 0
        written = own.stat().st_mtime_ns
        assert main(["report", str(folder)]) == 0
        assert own.stat().st_mtime_ns == written
    assert "not done" not in own.read_text()


def test_only_scripts_whose_hash_the_page_has_may_run_and_nothing_may_be_loaded(tmp_path):
    folder = write_pipeline(tmp_path / "p")
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    allowed = re.search("script-src ([^;]*)", policy)[1].split()
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert [f"'sha256-{h}'" for h in hashes] == allowed
