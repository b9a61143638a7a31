"""Rows of comparisons: every format, every mistake, and what the groups on disk hold."""

from __future__ import annotations

import pytest

from posttrain.data import DataConfig, groups_from_rows, load_groups
from posttrain.data.comparisons import normalise_comparison
from posttrain.data.readers import Row
from posttrain.types import SCORE_SLOT, Pair
from tests.tiny import byte_tokenizer

USER, GOOD, BAD = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "assistant", "content": "five"},
)


def comparison(format, **values):
    return normalise_comparison(Row(file="f.jsonl", row_number=3, values=values), format)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
        {"prompt": [USER], "chosen": "4", "rejected": "five"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_a_pair_in_all_its_writings(values):
    made = comparison("pairs", **values)
    assert [(m["role"], m["content"]) for m in made.prompt] == [("user", "2+2?")]
    assert [c[0]["content"] for c in made.completions] == ["4", "five"] and made.pairs == [Pair(chosen=0, rejected=1)]


def test_margins_weights_ranks_and_scores():
    assert comparison("pairs", prompt="p", chosen="a", rejected="b", margin=0.5, weight=2).pairs == [
        Pair(chosen=0, rejected=1, margin=0.5, weight=2.0)
    ]
    ranked = comparison("ranked", prompt="p", completions=["a", "b", "c"])
    assert [(p.chosen, p.rejected) for p in ranked.pairs] == [(0, 1), (0, 2), (1, 2)]
    tied = comparison("ranked", prompt="p", completions=["a", "b", "c"], ranks=[1, 0, 1])
    assert [(p.chosen, p.rejected) for p in tied.pairs] == [(1, 0), (1, 2)]
    scored = comparison("ranked", prompt="p", completions=["a", "b"], scores=[1.0, 3.5])
    assert scored.pairs == [Pair(chosen=1, rejected=0, margin=2.5)]
    assert comparison("labelled", prompt="p", completion="a", label=0).labels == [False]


@pytest.mark.parametrize(
    ("format", "values", "message"),
    [
        ("pairs", {"prompt": "p", "chosen": "a"}, "lacks rejected"),
        ("pairs", {"chosen": "a", "rejected": "b"}, "split by `posttrain prep pairs"),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"}, "margin must be a finite number"),
        ("pairs", {"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}, "must be >= 0"),
        ("pairs", {"chosen": [USER, GOOD], "rejected": [BAD]}, "share no first message"),
        ("pairs", {"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "no assistant turn"),
        ("ranked", {"prompt": "p", "completions": ["a"]}, "at least two"),
        ("ranked", {"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "one number per completion"),
        ("labelled", {"prompt": "p", "completion": "a", "label": "yes"}, "true (desirable) or false"),
    ],
)
def test_mistakes_name_the_row(format, values, message):
    with pytest.raises(ValueError, match="f.jsonl:3: ") as caught:
        comparison(format, **values)
    assert message in str(caught.value)


def test_groups_of_rows_in_memory_and_on_disk_are_the_same(tmp_path):
    import json

    rows = [{"prompt": f"{i}?", "completions": ["yes", "no", "maybe"], "scores": [1.0, 0.0, 0.5]} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = DataConfig(train=[str(tmp_path / "rows.jsonl")], cache_dir=str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    for purpose in ("preference", "reward"):
        memory = groups_from_rows(rows, tokenizer, config=config, purpose=purpose)
        disk = load_groups(config, tokenizer, purpose=purpose, progress=False).train
        assert len(disk) == len(memory) == 6
        for a, b in zip(memory, [disk[i] for i in range(6)], strict=True):
            assert list(a.prompt_ids) == list(b.prompt_ids) and list(a.trained_pairs) == list(b.trained_pairs)
            for c, d in zip(a.completions, b.completions, strict=True):
                assert list(c.token_ids) == list(d.token_ids) and [int(m) for m in c.loss_mask] == [int(m) for m in d.loss_mask]
        slots = [c.token_ids[-1] for c in memory[0].completions]
        assert all((s == SCORE_SLOT) == (purpose == "reward") for s in slots)


def test_a_long_answer_drops_the_whole_comparison():
    rows = [{"prompt": "a?", "chosen": "y" * 300, "rejected": "n"}, {"prompt": "a?", "chosen": "y", "rejected": "n"}]
    kept = groups_from_rows(rows, byte_tokenizer(), config=DataConfig(max_length=100, overlong="drop"), purpose="preference")
    assert len(kept) == 1 and kept[0].where.endswith(":2")
