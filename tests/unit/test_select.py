"""Which answers become data: cases made by hand (DeepSeek-R1 section 2.3.3, Kimi k1.5 section 2.4)."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.cli.main import main
from posttrain.cli.sample import training_row
from posttrain.rl.samples import Filters, select


def answer(tokens: int, correct: bool | None, text: str = "fine", **more) -> dict:
    plain = {"token_ids": [0] * tokens, "correct": correct, "text": text, "finish_reason": "stop"}
    return {**plain, "reward": float(bool(correct)), "parts": [], **more}


def lengths(chosen) -> list:
    return [
        tuple(len(a["token_ids"]) for a in one) if isinstance(one, tuple) else len(one["token_ids"])
        for one in chosen
    ]


def taken(answers, take, **options):
    counts: Counter[str] = Counter()
    filters = options.pop("filters", Filters())
    return lengths(select(answers, take, filters=filters, counts=counts, **options)), +counts


def test_correct_in_the_order_drawn_and_at_most():
    answers = [answer(9, True), answer(3, False), answer(5, True), answer(4, None), answer(7, True)]
    assert taken(answers, "correct") == ([9, 5, 7], {"wrong": 1, "not judged": 1})
    assert taken(answers, "correct", at_most=2)[0] == [9, 5]
    assert taken(answers, "correct", at_most=2)[1]["another was taken"] == 1


def test_shortest_correct_of_eight():
    answers = [
        answer(n, ok) for n, ok in [(9, 1), (2, 0), (5, 1), (5, 1), (30, 1), (1, 0), (8, 1), (6, 0)]
    ]
    assert taken(answers, "shortest")[0] == [5]
    assert taken([answer(2, False)], "shortest") == ([], {"wrong": 1})


def test_best_by_reward_right_or_not_and_never_unscored():
    parts = [("a", 0.1), ("b", 0.9), ("c", None), ("d", 0.9)]
    answers = [
        answer(i + 1, False, reward=value, parts=[{"name": "rm", "value": value}])
        for i, (_, value) in enumerate(parts)
    ]
    assert taken(answers, "best") == ([2], {"not scored": 1, "another was taken": 2})
    assert taken(answers, "best", by="rm")[0] == [2]
    with pytest.raises(ValueError, match="no reward 'rn'; they have rm"):
        taken(answers, "best", by="rn")


def test_pairs_of_long2short():
    """Chosen: the shortest right one. Rejected: every longer wrong one, and right ones more than 1.5
    times as long."""
    answers = [
        answer(10, True), answer(15, True), answer(16, True), answer(9, False), answer(10, False),
        answer(11, False), answer(40, True), answer(12, None),
    ]  # fmt: skip
    pairs, _ = taken(answers, "pairs")
    assert sorted(pairs) == [(10, 11), (10, 16), (10, 40)]
    assert taken(answers, "pairs", at_most=1)[0] == [(10, 11)]
    assert taken(answers, "pairs")[1] == {
        "not longer than the shortest right one": 3,
        "not judged": 1,
    }
    broken = [answer(20, False, "5\ufffd"), answer(30, False, " "), answer(40, False, "wrong")]
    assert taken([answer(10, True), *broken], "pairs")[0] == [(10, 40)]
    assert taken([answer(3, False), answer(5, False)], "pairs")[0] == []


@pytest.mark.parametrize(
    ("filters", "text", "reason"),
    [
        ({}, "   ", "empty"),
        ({}, "caf\ufffd", "unreadable characters"),
        ({"format": True}, "<think>a</think> b", "other format"),
        ({"language": "en"}, "<think>so 因此 so</think><answer>1</answer>", "mixed languages"),
        ({"max_paragraph": 50}, "ab\n\n" + "abcdefg" * 10, "long paragraphs"),
        ({"no_code": True}, "```python\n1\n```", "code blocks"),
        ({"max_repeated": 0.3}, "one two three " * 5, "repeated"),
        ({"max_tokens": 3}, "fine", "too long"),
        ({"min_reward": 1.5}, "fine", "low reward"),
    ],
)
def test_each_filter_counts_its_reason(filters, text, reason):
    good = answer(3, True, "<think>ok</think><answer>1</answer>", reward=2.0)
    bad = answer(4, True, text)
    chosen, counts = taken([bad, good], "correct", filters=Filters(**filters))
    assert chosen == [3] and counts == {reason: 1}


def test_what_did_not_end_or_repeats_is_left_out():
    cut, looped = answer(3, True, finish_reason="length"), answer(4, True, finish_reason="repeat")
    assert taken([cut, looped], "correct") == ([3], {"repeated": 1})
    ended = taken([cut, looped], "correct", filters=Filters(ended=True))[1]
    assert ended == {"did not end by itself": 1, "repeated": 1}


def test_rows_keep_what_the_problem_says():
    problem = {"question": "2+2?", "answer": "4", "task": "sum"}
    row = training_row(problem, answer(1, True, "It is 4"), system="Think.")
    assert row == {
        "answer": "4",
        "task": "sum",
        "messages": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "It is 4"},
        ],
    }
    pair = training_row(problem, (answer(1, True, "4"), answer(2, False, "5")))
    assert pair["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("4", "5")
    shown = {"messages": [*row["messages"][1:2], {"role": "assistant", "content": "old"}]}
    assert training_row(shown, answer(1, True, "new"))["messages"][-1]["content"] == "new"


def test_the_command_writes_rows_that_sft_reads_and_says_what_it_left_out(tmp_path, capsys):
    from posttrain.data.layouts import read_prompt

    rows = [
        {"where": f"f:{i}", "row": json.dumps({"question": f"q{i}", "answer": "1"}), **a}
        for i, group in enumerate([[answer(2, True), answer(1, False)], [answer(3, False)]])
        for a in group
    ]
    rows = [{k: v for k, v in row.items() if k != "parts"} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "part-00000.parquet")
    out = tmp_path / "rows.jsonl"
    figures = tmp_path / "figures.json"
    assert main(["select", str(tmp_path), "--out", str(out), "--figures", str(figures)]) == 0
    assert json.loads(figures.read_text()) == {
        "answers": 3,
        "rows": 1,
        "left out": {"wrong": 2, "another was taken": 0},
    }
    said = capsys.readouterr().out
    assert "3 answers to 2 problems; 1 problems have a row" in said and "2 left out: wrong" in said
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert read_prompt(row).answers[0].text == "fine"
    pq.write_table(pa.Table.from_pylist(rows[1:2]), tmp_path / "part-00000.parquet")
    assert main(["select", str(tmp_path), "--out", str(out)]) == 2
    assert "None of 1 answers" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 1  # as it was
