"""Checkpoints: whole or not at all, through crashes, full disks and failing ranks; and bit for bit what was saved.

Run as a script it is one rank of the distributed test: ``torchrun ... test_checkpoint.py ddp|fsdp FOLDER``.
"""

import errno
import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from posttrain.training.checkpoint import CheckpointError, agree, cut_metrics, damage, find_resumable, save_checkpoint
from posttrain.training.optimizer import OptimizerConfig, build_optimizer, build_schedule
from posttrain.training.state import (
    capture_rng,
    load_training_state,
    read_state,
    restore_rng,
    save_training_state,
    write_state,
)

ALONE: dict[str, Any] = {"is_main": True, "barrier": lambda: None, "all_ok": lambda ok: ok}


def write_files(folder: Path, *, size: int = 5000) -> None:
    (folder / "sub").mkdir()
    (folder / "weights.bin").write_bytes(random.randbytes(size))
    (folder / "sub" / "rank_0.json").write_text("{}")


def save(root: Path, step: int, write: Callable[[Path], None] = write_files, **settings: Any) -> Path:
    return save_checkpoint(root, step, write, state={"seen": step * 10}, **{"keep": None, **ALONE, **settings})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def resumable_step(root: Path) -> int | None:
    found = find_resumable(root)
    return found[1]["step"] if found else None


