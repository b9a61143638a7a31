import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data import read_rows

ROWS = [
    {"prompt": "What is 2+2?", "completion": "4"},
    {"prompt": 'He said "no",\nthen left', "completion": "Ü 👩‍🚀"},
]


def write_jsonl(path, rows=ROWS, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def write_csv(path, opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": lambda p: write_jsonl(p, opener=gzip.open),
    "rows.json": lambda p: p.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "lines.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.csv.gz": lambda p: write_csv(p, gzip.open),
    "rows.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p),
    "bom.jsonl": lambda p: p.write_bytes(
        b"\xef\xbb\xbf" + "\n".join(json.dumps(r) for r in ROWS).encode()
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    rows = list(read_rows(str(tmp_path / name)))
    assert [r.values for r in rows] == ROWS
    assert [r.where for r in rows] == [f"{tmp_path / name}:1", f"{tmp_path / name}:2"]


def test_a_row_number_is_the_line_also_after_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n\n{"a": 2}\n')
    assert [(r.row_number, r.values["a"]) for r in read_rows(str(path))] == [(1, 1), (4, 2)]


def test_a_folder_is_read_in_sorted_order_and_other_files_are_left_alone(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"x": 2}])
    write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / ".hidden.jsonl").write_text("not json")
    assert [r.values["x"] for r in read_rows(str(tmp_path))] == [1, 2]


def values(source, **options):
    return [row.values for row in read_rows(str(source), **options)]


def test_of_a_folder_with_several_splits_the_one_that_is_meant_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train-00000.jsonl", [{"x": 1}])
    write_jsonl(tmp_path / "data" / "test-00000.jsonl", [{"x": 2}])
    assert values(tmp_path) == [{"x": 1}] and values(tmp_path, split="test") == [{"x": 2}]
    write_jsonl(tmp_path / "data" / "more.jsonl", [{"x": 3}])
    with pytest.raises(
        ValueError,
        match=r"several splits, among them data/test-00000.jsonl.*'train' cannot be told.*Name the files",
    ):
        values(tmp_path)


def test_what_datasets_saved_is_read_and_what_describes_rows_is_no_row(tmp_path):
    import datasets

    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=saved, test=saved.select([4])).save_to_disk(str(tmp_path / "splits"))
    assert values(tmp_path / "one") == values(tmp_path / "splits") == rows
    assert values(tmp_path / "splits", split="test") == rows[4:]
    with pytest.raises(ValueError, match="no split 'dev'; there are test, train"):
        values(tmp_path / "splits", split="dev")
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed" / "rows.jsonl", rows[:1])
    (tmp_path / "mixed" / "dataset_info.json").write_text(
        '{"features": {"prompt": {"dtype": "string"}}}'
    )
    assert values(tmp_path / "mixed") == rows[:1]
    write_jsonl(tmp_path / "mixed" / "rejects.jsonl", rows[1:2])
    assert values(tmp_path / "mixed") == [rows[1], rows[0]], (
        "a file of one's own, whatever its name"
    )


def test_what_prep_wrote_is_read_as_a_folder(tmp_path):
    from posttrain.data.prep import PrepConfig, prepare

    raw = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(20)] + [{"x": 1}]
    write_jsonl(tmp_path / "raw.jsonl", raw)
    config = PrepConfig(
        inputs=[str(tmp_path / "raw.jsonl")], out=tmp_path / "out", workers=1, test_fraction=0.3
    )
    counts = prepare(config, show_progress=False)["counts"]
    assert len(values(tmp_path / "out")) == counts["written_train"] > 0
    assert len(values(tmp_path / "out", split="test")) == counts["written_test"] > 0


def test_a_data_set_of_the_hub_on_disk_is_read_by_its_card(tmp_path):
    card = "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n  - split: test\n    path: main/test-*\n"
    (tmp_path / "README.md").write_text(card + "---\n# Data\n")
    for config in ("main", "other"):
        (tmp_path / config).mkdir()
        for k, split in enumerate(("train", "test")):
            write_jsonl(
                tmp_path / config / f"{split}-00000-of-00001.jsonl", [{"x": f"{config} {k}"}]
            )
    assert values(tmp_path) == [{"x": "main 0"}] and values(tmp_path, split="test") == [
        {"x": "main 1"}
    ]
    (tmp_path / "README.md").write_text(
        card + "- config_name: other\n  data_files: other/train-*\n---\n"
    )
    with pytest.raises(ValueError, match="which of its configs. README.md names main, other"):
        values(tmp_path)
    assert values(f"{tmp_path}:other") == [{"x": "other 0"}]
    with pytest.raises(ValueError, match="names no file of split 'test'"):
        values(f"{tmp_path}:other", split="test")


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no data file in this folder.*found notes.txt"):
        list(read_rows(str(tmp_path)))


