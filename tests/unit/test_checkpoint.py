"""Checkpoints: whole or not at all, the damaged ones passed over, on failing ranks too; and the
metrics that belong to them."""

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.training.checkpoint import CheckpointError, cut_metrics, find_resumable
from tests.unit.checkpoint_helpers import OneProcess, names, resumable_step, save


# --- the folder
# -----------------------------------------------------------------------------------------------------------
def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    assert find_resumable(tmp_path / "none") is None
    save(tmp_path, 9)
    path = save(tmp_path, 10)
    assert path == tmp_path / "step_10"
    assert find_resumable(tmp_path) == (path, {"seen": 100, "step": 10})
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert files.keys() == {"weights.bin", "sub/rank_0.json", "state.json"}
    assert files["weights.bin"]["bytes"] == 5000
    assert len(files["weights.bin"]["sha256"]) == 64
    assert names(tmp_path) == ["step_10", "step_9"]


def test_every_file_is_on_disk_before_the_rename_and_the_rename_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"{a} -> {b}"), rename(a, b))[1])
    save(tmp_path, 1)
    temp = f"{tmp_path}/.tmp_step_1"
    inside = {
        temp,
        *(
            f"{temp}/{n}"
            for n in ("weights.bin", "sub", "sub/rank_0.json", "state.json", "manifest.json")
        ),
    }
    cut = events.index(f"{temp} -> {tmp_path}/step_1")
    assert set(events[:cut]) == inside
    assert events[cut + 1 :] == [str(tmp_path)]


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[2500] ^= 1
    (folder / "weights.bin").write_bytes(data)


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flip_a_byte, "sha256 of weights.bin"),
    "a short file": (
        lambda f: truncate(f / "weights.bin", 4999),
        "weights.bin has 4999 bytes, the manifest says 5000",
    ),
    "a missing file": (
        lambda f: (f / "sub" / "rank_0.json").unlink(),
        "sub/rank_0.json is missing",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "a truncated manifest": (
        lambda f: truncate(f / "manifest.json", 60),
        "manifest cannot be read",
    ),
    "an empty manifest": (lambda f: truncate(f / "manifest.json", 0), "manifest cannot be read"),
    "a manifest of zeros": (
        lambda f: (f / "manifest.json").write_bytes(bytes(300)),
        "manifest cannot be read",
    ),
    "a manifest of another kind": (
        lambda f: (f / "manifest.json").write_text("[]"),
        "manifest cannot be read",
    ),
    "a manifest of another step": (
        lambda f: edit_manifest(f, lambda m: m.update(step=7)),
        "it is of step",
    ),
    "a manifest without the state": (
        lambda f: edit_manifest(f, lambda m: m["files"].pop("state.json")),
        "cannot be read",
    ),
    "a renamed folder": (lambda f: f.rename(f.with_name("step_11")), "it is of step"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    harm, reason = DAMAGES[kind]
    harm(newest)
    with caplog.at_level(logging.WARNING):
        assert resumable_step(tmp_path) == 9
    assert len(caplog.records) == 1
    assert f"{tmp_path}/step_1" in caplog.text
    assert reason in caplog.text


def test_leftovers_of_a_crash_are_ignored_and_then_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step_3", tmp_path / ".tmp_step_5")
    shutil.copytree(tmp_path / "step_3", tmp_path / ".tmp_delete_step_1")
    (tmp_path / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert resumable_step(tmp_path) == 3
    assert not caplog.records
    save(tmp_path, 4)
    assert names(tmp_path) == ["notes", "step_3", "step_4"]


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_10", "step_11"]
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["step_12"]
    save(tmp_path, 13, keep=0)
    assert names(tmp_path) == ["step_12", "step_13"], "0 keeps all"


def test_a_rewound_run_never_deletes_what_it_just_wrote(tmp_path: Path) -> None:
    """step_9 is damaged, the run resumed from step_6: with keep=1 the newest *valid* one must
    stay."""
    save(tmp_path, 6)
    flip_a_byte(save(tmp_path, 9))
    save(tmp_path, 8)  # valid and of the abandoned future: not ours to delete
    save(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step_7", "step_8"]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    flip_a_byte(save(tmp_path, 5))
    save(tmp_path, 5)
    assert names(tmp_path) == ["step_5"]
    assert resumable_step(tmp_path) == 5


# --- several ranks
# --------------------------------------------------------------------------------------------------------
def on_ranks(count: int, action: Callable[[int, Any], Any]) -> list[Any]:
    """Runs ``action(rank, accelerator)`` on threads; a rank that misses a collective breaks the
    test after 10 s."""
    gate = threading.Barrier(count, timeout=10)
    flags = [torch.ones(1)] * count
    results: list[Any] = [None] * count

    class Rank(OneProcess):
        def __init__(self, rank: int) -> None:
            self.process_index, self.is_main_process = rank, rank == 0
            self.wait_for_everyone = gate.wait

        def gather(self, tensor: torch.Tensor) -> torch.Tensor:
            flags[self.process_index] = tensor
            gate.wait()
            answer = torch.cat(flags)
            gate.wait()
            return answer

    def rank_main(rank: int) -> None:
        try:
            results[rank] = action(rank, Rank(rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_writes_into_one_folder(tmp_path: Path) -> None:
    def action(rank: int, accelerator: Any) -> Path:
        def write(folder: Path) -> None:
            time.sleep(0.05 * rank)  # the main rank must wait for the slowest
            (folder / f"rank_{rank}").write_text("x")

        return save(tmp_path, 4, write, accelerator=accelerator)

    assert on_ranks(3, action) == [tmp_path / "step_4"] * 3
    assert names(tmp_path / "step_4") == [
        "manifest.json",
        "rank_0",
        "rank_1",
        "rank_2",
        "state.json",
    ]
    assert resumable_step(tmp_path) == 4


@pytest.mark.parametrize("bad_rank", [0, 2])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("a bug")], ids=str
)
def test_a_rank_that_fails_stops_all_of_them_without_a_deadlock(
    bad_rank: int, error: Exception, tmp_path: Path
) -> None:
    save(tmp_path, 1)

    def action(rank: int, accelerator: Any) -> Path:
        def write(folder: Path) -> None:
            (folder / f"rank_{rank}").write_text("x")
            if rank == bad_rank:
                raise error

        return save(tmp_path, 2, write, keep=1, accelerator=accelerator)

    results = on_ranks(3, action)
    assert all(isinstance(r, CheckpointError) for r in results)
    assert results[bad_rank].__cause__ is error
    assert all(
        "another process failed" in str(r) for rank, r in enumerate(results) if rank != bad_rank
    )
    assert names(tmp_path) == ["step_1"]


def test_the_partial_folder_stays_until_every_rank_has_looked_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (time.sleep(0.2), disk_usage(path))[1])

    def action(rank: int, accelerator: Any) -> Path:
        def write(folder: Path) -> None:
            if rank == 1:
                (folder / "rank_1").write_bytes(bytes(12_345))
                raise OSError(errno.ENOSPC, "No space left on device")

        return save(tmp_path, 2, write, accelerator=accelerator)

    assert "at least 12,345 bytes" in str(on_ranks(2, action)[1])


def test_a_failure_while_publishing_reaches_the_other_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    results = on_ranks(
        2, lambda rank, accelerator: save(tmp_path, 2, lambda folder: None, accelerator=accelerator)
    )
    assert "the disk is full" in str(results[0])
    assert "another process failed" in str(results[1])
    assert names(tmp_path) == []


# --- metrics.jsonl
# --------------------------------------------------------------------------------------------------------
def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "loss": 0.%d}\n' % (step, step) for step in (1, 2, 2, 3, 4)]
    path.write_bytes(b"".join(lines) + b'{"step": 5, "lo')
    assert cut_metrics(path, 2) == 3
    assert path.read_bytes() == b"".join(lines[:3])
    assert cut_metrics(path, 2) == 0
    assert cut_metrics(path, 0) == 3
    assert path.read_bytes() == b""
    assert names(tmp_path) == ["metrics.jsonl"]
    assert cut_metrics(tmp_path / "none.jsonl", 1) == 0
    assert names(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", [b'{"step": 2', b'{"step"', b"\x00\x00\x00", b"\xff\xfe", b"2"])
def test_a_torn_last_line_goes_and_a_torn_line_elsewhere_is_an_error(
    tail: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert cut_metrics(path, 9) == 1
    assert path.read_bytes() == b'{"step": 1}\n'
    path.write_bytes(tail + b'\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not a JSON object with a step"):
        cut_metrics(path, 9)
    assert path.read_bytes() == tail + b'\n{"step": 1}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert cut_metrics(path, 2) == 0
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