# --- the folder -----------------------------------------------------------------------------------------------------------
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
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"{a} -> {b}"), rename(a, b))[1])
    save(tmp_path, 1)
    temp = f"{tmp_path}/.tmp_step_1"
    inside = {temp, *(f"{temp}/{n}" for n in ("weights.bin", "sub", "sub/rank_0.json", "state.json", "manifest.json"))}
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
    "a short file": (lambda f: truncate(f / "weights.bin", 4999), "weights.bin has 4999 bytes, the manifest says 5000"),
    "a missing file": (lambda f: (f / "sub" / "rank_0.json").unlink(), "sub/rank_0.json is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "a truncated manifest": (lambda f: truncate(f / "manifest.json", 60), "manifest cannot be read"),
    "an empty manifest": (lambda f: truncate(f / "manifest.json", 0), "manifest cannot be read"),
    "a manifest of zeros": (lambda f: (f / "manifest.json").write_bytes(bytes(300)), "manifest cannot be read"),
    "a manifest of another kind": (lambda f: (f / "manifest.json").write_text("[]"), "manifest cannot be read"),
    "a manifest of another step": (lambda f: edit_manifest(f, lambda m: m.update(step=7)), "it is of step"),
    "a manifest without the state": (lambda f: edit_manifest(f, lambda m: m["files"].pop("state.json")), "cannot be read"),
    "a renamed folder": (lambda f: f.rename(f.with_name("step_11")), "it is of step"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    harm, reason = DAMAGES[kind]
    harm(newest)
    with caplog.at_level(logging.WARNING):
        assert resumable_step(tmp_path) == 9
    assert len(caplog.records) == 1
    assert f"{tmp_path}/step_1" in caplog.text
    assert reason in caplog.text


def test_leftovers_of_a_crash_are_ignored_and_then_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step_3", tmp_path / ".tmp_step_5")
    shutil.copytree(tmp_path / "step_3", tmp_path / ".tmp_delete_step_1")
    (tmp_path / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert resumable_step(tmp_path) == 3
    assert not caplog.records
    save(tmp_path, 4)
    assert names(tmp_path) == ["notes", "step_3", "step_4"]


def test_save_total_limit_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2, best=8)
    assert names(tmp_path) == ["step_10", "step_11", "step_8"]
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["step_12"]
    with pytest.raises(ValueError, match="at least 1"):
        save(tmp_path, 13, keep=0)


def test_a_rewound_run_never_deletes_what_it_just_wrote(tmp_path: Path) -> None:
    """step_9 is damaged, the run resumed from step_6: with keep=1 the newest *valid* one must stay."""
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


# --- crashes --------------------------------------------------------------------------------------------------------------
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
    """This process kills itself before its n-th call that changes the disk in an order that matters."""
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


def test_sigkill_at_random_times_leaves_a_valid_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


# --- a full disk ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where the user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
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
def test_a_full_disk_is_a_clear_error_and_the_previous_checkpoint_survives(writer: str, small_disk: Path) -> None:
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
def test_a_disk_that_is_full_at_any_call(call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    with pytest.raises(CheckpointError, match="at least 1,234 bytes.*There is no earlier checkpoint"):
        save(tmp_path / "new", 1, full)


# --- several ranks --------------------------------------------------------------------------------------------------------
def on_ranks(count: int, action: Callable[[int, dict[str, Any]], Any]) -> list[Any]:
    """Runs ``action(rank, collectives)`` on threads; a rank that misses a collective breaks the test after 10 s."""
    gate = threading.Barrier(count, timeout=10)
    flags = [True] * count
    results: list[Any] = [None] * count

    def rank_main(rank: int) -> None:
        def all_ok(ok: bool) -> bool:
            flags[rank] = ok
            gate.wait()
            answer = all(flags)
            gate.wait()
            return answer

        try:
            results[rank] = action(rank, {"is_main": rank == 0, "barrier": gate.wait, "all_ok": all_ok})
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_rank_writes_into_one_folder(tmp_path: Path) -> None:
    def action(rank: int, collectives: dict[str, Any]) -> Path:
        def write(folder: Path) -> None:
            time.sleep(0.05 * rank)  # the main rank must wait for the slowest
            (folder / f"rank_{rank}").write_text("x")

        return save(tmp_path, 4, write, **collectives)

    assert on_ranks(3, action) == [tmp_path / "step_4"] * 3
    assert names(tmp_path / "step_4") == ["manifest.json", "rank_0", "rank_1", "rank_2", "state.json"]
    assert resumable_step(tmp_path) == 4


@pytest.mark.parametrize("bad_rank", [0, 2])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("a bug")], ids=str)
def test_a_rank_that_fails_stops_all_of_them_without_a_deadlock(bad_rank: int, error: Exception, tmp_path: Path) -> None:
    save(tmp_path, 1)

    def action(rank: int, collectives: dict[str, Any]) -> Path:
        def write(folder: Path) -> None:
            (folder / f"rank_{rank}").write_text("x")
            if rank == bad_rank:
                raise error

        return save(tmp_path, 2, write, keep=1, **collectives)

    results = on_ranks(3, action)
    assert all(isinstance(r, CheckpointError) for r in results)
    assert results[bad_rank].__cause__ is error
    assert all("another process failed" in str(r) for rank, r in enumerate(results) if rank != bad_rank)
    assert names(tmp_path) == ["step_1"]


def test_the_partial_folder_stays_until_every_rank_has_looked_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (time.sleep(0.2), disk_usage(path))[1])

    def action(rank: int, collectives: dict[str, Any]) -> Path:
        def write(folder: Path) -> None:
            if rank == 1:
                (folder / "rank_1").write_bytes(bytes(12_345))
                raise OSError(errno.ENOSPC, "No space left on device")

        return save(tmp_path, 2, write, **collectives)

    assert "at least 12,345 bytes" in str(on_ranks(2, action)[1])


def test_a_failure_while_publishing_reaches_the_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    results = on_ranks(2, lambda rank, collectives: save(tmp_path, 2, lambda folder: None, **collectives))
    assert "the disk is full" in str(results[0])
    assert "another process failed" in str(results[1])
    assert names(tmp_path) == []


# --- metrics.jsonl --------------------------------------------------------------------------------------------------------
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
def test_a_torn_last_line_goes_and_a_torn_line_elsewhere_is_an_error(tail: bytes, tmp_path: Path) -> None:
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


