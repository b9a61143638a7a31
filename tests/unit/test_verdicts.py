"""``math_answer`` and ``numeric_answer`` over the forms of answers: nothing is read by a fragment,
in golds and in completions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from posttrain.rewards.answers import (
    answer_in,
    choice_answer,
    final_answer,
    judged_text,
    last_number,
    math_answer,
    numeric_answer,
    read_answer,
)
from tests.verdicts import MATH, table

FORMS = (
    r"So it is $\boxed{%s}$.",
    "<think>It is 3, no.</think><answer>%s</answer>",
    "The answer is $%s$.",
)


def test_the_table_is_wide_enough():
    assert len(table()) >= 200 and len(MATH) >= 60


def test_the_documentation_has_the_table():
    shown = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    for gold, right, wrong in MATH:
        cells = (
            ", ".join("`" + t.replace("|", "\\|") + "`" for t in texts)
            for texts in ([gold], right, wrong)
        )
        assert f"| {' | '.join(cells)} |" in shown, gold


@pytest.mark.parametrize("row", MATH, ids=[row[0] for row in MATH])
def test_every_way_to_say_it_is_right_and_no_fragment_is(row):
    """The gold bare and in dollars, the answer in a box, in a block, in a sentence."""
    gold, right, wrong = row
    for wanted, texts in ((1.0, right), (0.0, wrong)):
        for said in texts:
            for form in FORMS:
                for column in (gold, f"${gold}$"):
                    assert math_answer(form % said, {"answer": column}) == wanted, (
                        form % said,
                        column,
                    )


def test_what_cannot_be_read_is_no_verdict_but_for_the_same_text():
    gold = r"\oint_{\partial D} f \mapsto \heartsuit"
    assert not read_answer(gold).parsed
    assert math_answer(rf"\boxed{{{gold}}}", {"answer": gold}) == 1.0
    assert math_answer(r"\boxed{4}", {"answer": gold}) is None
    assert math_answer("", {"answer": gold}) == 0.0 and math_answer("4", {"answer": "  "}) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("72", "72"),
        ("it is 1,234.", "1234"),
        ("1{,}234", "1234"),
        (r"1,\!234", "1234"),
        ("\u22125", "-5"),
        ("1e5", "100000"),
        (r"1.5\times10^5", "150000"),
        (r"1.5 \times 10^{-2}", "0.015"),
        (r"\frac{3}{4}", "0.75"),
        (r"-\frac12", "-0.5"),
        (r"3\frac12", "3.5"),
        ("3 1/2", "3.5"),
        ("1/4", "0.25"),
        ("48/2 = 24 clips", "24"),
        ("$18.", "18"),
        (r"\$18", "18"),
        (r"50\%", "50"),
        ("5 cm", "5"),
        (r"90^\circ", "90"),
        (".5", "0.5"),
        ("x = 5", "5"),
        ("between 3 and 5.", "5"),
        ("(7)", "7"),
        ("5.0", "5"),
        (r"11\sqrt2", None),
        ("2^{10}", None),
        ("7!", None),
        ("9k", None),
        ("2+3i", None),
        ("y=2x+3", None),
        (r"(3, \frac{\pi}{2})", None),
        (r"7\pi", None),
        (r"\sqrt{3}", None),
        ("(1,2)", None),
        ("7 - 3", None),
        (r"\log 3", None),
        ("none", None),
        ("７", None),
        ("12_8", None),
    ],
)
def test_numbers_are_read_whole_or_not_at_all(text, wanted):
    found = last_number(text)
    if text == r"\log 3":
        assert found in (None, 3), "a space before it: as in a sentence"
    else:
        assert (None if found is None else f"{found.normalize():f}") == wanted
    assert (
        numeric_answer(text, {"answer": wanted}) == 1.0
        if wanted
        else numeric_answer("3", {"answer": text}) in (None, 1.0)
    )


RIGHT_C = [
    r"\boxed{C}",
    r"\boxed{\text{C}}",
    r"\boxed{\textbf{(C)}}",
    r"\boxed{\mathrm{C}}",
    r"$\boxed{\text{(C) } 12}$",
    "The answer is: C",
    "The correct answer is **C**",
    "The correct answer is **C.** Paris",
    "**C. Paris**",
    "Answer:C",
    "ANSWER: $C$",
    "Final answer: (C)",
    "So the answer is option C.",
    r"Answer: \boxed{C}",
    "The answer is (c).",
    "<answer>C. Paris</answer>",
    "<answer>C: Paris</answer>",
    r"<answer>\text{C}</answer>",
    "The answer is C, not B.",
    "(C) is right because (B) ignores friction. Answer: C",
    "C",
    "C.",
    "(C)",
    "c",
    "<think>(B)?</think>C",
    "The answer is B. No: the answer is C.",
]
NOT_C = [
    r"\boxed{B}",
    r"\boxed{\text{B}}",
    "The answer is B, not C",
    "I choose B",
    "the choice I made is B",
    "(C) or (A)",
    "C\x00",
    "Cats",
    "<think>The answer is C.",
    "The answer is Canada",
    "the answer is a cat",
    r"\boxed{Cat}",
    "",
    "It could be (B), but (C) fits.",
]


def test_a_choice_is_read_in_all_its_spellings():
    for wanted, texts in ((1.0, RIGHT_C), (0.0, NOT_C)):
        for said in texts:
            for gold in ("C", "(C)", "C)", "C.", r"\text{C}", "c"):
                assert choice_answer(said, {"answer": gold}) == wanted, (said, gold)
    assert choice_answer("C", {"answer": "Paris"}) is None


def test_boxes_side_by_side_are_one_answer_and_others_are_tries():
    assert math_answer(r"\boxed{13} or \boxed{12}", {"answer": "12"}) == 0.0
    assert math_answer(r"\boxed{12} and \boxed{13}", {"answer": "12, 13"}) == 1.0
    assert (
        math_answer(rf"\boxed{{13}} is wrong {'because ' * 10} \boxed{{12}}", {"answer": "12"})
        == 1.0
    )


@pytest.mark.parametrize("verify", [math_answer, numeric_answer])
def test_a_try_in_the_thought_is_no_answer(verify):
    said = "<think>Perhaps \\boxed{204}. No.</think>\n\nThe answer is 205."
    assert verify(said, {"answer": "205"}) == 1.0 and verify(said, {"answer": "204"}) == 0.0
    cut = "<think>Perhaps \\boxed{204}. But let me check"
    assert (
        verify(cut, {"answer": "204"}) == 0.0
        and verify(cut, {"answer": "204"}, in_thought=True) == 1.0
    )
    assert judged_text(cut) is None and final_answer(cut) == "" and final_answer(said) == "205"
    opened = "Perhaps \\boxed{204}.</think> It is 205."  # <think> stands in the prompt
    assert verify(opened, {"answer": "205"}) == 1.0


def test_votes_count_numbers_by_value_and_texts_by_what_they_say():
    same = [
        ("8.0", "8"),
        (r"\boxed{\frac{1}{2}}", "<answer>0.5</answer>"),
        (r"\boxed{5\sqrt{3}}", r"<answer>5 \sqrt 3</answer>"),
    ]
    assert all(final_answer(a) == final_answer(b) for a, b in same)
    assert final_answer(r"\boxed{11\sqrt2}") != final_answer(r"\boxed{11}")


def test_no_text_of_symbols_raises_or_is_read_as_a_part(caplog):
    """10,000 random strings of what answers are made of: read, or not; and never as one digit of
    several."""
    rng = random.Random(0)
    parts = [
        "1",
        "2",
        "12",
        r"\sqrt",
        r"\frac",
        "{",
        "}",
        "(",
        ")",
        ",",
        "^",
        "_",
        "$",
        "!",
        "x",
        "+",
        "-",
        " ",
        r"\pi",
        ".",
        "%",
        "e",
        "/",
    ]
    for _ in range(10_000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 8)))
        found = last_number(text)
        assert found is None or found.is_finite()
    for _ in range(300):
        answer_in("".join(rng.choices(parts, k=rng.randint(1, 6))))
