"""Rows of comparisons: every format, every mistake, and what the groups on disk hold."""

from __future__ import annotations

import pytest

from posttrain.data import DataConfig, groups_from_rows, load_groups
from posttrain.data.chat import ChatEncoder
from posttrain.data.layouts import read_sample
from posttrain.data.readers import Row
from posttrain.data.tokenise import RowEncoder, compared_pairs
from posttrain.types import SCORE_SLOT, Pair
from tests.tiny import byte_tokenizer

USER, GOOD, BAD = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "five"},
)


def pairs_of(format="auto", **values):
    return compared_pairs(read_sample(values, format=format))


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
        {"prompt": [USER], "chosen": "4", "rejected": "five"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": BAD,
        },
        {
            "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: five",
        },
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " five"},
        {"question": "2+2?", "response_a": "five", "response_b": "4", "winner": "model_b"},
    ],
)
def test_a_pair_in_all_its_writings(values):
    made = read_sample(values)
    assert [(m["role"], m["content"]) for m in made.prompt] == [("user", "2+2?")]
    (pair,) = compared_pairs(made)
    assert [made.answers[k].text for k in (pair.chosen, pair.rejected)] == ["4", "five"] and (
        pair.margin,
        pair.weight,
    ) == (0, 1)


def test_margins_weights_ranks_and_scores():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert pairs_of(**pair, margin=0.5, weight=2) == [
        Pair(chosen=0, rejected=1, margin=0.5, weight=2.0)
    ]
    assert pairs_of(**pair, score_chosen=9, score_rejected="6.5") == [
        Pair(chosen=0, rejected=1, margin=2.5)
    ]
    three = {"prompt": "p", "completions": ["a", "b", "c"]}
    assert [(p.chosen, p.rejected) for p in pairs_of("ranked", **three)] == [(0, 1), (0, 2), (1, 2)]
    assert [(p.chosen, p.rejected) for p in pairs_of(**three, ranks=[1, 0, 1])] == [(1, 0), (1, 2)]
    assert pairs_of(prompt="p", completions=["a", "b"], scores=[1.0, 3.5]) == [
        Pair(chosen=1, rejected=0, margin=2.5)
    ]
    assert [(p.chosen, p.rejected) for p in pairs_of(**three, scores=[1.0, None, 3.0])] == [
        (2, 0)
    ], "an unrated answer is in no pair"
    assert [(p.chosen, p.rejected) for p in pairs_of(**three, correct=[False, True, False])] == [
        (1, 0),
        (1, 2),
    ]
    assert read_sample({"prompt": "p", "completion": "a", "label": 0}).answers[0].label is False


@pytest.mark.parametrize(
    "name",
    [
        "ranks",
        "rank",
        "ranking",
        "scores",
        "ratings",
        "rewards",
        "rating",
        "is_correct",
        "correctness",
        "passed",
    ],
)
def test_parallel_lists_are_read_under_all_their_names(name):
    values = [0, 1] if name.startswith("rank") else [1, 0]
    assert [
        (p.chosen, p.rejected) for p in pairs_of(prompt="p", responses=["a", "b"], **{name: values})
    ] == [(0, 1)]
    with pytest.raises(ValueError, match="one number per completion|must be JSON"):
        pairs_of(prompt="p", responses=["a", "b"], **{name: [1]})
    with pytest.raises(ValueError, match="nothing says which"):
        pairs_of(prompt="p", responses=["a", "b"], **{f"{name}_x": values})


@pytest.mark.parametrize(
    ("format", "values", "message"),
    [
        ("pairs", {"prompt": "p", "chosen": "a"}, "lacks chosen and rejected"),
        ("pairs", {"chosen": "a", "rejected": "b"}, "no prompt"),
        (
            "pairs",
            {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"},
            "margin must be a finite number",
        ),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}, "must be >= 0"),
        ("pairs", {"chosen": [USER, GOOD], "rejected": [BAD]}, "share no first message"),
        ("pairs", {"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "no assistant turn"),
        ("ranked", {"prompt": "p", "completions": ["a"]}, "at least two"),
        (
            "ranked",
            {"prompt": "p", "completions": ["a", "b"], "scores": [1]},
            "one number per completion",
        ),
        (
            "auto",
            {"prompt": "p", "completions": ["a", "b"]},
            "nothing says which of the 2 completions is better",
        ),
        (
            "auto",
            {"prompt": "p", "completions": ["a", "b"], "ranks": [0, 1], "scores": [1, 2]},
            "contradict each other",
        ),
        (
            "auto",
            {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
            "stepwise supervision",
        ),
        (
            "auto",
            {"prompt": "p", "completions": ["a", "b"], "scores": ["good", "bad"]},
            "must be a finite number",
        ),
        (
            "pairs",
            {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 2},
            "which of them is better",
        ),
        (
            "pairs",
            {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "is not in the turns",
        ),
        ("auto", {"prompt": "p", "response": "a", "score": 3}, "rated rows are no preference data"),
        ("auto", {"messages": [USER, GOOD]}, "messages rows are no preference data"),
        (
            "labelled",
            {"prompt": "p", "completion": "a", "label": "yes"},
            "true (desirable) or false",
        ),
    ],
)
def test_mistakes_name_the_row(format, values, message):
    with pytest.raises(ValueError, match="f.jsonl:3: ") as caught:
        encode = RowEncoder(
            encoder=ChatEncoder(byte_tokenizer()),
            config=DataConfig(format=format),
            purpose="preference",
        )
        encode(Row(file="f.jsonl", row_number=3, values=values))
    assert message in str(caught.value)


def test_groups_of_rows_in_memory_and_on_disk_are_the_same(tmp_path):
    import json

    rows = [
        {"prompt": f"{i}?", "completions": ["yes", "no", "maybe"], "scores": [1.0, 0.0, 0.5]}
        for i in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = DataConfig(train=[str(tmp_path / "rows.jsonl")], cache_dir=str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    for purpose in ("preference", "reward"):
        memory = groups_from_rows(rows, tokenizer, config=config, purpose=purpose)
        disk = load_groups(config, tokenizer, purpose=purpose, progress=False).train
        assert len(disk) == len(memory) == 6
        for a, b in zip(memory, [disk[i] for i in range(6)], strict=True):
            assert list(a.prompt_ids) == list(b.prompt_ids) and list(a.trained_pairs) == list(
                b.trained_pairs
            )
            for c, d in zip(a.completions, b.completions, strict=True):
                assert list(c.token_ids) == list(d.token_ids) and [int(m) for m in c.loss_mask] == [
                    int(m) for m in d.loss_mask
                ]
        slots = [c.token_ids[-1] for c in memory[0].completions]
        assert all((s == SCORE_SLOT) == (purpose == "reward") for s in slots)


def test_a_long_answer_drops_the_whole_comparison():
    rows = [
        {"prompt": "a?", "chosen": "y" * 300, "rejected": "n"},
        {"prompt": "a?", "chosen": "y", "rejected": "n"},
    ]
    kept = groups_from_rows(
        rows,
        byte_tokenizer(),
        config=DataConfig(max_length=100, overlong="drop"),
        purpose="preference",
    )
    assert len(kept) == 1 and kept[0].where.endswith(":2")