# --- random state ---------------------------------------------------------------------------------------------------------
def draw() -> tuple[Any, ...]:
    return (
        random.random(), random.gauss(), np.random.standard_normal(3).tolist(), np.random.rand(2).tolist(),
        torch.randn(5).tolist(), torch.nn.functional.dropout(torch.ones(50)).tolist(),
    )  # fmt: skip


def test_random_states_survive_json() -> None:
    draw()  # leaves a cached gaussian in python's and numpy's generators
    state = json.loads(json.dumps(capture_rng()))
    expected = [draw(), draw()]
    restore_rng(state)
    assert [draw(), draw()] == expected


def test_the_random_state_of_a_missing_device_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match="CUDA device"):
        restore_rng({**capture_rng(), "cuda": "00"})


# --- training state -------------------------------------------------------------------------------------------------------
TINY = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, schedule="cosine", warmup_steps=2)


def llama(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **overrides}))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.1)
    return transformers.GPT2LMHeadModel(config)


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    base = llama()
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))


class WithViews(nn.Module):
    """A buffer that views a parameter, one of another dtype, a matrix stored transposed, a parameter without gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(31, 8).t())
        self.scale = nn.Parameter(torch.rand(8, 1))
        self.idle = nn.Parameter(torch.randn(3))
        self.register_buffer("view", self.weight.data[:2])
        self.register_buffer("first", self.scale.data[:1])
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        self.count += 1
        logits = self.weight.t()[input_ids] @ (self.weight * self.scale)
        return transformers.utils.ModelOutput(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-bf16": lambda: llama().bfloat16(),
    "llama-float64": lambda: llama().double(),
    "gpt2-dropout": gpt2,
    "lora-dropout": lora,
    "views": WithViews,
}


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.AdamW, Any]:
    model = make().train()
    optimizer = build_optimizer(model, CONFIG)
    return model, optimizer, build_schedule(optimizer, CONFIG, 10)


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights, buffers and moments by name, without the code under test."""
    tensors = {f"weight {n}": t.detach().clone() for n, t in model.state_dict().items()}
    for n, p in model.named_parameters():
        tensors |= {f"{kind} {n}": v.clone() for kind, v in optimizer.state.get(p, {}).items()}
    return tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


class OneProcess:
    """What ``write_state`` asks of an accelerator."""

    distributed_type, is_main_process, process_index, num_processes, scaler = "NO", True, 0, 1, None


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_equal_five_and_five_after_a_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = build(MODELS[name])
    torch.manual_seed(7)
    train(*run, range(5))
    save(tmp_path, 5, lambda folder: write_state(OneProcess, *run, folder))
    at_five = everything(*run[:2])
    train(*run, range(5, 10))

    fresh = build(MODELS[name])
    torch.manual_seed(99)
    read_state(OneProcess, *fresh, find_resumable(tmp_path)[0])
    assert_same(everything(*fresh[:2]), at_five)
    train(*fresh, range(5, 10))
    assert_same(everything(*fresh[:2]), everything(*run[:2]))
    assert fresh[2].get_last_lr() == run[2].get_last_lr()
    assert any(not torch.equal(at_five[k], v) for k, v in everything(*run[:2]).items())


def test_a_resume_without_the_moments_would_differ(tmp_path: Path) -> None:
    """The test above can fail: weights alone are not enough."""
    run, fresh = build(llama), build(llama)
    train(*run, range(5))
    fresh[0].load_state_dict(run[0].state_dict())
    for other in (run, fresh):
        train(*other, range(5, 10))
    assert not torch.equal(run[0].lm_head.weight, fresh[0].lm_head.weight)


