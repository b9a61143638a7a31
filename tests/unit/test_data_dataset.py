import dataclasses
import io
import json
import multiprocessing
import shutil
from collections import Counter

import pytest
from rich.console import Console

from posttrain.data import DataConfig, encode_conversation, groups_from_rows, load_sft_data
from posttrain.data import cache as data_cache
from posttrain.data import dataset as data_dataset
from tests.unit.data_tokenizers import CHATML, MARKED_WITHOUT_END, NO_END, byte_level, trained_text, whole_text


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def pairs(n, start=0, words=1):
    return [{"prompt": f"question {i}", "completion": " ".join(["four"] * words)} for i in range(start, start + n)]


@pytest.fixture
def config(tmp_path):
    return DataConfig(train=[write(tmp_path / "rows.jsonl", pairs(20))], cache_dir=str(tmp_path / "cache"))


def load(config, tokenizer=None, **changes):
    return load_sft_data(dataclasses.replace(config, **changes), tokenizer or byte_level(), progress=False)


def everything(dataset):
    return [(g.prompt_ids, g.completions[0].token_ids, g.completions[0].loss_mask, g.meta) for g in dataset]


def test_groups_on_disk_are_those_of_the_rows_less_what_follows_the_last_trained_token(config):
    data, tokenizer = load(config), byte_level()
    assert len(data.train) == 20 and data.eval is None
    for i, row in enumerate(pairs(20)):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        direct, group = encode_conversation(messages, tokenizer), data.train[i]
        assert group.prompt_ids == list(direct.prompt_ids)
        assert group.completions[0].token_ids == list(direct.completions[0].token_ids)[:-1]  # the line break
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
    assert data.train.at(1, 2).meta == data.train[22].meta == {"file": str(tmp_path / "alpaca.jsonl"), "row": 3}
    assert [s.format for s in data.report.train] == ["prompt_completion", "alpaca"]


def test_a_folder_keeps_the_name_of_each_file(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        write(folder / f"{name}.jsonl", pairs(2))
    data = load(config, train=[str(folder)])
    assert [g.where for g in data.train] == [f"{folder}/{n}.jsonl:{i}" for n in "ab" for i in (1, 2)]


def test_a_tokenizer_without_template_trains_raw_text_and_refuses_turns(config, tmp_path):
    tokenizer = byte_level(None)
    data = load(config, tokenizer)
    assert whole_text(data.train[0], tokenizer) == "question 0four<|im_end|>"
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "talk.jsonl", [talk])
    with pytest.raises(ValueError, match=r"talk\.jsonl:1: a conversation needs a chat template"):
        load(config, tokenizer, train=[path])


# --- length ---------------------------------------------------------------------------------------------------------


def lengths_of(config):
    data = load(config)
    return {int(g.meta["row"]): int(n) for g, n in zip(data.train, data.train.lengths, strict=True)}


@pytest.fixture
def long_rows(tmp_path):
    rows = [*pairs(3), *pairs(2, start=3, words=40), {"prompt": "question " * 40, "completion": "no"}]
    return DataConfig(train=[write(tmp_path / "long.jsonl", rows)], cache_dir=str(tmp_path / "cache"))


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
        assert cut.prompt_ids == uncut.prompt_ids
        assert cut.completions[0].token_ids == uncut.completions[0].token_ids[:kept]
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


def test_a_prompt_that_leaves_room_for_one_token_is_kept_and_one_that_fills_the_limit_dropped(long_rows):
    prompt = len(load(long_rows).train[5].prompt_ids)
    assert load(long_rows, max_length=prompt + 1).report.train[0].dropped == {}
    assert load(long_rows, max_length=prompt).report.train[0].dropped == {"prompt fills max_length": 1}


def test_overlong_drop_and_error(long_rows):
    limit = lengths_of(long_rows)[1] + 5
    report = load(long_rows, max_length=limit, overlong="drop").report
    assert report.counts()["kept"] == 3 and report.dropped() == {"longer than max_length": 3}
    with pytest.raises(ValueError, match=rf"long\.jsonl:4: \d+ tokens, more than data\.max_length={limit}\. Raise"):
        load(long_rows, max_length=limit, overlong="error")


def test_truncation_inside_a_later_user_turn_ends_with_a_trained_token(config, tmp_path):
    turns = ["question", "four", "hello " * 30, "five"]
    talk = {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(turns)]}
    path, tokenizer = write(tmp_path / "talk.jsonl", [talk]), byte_level()
    whole = load(config, train=[path]).train[0]
    first_answer = whole.completions[0].loss_mask.index(0)
    data = load(config, train=[path], max_length=len(whole.prompt_ids) + first_answer + 10)
    assert trained_text(data.train[0], tokenizer) == "four<|im_end|>"
    assert data.train[0].completions[0].loss_mask == [1] * first_answer
    assert data.report.train[0].num_truncated == 1


