"""What `make demo` shows and the problems that it makes; the whole of it is run by hand (README,
benchmarks/RESULTS.md)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from rich.console import Console

from posttrain.rewards.answers import numeric_answer

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(tmp_path, monkeypatch):
    module = load("demo")
    for name, folder in (("REPO", ""), ("DATA", "data"), ("RUNS", "runs")):
        monkeypatch.setattr(module, name, tmp_path / folder)
    return module


def test_counting_problems_are_right_different_and_partly_counted():
    train, heldout = load("demo_task").make_rows(
        task="word_count", num_train=300, num_heldout=100, seed=3
    )
    questions = [row["messages"][1]["content"] for row in (*train, *heldout)]
    assert len(set(questions)) == len(questions) == 400
    counted = 0
    for row, question in zip((*train, *heldout), questions, strict=True):
        words = question.partition("? ")[2].split(", ")
        said = row["messages"][2]["content"]
        assert (
            row["answer"] == str(len(words))
            and 3 <= len(words) <= 8
            and numeric_answer(said, row) == 1.0
        )
        thought = said.removeprefix("<think>").partition("</think>")[0]
        assert thought in ("", " ".join(f"{i} {w}" for i, w in enumerate(words, start=1)))
        counted += bool(thought)
    assert 60 < counted < 140
    other, _ = load("demo_task").make_rows(
        task="word_count", num_train=300, num_heldout=100, seed=4
    )
    assert other != train


def answer(text, correct, reason="stop"):
    return {"text": text, "correct": correct, "finish_reason": reason, "tokens": 7}


def test_the_result_fits_80_columns_and_text_is_no_markup(demo, tmp_path):
    rows = [
        {
            "messages": [{}, {"content": f"How many [bold]words[/x]? {'tea, ' * 20}"}, {}],
            "answer": "20",
        }
    ] * 3
    answers = {
        "before": [
            answer("[/red] line\nof\ttwo " + "long " * 90, False, "length"),
            answer("", False),
            answer("x" * 300, False),
        ],
        "after cold start": [answer("<think></think><answer>5</answer>", False)] * 3,
        "after GRPO": [answer("<think>1 tea</think><answer>20</answer>", True)] * 3,
    }
    console = Console(width=demo.WIDTH, record=True, file=(tmp_path / "shown").open("w"))
    demo.show(console, rows, answers)
    text = console.export_text()
    assert max(map(len, text.rstrip().splitlines())) <= 80
    assert (
        "67%" in text
        and "[/red] line of two long" in text
        and "How many [bold]words[/x]?" in text
        and "(nothing)" in text
    )
    demo.draw(
        [{"step": 1, "reward": 0.1, "length": 9.0}, {"step": 2, "reward": 0.4, "length": 12.0}],
        answers,
        tmp_path / "a.svg",
    )
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_a_command_that_fails_ends_the_demo_with_what_it_printed(demo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.run(Console(width=80), "Nothing", ("python", "no_such_file.py"), log="a.log")
    out = capsys.readouterr().out
    assert "$ python no_such_file.py" in out and "No such file" in out and "data/a.log" in out


def test_the_live_line_reads_a_file_that_is_being_written(demo, tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert demo._now(None) == "" and demo._now(path) == "starting"
    step = {"step": 3, "loss": 0.5, "step_s": 2.4}
    path.write_text(
        json.dumps({"step": 0, "data": {}}) + "\n" + json.dumps(step) + "\n" + '{"step": 4, "lo'
    )
    assert demo._now(path) == "step 3  loss 0.50  2 s a step"
    path.write_text(json.dumps({**step, "reward": 0.25, "length": 12.0}) + "\n")
    assert demo._now(path) == "step 3  reward 0.25  length 12.0 tokens  2 s a step"


def test_a_command_is_shown_as_it_can_be_typed(demo, capsys):
    command = (
        "python",
        "-c",
        "pass",
        *(word for i in range(6) for word in (f"--option.number_{i}", f"value_{i}")),
    )
    demo.run(Console(width=80), "Shown", command, log="a.log")
    shown = capsys.readouterr().out.split("$ ")[1].split("\n  0:")[0]
    assert (
        shown.replace("\\\n", "").split() == list(command)
        and max(map(len, shown.splitlines())) <= 80
    )
    assert all(line.count("--") == line.count("value") for line in shown.splitlines())


@pytest.mark.parametrize(
    ("task", "reasoning"),
    [("word_count", False), ("word_sequence_reversal", False), ("word_sequence_reversal", True)],
)
def test_rows_of_the_demo_are_demonstrations_and_problems(task, reasoning):
    """The same rows train the cold start and are sampled from afterwards."""
    from posttrain.data import read_prompt, read_sample

    for row in load("demo_task").make_rows(
        task=task, num_train=20, num_heldout=1, seed=1, reasoning=reasoning
    )[0]:
        sample, prompt = read_sample(row), read_prompt(row, column="messages")
        assert (
            sample.layout == "messages" and prompt.prompt == sample.prompt == row["messages"][:-1]
        )
