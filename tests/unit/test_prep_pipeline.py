"""The run as a whole: nothing lost, split by prompt, the same bytes, cleaning step by step."""

from __future__ import annotations

import gzip
import json
import random
import re

import pytest

from posttrain.cli.main import main
from posttrain.data import DataConfig, load_groups
from posttrain.data.prep import PrepConfig, prepare
from posttrain.data.prep.duplicates import near_duplicates, words
from posttrain.data.prep.report import difference
from posttrain.data.readers import read_file
from posttrain.report.prep import length_bias
from tests.tiny import byte_tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def pair(prompt, chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def run(tmp_path, rows, name="out", **options):
    source = rows if isinstance(rows, str) else write(tmp_path / "raw.jsonl", rows)
    config = PrepConfig(**{"inputs": [source], "out": tmp_path / name, "workers": 1, **options})
    return prepare(config, show_progress=False)


def read(folder):
    return [row.values for path in sorted(folder.glob("*.parquet")) for row in read_file(path)]


def all_files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def accounted(manifest):
    """Rows in = bad + parsed; samples = used + dropped; built rows = written + dropped."""
    counts = manifest["counts"]
    assert counts["read"] == counts["parsed"] + counts["rejected"]
    sample_reasons = (
        "nothing to compare: one answer, or all tied",
        "near-duplicate prompt",
        "shares an n-gram with the evaluation set",
    )
    answers = ("empty answer", "repeated answer")
    rows_dropped = sum(
        n for reason, n in manifest["dropped"].items() if reason not in (*sample_reasons, *answers)
    )
    assert counts["dropped_samples"] == sum(manifest["dropped"].get(r, 0) for r in sample_reasons)
    assert counts["built"] == counts["written_train"] + counts.get("written_test", 0) + rows_dropped


def test_cleaning_counts_every_reason(tmp_path):
    rows = [
        pair("one"),
        pair("one"),
        pair("two"),
        pair("two", "bad", "good"),
        pair("three", "same", "same"),
        pair("four", "", "x"),
        pair("five", score_chosen=3, score_rejected=2.9),
        pair("six", score_chosen=3, score_rejected=1),
        {"text": "?"},
        pair("seven", "a" * 99, "b"),
    ]
    manifest = run(tmp_path, rows)
    accounted(manifest)
    assert manifest["dropped"] == {
        "contradictory: both orders are preferred": 2,
        "empty answer": 1,
        "equal sides": 1,
        "nothing to compare: one answer, or all tied": 1,
        "repeated pair": 1,
    }
    assert [r["prompt"][0]["content"] for r in read(tmp_path / "out" / "train")] == [
        "one",
        "five",
        "six",
        "seven",
    ]
    limited = run(tmp_path, rows, name="limited", min_margin=0.5, max_chars=50)
    accounted(limited)
    assert [r["margin"] for r in read(tmp_path / "limited" / "train")] == [2.0]
    assert (
        limited["dropped"]["margin below the minimum"] == 1
        and limited["dropped"]["no scores, so no margin"] == 2
    )
    rejects = [
        json.loads(line)
        for line in (tmp_path / "limited" / "rejects.jsonl").read_text().splitlines()
    ]
    assert (
        rejects[0]["row"] == 9
        and "unknown format" in rejects[0]["reason"]
        and rejects[0]["file"] == "raw.jsonl"
    )
    assert len(rejects) == 1 + sum(
        n for reason, n in limited["dropped"].items() if reason != "empty answer"
    )


def test_scattered_rows_are_joined_by_prompt(tmp_path):
    rows = [{"prompt": f"q{i % 3}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(9)]
    manifest = run(tmp_path, rows, strategy="all")
    accounted(manifest)
    made = {
        (r["prompt"][0]["content"], r["chosen"][0]["content"], r["rejected"][0]["content"])
        for r in read(tmp_path / "out" / "train")
    }
    wanted = {
        (a["prompt"], a["completion"], b["completion"])
        for a in rows
        for b in rows
        if a["prompt"] == b["prompt"] and a["label"] and not b["label"]
    }
    assert made == wanted


def test_layouts(tmp_path):
    rows = [{"prompt": "q", "completions": ["c", "a", "b"], "scores": [1.0, 3.0, 1.0]}, pair("p")]
    run(tmp_path, rows, name="groups", layout="groups")
    first = next(r for r in read(tmp_path / "groups" / "train") if r["scores"])
    assert [c[0]["content"] for c in first["completions"]] == ["a", "c", "b"]
    assert (first["ranks"], first["scores"]) == ([0, 1, 1], [3.0, 1.0, 1.0])
    run(tmp_path, rows, name="labelled", layout="labelled")
    labels = sorted(
        (r["completion"][0]["content"], r["label"]) for r in read(tmp_path / "labelled" / "train")
    )
    assert labels == [("a", True), ("b", False), ("bad", False), ("c", False), ("good", True)]
    run(tmp_path, rows, name="sft", layout="sft")
    assert sorted(r["messages"][-1]["content"] for r in read(tmp_path / "sft" / "train")) == [
        "a",
        "good",
    ]


def vocabulary_prompt(rng):
    return " ".join(
        rng.choice(
            [
                "red",
                "blue",
                "cat",
                "dog",
                "runs",
                "jumps",
                "over",
                "under",
                "hill",
                "river",
                "sun",
                "moon",
            ]
        )
        for _ in range(30)
    )


def test_split_is_by_prompt_and_its_near_duplicates(tmp_path):
    rng = random.Random(0)
    prompts = [vocabulary_prompt(rng) for _ in range(150)]
    rows = [pair(p, f"good {k}") for p in prompts for k in range(2)] + [
        pair(p + " please", "fine") for p in prompts
    ]
    rng.shuffle(rows)
    manifest = run(tmp_path, rows, test_fraction=0.3, near_duplicates="split")
    accounted(manifest)
    sides = {
        side: {
            r["prompt"][0]["content"].removesuffix(" please") for r in read(tmp_path / "out" / side)
        }
        for side in ("train", "test")
    }
    assert not sides["train"] & sides["test"]
    assert 25 <= len(sides["test"]) <= 65
    dropped = run(tmp_path, rows, name="dropped", near_duplicates="drop")
    accounted(dropped)
    left = [r["prompt"][0]["content"] for r in read(tmp_path / "dropped" / "train")]
    assert len({p.removesuffix(" please") for p in left}) == 150 == len(set(left))


def test_minhash_finds_near_duplicates_and_nothing_else():
    rng = random.Random(1)
    prompts, near = [], {}
    for i in range(200):
        text = vocabulary_prompt(rng)
        prompts += [(f"{i}a", text), (f"{i}b", text + " now"), (f"{i}a", text)]
        near[f"{i}b"] = f"{i}a"
    assert near_duplicates(prompts, 0.75) == near
    assert (
        near_duplicates(prompts, 1.0).items() < near.items()
    )  # only those whose 64 minima are all equal
    assert near_duplicates([], 0.75) == {}


def test_languages_without_spaces_have_near_duplicates_and_overlaps_too(tmp_path):
    """Every character is a word: else a whole sentence is one, and only equal sentences are
    alike."""
    question = "請用三句話說明為什麼海水是鹹的而河水不是"
    assert len(words(question)) == len(question) and words("海水 is salty") == [
        "海",
        "水",
        "is",
        "salty",
    ]
    assert len(words("ทำไมน้ำทะเลเค็ม")) > 5 and words("naïve café") == ["naïve", "café"]
    prompts = [
        ("a", question * 3),
        ("b", question * 3 + "嗎"),
        ("c", "猫は窓のそばで眠っている" * 4),
    ]
    assert near_duplicates(prompts, 0.8) == {"b": "a"}
    evaluation = write(tmp_path / "eval.jsonl", [{"question": question}])
    rows = [pair(f"{question}？謝謝", "鹽", "糖"), pair("別的問題", "是", "否")]
    manifest = run(tmp_path, rows, decontaminate=[evaluation])
    assert manifest["dropped"] == {"shares an n-gram with the evaluation set": 1}


def test_calls_thoughts_tools_flags_and_carried_columns_go_through(tmp_path):
    """What is trained from prep's files is what is trained from the raw rows, and what changes
    nothing goes along on request."""
    from posttrain.data import DataConfig, groups_from_rows
    from tests.tiny import byte_tokenizer
    from tests.unit.test_layouts import TOOLS_TEMPLATE

    def call(**arguments):
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "lift", "arguments": arguments}}
            ],
        }

    tool = {
        "type": "function",
        "function": {
            "name": "lift",
            "parameters": {"type": "object", "properties": {"floor": {"type": "integer"}}},
        },
    }
    user, result = {"role": "user", "content": "to 3"}, {"role": "tool", "content": "there"}
    good = {"role": "assistant", "content": "  done", "reasoning_content": "three is above"}
    rows = [
        {
            "prompt": [user, call(floor=3, fast=None), result],
            "chosen": [good],
            "rejected": [call(speed=1)],
            "tools": [tool],
            "weight": 2,
            "note": {"a": 1},
        },
        {"prompt": "plain", "chosen": "yes", "rejected": "no", "note": "n", "id": 7},
    ]
    manifest = run(tmp_path, rows, carry=["note"])
    made = read(tmp_path / "out" / "train")
    assert (
        manifest["columns"]["carried"] == {"id": 1, "note": 2}
        and manifest["columns"]["used"]["tools"] == 1
    )
    assert [r["note"] for r in made] == ['{"a": 1}', "n"] and [r["weight"] for r in made] == [
        2.0,
        None,
    ]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS_TEMPLATE
    for raw, prepped in zip(rows, made, strict=True):
        groups = [
            groups_from_rows(
                [row], tokenizer, config=DataConfig(carry=["note"]), purpose="preference"
            )[0]
            for row in (raw, prepped)
        ]
        (a, b) = (
            [
                list(g.prompt_ids),
                [(list(c.token_ids), list(c.loss_mask)) for c in g.completions],
                list(g.pairs),
            ]
            for g in groups
        )
        assert a == b
    rejected = run(tmp_path, rows, name="groups", layout="groups", carry=["note"])
    assert rejected["counts"]["rejected"] == 1, "a weight has no place there"
    lines = [
        json.loads(line)
        for line in (tmp_path / "groups" / "rejects.jsonl").read_text().splitlines()
    ]
    assert lines[0]["values"] == rows[0] and "weight" in lines[0]["reason"], "the whole row"