def test_if_every_row_is_dropped_the_run_stops(long_rows):
    with pytest.raises(
        ValueError,
        match=r"long\.jsonl: no row is left to train on: 6 read, dropped: .*'prompt fills max_length': 6.*now 5",
    ):
        load(long_rows, max_length=5)
    assert not [p for p in (data_cache.cache_folder(long_rows)).iterdir()]


def test_if_every_completion_is_cut_no_stop_is_trained_and_the_run_stops(config):
    prompt = max(len(g.prompt_ids) for g in load(config).train)
    with pytest.raises(ValueError, match="No stop token is ever trained: none of the 20 samples.*max_length"):
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


# --- cache ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoded_rows(monkeypatch):
    """Rows that went through the tokenizer, counted."""
    seen = []
    original = data_dataset.encode_rows

    def count(*args, **kwargs):
        for result in original(*args, **kwargs):
            seen.append(result)
            yield result

    monkeypatch.setattr(data_dataset, "encode_rows", count)
    return seen


def test_a_second_load_reads_the_cache_and_reports_the_same(long_rows, encoded_rows):
    config = dataclasses.replace(long_rows, max_length=60)
    first = load(config)
    assert len(encoded_rows) == 6 and not first.report.train[0].from_cache
    second = load(config)
    assert len(encoded_rows) == 6 and second.report.train[0].from_cache
    assert everything(second.train) == everything(first.train)
    assert dataclasses.replace(second.report.train[0], from_cache=False) == first.report.train[0]
    assert first.report.train[0].num_truncated + sum(first.report.train[0].dropped.values()) > 0


HITS = {
    "seed": {"seed": 9},
    "weights": {"weights": [2.0]},
    "eval_fraction": {"eval_fraction": 0.2},
    "num_proc is not used on a hit": {"num_proc": 3},
    "format as detected": {"format": "prompt_completion"},
}
MISSES = {
    "max_length": {"max_length": 512},
    "overlong": {"overlong": "drop"},
    "columns": {"columns": {"prompt": "completion", "completion": "prompt"}},
}


@pytest.mark.parametrize("case", HITS)
def test_options_that_change_no_token_hit(config, encoded_rows, case):
    load(config)
    load(config, **HITS[case])
    assert len(encoded_rows) == 20


@pytest.mark.parametrize("case", MISSES)
def test_options_that_change_tokens_miss(config, encoded_rows, case):
    load(config)
    load(config, **MISSES[case])
    assert len(encoded_rows) == 40


def test_the_key_is_the_content_not_the_name_nor_the_time(config, tmp_path, encoded_rows):
    load(config)
    copy = tmp_path / "elsewhere.jsonl"
    shutil.copy(config.train[0], copy)
    data = load(config, train=[str(copy)])
    assert len(encoded_rows) == 20
    assert data.train[0].meta["file"] == str(copy) and data.report.train[0].source == str(copy)
    text = copy.read_text()
    copy.write_text(text.replace("question 7", "question x"))  # same size
    load(config, train=[str(copy)])
    assert len(encoded_rows) == 40


def test_another_template_or_vocabulary_misses_and_padding_state_does_not(config, encoded_rows, tmp_path):
    tokenizer = byte_level()
    load(config, tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves its state in the tokenizer
    load(config, tokenizer)
    assert len(encoded_rows) == 20
    (tmp_path / "t.jinja").write_text(MARKED_WITHOUT_END)
    load(config, tokenizer, chat_template=str(tmp_path / "t.jinja"))
    assert len(encoded_rows) == 40 and tokenizer.chat_template == MARKED_WITHOUT_END
    larger = byte_level(CHATML)
    larger.add_tokens(["question"])
    assert load(config, larger).train.lengths[0] < load(config).train.lengths[0]
    assert len(encoded_rows) == 60


def test_a_damaged_cache_is_written_again(config, encoded_rows):
    good = everything(load(config).train)
    (folder,) = data_cache.cache_folder(config).iterdir()
    tokens = folder / data_cache.TOKENS
    tokens.write_bytes(tokens.read_bytes()[:-10])
    assert everything(load(config).train) == good and len(encoded_rows) == 40
    (folder / data_cache.MANIFEST).write_text("{")
    assert everything(load(config).train) == good and len(encoded_rows) == 60
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failed_run_leaves_nothing_behind(config, tmp_path):
    path = write(tmp_path / "bad.jsonl", [*pairs(3), {"prompt": "a", "completion": ""}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:4: an assistant turn is empty"):
        load(config, train=[path])
    assert list(data_cache.cache_folder(config).iterdir()) == []


def _load_in_process(config, barrier, results):
    barrier.wait()
    results.put(everything(load_sft_data(config, byte_level(), progress=False).train))


def test_two_processes_at_once_read_the_same_and_leave_one_folder(config):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_load_in_process, args=(config, barrier, results)) for _ in range(2)]
    for p in processes:
        p.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for p in processes:
        p.join()
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 20
    assert len(list(data_cache.cache_folder(config).iterdir())) == 1


def test_the_first_of_two_writers_wins(tmp_path):
    folder = tmp_path / "key"

    def slow(path):
        data_cache.publish(folder, lambda p: {"by": p.write_bytes(b"fast") and "fast"})
        path.write_bytes(b"slow!")
        return {"by": "slow"}

    assert data_cache.publish(folder, slow)["by"] == "fast"
    assert (folder / data_cache.TOKENS).read_bytes() == b"fast"
    assert data_cache.read_manifest(folder)["by"] == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_a_cache_folder_that_cannot_be_written_is_an_error_with_advice(config, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write tokenised data here.*--data\.cache_dir"):
        load(config, cache_dir=str(tmp_path / "file"))


def test_the_cache_folder_follows_option_then_environment_then_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("POSTTRAIN_CACHE", raising=False)
    assert data_cache.cache_folder(DataConfig()) == tmp_path / "xdg" / "posttrain" / "data"
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "env"))
    assert data_cache.cache_folder(DataConfig()) == tmp_path / "env" / "data"
    assert data_cache.cache_folder(DataConfig(cache_dir=str(tmp_path / "own"))) == tmp_path / "own" / "data"


