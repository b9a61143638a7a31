"""tensorboard and wandb (offline) get the figures of a real run; progress is a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from posttrain.training.metrics import read_metrics
from tests.e2e.launching import REPO, check, environment
from tests.tiny import model_folder, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return model_folder(folder / "model"), write_rows(folder / "rows.jsonl", 16)


def command(inputs, folder, *more):
    options = {
        "model.name": inputs[0],
        "data.train": f"[{inputs[1]}]",
        "data.cache_dir": folder / "cache",
        "train.run_dir": folder,
        "train.max_steps": 2,
        "train.batch_size": 4,
    }
    given = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    return [sys.executable, str(REPO / "recipes/sft.py"), *given, *more]


def train(inputs, folder, *more, **extra):
    """A run without the launcher; what it prints."""
    result = subprocess.run(
        command(inputs, folder, *more),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(**extra),
        timeout=120,
    )
    return check(result).stdout


def of_tensorboard(folder):
    """{(step, name): value} of a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        names = events.Tags()["scalars"]
        found |= {(e.step, name): e.value for name in names for e in events.Scalars(name)}
    return found


def test_trackers_get_the_figures_of_metrics_jsonl(inputs, tmp_path):
    pytest.importorskip("wandb")
    more = ["--train.trackers", "[wandb, tensorboard]", "--data.eval", f"[{inputs[1]}]"]
    train(inputs, tmp_path, *more, WANDB_MODE="offline")
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    written = {
        (line["step"], name): value
        for line in read_metrics(metrics)
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }
    assert {"loss", "lr", "eval_loss", "tokens_per_s"} <= {name for _, name in written}
    assert of_tensorboard(tmp_path) == pytest.approx(written, rel=1e-6)  # float32 there
    (file,) = tmp_path.rglob("*.wandb")  # no public reader
    assert b"eval_loss" in file.read_bytes()


def test_a_terminal_gets_a_bar(inputs, tmp_path):
    main, worker = pty.openpty()
    run = subprocess.Popen(
        command(inputs, tmp_path),
        stdout=worker,
        stderr=subprocess.DEVNULL,
        env=environment(TERM="xterm", COLUMNS="100"),
        cwd=REPO,
    )
    os.close(worker)
    shown = b""
    try:
        while read := os.read(main, 65536):
            shown += read
    except OSError:  # the other end is closed
        pass
    assert run.wait() == 0 and b"2/2" in shown
    assert b"\x1b[?25l" in shown and b"step 2/2  loss " not in shown
