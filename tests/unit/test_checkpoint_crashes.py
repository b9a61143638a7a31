"""Checkpoints that are cut short: killed at every point of saving, or on a full disk."""

import errno
import gc
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from posttrain.training.checkpoint import CheckpointError, damage
from tests.unit.checkpoint_helpers import names, resumable_step, save, write_files


# --- crashes
# --------------------------------------------------------------------------------------------------------------
def in_a_fork(action: Callable[[], None]) -> int:
    """Runs the action in a child process and returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def die_before_call(n: int) -> None:
    """This process kills itself before its n-th call that changes the disk in an order that
    matters."""
    calls = iter(range(1, 10_000))

    def armed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "mkdir"),
        (Path, "write_text"),
    ):
        setattr(module, name, armed(getattr(module, name)))


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_sigkill_at_every_point_of_saving_leaves_a_valid_checkpoint(
    again: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """keep=1: the hardest case, the only older checkpoint is deleted in the same call."""
    new = 1 if again else 2
    seen = set()
    for n in range(1, 100):
        root = tmp_path / str(n)
        save(root, 1)

        def die(n: int = n, root: Path = root) -> None:
            die_before_call(n)
            save(root, new, keep=1)

        _, status = os.waitpid(in_a_fork(die), 0)
        with caplog.at_level(logging.WARNING):
            step = resumable_step(root)
        assert step in (1, new)
        assert [folder for folder in root.glob("step_*") if damage(folder)] == []
        assert not caplog.records
        seen.add(step)
        save(root, 3, keep=1)
        assert names(root) == ["step_3"]
        if os.WIFEXITED(status):
            break
    assert n > 15, "the crash points were not reached"
    assert os.WIFEXITED(status)
    assert seen == {1, new}


def test_sigkill_at_random_times_leaves_a_valid_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def save_for_ever() -> None:
        step = resumable_step(tmp_path) or 0
        while True:
            step += 1
            save(tmp_path, step, lambda folder: write_files(folder, size=200_000), keep=2)

    last = 0
    for seed in range(25):
        pid = in_a_fork(save_for_ever)
        time.sleep(random.Random(seed).uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with caplog.at_level(logging.WARNING):
            step = resumable_step(tmp_path) or 0
        assert not caplog.records
        assert step >= last
        last = step
    assert last > 5


# --- a full disk
# ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(folder: Path) -> None:
    """Takes all space and does not complain: the next writer gets the error."""
    with (folder / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


BIG = torch.zeros(2**20)
WRITERS: dict[str, Callable[[Path], Any]] = {
    "python": lambda folder: (folder / "big").write_bytes(bytes(2**21)),
    "safetensors": lambda folder: safetensors.torch.save_file({"w": BIG}, folder / "big"),
    "torch": lambda folder: torch.save(BIG, folder / "big"),
    "manifest": fill,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_a_clear_error_and_the_previous_checkpoint_survives(
    writer: str, small_disk: Path
) -> None:
    root = small_disk / "checkpoints"
    save(root, 1, lambda folder: write_files(folder, size=100_000))
    with pytest.raises(CheckpointError) as caught:
        save(root, 2, WRITERS[writer], keep=1)
    message = str(caught.value)
    del caught  # its traceback holds torch's open file, and with it the space
    gc.collect()
    assert f"Checkpoint {root}/step_2 was not written" in message
    assert "the disk is full" in message  # torch.save itself says "unexpected pos 704 vs 598"
    free = shutil.disk_usage(small_disk).free
    assert f"; {free:,} are free in {root}" in message
    assert free > 500_000
    assert f"{root}/step_1 was not touched" in message
    assert names(root) == ["step_1"]
    assert resumable_step(root) == 1
    save(root, 2)
    assert resumable_step(root) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_disk_that_is_full_at_any_call(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match="the disk is full.*step_1 was not touched"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step_1"]
    assert resumable_step(tmp_path) == 1


def test_the_first_checkpoint_on_a_full_disk_says_that_there_is_no_other(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "part").write_bytes(bytes(1234))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        CheckpointError, match="at least 1,234 bytes.*There is no earlier checkpoint"
    ):
        save(tmp_path / "new", 1, full)
