"""`posttrain prep tests` with the real sandbox."""

from __future__ import annotations

import json

from posttrain.cli.main import main
from posttrain.rewards.code import code_tests

DOUBLE = ["print(2 * int(input()))", "n = int(input())\nprint(n + n)", "print(int(input()) << 1)"]


def test_what_submissions_agree_on_becomes_tests_that_the_reward_runs(tmp_path, capsys):
    """Of ten, six print something of their own on 7, one loops for ever on 4: that input stays, 9
    pass what is kept."""
    of_its_own = "import time\nprint(time.perf_counter_ns() if (n := int(input())) == 7 else 2 * n)"
    loops = "n = int(input())\nwhile n == 4:\n    pass\nprint(2 * n)"
    rows = [
        {
            "question": "double",
            "solutions": [*DOUBLE, *[of_its_own] * 6, loops],
            "inputs": ["3\n", "4\n", "7\n"],
        },
        {"question": "disagreed", "solutions": [f"print({i})" for i in range(10)], "inputs": [""]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert (
        main(["prep", "tests", str(tmp_path / "rows.jsonl"), "--out", str(out), "--timeout", "2"])
        == 0
    )
    (kept,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (
        kept["tests"] == [{"stdin": "3\n", "stdout": "6"}, {"stdin": "4\n", "stdout": "8"}]
        and kept["question"] == "double"
    )
    assert "2 problems with 4 inputs; wrote 1 problems with 2 tests" in capsys.readouterr().out
    assert (
        code_tests(f"```python\n{DOUBLE[1]}\n```", kept) == 1.0
        and code_tests("print(6)", kept) == 0.0
    )


def test_rows_without_programs_are_named(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "q", "inputs": ["1"]}) + "\n")
    assert (
        main(["prep", "tests", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out.jsonl")])
        == 2
    )
    assert "rows.jsonl:1: column 'solutions' must be a list of texts" in capsys.readouterr().err
