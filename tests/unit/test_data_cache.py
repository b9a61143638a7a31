import dataclasses
import multiprocessing
import shutil

import pytest

from posttrain.data import DataConfig, load_groups
from posttrain.data import dataset as data_dataset
from tests.unit.data_tokenizers import (
    CHATML,
    MARKED_WITHOUT_END,
    byte_level,
    everything,
    load,
    pairs,
    write,
)


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        train=[write(tmp_path / "rows.jsonl", pairs(20))], cache_dir=str(tmp_path / "cache")
    )


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
}
MISSES = {
    "max_length": {"max_length": 512},
    "overlong": {"overlong": "drop"},
    "format": {"format": "prompt_completion"},
    "carry": {"carry": ["note"]},
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


def test_another_template_or_vocabulary_misses_and_padding_state_does_not(
    config, encoded_rows, tmp_path
):
    tokenizer = byte_level()
    load(config, tokenizer)
    tokenizer(
        ["a", "a b c"], padding=True, truncation=True, max_length=2
    )  # leaves its state in the tokenizer
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
    (folder,) = data_dataset.cache_folder(config).iterdir()
    tokens = folder / data_dataset.TOKENS
    tokens.write_bytes(tokens.read_bytes()[:-10])
    assert everything(load(config).train) == good and len(encoded_rows) == 40
    (folder / data_dataset.MANIFEST).write_text("{")
    assert everything(load(config).train) == good and len(encoded_rows) == 60
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failed_run_leaves_nothing_behind(config, tmp_path):
    path = write(tmp_path / "bad.jsonl", [*pairs(3), {"prompt": "a", "completion": " "}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:4: an assistant turn is empty"):
        load(config, train=[path])
    assert list(data_dataset.cache_folder(config).iterdir()) == []


def _load_in_process(config, barrier, results):
    barrier.wait()
    results.put(everything(load_groups(config, byte_level(), progress=False).train))


def test_two_processes_at_once_read_the_same_and_leave_one_folder(config):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_load_in_process, args=(config, barrier, results)) for _ in range(2)
    ]
    for p in processes:
        p.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for p in processes:
        p.join()
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 20
    assert len(list(data_dataset.cache_folder(config).iterdir())) == 1


def test_the_first_of_two_writers_wins(tmp_path):
    folder = tmp_path / "key"

    def slow(path):
        data_dataset.publish(folder, lambda p: {"by": p.write_bytes(b"fast") and "fast"})
        path.write_bytes(b"slow!")
        return {"by": "slow"}

    assert data_dataset.publish(folder, slow)["by"] == "fast"
    assert (folder / data_dataset.TOKENS).read_bytes() == b"fast"
    assert data_dataset.read_manifest(folder)["by"] == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_a_cache_folder_that_cannot_be_written_is_an_error_with_advice(config, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write tokenised data here.*--data\.cache_dir"):
        load(config, cache_dir=str(tmp_path / "file"))


def test_the_cache_folder_follows_option_then_environment_then_user_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("POSTTRAIN_CACHE", raising=False)
    assert data_dataset.cache_folder(DataConfig()) == tmp_path / "xdg" / "posttrain" / "data"
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "env"))
    assert data_dataset.cache_folder(DataConfig()) == tmp_path / "env" / "data"
    assert (
        data_dataset.cache_folder(DataConfig(cache_dir=str(tmp_path / "own")))
        == tmp_path / "own" / "data"
    )


def test_several_processes_tokenise_the_same_in_the_same_order(config, tmp_path):
    rows = write(tmp_path / "many.jsonl", pairs(700))
    one = load(config, train=[rows])
    two = load(config, train=[rows], num_proc=2, cache_dir=str(tmp_path / "second"))
    assert not two.report.train[0].from_cache
    assert everything(two.train) == everything(one.train)
