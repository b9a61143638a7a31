import io
import json
from collections import Counter

import pytest
from rich.console import Console

from posttrain.data import DataConfig, encode_conversation, groups_from_rows
from posttrain.data import dataset as data_dataset
from tests.unit.data_tokenizers import (
    NO_END,
    byte_level,
    load,
    pairs,
    trained_text,
    whole_text,
    write,
)


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        train=[write(tmp_path / "rows.jsonl", pairs(20))], cache_dir=str(tmp_path / "cache")
    )


def test_groups_on_disk_are_those_of_the_rows_less_what_follows_the_last_trained_token(config):
    data, tokenizer = load(config), byte_level()
    assert len(data.train) == 20 and data.eval is None
    for i, row in enumerate(pairs(20)):
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        direct, group = encode_conversation(messages, tokenizer), data.train[i]
        assert list(group.prompt_ids) == list(direct.prompt_ids)
        without_line_break = list(direct.completions[0].token_ids)[:-1]
        assert list(group.completions[0].token_ids) == without_line_break
        assert trained_text(group, tokenizer) == row["completion"] + "<|im_end|>"
        assert group.where == f"{config.train[0]}:{i + 1}"
        assert data.train.lengths[i] == len(group.prompt_ids) + len(group.completions[0].token_ids)
    assert data.train[-1].meta["row"] == 20 and [g.meta["row"] for g in data.train[3:5]] == [4, 5]
    with pytest.raises(IndexError, match="index 20 of a dataset of 20 groups"):
        data.train[20]


def test_sources_are_laid_end_to_end_and_found_by_source_and_index(config, tmp_path):
    alpaca = [{"instruction": f"add {i}", "output": "five"} for i in range(3)]
    data = load(config, train=[*config.train, write(tmp_path / "alpaca.jsonl", alpaca)])
    assert data.train.sizes == [20, 3]
    assert (
        data.train.at(1, 2).meta
        == data.train[22].meta
        == {"file": str(tmp_path / "alpaca.jsonl"), "row": 3}
    )
    assert [list(s.layouts) for s in data.report.train] == [
        ["prompt_completion"],
        ["prompt_completion"],
    ]


def test_a_folder_keeps_the_name_of_each_file(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.jsonl", pairs(2))
    data = load(config, train=[str(folder)])
    assert [g.where for g in data.train] == [
        f"{folder}/{n}.jsonl:{i}" for n in "ab" for i in (1, 2)
    ]


def test_a_tokenizer_without_template_trains_raw_text_and_refuses_turns(config, tmp_path):
    tokenizer = byte_level(None)
    data = load(config, tokenizer)
    assert whole_text(data.train[0], tokenizer) == "question 0four<|im_end|>"
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "talk.jsonl", [talk])
    with pytest.raises(ValueError, match=r"talk\.jsonl:1: a conversation needs a chat template"):
        load(config, tokenizer, train=[path])


# --- length
# ---------------------------------------------------------------------------------------------------------


def lengths_of(config):
    data = load(config)
    return {int(g.meta["row"]): int(n) for g, n in zip(data.train, data.train.lengths, strict=True)}


@pytest.fixture
def long_rows(tmp_path):
    rows = [
        *pairs(3),
        *pairs(2, start=3, words=40),
        {"prompt": "question " * 40, "completion": "no"},
    ]
    return DataConfig(
        train=[write(tmp_path / "long.jsonl", rows)], cache_dir=str(tmp_path / "cache")
    )


def test_truncation_cuts_the_completions_end_and_counts_what_it_does(long_rows):
    whole = lengths_of(long_rows)
    limit = whole[1] + 5
    data, tokenizer = load(long_rows, max_length=limit), byte_level()
    assert [g.meta["row"] for g in data.train] == [1, 2, 3, 4, 5]
    assert list(data.train.lengths[3:]) == [limit, limit]
    full = load(long_rows).train
    for i in (3, 4):
        cut, uncut = data.train[i], full[i]
        kept = len(cut.completions[0].token_ids)
        assert list(cut.prompt_ids) == list(uncut.prompt_ids)
        start = uncut.completions[0].token_ids[:kept]
        assert list(cut.completions[0].token_ids) == list(start)
        assert "<|im_end|>" not in trained_text(cut, tokenizer)
    (source,) = data.report.train
    assert (source.num_read, source.num_kept, source.num_truncated) == (6, 5, 2)
    assert source.num_cut_tokens == whole[4] + whole[5] - 2 * limit
    assert source.dropped == {"prompt fills max_length": 1}
    assert source.num_tokens == sum(data.train.lengths)
    assert source.num_trained_tokens == sum(g.num_trained for g in data.train)


