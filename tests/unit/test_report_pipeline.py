"""The page of a pipeline: its graph, its table, its links."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("vl_convert")

from posttrain.cli.main import main
from posttrain.report.pipeline import graph, graph_svg, layers
from posttrain.report.write import is_finished


def stage(name: str, *needs: str, state: str = "done", **more) -> dict:
    known = {"command": f"posttrain sft --train.name {name}", "seconds": 61.0, "folder": name}
    return {"name": name, "state": state, "needs": list(needs), "figures": {}, **known, **more}


EVIL = '</script><img src=x onerror="alert(1)">'
STAGES = [
    stage("prep"),
    stage("cold", "prep", figures={"accuracy": 0.125, "accuracy_ci95": 0.05, "mean_tokens": 14.0}),
    stage("rl", "cold", state="running", figures={"accuracy": 0.0, "mean_tokens": 30.0}),
    stage("other", "cold", state="failed"),
    stage(EVIL, "rl", "prep", state="waiting", seconds=None, folder=None),
]


def test_a_stage_is_one_layer_behind_the_last_that_it_needs():
    assert layers(STAGES) == {"prep": 0, "cold": 1, "rl": 2, "other": 2, EVIL: 3}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([stage("a", "b"), stage("b", "a"), stage("c")], "circle, or behind one: a, b"),
        ([stage("a", "z")], "need z, but there are a"),
    ],
)
def test_wrong_needs_are_named(stages, message):
    with pytest.raises(ValueError, match=message):
        layers(stages)


def test_boxes_do_not_overlap_and_arrows_go_around_them():
    spec = graph(STAGES)
    lists = spec["datasets"].values()
    boxes = next(rows for rows in lists if "left" in rows[0])
    points = next(rows for rows in lists if "edge" in rows[0])
    assert len(boxes) == len(STAGES)
    for a in boxes:
        for b in boxes:
            apart = a["right"] <= b["left"] or a["bottom"] <= b["top"]
            assert a is b or apart or b["right"] <= a["left"] or b["bottom"] <= a["top"]
    edges = {p["edge"] for p in points}
    shortcuts = {f"prep → {EVIL}"}  # rl, which it needs as well, is behind prep
    assert edges == {f"{need} → {s['name']}" for s in STAGES for need in s["needs"]} - shortcuts
    for edge in edges:
        names = edge.split(" → ")
        way = [p for p in points if p["edge"] == edge]
        for box in (b for b in boxes if b["name"] not in names):
            for p in way:
                assert not (
                    box["left"] < p["px"] < box["right"] and box["top"] < p["py"] < box["bottom"]
                )


def test_the_picture_names_every_stage_and_is_valid_xml():
    root = ElementTree.fromstring(graph_svg(STAGES))
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
    assert re.findall(r'<a href="([^"]*)">', page) == ["p/rl/report.html"]
    assert EVIL not in page and EVIL.replace("</", "\\u003c/") not in page
    assert "&lt;/script&gt;&lt;img" in page


@pytest.mark.parametrize(
    ("states", "finished"),
    [("done done", True), ("done running", False), ("failed waiting", True), ("waiting", False)],
)
def test_a_pipeline_that_failed_and_runs_nothing_is_watched_no_longer(tmp_path, states, finished):
    stages = [stage(str(i), state=state) for i, state in enumerate(states.split())]
    (tmp_path / "pipeline.json").write_text(json.dumps({"name": "mine", "stages": stages}))
    assert is_finished([tmp_path]) == finished


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