def test_several_processes_tokenise_the_same_in_the_same_order(config, tmp_path):
    rows = write(tmp_path / "many.jsonl", pairs(700))
    one = load(config, train=[rows])
    two = load(config, train=[rows], num_proc=2, cache_dir=str(tmp_path / "second"))
    assert not two.report.train[0].from_cache
    assert everything(two.train) == everything(one.train)


# --- evaluation split -----------------------------------------------------------------------------------------------


def prompts(dataset):
    return [tuple(g.prompt_ids) for g in dataset]


def test_held_out_rows_are_the_fraction_disjoint_and_chosen_by_seed_and_content(config, tmp_path):
    rows = pairs(200)
    path = write(tmp_path / "r.jsonl", rows)
    data = load(config, train=[path], eval_fraction=0.1)
    assert (len(data.train), len(data.eval)) == (180, 20)
    assert (data.report.num_train_rows, data.report.num_eval_rows) == (180, 20)
    assert Counter(prompts(data.train) + prompts(data.eval)) == Counter(prompts(load(config, train=[path]).train))
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
    with pytest.raises(ValueError, match="holds out every row of training source 0 .*1 different prompts in 10 rows"):
        load(config, train=[write(tmp_path / "r.jsonl", rows)], eval_fraction=0.1)


def test_evaluation_sources_are_loaded_and_reported(config, tmp_path):
    data = load(config, eval=[write(tmp_path / "e.jsonl", pairs(4, start=90))])
    assert (len(data.train), len(data.eval)) == (20, 4)
    assert data.report.eval[0].num_read == 4 and data.report.counts()["read"] == 20


# --- bad input, through the front door ------------------------------------------------------------------------------


def test_bad_sources_name_file_and_row(config, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(pairs(1)[0]) + "\nnot json\n")
    silent = write(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    for path, message in (
        (empty, r"empty\.jsonl: no rows"),
        (broken, r"broken\.jsonl:2: not JSON"),
        (silent, r"silent\.jsonl:1: no assistant turn"),
    ):
        with pytest.raises(ValueError, match=message):
            load(config, train=[*config.train, str(path)])
    with pytest.raises(ValueError, match="data.train is empty"):
        load(DataConfig())


def test_a_later_row_of_another_format_is_an_error(config, tmp_path):
    path = write(tmp_path / "m.jsonl", [*pairs(2), {"instruction": "a", "output": "b"}])
    with pytest.raises(
        ValueError, match=r"m\.jsonl:3: format prompt_completion needs .*All rows of a source have one format"
    ):
        load(config, train=[path])


def test_rows_in_memory_become_the_same_groups(config):
    tokenizer = byte_level()
    from_disk = load(config, tokenizer).train
    in_memory = groups_from_rows(pairs(20), tokenizer)
    assert [g.prompt_ids for g in from_disk] == [list(g.prompt_ids) for g in in_memory]
    assert [g.completions[0].token_ids for g in from_disk] == [list(g.completions[0].token_ids) for g in in_memory]
    with pytest.raises(ValueError, match="<memory>:2: an assistant turn is empty"):
        groups_from_rows([*pairs(1), {"prompt": "a", "completion": " "}], tokenizer)
    with pytest.raises(ValueError, match="No rows were given"):
        groups_from_rows([], tokenizer)