def test_no_pickle_and_a_tied_tensor_once(tmp_path: Path) -> None:
    model, optimizer, schedule = build(MODELS["llama-tied"])
    train(model, optimizer, schedule, range(1))
    write_state(OneProcess, model, optimizer, schedule, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert weights.keys() == {n for n, _ in model.named_parameters()}
    moments = safetensors.torch.load_file(tmp_path / "optimizer.safetensors")
    assert moments.keys() == {f"{kind}/{n}" for n in weights for kind in ("step", "exp_avg", "exp_avg_sq")}


def test_adapters_are_saved_without_the_base(tmp_path: Path) -> None:
    model, optimizer, _ = build(lora)
    save_training_state(tmp_path, model, optimizer)
    assert all("lora_" in n for n in safetensors.torch.load_file(tmp_path / "model.safetensors"))
    other, other_optimizer, _ = build(lora)
    with torch.no_grad():
        other.base_model.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="frozen weights has"):
        load_training_state(tmp_path, other, other_optimizer)


def test_the_order_of_parameters_does_not_matter(tmp_path: Path) -> None:
    model, optimizer, schedule = build(llama)
    train(model, optimizer, schedule, range(3))
    save_training_state(tmp_path, model, optimizer)
    other, shuffled, _ = build(llama)
    for group in shuffled.param_groups:
        group["params"].reverse()
    load_training_state(tmp_path, other, shuffled)
    assert_same(everything(other, shuffled), everything(model, optimizer))


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model, optimizer, schedule = build(llama)
    train(model, optimizer, schedule, range(2))
    save_training_state(tmp_path, model, optimizer)

    def refuse(make: Callable[[], nn.Module], message: str, **changes: Any) -> None:
        other = make()
        fresh = build_optimizer(other, OptimizerConfig(**{"lr": 1e-2, "weight_decay": 0.1, **changes}))
        before = everything(other, fresh)
        with pytest.raises(ValueError, match=message):
            load_training_state(tmp_path, other, fresh)
        assert_same(everything(other, fresh), before)

    refuse(lambda: llama(attention_bias=True), "8 names are missing.*layers.0.self_attn.k_proj.bias")
    refuse(lambda: llama(tie_word_embeddings=True), "1 are unexpected.*lm_head.weight")
    refuse(
        lambda: llama(intermediate_size=32),
        r"mlp.gate_proj.weight has \[\(24, 16\) torch.float32\], this run has \[\(32",
    )
    refuse(lambda: llama().bfloat16(), r"torch.float32\], this run has .* torch.bfloat16\]")
    refuse(llama, r"betas=\(0.9, 0.999\).*this run has.*betas=\(0.9, 0.95\)", betas=(0.9, 0.95))
    refuse(llama, r"lr=0.01.*this run has.*lr=0.02", lr=0.02)
    refuse(llama, r"weight_decay=0.1\].*this run has.*weight_decay=0.2\]", weight_decay=0.2)
    load_training_state(tmp_path, *build(llama)[:2])


def test_moments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, optimizer, schedule = build(llama)
    train(model, optimizer, schedule, range(1))
    save_training_state(tmp_path, model, optimizer)
    path = tmp_path / "optimizer.safetensors"
    whole = safetensors.torch.load_file(path)
    key = "exp_avg/lm_head.weight"
    for broken, message in (
        ({k: v for k, v in whole.items() if k != key}, "1 names are missing.*exp_avg/lm_head.weight"),
        ({**whole, key: whole[key][:5].clone()}, r"exp_avg/lm_head.weight has \[\(5, 16\)"),
        ({**whole, key: whole[key].double()}, r"exp_avg/lm_head.weight has \[\(31, 16\) torch.float64"),
    ):
        safetensors.torch.save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            load_training_state(tmp_path, *build(llama)[:2])


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    run = build(llama)
    write_state(OneProcess, *run, tmp_path)
    two = type("TwoProcesses", (OneProcess,), {"num_processes": 2})
    with pytest.raises(ValueError, match="written by 1 processes, this run has 2"):
        read_state(two, *run, tmp_path)


def test_the_state_of_the_loss_scaler_comes_back(tmp_path: Path) -> None:
    def scaled() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return type("Scaled", (OneProcess,), {"scaler": scaler})

    first, second, run = scaled(), scaled(), build(llama)
    first.scaler.scale(torch.ones(()))
    first.scaler.update(32.0)
    write_state(first, *run, tmp_path)
    read_state(second, *run, tmp_path)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.get_scale() == 32.0