def test_texts_keep_their_indentation(tmp_path):
    run(tmp_path, [pair("Complete:\ndef f(x):\n", "    y = x\n    return y\n", "    return 0\n")])
    sides = [
        [{"role": "assistant", "content": c}]
        for c in ("    y = x\n    return y\n", "    return 0\n")
    ]
    user = [{"role": "user", "content": "Complete:\ndef f(x):\n"}]
    run(tmp_path, [{"prompt": user, "chosen": sides[0], "rejected": sides[1]}], name="messages")
    (row,) = read(tmp_path / "out" / "train")
    assert {**row, "source": ""} == {**read(tmp_path / "messages" / "train")[0], "source": ""}
    assert [row[n][0]["content"] for n in ("prompt", "chosen", "rejected")] == [
        "Complete:\ndef f(x):\n",
        "    y = x\n    return y\n",
        "    return 0\n",
    ]


def test_answers_to_different_inputs_are_not_compared(tmp_path):
    inputs = (
        ("Guten Tag", "Good day", 5),
        ("Guten Tag", "Bread", 2),
        ("Gute Nacht", "Good night", 5),
        ("Gute Nacht", "Nut", 1),
    )
    run(
        tmp_path,
        [{"instruction": "Translate", "input": s, "output": o, "score": n} for s, o, n in inputs],
    )
    made = [
        (r["prompt"][0]["content"], r["chosen"][0]["content"], r["rejected"][0]["content"])
        for r in read(tmp_path / "out" / "train")
    ]
    assert sorted(made) == [
        ("Translate\n\nGute Nacht", "Good night", "Nut"),
        ("Translate\n\nGuten Tag", "Good day", "Bread"),
    ]