def test_a_row_of_exactly_the_limit_is_whole_and_one_token_less_room_cuts_it(long_rows):
    n = max(lengths_of(long_rows).values())
    assert load(long_rows, max_length=n).report.counts()["truncated"] == 0
    cut = load(long_rows, max_length=n - 1).report.train[0]
    assert load(long_rows, max_length=n, overlong="drop").report.counts()["kept"] == 6
    assert cut.num_truncated == list(lengths_of(long_rows).values()).count(n) == cut.num_cut_tokens


def test_a_prompt_that_leaves_room_for_one_token_is_kept_and_one_that_fills_the_limit_dropped(
    long_rows,
):
    prompt = len(load(long_rows).train[5].prompt_ids)
    assert load(long_rows, max_length=prompt + 1).report.train[0].dropped == {}
    assert load(long_rows, max_length=prompt).report.train[0].dropped == {
        "prompt fills max_length": 1
    }


def test_overlong_drop_and_error(long_rows):
    limit = lengths_of(long_rows)[1] + 5
    report = load(long_rows, max_length=limit, overlong="drop").report
    assert report.counts()["kept"] == 3 and report.dropped() == {"longer than max_length": 3}
    with pytest.raises(
        ValueError, match=rf"long\.jsonl:4: \d+ tokens, more than data\.max_length={limit}\. Raise"
    ):
        load(long_rows, max_length=limit, overlong="error")


def test_truncation_inside_a_later_user_turn_ends_with_a_trained_token(config, tmp_path):
    turns = ["question", "four", "hello " * 30, "five"]
    talk = {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(turns)
        ]
    }
    path, tokenizer = write(tmp_path / "talk.jsonl", [talk]), byte_level()
    whole = load(config, train=[path]).train[0]
    first_answer = list(whole.completions[0].loss_mask).index(0)
    data = load(config, train=[path], max_length=len(whole.prompt_ids) + first_answer + 10)
    assert trained_text(data.train[0], tokenizer) == "four<|im_end|>"
    assert list(data.train[0].completions[0].loss_mask) == [1] * first_answer
    assert data.report.train[0].num_truncated == 1


def test_if_every_row_is_dropped_the_run_stops(long_rows):
    with pytest.raises(
        ValueError,
        match=r"long\.jsonl: no row is left to train on: 6 read, dropped: .*'prompt fills max_length': 6.*now 5",
    ):
        load(long_rows, max_length=5)
    assert not [p for p in (data_dataset.cache_folder(long_rows)).iterdir()]


def test_if_every_completion_is_cut_no_stop_is_trained_and_the_run_stops(config):
    prompt = max(len(g.prompt_ids) for g in load(config).train)
    with pytest.raises(
        ValueError, match="No stop token is ever trained: none of the 20 samples.*max_length"
    ):
        load(config, max_length=prompt + 1)


def test_a_template_without_an_end_of_turn_is_refused(config):
    with pytest.raises(ValueError, match="No stop token is ever trained"):
        load(config, byte_level(NO_END, eos="<|endoftext|>"))


def test_the_report_renders_all_counts(long_rows):
    data = load(long_rows, max_length=lengths_of(long_rows)[1] + 5)
    out = io.StringIO()
    Console(file=out, width=120).print(data.report.render())
    text = out.getvalue()
    for part in (
        "5 rows to train on",
        "long.jsonl",
        "prompt_completion, mask from prefixes",
        "1 rows dropped: prompt fills max_length",
    ):
        assert part in text
    assert f"{data.report.train[0].num_cut_tokens:,} tokens cut from 2 completions" in text


# --- evaluation split
# -----------------------------------------------------------------------------------------------


def prompts(dataset):
    return [tuple(g.prompt_ids) for g in dataset]


def test_held_out_rows_are_the_fraction_disjoint_and_chosen_by_seed_and_content(config, tmp_path):
    rows = pairs(200)
    path = write(tmp_path / "r.jsonl", rows)
    data = load(config, train=[path], eval_fraction=0.1)
    assert (len(data.train), len(data.eval)) == (180, 20)
    assert (data.report.num_train_rows, data.report.num_eval_rows) == (180, 20)
    assert Counter(prompts(data.train) + prompts(data.eval)) == Counter(
        prompts(load(config, train=[path]).train)
    )
    shuffled = load(config, train=[write(tmp_path / "s.jsonl", rows[::-1])], eval_fraction=0.1)
    assert set(prompts(shuffled.eval)) == set(prompts(data.eval))
    other = load(config, train=[path], eval_fraction=0.1, seed=1)
    assert set(prompts(other.eval)) != set(prompts(data.eval))
    rows_held_out = [g.meta["row"] for g in data.eval]
    assert min(rows_held_out) < 60 and max(rows_held_out) > 140  # not one end of the file


