"""SIGKILL anywhere, start again: the same weights bit for bit and the same metrics as a run that
was never interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import random
import shutil
import time
from pathlib import Path

import pytest

from posttrain.training.metrics import TIMING_KEYS, read_metrics
from tests.e2e.launching import check, run_warm, start_warm
from tests.tiny import model_folder, write_rows

STEPS = 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A model with dropout, so that the random state matters, and its data."""
    folder = tmp_path_factory.mktemp("inputs")
    return model_folder(folder / "model", dropout=0.1), write_rows(folder / "rows.jsonl", 60)


def arguments(inputs, run_dir: Path, name: str) -> list[str]:
    model, rows = inputs
    return [
        "--model.name",
        str(model),
        "--data.train",
        f"[{rows}]",
        "--data.cache_dir",
        str(run_dir / "cache"),
        "--data.eval_fraction",
        "0.1",
        "--train.run_dir",
        str(run_dir),
        "--train.name",
        name,
        "--train.max_steps",
        str(STEPS),
        "--train.batch_size",
        "8",
        "--train.save_every",
        "4",
        "--train.eval_every",
        "3",
        "--optimizer.lr",
        "3e-3",
        "--optimizer.weight_decay",
        "0.1",
        "--packing.max_tokens",
        "200",
    ]


def outcome(folder: Path) -> tuple[str, list[dict]]:
    weights = hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()
    return weights, read_metrics(folder / "metrics.jsonl", drop=TIMING_KEYS)


def run_until_killed(launch: str, args: list[str], folder: Path, rng: random.Random) -> None:
    """Starts the recipe and kills all its processes a moment after a random one of its next
    steps."""
    process = start_warm(launch, "sft", *args)
    metrics = folder / "metrics.jsonl"
    before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    wanted = before + rng.randint(1, 6)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        saved = any((folder / "checkpoints").glob("step_*"))
        if saved and len(metrics.read_text().splitlines()) >= wanted:
            time.sleep(rng.random() * 0.02)
            break
        time.sleep(0.002)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()


@pytest.mark.parametrize(("launch", "kills"), [("cpu.yaml", 3), ("cpu2.yaml", 2)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, inputs, launch, kills):
    check(run_warm(launch, "sft", *arguments(inputs, tmp_path, "whole")))
    rng = random.Random(kills)
    args = arguments(inputs, tmp_path, "killed")
    for _ in range(kills):
        run_until_killed(launch, args, tmp_path / "killed", rng)
    last = check(run_warm(launch, "sft", *args))
    weights, metrics = outcome(tmp_path / "killed")
    wanted_weights, wanted_metrics = outcome(tmp_path / "whole")
    assert metrics == wanted_metrics
    assert weights == wanted_weights
    assert "resumed from" in last.stderr + last.stdout


def test_two_runs_do_not_share_a_folder(tmp_path, inputs):
    args = arguments(inputs, tmp_path, "shared")
    (tmp_path / "shared").mkdir()
    with (tmp_path / "shared" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_warm("cpu.yaml", "sft", *args)
    assert result.returncode != 0 and "Another process is training" in result.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(tmp_path, inputs):
    args = arguments(inputs, tmp_path, "damaged")
    check(run_warm("cpu.yaml", "sft", *args))
    wanted = outcome(tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / f"step_{STEPS}"
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    result = check(run_warm("cpu.yaml", "sft", *args))
    assert f"step_{STEPS} is damaged" in result.stderr and f"step_{STEPS - 2}" in result.stderr
    assert outcome(tmp_path / "damaged") == wanted


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adafactor"])
def test_other_optimizers_resume_as_if_never_interrupted(tmp_path, inputs, optimizer):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    args = [
        *arguments(inputs, tmp_path, "run"),
        "--optimizer.name",
        optimizer,
        "--train.max_steps",
        "8",
    ]
    check(run_warm("cpu.yaml", "sft", *args))
    folder = tmp_path / "run"
    wanted = outcome(folder)
    shutil.rmtree(folder / "checkpoints" / "step_8")
    shutil.rmtree(folder / "final")
    resumed = check(run_warm("cpu.yaml", "sft", *args))
    assert "step_4" in resumed.stdout + resumed.stderr and outcome(folder) == wanted
