"""`posttrain sample`, `select`, `eval --rescore`, `merge` of several: on a tiny model, offline."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.cli.main import main
from posttrain.files import content_digest
from tests.tiny import model_folder, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    model_folder(folder / "model")
    write_rows(folder / "rows.jsonl", 12)
    return folder


def words(place, out, *more: str) -> list[str]:
    base = ["sample", str(place / "model"), "--task", str(place / "rows.jsonl")]
    return [*base, "--out", str(place / out), "--samples", "3", "--max-tokens", "12",
            "--part", "4", "--reward", "numeric_answer", "--also", "think_answer_format", *more]  # fmt: skip


def test_a_killed_one_goes_on_to_the_same_answers(place, capsys):
    assert main(words(place, "whole")) == 0
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines() if line.startswith("part")] == [
        "part 0", "part 1", "part 2",
    ]  # fmt: skip
    command = [sys.executable, "-m", "posttrain.cli.main", *words(place, "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (place / "killed/part-00000.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    figures = place / "figures.json"
    assert main(words(place, "killed", "--figures", str(figures))) == 0
    assert "part 0: is there" in capsys.readouterr().out
    for number in range(3):
        name = f"part-{number:05d}.parquet"
        whole, killed = (pq.read_table(place / at / name) for at in ("whole", "killed"))
        assert whole.equals(killed)
    parts = sorted((place / "whole").glob("*.parquet"))
    drawn = [row for part in parts for row in pq.read_table(part).to_pylist()]
    assert json.loads(figures.read_text()) == {
        "eval_pass@1": sum(row["correct"] for row in drawn) / 36,
        "eval_length": sum(len(row["token_ids"]) for row in drawn) / 36,
        "eval_truncated": sum(row["finish_reason"] == "length" for row in drawn) / 36,
    }
    table = pq.read_table(place / "whole/part-00000.parquet").to_pylist()
    assert len(table) == 12 and {row["completion"] for row in table} == {0, 1, 2}
    assert all(len(row["token_ids"]) == len(row["logps"]) for row in table)
    assert [p["name"] for p in table[0]["parts"]] == ["numeric_answer", "think_answer_format"]


def test_a_part_of_problems_that_are_all_too_long_is_left_out(place, capsys):
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()[:5]]
    rows[-1]["messages"][0]["content"] = "9" * 600
    (place / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = words(place, "long")
    asked[asked.index("--task") + 1] = str(place / "long.jsonl")
    assert main(asked) == 0
    assert "1 problems were left out: too long" in capsys.readouterr().out
    assert [p.name for p in (place / "long").glob("*.parquet")] == ["part-00000.parquet"]


def test_other_settings_or_problems_are_refused(place, capsys):
    assert main(words(place, "first", "--problems", "4")) == 0
    assert main(words(place, "first", "--problems", "4", "--temperature", "0.5")) == 2
    assert "drawn with temperature 1.0; now it is 0.5" in capsys.readouterr().err
    rows = place / "rows.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("+", "-"))
    try:
        assert main(words(place, "first", "--problems", "4")) == 2
        assert "answers to other problems" in capsys.readouterr().err
    finally:
        rows.write_text(before)


def test_stored_answers_are_judged_again(place, capsys):
    """By the same verifier: the same figures. By another: its own, without a model."""
    model, rows = str(place / "model"), str(place / "rows.jsonl")
    answers, figures = place / "answers.jsonl", place / "figures.json"
    shared = ["--out", str(answers), "--figures", str(figures)]
    drawn = ["--samples", "2", "--temperature", "1", "--max-tokens", "12"]
    assert main(["eval", model, "--task", rows, "--reward", "numeric_answer", *drawn, *shared]) == 0
    first = json.loads(figures.read_text())
    again, changed = place / "again.json", place / "changed.json"
    base = ["eval", "--rescore", str(answers), "--task", rows, "--reward"]
    assert main([*base, "numeric_answer", "--figures", str(again)]) == 0
    assert json.loads(again.read_text()) == first
    assert main([*base, "repetition_penalty", "--figures", str(changed)]) == 0
    assert json.loads(changed.read_text())["eval_reward"] <= 0
    assert main(words(place, "scored", "--problems", "4")) == 0
    assert main(["eval", "--rescore", str(place / "scored"), "--reward", "numeric_answer"]) == 0
    assert "4 problems, 3 answers of each" in capsys.readouterr().out
    assert main(["eval", "--rescore", str(answers), "--reward", "numeric_answer"]) == 2
    assert "stored without their problem" in capsys.readouterr().err


def test_an_average_of_models_is_that_of_their_float32_weights(place, capsys):
    other = model_folder(place / "other", seed=1)
    first = str(place / "model")
    assert main(["merge", first, str(other), "--out", str(place / "mean")]) == 0
    weights = ["--weights", "3", "1"]
    assert main(["merge", first, str(other), *weights, "--out", str(place / "most")]) == 0
    a, b, mean, most = (
        AutoModelForCausalLM.from_pretrained(place / name).state_dict()
        for name in ("model", "other", "mean", "most")
    )
    for name, value in a.items():
        assert torch.equal(mean[name], 0.5 * value + 0.5 * b[name]), name
        assert torch.equal(most[name], 0.75 * value + 0.25 * b[name]), name
    assert content_digest(place / "mean") != content_digest(place / "model")
    assert main(["merge", first, str(other), "--weights", "1", "--out", str(place / "x")]) == 2
    assert "one number for each model" in capsys.readouterr().err


def test_models_that_do_not_fit_are_not_averaged(place, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(place / "model")
    config.intermediate_size = 96
    odd = place / "odd"
    LlamaForCausalLM(config).save_pretrained(odd)
    for file in (place / "model").glob("token*"):
        (odd / file.name).write_bytes(file.read_bytes())
    words = ["merge", str(place / "model"), str(odd), "--out", str(place / "bad")]
    assert main(words) == 2
    assert "cannot be averaged: model.layers.0.mlp" in capsys.readouterr().err
    assert not (place / "bad").exists()
