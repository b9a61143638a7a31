"""The page of runs, of folders as runs leave them: done, killed, resumed, with and without
samples."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("vl_convert")

from posttrain.cli import report as command
from posttrain.cli.main import main
from posttrain.report.page import duration, escape, json_script, number, tag
from posttrain.report.run import read_run, read_runs, read_samples
from posttrain.report.runs import CURVES, label, phases
from tests.report_folders import EVIL, TEXTS, add_samples, run_folder


def specs(page: str) -> list[dict]:
    found = re.findall(r'<script type="application/json" class="spec">(.*?)</script>', page)
    return [json.loads(text) for text in found]


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption><b>(.*?)</b>", page)


def values(spec: dict) -> list[dict]:
    return [row for rows in spec["datasets"].values() for row in rows]


def page_of(*folders: Path, out: Path) -> str:
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    return out.read_text()


def test_a_run_that_writes_its_last_line_is_read_up_to_there(tmp_path):
    folder = run_folder(tmp_path / "run")
    whole = read_run(folder, "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.')
    torn = read_run(folder, "run")
    assert torn.steps == whole.steps and [s["step"] for s in torn.steps] == [1, 2, 3]


def test_of_steps_that_were_repeated_after_a_resume_the_last_count(tmp_path):
    folder = run_folder(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 7.5}\n{"step": 3, "loss": null}\n')
    run = read_run(folder, "run")
    assert [s["loss"] for s in run.steps] == [2.0, 7.5, None]
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    loss = specs(page)[titles(page).index("Loss")]
    points = {r["step"]: r["value"] for r in values(loss) if r["label"] == "training"}
    assert points == {1: 2.0, 2: 7.5}, "what is not finite is a gap"


def test_a_folder_that_is_no_run_is_an_error_that_says_so(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl: it is no folder of a run" in capsys.readouterr().err


def test_every_metric_is_in_a_chart_with_its_own_name(tmp_path):
    page = page_of(run_folder(tmp_path / "run"), out=tmp_path / "r.html")
    found = dict(zip(titles(page), specs(page), strict=True))
    assert {"Loss", "Accuracy", "Gradient norm", "Learning rate", "My metric"} <= found.keys()
    accuracy = values(found["Accuracy"])
    held = [r for r in accuracy if r["label"] == "held out, pass at 1"]
    assert [(r["step"], r["low"], r["value"], r["high"]) for r in held] == [
        (0, 0.0, 0.25, 0.5),
        (3, 0.5, 0.75, 1.0),
    ]


def test_metrics_of_all_methods_have_their_charts():
    wanted = {
        "Loss": "loss eval_loss eval_math_loss",
        "Reward": "reward reward/my.format eval_reward",
        "Implicit reward": "rewards_train/chosen rewards_eval/margins",
        "Accuracy": "accuracy eval_pass@1 eval_pass@16 eval_cons@16 rewards_eval/accuracies",
        "Length": "length length_min eval_length",
        "KL divergence": "kl_reference_nats divergence/teacher_nats",
        "Entropy": "entropy_nats surprise_nats",
        "Clip fractions": "clipped clipped_low clipped_high",
        "Sampler mismatch": "sampler_mismatch_nats",
        "Tokens per second": "tokens_per_s rollout_tokens_per_s update_tokens_per_s",
    }
    for title, names in wanted.items():
        for name in names.split():
            fitting = [c.title for c in CURVES if re.fullmatch(c.pattern, name)]
            assert fitting == [title], name
        labels = [label(name) for name in names.split()]
        assert len(set(labels)) == len(labels), labels


def test_phases_are_the_whole_step():
    step = {"step_s": 10.0, "rollout_s": 4.0, "reward_s": 1.0, "update_s": 3.0}
    found = dict(phases(step))
    assert found == {"sampling": 4.0, "rewards": 1.0, "update": 3.0, "other": 2.0}
    assert dict(phases({"step_s": 2.0})) == {"training step": 2.0}


def test_memory_is_planned_by_item_and_measured(tmp_path):
    page = page_of(run_folder(tmp_path / "run"), out=tmp_path / "r.html")
    memory = specs(page)[titles(page).index("Memory planned and measured")]
    rows = values(memory)
    assert {(r["bar"], r["part"]): r["value"] for r in rows if "bar" in r} == {
        ("load", "weights"): 1.0,
        ("update", "weights"): 1.0,
        ("update", "gradients"): 2.0,
    }
    assert [r["said"] for r in rows if "said" in r] == ["measured 2.50 GB"]


def test_of_several_runs_the_settings_that_differ_are_shown(tmp_path):
    a = run_folder(tmp_path / "a")
    b = run_folder(tmp_path / "b", lr=0.5, only="b")
    page = page_of(a, b, out=tmp_path / "r.html")
    differ = page.partition("What differs")[2].partition("<details>")[0]
    assert re.findall("<tr>.*?</tr>", differ)[1:] == [
        "<tr><td><code>optimizer.lr</code></td><td>0.1</td><td>0.5</td></tr>",
        "<tr><td><code>only</code></td><td>–</td><td>b</td></tr>",
    ]
    loss = specs(page)[titles(page).index("Loss")]
    assert {r["label"] for r in values(loss)} == {"a", "b"}, "colours are runs"
    assert {r["dash"] for r in values(loss)} == {"training", "held out"}


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [run_folder(tmp_path / x / "run") for x in ("one", "two")]
    assert [r.name for r in read_runs(folders)] == [str(f) for f in folders]


def test_data_is_counted_by_reason_and_use(tmp_path):
    page = page_of(run_folder(tmp_path / "run"), out=tmp_path / "r.html")
    data = page.partition('<section id="data">')[2].partition("</section>")[0]
    rows = dict(re.findall('<tr><td>(.*?)</td><td class="number">(.*?)</td></tr>', data))
    assert rows == {
        "rows read": "1,000",
        "kept": "998",
        "rejected": "2",
        "rejected: longer than max_length": "2",
        "columns used": "messages (998)",
        "columns carried along, not read": "topic (7)",
    }


# -- samples --------------------------------------------------------------------------------------


def unpacked(page: str) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    text = re.search(r'id="packed-samples">(.*?)</script>', page)[1]
    data = gzip.decompress(base64.b64decode(text))
    length = int.from_bytes(data[:4], "little")
    head = json.loads(data[4 : 4 + length])
    n = sum(head["columns"]["count"])
    rest = data[4 + length :]
    assert len(rest) == 6 * n
    return (
        head,
        np.frombuffer(rest[: 4 * n], "<u4"),
        np.frombuffer(rest[4 * n : 5 * n], np.uint8),
        np.frombuffer(rest[5 * n :], np.uint8),
    )


def test_tokens_of_every_text_come_back_with_their_log_probs_and_masks(tmp_path):
    folder = add_samples(run_folder(tmp_path / "run"))
    head, pieces, roots, flags = unpacked(page_of(folder, out=tmp_path / "r.html"))
    columns, ends = head["columns"], np.cumsum(head["columns"]["count"])
    texts = [
        "".join(head["pieces"][p] for p in pieces[end - n : end]) if n else text
        for n, end, text in zip(columns["count"], ends, columns["text"], strict=True)
    ]
    trained = [i for i, held in enumerate(columns["held_out"]) if not held]
    assert sorted({texts[i] for i in trained}) == sorted(TEXTS)
    table = pq.read_table(sorted((folder / "rollouts").glob("*.parquet"))).to_pylist()
    logps = np.concatenate([row["logps"] for row in table])
    nats = head["most_nats"] * (roots / 255.0) ** 2
    assert np.abs(nats + np.maximum(logps, -16)).max() < 0.07
    assert np.abs(nats + logps)[logps > -0.1].max() < 0.01, "finer where tokens are likely"
    assert (flags & 1).tolist() == [int(t) for row in table for t in row["trained"]]
    assert (flags >> 1).tolist() == [int(t) for row in table for t in row["sampled"]]


def test_unscored_is_not_zero_and_steps_are_those_of_the_iterations(tmp_path):
    folder = add_samples(run_folder(tmp_path / "run"))
    columns = unpacked(page_of(folder, out=tmp_path / "r.html"))[0]["columns"]
    assert columns["reward"].count(None) == 2 and 0.0 in columns["reward"]
    by_kind = {(h, s) for h, s in zip(columns["held_out"], columns["step"], strict=True)}
    assert by_kind == {(0, 1), (0, 3), (1, 3)}, "iteration 1 begins at step 3"


def test_text_can_neither_end_the_script_nor_be_html(tmp_path):
    folder = add_samples(run_folder(tmp_path / "run", only=EVIL))
    page = page_of(folder, out=tmp_path / "r.html")
    assert EVIL not in page and "<img" not in page.split("window.vegaEmbed")[-1]
    for value in (EVIL, {"a": [EVIL]}):
        assert "</script>" not in json_script(value)[:-9] and "<" not in escape(str(value))
    assert tag("td", EVIL, title='"') == (
        '<td title="&quot;">&lt;/script&gt;&lt;img src=x onerror=&quot;document.title=1&quot;&gt;</td>'
    )


def test_a_run_without_its_tokenizer_shows_whole_texts(tmp_path):
    folder = add_samples(run_folder(tmp_path / "run"))
    (folder / "final" / "tokenizer.json").unlink()
    head, pieces, *_ = unpacked(page_of(folder, out=tmp_path / "r.html"))
    assert not len(pieces) and set(TEXTS) <= set(head["columns"]["text"])


def test_of_too_many_samples_whole_iterations_are_shown_the_last_among_them(tmp_path):
    folder = add_samples(run_folder(tmp_path / "run"), iterations=8, held_out=False)
    each = len(TEXTS)
    found = read_samples([read_run(folder, "run")], most=3 * each)
    steps = [row["step"] for row in found.rows]
    assert found.total == 8 * each and len(found.rows) <= 3 * each
    assert {steps.count(s) for s in set(steps)} == {each} and max(steps) == 8


def test_an_iteration_of_several_processes_is_taken_whole(tmp_path):
    folder = add_samples(run_folder(tmp_path / "run"), iterations=8, held_out=False)
    for path in list((folder / "rollouts").glob("*.parquet")):
        shutil.copy(path, path.with_stem(f"{path.stem}_rank1"))
    found = read_samples([read_run(folder, "run")], most=5 * len(TEXTS))
    steps = [row["step"] for row in found.rows]
    assert {steps.count(s) for s in set(steps)} == {2 * len(TEXTS)} and len(set(steps)) == 2


# -- the command ----------------------------------------------------------------------------------


def test_watch_rewrites_until_the_run_has_its_final_model(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run", done=False)
    seen = []

    def sleep(seconds: float) -> None:
        page = (folder / "report.html").read_text()
        seen.append((seconds, 'data-reload="2.5"' in page, "not done, 3 of 3 steps" in page))
        if len(seen) == 2:
            (folder / "final").mkdir()

    monkeypatch.setattr(command.time, "sleep", sleep)
    assert main(["report", str(folder), "--watch", "2.5"]) == 0
    assert seen == [(2.5, True, True)] * 2
    page = (folder / "report.html").read_text()
    assert "data-reload" not in page and "done, 3 steps" in page


def test_wrong_arguments(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    assert main(["report", str(folder), "--watch", "0"]) == 2
    assert "--watch is a number of seconds above 0; got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "–"), (1234567, "1,234,567"), (0.012345, "0.0123"), ("x", "x"), (12345.6, "12,346")],
)
def test_numbers_for_people(value, said):
    assert number(value) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(4.13, "4.1 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7499, "2 h 04 min"), (None, "–")],
)
def test_durations_for_people(seconds, said):
    assert duration(seconds) == said
