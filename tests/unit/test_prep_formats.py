"""Every raw format becomes the same kind of sample; junk becomes a reason, never a crash."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.layouts import read_sample as parse
from posttrain.data.prep.rows import index_pairs, prompt_id
from posttrain.data.row import Answer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant: Yes, gladly",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant: No",
}
# (row, prompt messages, answers best first)
ROWS = {
    "hh": (HH, [user("Hi"), assistant("Hello"), user("More?")], ["Yes, gladly", "No"]),
    "explicit text": (
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        [user("Q")],
        ["good", "bad"],
    ),
    "explicit messages": (
        {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        [user("Q")],
        ["good", "bad"],
    ),
    "implicit messages": (
        {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        [user("Q")],
        ["good", "bad"],
    ),
    "prompt text beside whole conversations": (
        {
            "prompt": "Q",
            "chosen": [user("Q"), assistant("good")],
            "rejected": [user("Q"), assistant("bad")],
        },
        [user("Q")],
        ["good", "bad"],
    ),
    "ultrafeedback": (
        {
            "instruction": "Q",
            "completions": [
                {"response": "bad", "overall_score": 2.0},
                {"response": "good", "overall_score": 8.5},
            ],
        },
        [user("Q")],
        ["good", "bad"],
    ),
    "nectar": (
        {
            "prompt": "Q",
            "answers": [
                {"answer": "good", "rank": 1.0},
                {"answer": "bad", "rank": 7.0},
                {"answer": "mid", "rank": 3.0},
            ],
        },
        [user("Q")],
        ["good", "mid", "bad"],
    ),
    "ranked texts": (
        {"prompt": "Q", "responses": ["good", "mid", "bad"], "ranks": [0, 1, 2]},
        [user("Q")],
        ["good", "mid", "bad"],
    ),
    "shp": (
        {
            "history": "Q",
            "human_ref_A": "bad",
            "human_ref_B": "good",
            "labels": 0,
            "score_A": 3,
            "score_B": 9,
        },
        [user("Q")],
        ["good", "bad"],
    ),
    "arena": (
        {
            "conversation_a": [user("Q"), assistant("bad")],
            "conversation_b": [user("Q"), assistant("good")],
            "winner": "model_b",
        },
        [user("Q")],
        ["good", "bad"],
    ),
    "verifier": (
        {
            "question": "Q",
            "m1": {"is_correct": False, "solution": "bad"},
            "m2": {"is_correct": True, "solution": "good"},
        },
        [user("Q")],
        ["good", "bad"],
    ),
    "correction": (
        {
            "instruction": "Click save",
            "state": "<screen>",
            "wrong_action": "click(1)",
            "corrected_action": "click(2)",
        },
        [user("Click save\n\n<screen>")],
        ["click(2)", "click(1)"],
    ),
    "labelled": ({"prompt": "Q", "completion": "good", "label": True}, [user("Q")], ["good"]),
    "rated": ({"prompt": "Q", "response": "good", "score": 4}, [user("Q")], ["good"]),
    "system prompt": (
        {"system": "Be brief", "prompt": "Q", "chosen": "good", "rejected": "bad"},
        [{"role": "system", "content": "Be brief"}, user("Q")],
        ["good", "bad"],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_format(name):
    row, prompt, answers = ROWS[name]
    sample = parse(json.loads(json.dumps(row)))
    assert sample.prompt == prompt
    ordered = sorted(sample.answers, key=lambda a: a.rank)
    assert [a.text for a in ordered] == answers
    if len(answers) > 1:
        assert len({a.rank for a in ordered}) == len(answers)


def test_ties_and_scores():
    tie = parse(
        {
            "conversation_a": [user("Q"), assistant("a")],
            "conversation_b": [user("Q"), assistant("b")],
            "winner": "tie (bothbad)",
        }
    )
    assert tie.answers[0].rank == tie.answers[1].rank
    assert index_pairs(tie.answers, "all", seed="", keep_ties=False) == []
    assert index_pairs(tie.answers, "best-worst", seed="", keep_ties=True) == [(0, 1)]
    scored = parse(
        {"prompt": "Q", "chosen": "g", "rejected": "b", "score_chosen": 8, "score_rejected": 3}
    )
    assert [a.score for a in scored.answers] == [8.0, 3.0]


BAD = [
    (
        {"text": "only"},
        r"unknown format: the columns \['text'\].*Known: pairs: .*labelled: a prompt, an answer, label",
    ),
    (
        {"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"},
        "share no first message",
    ),
    ({"prompt": "Q", "completion": "a", "label": "maybe"}, "label is true"),
    ({"prompt": "Q", "response": "a", "score": "nan"}, "finite"),
    ({"prompt": "Q", "chosen": {"a": None}, "rejected": "b"}, "all texts or all lists"),
    ({"prompt": "Q", "chosen": [None], "rejected": ["b"]}, "object with role and content"),
    ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt is empty"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "no prompt"),
    ({"prompt": "Q", "chosen": "\ud800", "rejected": "b"}, "surrogate"),
    (
        {
            "conversation_a": [user("Q"), assistant("a")],
            "conversation_b": [user("Q"), assistant("b")],
            "winner": "me",
        },
        "winner is",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_say_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse(row)


names = st.sampled_from(
    [
        "prompt",
        "question",
        "chosen",
        "rejected",
        "completions",
        "answers",
        "responses",
        "completion",
        "label",
        "score",
        "winner",
        "ranks",
        "scores",
        "conversation_a",
        "conversation_b",
        "history",
        "human_ref_A",
        "human_ref_B",
        "labels",
        "wrong_action",
        "corrected_action",
        "solutions",
        "m1",
    ]
)
leaf = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.text(max_size=8)
    | st.just("\n\nHuman: a\n\nAssistant: b")
)
messageish = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "robot"]), "content": leaf}
)
junk = st.recursive(
    leaf | messageish,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "is_correct", "solution", "answer", "rank", "score"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(st.dictionaries(names, junk, max_size=6))
@settings(max_examples=400, deadline=None)
def test_junk_is_a_sample_or_a_reason(row):
    try:
        sample = parse(row)
    except ValueError as error:
        assert str(error)
        return
    assert sample.prompt and all(
        isinstance(m["content"], str) for a in sample.answers for m in a.messages
    )
    prompt_id(sample.prompt)


def make(ranks, labels=None, lengths=None):
    lengths = lengths or [3] * len(ranks)
    return [
        Answer(messages=[assistant("x" * n)], rank=r, label=None if labels is None else labels[i])
        for i, (r, n) in enumerate(zip(ranks, lengths, strict=True))
    ]


def test_strategies():
    answers = make([2, 0, 1, 1])
    assert index_pairs(answers, "best-worst", seed="", keep_ties=False) == [(1, 0)]
    assert index_pairs(answers, "all", seed="", keep_ties=False) == [
        (1, 2),
        (1, 3),
        (1, 0),
        (2, 0),
        (3, 0),
    ]
    assert index_pairs(answers, "adjacent", seed="", keep_ties=False) == [(1, 2), (3, 0)]
    drawn = {index_pairs(answers, "random", seed=str(s), keep_ties=False)[0] for s in range(60)}
    assert drawn == set(index_pairs(answers, "all", seed="", keep_ties=False))
    assert index_pairs(answers, "random", seed="7", keep_ties=False) == index_pairs(
        answers, "random", seed="7", keep_ties=False
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_long2short_is_its_definition(answers):
    """Kimi k1.5: the shortest correct solution against wrong longer ones and correct ones more than
    1.5 times as long."""
    labels, lengths = zip(*answers, strict=True)
    got = index_pairs(
        make([0 if c else 1 for c in labels], labels, lengths),
        "long2short",
        seed="",
        keep_ties=False,
    )
    correct = [i for i in range(len(labels)) if labels[i]]
    if not correct:
        assert got == []
        return
    positive = [i for i in correct if lengths[i] == min(lengths[c] for c in correct)][0]
    wanted = {
        (positive, j)
        for j in range(len(labels))
        if (not labels[j] and lengths[j] > lengths[positive])
        or (labels[j] and lengths[j] > 1.5 * lengths[positive])
    }
    assert set(got) == wanted and len(got) == len(wanted)


def test_all_is_every_combination():
    assert (
        len(index_pairs(make(range(9)), "all", seed="", keep_ties=False))
        == len(list(itertools.combinations(range(9), 2)))
        == 36
    )