def bad(name, content):
    return name, content if isinstance(content, bytes) else content.encode()


GOOD_LINE = '{"prompt": "a", "completion": "b"}\n'
BAD_FILES = {
    "empty": (*bad("e.jsonl", ""), r"e\.jsonl: no rows; the file is empty"),
    "blank": (*bad("e.jsonl", "\n\n"), r"e\.jsonl: no rows"),
    "empty csv": (*bad("e.csv", ""), r"e\.csv: no rows"),
    "csv with a header only": (*bad("e.csv", "prompt,completion\n"), r"e\.csv: no rows"),
    "empty array": (*bad("e.json", "[]"), r"e\.json: no rows"),
    "not JSON": (
        *bad("b.jsonl", GOOD_LINE * 2 + "{'prompt': 1}\n"),
        r"b\.jsonl:3: not JSON: .*\{'prompt': 1\}",
    ),
    "cut line": (*bad("b.jsonl", GOOD_LINE + GOOD_LINE[:-10]), r"b\.jsonl:2: not JSON"),
    "broken array": (*bad("b.json", "[\n{},\n{]"), r"b\.json:3: not JSON"),
    "no object": (
        *bad("b.jsonl", GOOD_LINE + '["a", "b"]\n'),
        r'b\.jsonl:2: a row is a JSON object.*got an array: \["a"',
    ),
    "a string": (
        *bad("b.json", '[{"a": 1}, "x"]'),
        r"b\.json:2: a row is a JSON object.*got a string: x",
    ),
    "null": (*bad("b.jsonl", "null\n"), r"b\.jsonl:1: a row is a JSON object.*got null"),
    "latin-1": (
        *bad("b.jsonl", GOOD_LINE.encode() + '{"prompt": "ü"}\n'.encode("latin-1")),
        r"b\.jsonl:2: not UTF-8: byte 0xfc.*iconv",
    ),
    "utf-16": (
        *bad("b.csv", "prompt,completion\n".encode("utf-16")),
        r"b\.csv:1: not UTF-8: byte 0xff",
    ),
    "cut gzip": (
        *bad("b.jsonl.gz", gzip.compress(GOOD_LINE.encode() * 2)[:-9]),
        r"b\.jsonl\.gz:3: the gzip file is damaged or cut short after 2 lines",
    ),
    "no gzip": (*bad("b.jsonl.gz", GOOD_LINE), r"b\.jsonl\.gz:1: the gzip file is damaged"),
    "csv field missing": (
        *bad("b.csv", "prompt,completion\na,b\nc\n"),
        r"b\.csv:2: .*ends on line 3 has not the 2 fields",
    ),
    "csv field too many": (
        *bad("b.csv", "prompt,completion\na,b,c\n"),
        r"b\.csv:1: .*Quote fields",
    ),
    "csv open quote": (*bad("b.csv", 'prompt,completion\na,b\n"c,d\n'), r"b\.csv:2: not CSV"),
    "no parquet": (*bad("b.parquet", "PAR"), r"b\.parquet:1: not a readable Parquet file"),
    "suffix": (
        *bad("b.txt", "hello"),
        r"b\.txt: unknown suffix '\.txt'; rows are read from \.jsonl",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_row(tmp_path, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "./nowhere", "a/b/c", "justaname", "data/train.jsonl"]
)
def test_a_missing_path_that_is_no_hub_id_fails_without_the_network(source, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=f"{source}: no such file or folder .*not a hub id"):
        list(read_rows(source))


def test_a_hub_id_gives_its_split_and_a_missing_one_says_both_readings(monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        if name == "no/where":
            raise ConnectionError("Couldn't reach 'no/where' on the Hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows("openai/gsm8k:main", split="test"))
    assert [r.values for r in rows] == ROWS and rows[1].where == "openai/gsm8k:main[test]:2"
    assert asked == [("openai/gsm8k", "main", "test")]
    with pytest.raises(
        ValueError, match="no/where: no such file or folder here.*hub id.*Couldn't reach"
    ):
        list(read_rows("no/where"))


def test_a_name_that_stands_twice_is_an_error(tmp_path):
    """Only the last of them would be read."""
    (tmp_path / "a.csv").write_text("prompt,completion,completion\nQ,a,b\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q", "completion": "a", "completion": "b"}\n')
    (tmp_path / "a.json").write_text('[{"prompt": "Q", "prompt": "R"}]')
    with pytest.raises(ValueError, match="two columns have the same name"):
        values(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="a.jsonl:1: not JSON: the key 'completion' stands twice"):
        values(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="the key 'prompt' stands twice"):
        values(tmp_path / "a.json")
