"""Stages, what decides them, and what runs again: with scripts that note each time they run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from posttrain.cli.main import main
from posttrain.pipeline.run import Pipeline, StageFailed, option
from posttrain.pipeline.slurm import job_script, queued_jobs, submit
from posttrain.pipeline.stages import OUTPUTS, command_of, merged, read_stages
from tests.e2e.launching import REPO

SCRIPT = """
import argparse, pathlib, time
p = argparse.ArgumentParser()
p.add_argument("--out"); p.add_argument("--read", nargs="*", default=[])
p.add_argument("--say", default=""); p.add_argument("--seconds", type=float, default=0)
p.add_argument("--fail", action="store_true")
a = p.parse_args()
out = pathlib.Path(a.out); ran = out.parent / "ran.txt"
with ran.open("a") as f: f.write(out.name + "\\n")
time.sleep(a.seconds)
if a.fail: raise SystemExit("no luck today")
(out / "text.txt").write_text(a.say + "".join(pathlib.Path(r).read_text() for r in a.read))
"""
DIAMOND = {
    "variables": {"word": "w", "left_word": "l"},
    "stages": {
        name: {
            "run": "python ${here}/script.py",
            "settings": {"out": "${out}", **settings},
            "outputs": {"text": "text.txt"},
        }
        for name, settings in {
            "top": {"say": "${word}"},
            "left": {"say": "${left_word}", "read": ["${top.text}"]},
            "right": {"say": "r", "read": ["${top.text}"]},
            "bottom": {"read": ["${left.text}", "${right.text}"]},
        }.items()
    },
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def pipeline(folder: Path, text: dict = DIAMOND, **variables) -> Pipeline:
    (folder / "p.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    root = folder / "out"
    stages = read_stages(folder / "p.yaml", root=root, variables=variables)
    return Pipeline(stages, root=root, name="p")


def ran(p: Pipeline, jobs: int = 1) -> list[str]:
    """The names of the stages that a run executes."""
    log = p.root / "ran.txt"
    log.unlink(missing_ok=True)
    p.run_all(p.stages, jobs=jobs)
    return log.read_text().split() if log.exists() else []


@pytest.mark.parametrize("jobs", [1, 3])
def test_stages_run_once_and_after_what_they_need(folder, jobs):
    p = pipeline(folder)
    order = ran(p, jobs)
    assert sorted(order) == ["bottom", "left", "right", "top"]
    assert order[0] == "top" and order[-1] == "bottom"
    assert (p.root / "bottom/text.txt").read_text() == "lwrw"
    assert ran(p, jobs) == []


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"left_word": "x"}, ["left", "bottom"]),
        ({"word": "x"}, ["top", "left", "right", "bottom"]),
        ({}, []),
    ],
)
def test_a_change_runs_its_stage_and_those_that_depend_on_it(folder, change, again):
    ran(pipeline(folder))
    p = pipeline(folder, **change)
    assert [s.name for s in p.stages if p.verdict(s).state != "done"] == again
    assert ran(p) == again
    for name in again:  # what was there is kept aside
        assert (p.root / f"{name}.old-1/text.txt").exists()


def test_a_stages_own_change_and_its_reason(folder):
    ran(pipeline(folder))
    text = json.loads(json.dumps(DIAMOND))
    text["stages"]["right"]["settings"]["say"] = "R"
    p = pipeline(folder, text)
    why = {s.name: p.verdict(s).why for s in p.stages}
    assert why == {
        "top": "",
        "left": "",
        "right": 'settings.say is "R", was "r"',
        "bottom": "stage right is another",
    }


def test_the_content_of_a_file_decides_and_its_time_does_not(folder):
    data = folder / "data.jsonl"
    data.write_text("1")
    text = json.loads(json.dumps(DIAMOND))
    text["stages"]["right"]["settings"]["read"].append(str(data))
    assert len(ran(pipeline(folder, text))) == 4
    os.utime(data)
    assert ran(pipeline(folder, text)) == []
    data.write_text("2")
    assert ran(pipeline(folder, text)) == ["right", "bottom"]
    script = folder / "script.py"
    script.write_text(script.read_text() + "# other code\n")
    assert len(ran(pipeline(folder, text))) == 4


WRITES = """
import sys, pathlib
out = pathlib.Path(sys.argv[2])
(out / "checkpoints").mkdir()
(out / "checkpoints/model.txt").write_text("kept")
(out / "figures.png").write_bytes(b"\\x89PNG")
"""


def test_outputs_of_a_script_are_its_own(folder):
    """What it calls checkpoints stays, figures are no JSON, and all of them must be there."""
    (folder / "writes.py").write_text(WRITES)
    outputs = {"model": "checkpoints/model.txt", "figures": "figures.png"}
    run = {"run": f"python {folder}/writes.py", "settings": {"out": "${out}"}, "outputs": outputs}
    p = pipeline(folder, {"stages": {"a": run}})
    p.run(p.stages[0])
    assert p.verdict(p.stages[0]).state == "done"
    (p.root / "a/figures.png").unlink()
    assert "figures.png is gone" in p.verdict(p.stages[0]).why
    more = {"stages": {"a": run | {"outputs": outputs | {"table": "table.csv"}}}}
    p = pipeline(folder, more)
    with pytest.raises(StageFailed, match="did not write .*table.csv"):
        p.run(p.stages[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"stages": {"a": "sft"}}, "stage a is a mapping"),
        ({"stages": {"a": {"run": "sft", "only": "tiny"}}}, "only is a list; got 'tiny'"),
        ({"stages": {"a": {"run": "sft", "needs": "b"}}}, "needs is a list"),
        ({"variables": {"m": "${m}"}, "stages": {"a": {"run": "eval ${m}"}}}, "m names itself"),
    ],
)
def test_files_that_are_no_pipeline(folder, text, message):
    with pytest.raises(ValueError, match=message):
        pipeline(folder, text)


def test_a_stage_that_is_killed_says_by_what(folder):
    (folder / "dies.py").write_text("import os; os.kill(os.getpid(), 9)")
    p = pipeline(folder, {"stages": {"a": {"run": f"python {folder}/dies.py"}}})
    with pytest.raises(StageFailed, match="ended by SIGKILL"):
        p.run(p.stages[0])


def test_a_lost_output_is_made_again(folder):
    p = pipeline(folder)
    ran(p)
    (p.root / "left/text.txt").unlink()
    assert "is gone" in p.verdict(p.stages[1]).why
    assert ran(p) == ["left"]


def test_a_failure_says_the_end_of_the_log_and_stops(folder):
    text = json.loads(json.dumps(DIAMOND))
    text["stages"]["left"]["settings"]["fail"] = True
    p = pipeline(folder, text)
    with pytest.raises(StageFailed, match="no luck today"):
        ran(p)
    assert [p.verdict(s).state for s in p.stages] == ["done", "failed", "waiting", "waiting"]
    text["stages"]["left"]["settings"]["fail"] = False
    assert ran(pipeline(folder, text)) == ["left", "right", "bottom"]


def test_a_stage_that_writes_nothing_is_no_success(folder):
    text = json.loads(json.dumps(DIAMOND))
    text["stages"]["top"]["outputs"]["text"] = "other.txt"
    with pytest.raises(StageFailed, match="did not write .*other.txt"):
        ran(pipeline(folder, text))


def command(folder: Path, *words: str) -> list[str]:
    base = [
        sys.executable,
        "-m",
        "posttrain.cli.main",
        "pipeline",
        *words[:1],
        str(folder / "p.yaml"),
    ]
    return [*base, "--out", str(folder / "out"), *words[1:]]


def test_a_killed_pipeline_leaves_nothing_behind_that_disturbs(folder):
    """The killed one's script still runs when the next one begins: it is ended first."""
    text = json.loads(json.dumps(DIAMOND))
    text["stages"]["top"]["settings"]["seconds"] = 60
    p = pipeline(folder, text)
    first = subprocess.Popen(command(folder, "run"), stdout=subprocess.DEVNULL)
    while not (p.root / "ran.txt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    assert p.verdict(p.stages[0]).state == "running"
    with pytest.raises(ValueError, match="is being run by another process"):
        p.run(p.stages[0])
    first.send_signal(signal.SIGKILL)
    first.wait()
    found = p.verdict(p.stages[0])
    assert (found.state, found.why) == ("waiting", "was interrupted, and starts anew")
    assert left_over(p)
    text["stages"]["top"]["settings"]["seconds"] = 0
    p = pipeline(folder, text)
    assert len(ran(p)) == 4
    assert not left_over(p)


def test_ctrl_c_ends_the_stage_and_the_next_run_goes_on(folder):
    text = json.loads(json.dumps(DIAMOND))
    text["stages"]["top"]["settings"]["seconds"] = 60
    p = pipeline(folder, text)
    process = subprocess.Popen(
        command(folder, "run"),
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # what runs in the background of a shell ignores SIGINT, and so do its children
    while not (p.root / "ran.txt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert not left_over(p)
    assert p.verdict(p.stages[0]).why == "was interrupted, and starts anew"


def left_over(p: Pipeline) -> list[int]:
    mark = f"POSTTRAIN_STAGE={(p.root / 'top').resolve()}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [int(path.parent.name)] if mark in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_two_runs_at_once_are_refused_and_status_is_not(folder, capsys):
    ran(pipeline(folder))
    assert main(["pipeline", "status", str(folder / "p.yaml"), "--out", str(folder / "out")]) == 0
    assert capsys.readouterr().out.count("done") == 4


def test_force_runs_a_stage_and_all_that_depends_on_it(folder, capsys):
    p = pipeline(folder)
    ran(p)
    (p.root / "ran.txt").unlink()
    words = ["pipeline", "run", str(folder / "p.yaml"), "--out", str(folder / "out")]
    assert main([*words, "--force", "right", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("is forced to run again") == 2
    assert not (p.root / "ran.txt").exists()
    assert main([*words, "--force", "right"]) == 0
    assert (p.root / "ran.txt").read_text().split() == ["right", "bottom"]
    assert "p: done" in capsys.readouterr().out


def test_only_refuses_what_needs_a_stage_that_is_not_done(folder, capsys):
    """Else it would be done with the old input, and its record would say that it is the new."""
    ran(pipeline(folder))
    words = ["pipeline", "run", str(folder / "p.yaml"), "--out", str(folder / "out")]
    changed = [*words, "--set", "word=new"]
    assert main([*changed, "--only", "left"]) == 2
    assert "Stage left needs top, which is not done: settings.say" in capsys.readouterr().err
    assert main([*changed, "--only", "top", "--only", "left"]) == 0
    assert "p: left: right, bottom" in capsys.readouterr().out
    assert (folder / "out/left/text.txt").read_text() == "lnew"
    assert main([*words, "--only", "rihgt"]) == 2
    assert "Did you mean right?" in capsys.readouterr().err


def test_a_folder_that_is_called_as_an_option_decides_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = {"stages": {"a": {"run": "sample m", "settings": {"samples": 4, "task": ["t.jsonl"]}}}}
    before = pipeline(folder, text).stages[0].decides
    for name in ("samples", "sample", "task"):
        (folder / name).mkdir()
        (folder / name / "x").write_text("x")
    assert pipeline(folder, text).stages[0].decides == before
    (folder / "t.jsonl").write_text("{}")
    assert "the content of t.jsonl" in pipeline(folder, text).stages[0].decides


def one(**stage) -> dict:
    return {"stages": {"a": {"run": "sft", **stage}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "needs `stages:`"),
        ({"stages": {"a": {"run": "sftt"}}}, "runs 'sftt'.*Did you mean sft"),
        (one(setings={}), "unknown key 'setings'.*Did you mean settings"),
        (one(settings={"model": {"name": "${modle}"}}), "no variable"),
        (one(settings={"model": {"name": "${b.model}"}}), "needs stage 'b', which is not there"),
        ({"stages": {"a": {"run": "eval ${b.model}"}, "b": {"run": "sft"}}}, "is not before it"),
        ({"stages": {"a": {"run": "sft"}, "b": {"run": "eval ${a.modl}"}}}, "Did you mean model"),
        ({"sizes": {"x": {}}, **one()}, "has the sizes x: name one with --size; got none"),
        ({"stages": {"a b": {"run": "sft"}}}, "name is letters"),
        (one(settings={"model": "${out}"}, stages=1), "unknown key 'stages'"),
        (
            {"stages": {"a": {"run": "sft"}, "b": {"run": "eval ${a.best}"}}},
            "sets train.best_metric",
        ),
        ({"stages": {"a": {"run": "eval x", "settings": {"out": "y"}}}}, "out is the pipeline's"),
        (
            one(config=["nowhere"]),
            "Stage a: config .blocks of settings: none. is a file, or one of",
        ),
    ],
)
def test_a_wrong_file_says_where_and_what(folder, text, message):
    with pytest.raises(ValueError, match=message):
        pipeline(folder, text)


def test_broken_yaml_and_a_key_that_stands_twice(folder):
    for text, message in [
        ("stages: [a, b", "is no valid YAML"),
        ("stages:\n  a: {run: sft}\n  a: {run: dpo}\n", "the key 'a' stands twice"),
        ("- a", "holds no settings"),
    ]:
        (folder / "p.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_stages(folder / "p.yaml", root=folder, variables={})


def test_a_dry_run_finds_wrong_settings_options_and_paths(folder, capsys):
    for stage, message in [
        ({"run": "sft", "settings": {"data": {"train": "a text"}}}, "Expected a <class 'list'>"),
        ({"run": "eval smollm2-135m"}, "Evaluated on what?"),
        ({"run": "eval smolm2-135m", "settings": {"task": ["x"]}}, "Did you mean smollm2-135m"),
        ({"run": "sft", "settings": {"model": {"name": "./gone"}}}, "'./gone' does not exist"),
        ({"run": "merge ./gone smollm2-135m"}, "'./gone' does not exist"),
        ({"run": "eval m", "settings": {"task": ["x"], "reward": "exact_anwser"}}, "exact_answer?"),
        (
            {"run": "eval m", "settings": {"task": ["x"], "max_token": 3}},
            "Did you mean --max-tokens",
        ),
        ({"run": "sft", "settings": {"optimizer": {"lrr": 1}}}, "lrr"),
        (
            {"run": "eval smollm2-135m", "settings": {"tsak": ["x"]}},
            "unrecognized arguments: --tsak",
        ),
        ({"run": "sft", "launch": "cqu"}, "Did you mean cpu"),
        (
            {"run": "sft", "settings": {"data": {"train": ["gone.jsonl"]}}},
            "gone.jsonl is not there",
        ),
    ]:
        pipeline(folder, {"stages": {"a": stage}})
        words = [
            "pipeline",
            "run",
            str(folder / "p.yaml"),
            "--out",
            str(folder / "out"),
            "--dry-run",
        ]
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_values_keep_their_type_and_sizes_come_before_variables(folder):
    text = {
        "variables": {"n": 1, "all": ["${n}", "x${n}"], "same": "${n}"},
        "sizes": {"big": {"n": 5, "quick": {"n": 2}}},
        "stages": {"a": {"run": "sft", "settings": {"x": "${all}", "y": "${same}"}}},
    }
    (folder / "p.yaml").write_text(yaml.safe_dump(text))
    for quick, given, n in [(False, {}, 5), (True, {}, 2), (True, {"n": 9}, 9)]:
        (a,) = read_stages(folder / "p.yaml", root=folder, size="big", quick=quick, variables=given)
        assert a.settings == {"x": [n, f"x{n}"], "y": n}


def test_shared_settings_are_merged_key_by_key():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4, "c": None}}) == {
        "a": {"b": 4},
        "d": 3,
    }


def test_where_a_pipeline_lies_decides_nothing(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "script.py").write_text(SCRIPT)
    here, there = pipeline(folder), pipeline(other)
    assert [s.identity for s in here.stages] == [s.identity for s in there.stages]


def test_options_of_commands():
    assert option("max_tokens", 4) == ["--max-tokens", "4"]
    assert option("task", ["a", "b"]) == ["--task", "a", "b"]
    assert option("must_end", True) == ["--must-end"]
    assert option("must_end", False) == option("system", None) == []
    assert option("reward_options", {"x": {"y": 1}}) == ["--reward-options", '{"x": {"y": 1}}']
    assert command_of(["prep", "pairs", "x"]) in OUTPUTS


def test_options_of_sbatch_are_quoted_and_left_out_where_they_are_off(folder):
    (stage, *_) = pipeline(folder).stages
    stage = replace(stage, slurm={"requeue": False, "qos": None, "exclusive": True})
    script = job_script(stage, ["run"], log=Path("my runs/top.log"))
    assert "#SBATCH --output='my runs/top.slurm.log'\n" in script
    assert "#SBATCH --exclusive\n" in script
    assert "requeue" not in script and "qos" not in script


def test_slurm_jobs_wait_for_what_they_need(folder, monkeypatch):
    """sbatch is a script here that notes what it was given."""
    given = folder / "sbatch.txt"
    program = folder / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$@" >> {given}\necho "$(grep -c . {given});cluster"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    p = pipeline(folder)
    given_to_all = {"run": ["posttrain", "run", "--only"], "options": ["--partition=gpu"]}
    assert queued_jobs(p) == {}
    jobs = submit(p, p.stages, **given_to_all, queued={})
    assert jobs == {"top": "1", "left": "2", "right": "3", "bottom": "4"}
    lines = given.read_text().splitlines()
    assert "--dependency" not in lines[0] and all("--partition=gpu" in line for line in lines)
    assert "--dependency=afterok:1 " in lines[1] and "--dependency=afterok:1 " in lines[2]
    assert "--dependency=afterok:2:3 " in lines[3]
    squeue = program.with_name("squeue")
    squeue.write_text("#!/bin/bash\necho 1\necho 3\necho 77\n")
    squeue.chmod(0o755)
    assert queued_jobs(p) == {"top": "1", "right": "3"}, "the job of left failed, and bottom's went"
    again = [s for s in p.stages if s.name in ("left", "bottom")]
    assert submit(p, again, **given_to_all, queued=queued_jobs(p)) == {"left": "5", "bottom": "6"}
    lines = given.read_text().splitlines()
    assert "--dependency=afterok:1 " in lines[4] and "--dependency=afterok:5:3 " in lines[5]
    script = job_script(p.stages[3], ["posttrain", "run", "--only"], log=Path("x.log"))
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=bottom\n")
    assert script.endswith("\nposttrain run --only bottom\n")


def test_a_command_under_srun_finds_the_other_nodes(monkeypatch):
    """Accepted by accelerate's own parser."""
    from accelerate.commands.launch import launch_command_parser

    from posttrain.cli.train import several_machines

    assert several_machines(8) == []
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert several_machines(8) == []  # the batch script itself
    for name, value in {"PROCID": "1", "LAUNCH_NODE_IPADDR": "10.0.0.1", "JOB_ID": "41234"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    parsed = launch_command_parser().parse_args([*several_machines(8), "script.py"])
    assert (parsed.num_machines, parsed.machine_rank, parsed.num_processes) == (2, 1, 16)
    assert (parsed.main_process_ip, parsed.main_process_port) == ("10.0.0.1", 21234)


@pytest.mark.parametrize("name", ["r1", "k15", "rlhf"])
def test_the_cluster_size_resolves_to_the_last_path(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in re.findall(
        r"data/\w+/[\w.]+", (REPO / f"recipes/pipelines/{name}.yaml").read_text()
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    words = ["pipeline", "run", name, "--size", "cluster", "--dry-run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "--launch fsdp" in said and "--launch zero2" in said and "${" not in said
    missing = next(tmp_path.glob("data/*/*.jsonl"))
    missing.unlink()
    assert main(words) == 2
    assert f"{missing.relative_to(tmp_path)} is not there" in capsys.readouterr().err