def test_unrated_answers_are_in_no_pair_and_counted(tmp_path):
    rows = [{"prompt": "q", "responses": ["a", "b", "c"], "scores": [1.0, None, 3.0]}]
    manifest = run(tmp_path, rows, strategy="all")
    assert manifest["dropped"] == {"unrated answer": 1}
    assert [
        (r["chosen"][0]["content"], r["rejected"][0]["content"])
        for r in read(tmp_path / "out" / "train")
    ] == [("c", "a")]


def test_same_options_same_bytes_whatever_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.data.prep.pipeline._PARTITION_BYTES", 4000)
    rng = random.Random(2)
    rows = [pair(vocabulary_prompt(rng), f"good {i}", f"bad {i}") for i in range(120)] + [{"x": 1}]
    outputs = []
    for name, workers in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, rows, name=name, test_fraction=0.2, near_duplicates="split", workers=workers)
        outputs.append(all_files(tmp_path / name))
    assert outputs[0] == outputs[1] == outputs[2]
    assert sum(name.startswith("train/") for name in outputs[0]) > 3
    run(tmp_path, rows, name="d", test_fraction=0.2, near_duplicates="split", seed=1)
    assert all_files(tmp_path / "d") != outputs[0]


def test_decontamination(tmp_path):
    long = "how many clips did natalia sell altogether in april and may of this year"
    evaluation = write(
        tmp_path / "eval.jsonl",
        [{"question": long, "answer": "42"}, {"question": "what is the capital"}],
    )
    rows = [
        pair("please say " + long + " now"),
        pair("What is the CAPITAL?"),
        pair("what is the capital of france"),
        pair("42 things", "42", "41"),
    ]
    manifest = run(tmp_path, rows, decontaminate=[evaluation])
    assert manifest["dropped"] == {"shares an n-gram with the evaluation set": 2}
    left = {r["prompt"][0]["content"] for r in read(tmp_path / "out" / "train")}
    assert left == {"what is the capital of france", "42 things"}


