"""The gradient does not depend on the number of ranks, on one process and on two; and no launch
shrinks silently."""

from __future__ import annotations

import json
import os

import pytest

from posttrain.rl.algorithms import ALGORITHMS
from posttrain.training.launch import check_launch
from tests.e2e.launching import REPO, check, run, run_warm
from tests.tiny import model_folder, write_rows


@pytest.mark.parametrize(("launch", "ranks"), [("cpu.yaml", 1), ("cpu2.yaml", 2)])
def test_gradient_is_the_same_on_every_topology(tmp_path, launch, ranks):
    out = tmp_path / "results.json"
    check(run_warm(launch, "tests/e2e/gradient_script.py", str(out)))
    results = json.loads(out.read_text())
    assert len(results) == 72 + 12 and {r["ranks"] for r in results} == {ranks}
    assert [sum(name in r["case"] for r in results) for name in ("clipped", "mirror_descent")] == [
        6,
        6,
    ]
    worst = max(results, key=lambda r: max(r["gradient"], r["loss"]))
    assert max(worst["gradient"], worst["loss"]) < 1e-10, worst
    if ranks == 2:
        shapes = {tuple(sorted(r["micro_batches"])) for r in results}
        assert any(0 in shape for shape in shapes), "one rank with only dummy micro-batches"
        assert any(0 < shape[0] < shape[1] for shape in shapes), "one rank with more micro-batches"
        assert any(r["coupled"] for r in results), "a group over the budget under a coupled loss"


def test_every_algorithm_on_two_ranks_is_the_papers_objective(tmp_path):
    """Float64; two of six groups have no signal and one completion no score, so denominators count
    what no rank computes."""
    out = tmp_path / "results.json"
    check(run_warm("cpu2.yaml", "tests/e2e/policy_gradient_script.py", str(out)))
    results = json.loads(out.read_text())
    assert {r["algorithm"] for r in results} == {*ALGORITHMS, "entropy"}
    assert len(results) == 2 * (len(ALGORITHMS) + 1)
    assert all(min(r["micro_batches"]) >= 1 for r in results) and any(r["skipped"] for r in results)
    worst = max(results, key=lambda r: r["gradient"])
    assert worst["gradient"] < 1e-10 and min(r["largest"] for r in results) > 1e-6, worst


THREADS_AT_EXIT = """
import atexit, os, pathlib

def write():
    names = [pathlib.Path("/proc/self/task", task, "comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    pathlib.Path(os.environ["THREADS"], os.environ["RANK"]).write_text(" ".join(names))

if "RANK" in os.environ:
    atexit.register(write)
"""


def test_a_finished_run_has_no_thread_of_gloo(tmp_path):
    """One that frees a tensor while Python shuts down aborts the process, and a finished run is
    called failed."""
    (tmp_path / "sitecustomize.py").write_text(THREADS_AT_EXIT)
    threads = tmp_path / "threads"
    threads.mkdir()
    model, rows = model_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 12)
    arguments = [
        "--model.name",
        str(model),
        "--data.train",
        f"[{rows}]",
        "--train.run_dir",
        str(tmp_path),
        "--train.max_steps",
        "2",
    ]
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    check(run("cpu2.yaml", "sft", *arguments, THREADS=str(threads), PYTHONPATH=path))
    names = {file.name: file.read_text() for file in threads.iterdir()}
    assert set(names) == {"0", "1"} and all("python" in found for found in names.values())
    assert not any("gloo" in found for found in names.values()), names


def test_a_launch_that_becomes_one_process_is_refused(tmp_path):
    """accelerate's MULTI_CPU launcher starts one process where two were asked for."""
    config = (REPO / "launch" / "cpu2.yaml").read_text().replace("MULTI_GPU", "MULTI_CPU")
    path = tmp_path / "silent.yaml"
    path.write_text(config)
    result = run(str(path), "tests/e2e/gradient_script.py", str(tmp_path / "out.json"))
    assert result.returncode != 0
    assert "asked for several processes and started one" in result.stderr


def test_independent_processes_are_refused():
    with pytest.raises(RuntimeError, match="started 2 processes, but they found only 1"):
        check_launch({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, num_processes=1)
    check_launch({}, num_processes=1)
    check_launch({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, num_processes=2)


def test_a_launch_that_would_not_shard_is_refused(tmp_path):
    """accelerate takes sharding from the environment of several processes only: with one, the model
    would stay whole."""
    result = run(
        "fsdp_cpu2.yaml --num_processes 1",
        "tests/e2e/gradient_script.py",
        str(tmp_path / "out.json"),
    )
    assert result.returncode != 0
    assert "asks for FSDP, but the run became" in result.stderr


def test_a_launch_option_that_would_be_ignored_is_refused(tmp_path):
    result = run_warm(
        "zero_cpu2.yaml --gradient_clipping 0.5",
        "tests/e2e/gradient_script.py",
        str(tmp_path / "out.json"),
    )
    assert result.returncode != 0
    assert "would be ignored" in result.stderr and "--optimizer.max_grad_norm" in result.stderr