def test_rows_with_the_same_prompt_stay_on_one_side(config, tmp_path):
    rows = [{"prompt": f"question {i % 25}", "completion": f"five {i}"} for i in range(100)]
    data = load(config, train=[write(tmp_path / "r.jsonl", rows)], eval_fraction=0.1)
    assert len(data.eval) == 12  # whole prompts of 4 rows, until at least 10
    assert not set(prompts(data.eval)) & set(prompts(data.train))


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(config, tmp_path):
    rows = [{"prompt": "same", "completion": f"five {i}"} for i in range(10)]
    with pytest.raises(
        ValueError,
        match="holds out every row of training source 0 .*1 different prompts in 10 rows",
    ):
        load(config, train=[write(tmp_path / "r.jsonl", rows)], eval_fraction=0.1)


def test_evaluation_sources_are_loaded_and_reported(config, tmp_path):
    data = load(config, eval=[write(tmp_path / "e.jsonl", pairs(4, start=90))])
    assert (len(data.train), len(data.eval)) == (20, 4)
    assert data.report.eval[0].num_read == 4 and data.report.counts()["read"] == 20


# --- bad input, through the front door
# ------------------------------------------------------------------------------


def test_bad_sources_name_file_and_row(config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(pairs(1)[0]) + "\nnot json\n")
    silent = write(
        tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}]
    )
    for path, message in (
        (empty, r"empty\.jsonl: no rows"),
        (broken, r"broken\.jsonl:2: not JSON"),
        (silent, r"silent\.jsonl:1: no assistant turn"),
    ):
        with pytest.raises(ValueError, match=message):
            load(config, train=[*config.train, str(path)])
    with pytest.raises(ValueError, match="data.train is empty"):
        load(DataConfig())


def test_every_row_is_read_by_its_own_columns_and_must_be_of_the_kind_that_is_trained(
    config, tmp_path
):
    path = write(
        tmp_path / "m.jsonl",
        [
            *pairs(2),
            {"instruction": "a", "output": "b"},
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "id": 1,
            },
        ],
    )
    report = load(config, train=[path]).report.train[0]
    assert report.layouts == {"prompt_completion": 3, "messages": 1}
    assert report.columns == {
        "carried": {"id": 1},
        "used": {"completion": 2, "instruction": 1, "messages": 1, "output": 1, "prompt": 2},
    }
    path = write(tmp_path / "m.jsonl", [*pairs(2), {"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(
        ValueError,
        match=r"m\.jsonl:3: pairs rows are no sft data, which is messages, prompt_completion",
    ):
        load(config, train=[path])


def test_rows_in_memory_become_the_same_groups(config):
    tokenizer = byte_level()
    from_disk = load(config, tokenizer).train
    in_memory = groups_from_rows(pairs(20), tokenizer)
    assert [list(g.prompt_ids) for g in from_disk] == [list(g.prompt_ids) for g in in_memory]
    assert [list(g.completions[0].token_ids) for g in from_disk] == [
        list(g.completions[0].token_ids) for g in in_memory
    ]
    with pytest.raises(ValueError, match="<memory>:2: an assistant turn is empty"):
        groups_from_rows([*pairs(1), {"prompt": "a", "completion": " "}], tokenizer)
    with pytest.raises(ValueError, match="No rows were given"):
        groups_from_rows([], tokenizer)


def test_rows_in_memory_that_are_cut_or_dropped_are_counted_in_a_warning(long_rows):
    rows = [json.loads(line) for line in open(long_rows.train[0])]
    limit = lengths_of(long_rows)[1] + 5
    config = DataConfig(max_length=limit)
    with pytest.warns(
        UserWarning,
        match=rf"6 rows, 2 cut to data.max_length={limit}, dropped: {{'prompt fills max_length': 1}}",
    ):
        groups = groups_from_rows(rows, byte_level(), config=config)
    assert len(groups) == 5 and max(g.num_tokens_shared for g in groups) == limit
    with pytest.raises(ValueError, match="<memory>: no row is left to train on: 6 read"):
        groups_from_rows(rows, byte_level(), config=DataConfig(max_length=5))
    with pytest.raises(ValueError, match="No stop token is ever trained"):
        groups_from_rows(pairs(2), byte_level(NO_END, eos="<|endoftext|>"))
