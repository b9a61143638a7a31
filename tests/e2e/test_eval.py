"""`posttrain eval` and `posttrain prep difficulty` as commands."""

from __future__ import annotations

import json

import pytest

from tests.e2e.launching import check, posttrain, posttrain_warm
from tests.tiny import model_folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"question": f"{a}?", "answer": str(a)} for a in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return model_folder(folder / "model"), folder / "rows.jsonl"


def test_eval_prints_figures_and_writes_answers(inputs, tmp_path):
    reward = "tests.reward_functions.starts_with_digit"
    arguments = [
        "eval",
        str(inputs[0]),
        "--task",
        str(inputs[1]),
        "--reward",
        reward,
        "--max-tokens",
        "3",
    ]
    result = check(
        posttrain(
            *arguments,
            "--samples",
            "8",
            "--temperature",
            "1.0",
            "--out",
            str(tmp_path / "answers.jsonl"),
        )
    )
    assert all(
        text in result.stdout
        for text in ("6 problems, 8 answers of each", "pass@1", "pass@8", "cons@8", "length")
    )
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 48 and all(a["correct"] == a["text"][:1].isdigit() for a in answers)
    again = check(
        posttrain_warm(*arguments, "--samples", "8", "--temperature", "1.0", "--max-rows", "5")
    )
    assert again.stdout == result.stdout  # the same samples whatever runs at the same time


def test_reasoning_gym_by_name(inputs):
    result = check(
        posttrain_warm(
            "eval",
            str(inputs[0]),
            "--task",
            "gym:word_sequence_reversal",
            "--problems",
            "3",
            "--max-tokens",
            "4",
        )
    )
    assert "3 problems" in result.stdout and "0.0%" in result.stdout


def test_difficulty_is_one_minus_the_pass_rate_and_guessable_problems_go(inputs, tmp_path):
    out = tmp_path / "rated.jsonl"
    arguments = [
        "prep",
        "difficulty",
        str(inputs[0]),
        "--task",
        str(inputs[1]),
        "--max-tokens",
        "2",
        "--samples",
        "16",
        "--out",
        str(out),
    ]
    check(posttrain_warm(*arguments, "--reward", "tests.reward_functions.starts_with_digit"))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["question"] for r in rows] == [f"{a}?" for a in range(6)]
    assert all(r["difficulty"] == pytest.approx(1 - r["pass_rate"]) for r in rows) and any(
        0 < r["pass_rate"] < 1 for r in rows
    )
    result = check(
        posttrain_warm(
            *arguments, "--reward", "tests.reward_functions.always", "--guess-tries", "2"
        )
    )
    assert "6 left out (a guess was right)" in result.stdout and out.read_text() == ""


def test_a_missing_model_is_one_line(inputs):
    result = posttrain_warm("eval", "no/such/folder/", "--task", str(inputs[1]))
    assert result.returncode == 2 and "Traceback" not in result.stderr