def test_bad_files_lose_only_what_is_bad(tmp_path):
    good = [json.dumps(pair(f"p{i}")) for i in range(40)]
    (tmp_path / "latin.jsonl").write_bytes(
        "\n".join(
            [good[0], json.dumps(pair("x"))[:-1] + ', "é": 1}', "[1, 2]", "{", good[1]]
        ).encode("latin-1")
    )
    packed = gzip.compress("\n".join(good).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) - 12])
    (tmp_path / "lines.csv").write_text(
        'prompt,chosen,rejected\n"two\nlines","good, really","bad"\nonly,two\n"last",a,b\n'
    )
    (tmp_path / "nested.jsonl").write_text(
        json.dumps({"prompt": None, "chosen": [{"role": None}], "rejected": {"a": [None]}})
        + "\n"
        + good[2]
        + "\n"
    )
    (tmp_path / "big.jsonl").write_text(json.dumps(pair("big", "y" * 10_000_000)) + "\n")
    inputs = [
        str(tmp_path / n)
        for n in ("latin.jsonl", "cut.jsonl.gz", "lines.csv", "nested.jsonl", "big.jsonl")
    ]
    manifest = prepare(
        PrepConfig(inputs=inputs, out=tmp_path / "out", workers=1), show_progress=False
    )
    accounted(manifest)
    reasons = {
        (r["file"], r["row"]): r["reason"]
        for r in map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    }
    assert (
        "not UTF-8" in reasons["latin.jsonl", 2]
        and "JSON object" in reasons["latin.jsonl", 3]
        and "not JSON" in reasons["latin.jsonl", 4]
    )
    assert any(
        file == "cut.jsonl.gz" and "cut short" in reason for (file, _), reason in reasons.items()
    )
    assert "fields of the header" in reasons["lines.csv", 2]
    assert ("nested.jsonl", 1) in reasons
    prompts = {r["prompt"][0]["content"] for r in read(tmp_path / "out" / "train")}
    assert {"two\nlines", "last", "big", "p0", "p1", "p2"} <= prompts
    with pytest.raises(ValueError, match=r"latin.jsonl:2: not UTF-8.*--strict"):
        prepare(
            PrepConfig(inputs=inputs, out=tmp_path / "strict", workers=1, strict=True),
            show_progress=False,
        )
    assert not (tmp_path / "strict").exists() and not list(tmp_path.glob(".strict*"))


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    run(tmp_path, [pair("p")])
    with pytest.raises(ValueError, match="not empty"):
        run(tmp_path, [pair("p")])
    with pytest.raises(ValueError, match="No row of .* could be used .*unknown format"):
        run(tmp_path, [{"text": "?"}], name="none")
    with pytest.raises(ValueError, match="No training row is left"):
        run(tmp_path, [pair("p", "a", "a")], name="left")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("posttrain.data.prep.pipeline._finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [pair("p")], name="stopped")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw.jsonl"]


def test_length_bias_is_said_where_it_cannot_be_chance():
    assert length_bias(80, 100) == (0.8, True)
    assert length_bias(52, 100)[1] is False
    assert length_bias(3, 4)[1] is False  # too few to tell