# --- real processes -------------------------------------------------------------------------------------------------------
def accelerator_for(kind: str) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=True)
    if kind == "ddp":
        return Accelerator(cpu=True)
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], state_dict_type="SHARDED_STATE_DICT", cpu_offload=False,
    )  # fmt: skip
    return Accelerator(fsdp_plugin=plugin)


def distributed_rank(kind: str, root: Path) -> None:
    """Trains 4 steps, or 2 and a resume; rank 1 fails once on the way. Every rank writes ``ok`` at its end."""
    torch.manual_seed(0)
    accelerator = accelerator_for(kind)
    assert accelerator.num_processes == 2
    assert accelerator.distributed_type == ("FSDP" if kind == "fsdp" else "MULTI_CPU")

    def prepared() -> tuple[Any, Any, Any]:
        accelerator.free_memory()
        model = llama().train()
        model, optimizer = accelerator.prepare(model, build_optimizer(model, CONFIG))
        return model, optimizer, build_schedule(optimizer, CONFIG, 4)

    def local(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        tensors = everything(model, optimizer)
        return {k: v.to_local() if hasattr(v, "to_local") else v for k, v in tensors.items()}

    def steps(model: Any, optimizer: Any, schedule: Any, which: range) -> None:
        for step in which:
            train(
                model,
                optimizer,
                schedule,
                range(step * 2 + accelerator.process_index, step * 2 + accelerator.process_index + 1),
            )

    def fail_on_rank_1(folder: Path) -> None:
        if accelerator.process_index == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    together: dict[str, Any] = {
        "is_main": accelerator.is_main_process, "barrier": accelerator.wait_for_everyone,
        "all_ok": agree(accelerator), "keep": 1,
    }  # fmt: skip
    run = prepared()
    steps(*run, range(2))
    save(root, 2, lambda folder: write_state(accelerator, *run, folder), **together)
    draws = torch.randn(3)
    steps(*run, range(2, 4))
    final = local(*run[:2])
    try:
        save(root, 4, fail_on_rank_1, **together)
    except CheckpointError as error:
        assert ("the disk is full" if accelerator.process_index == 1 else "another process failed") in str(error)
    else:
        raise AssertionError("a failing rank was not noticed")
    fresh = prepared()
    torch.manual_seed(99)
    path, _ = find_resumable(root)  # type: ignore[misc]
    assert path.name == "step_2"
    read_state(accelerator, *fresh, path)
    assert torch.equal(torch.randn(3), draws)
    steps(*fresh, range(2, 4))
    assert_same(local(*fresh[:2]), final)
    assert fresh[2].last_epoch == run[2].last_epoch == 4
    (root.parent / f"ok_{accelerator.process_index}").write_text(json.dumps(sorted(p.name for p in path.rglob("*"))))
    accelerator.end_training()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_save_fail_and_resume_bit_for_bit(kind: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    env |= {"ACCELERATE_USE_CPU": "true"} if kind == "ddp" else {"ACCELERATE_USE_FSDP": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend",
               "c10d", "--rdzv_endpoint", "localhost:0", __file__, kind, str(tmp_path / "checkpoints")]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    files = json.loads((tmp_path / "ok_0").read_text())
    assert (tmp_path / "ok_1").exists()
    assert {"rng_0.json", "rng_1.json", "schedule.json", "manifest.json"} <= set(files)
    assert ("model.safetensors" in files) == (kind == "ddp")
    if kind == "ddp":
        assert not [name for name in files if name.endswith((".pkl", ".bin", ".pt"))]
    assert names(tmp_path / "checkpoints") == ["step_2"]
    assert damage(tmp_path / "checkpoints" / "step_2") is None


if __name__ == "__main__":
    distributed_rank(sys.argv[1], Path(sys.argv[2]))