def test_the_report_has_counts_in_words_histograms_and_ten_rows_as_text(tmp_path, capsys):
    rows = [
        pair(f"p{i} <script>", "longer than the other", "short", margin=float(i)) for i in range(50)
    ]
    path, out = write(tmp_path / "raw.jsonl", rows), tmp_path / "out"
    assert main(["prep", "pairs", str(path), "--out", str(out)]) == 0
    assert f"look at {out / 'report.html'}" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "Length bias." in page and "100.0% of 50 pairs" in page
    assert "rows written for training</td>" in page and "written_train" not in page
    specs = [json.loads(s) for s in re.findall('class="spec">(.*?)</script>', page)]
    lengths, margins = ([r for rows in s["datasets"].values() for r in rows] for s in specs)
    assert {(r["part"], r["low"], r["high"], r["value"]) for r in lengths} == {
        ("chosen", 16, 32, 50),
        ("rejected", 4, 8, 50),
    }
    assert sum(r["value"] for r in margins) == 50 and margins[0]["low"] == 0.0
    assert page.count('<div class="card">') == 10 and page.count("p1 &lt;script&gt;") <= 1
    assert not re.search(r"p\d+ <script>", page)


def test_difference_marks_what_the_other_side_has_not():
    left, right = difference("the cat sat", "the dog sat")
    assert [left.plain[s.start : s.end] for s in left.spans] == ["cat"]
    assert [right.plain[s.start : s.end] for s in right.spans] == ["dog"]


def test_odd_rows_do_not_end_the_run_and_columns_of_the_output_are_carried_under_another_name(
    tmp_path,
):
    rows = [
        pair("q", "cut \ud83d", "b"),
        pair("q", "good", "bad", source="web", row="7"),
        {**pair("r"), "note": "\ud83d"},
    ]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    manifest = run(tmp_path, str(tmp_path / "odd.jsonl"), carry=["source", "row", "note"])
    assert manifest["counts"]["rejected"] == 2
    (made,) = read(tmp_path / "out" / "train")
    assert (made["raw_source"], made["raw_row"], made["source"], made["row"]) == (
        "web",
        "7",
        "odd.jsonl",
        2,
    )
    assert (
        len(
            [
                json.loads(line)
                for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
            ]
        )
        == 2
    )


def test_two_bad_answers_are_no_demonstration_and_a_kept_tie_has_margin_0(tmp_path):
    row = {"prompt": "q", "response_a": "x", "response_b": "y", "winner": "tie (bothbad)"}
    with pytest.raises(ValueError, match="No training row is left"):
        run(tmp_path, [row], name="sft", layout="sft")
    run(tmp_path, [row], name="ties", ties="keep")
    assert [r["margin"] for r in read(tmp_path / "ties" / "train")] == [0.0]


def test_what_was_carried_along_in_prep_is_carried_along_in_training(tmp_path, capsys):
    """A CSV with a note: its rows are bad without --carry, which the screen says with the first
    reason; with it they train from the folder without being named again."""
    source = tmp_path / "raw.csv"
    lines = [f"is {i} even?,yes {i},no {i},{'seen' if i % 2 else ''}" for i in range(8)]
    source.write_text("\n".join(["question,good,bad,note", *lines]) + "\n")
    names = ["--columns", "prompt=question", "--columns", "chosen=good", "rejected=bad"]
    assert main(["prep", "pairs", str(source), "--out", str(tmp_path / "a"), *names]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "8 rows read, 4 bad" in said
    assert "raw.csv:2: nothing reads note" in said and "rejects.jsonl" in said
    carried = ["--out", str(tmp_path / "b"), *names, "--carry", "note"]
    assert main(["prep", "pairs", str(source), *carried]) == 0
    config = DataConfig(train=[str(tmp_path / "b" / "train")], cache_dir=str(tmp_path / "cache"))
    groups = load_groups(config, byte_tokenizer(), purpose="preference").train
    assert len(groups) == 8
    assert main(["prep", "pairs", str(source), "--out", str(tmp_path / "c"), "--columns", "x"]) == 2
    assert "--columns takes OURS=YOURS" in capsys.readouterr().err
    assert (
        main(
            [
                "prep",
                "pairs",
                str(source),
                "--out",
                str(tmp_path / "c"),
                "--columns",
                "ask=question",
            ]
        )
        == 2
    )
    assert "columns: ['ask'] belong to no format" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match="PrepConfig.near_duplicates is one of off, split, drop; got 'keep'"
    ):
        PrepConfig(inputs=[str(source)], out=tmp_path / "c", near_duplicates="keep")  # type: ignore[arg-type]
