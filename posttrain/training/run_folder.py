"""The folder of a run: resolved settings, metrics, checkpoints, the final model. Everything in it
survives a kill.

runs/<name>/  config.yaml  about.json  metrics.jsonl  checkpoints/step_N/  final/
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from posttrain.files import free_name_beside, whole_file, whole_folder, write_json
from posttrain.resolve import flat
from posttrain.training import checkpoint
from posttrain.training.config import TrainConfig
from posttrain.training.metrics import read_metrics
from posttrain.training.sharding import broadcast_object

log = logging.getLogger(__name__)

_FREE = """
train.run_dir train.name train.log_every train.eval_every train.save_every train.save_total_limit
train.resume train.trackers train.best_metric train.force train.self_check train.max_steps
train.num_epochs evaluation vllm model.name model.revision reference.model reference.cache
reference.cache_dir rollout.show_every rollout.max_mismatch_nats rewards.max_unscored
rewards.workers rewards.concurrency rewards.timeout_s
""".split()
"""Settings that decide no weight, or for which a digest in the run's identity stands."""
_ROUNDING = ("packing", "local", "engine", "model.gradient_checkpointing", "optimizer.offload")
"""Settings after which the run goes on, not bit-identical."""
_DIGESTS = {
    "data": ": rows, their order, the tokenizer, or how rows become tokens",
    "model": ": the weights that training starts from",
    "reference": ": the weights of the reference model",
    "adapters": ": peft_config",
}


def _is_of(name: str, listed: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in listed)


def _decides(name: str) -> bool:
    """Whether a setting decides weights and no digest stands for it."""
    if name.startswith("data."):
        return name == "data.weights"
    return not _is_of(name, _FREE) and not _is_of(name, _ROUNDING)


class Extra(Protocol):
    """State of a run beside policy and optimizer (a moving reference, what was sampled)."""

    def write(self, folder: Path, *, is_main: bool) -> None:
        """Every process: its files into the checkpoint; what is the same everywhere only where
        ``is_main``."""

    def read(self, folder: Path) -> None:
        """Every process: what ``write`` wrote."""


class RunFolder:
    """Opens or continues ``<run_dir>/<name>``; inside of ``with`` no other process does. Raises
    ValueError if it cannot be written or must not be continued."""

    def __init__(
        self,
        train: TrainConfig,
        accelerator: Any,
        settings: dict[str, Any],
        *,
        num_steps: int,
        about: dict[str, Any] | None = None,
    ) -> None:
        """``about``: what about.json says beside the environment and the number of steps."""
        self.path = train.folder
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._lock = FileLock(self.path / ".lock")  # the system releases it with the process
        self._train, self._accelerator = train, accelerator
        self._settings, self._about = settings, about or {}
        self._identity: dict[str, Any] = {}
        self._fingerprint: dict[str, Any] = {
            "num_steps": num_steps,
            "num_processes": accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
        }
        for name in ("torch", "transformers", "accelerate"):
            self._fingerprint[f"version of {name}"] = version(name)

    def __enter__(self) -> RunFolder:
        if self._accelerator.is_main_process:
            self._open()
        self._accelerator.wait_for_everyone()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _open(self) -> None:
        if self._train.resume == "never" and any(self.checkpoints.glob("step_*")):
            raise ValueError(
                f"{self.checkpoints} has checkpoints and train.resume is never. Set another "
                "--train.name, or --train.resume auto to continue it, or restart to begin anew."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(
                f"Another process is training in {self.path} (a worker of a killed launch, "
                "perhaps). Wait for it, end it, or set another --train.name."
            ) from error
        except OSError as error:
            advice = "Set another --train.run_dir."
            raise ValueError(f"{self.path} cannot be written: {error}. {advice}") from error
        for partial in self.path.glob(".*-*"):  # left by a kill (posttrain/files.py)
            shutil.rmtree(partial, ignore_errors=True)
        if self._train.resume == "restart":
            self._put_aside()

    def _put_aside(self) -> None:
        """Moves what an earlier run left to <name>.old-1 or so."""
        left = [path for path in self.path.iterdir() if path.name != ".lock"]
        if not left:
            return
        old = free_name_beside(self.path)
        old.mkdir()
        for path in left:
            path.rename(old / path.name)
        print(f"train.resume is restart: what was in {self.path} is in {old} now")

    def resume(
        self,
        policy: Any,
        optimizer: Any,
        schedule: Any,
        *,
        identity: dict[str, Any],
        machine: dict[str, Any] | None = None,
        extras: Sequence[Extra] = (),
    ) -> int:
        """Puts the newest valid checkpoint into the three and returns its step; 0 and an empty
        metrics file without one.

        ``identity``: digests of what decides the weights beside the settings. ValueError where the
        saved run has others; ``machine``: what decides only the rounding, a warning.
        """
        self._identity = identity
        self._fingerprint.update(machine or {})
        accelerator, found, step = self._accelerator, None, 0
        if accelerator.is_main_process:
            found = checkpoint.find_resumable(self.checkpoints)
        if (found := broadcast_object(accelerator, found)) is not None:
            folder, state = found
            step = int(state["step"])
            self._compare_with(state)
            checkpoint.read_state(accelerator, policy, optimizer, schedule, folder)
            for extra in extras:
                extra.read(folder)
            if accelerator.is_main_process:
                self._say_where(folder, step)
        if accelerator.is_main_process:
            if step:
                checkpoint.cut_metrics(self.metrics_path, step)
            else:
                self.metrics_path.unlink(missing_ok=True)
            with whole_file(self.path / "config.yaml") as file:
                file.write_text(yaml.safe_dump(self._settings, sort_keys=False), encoding="utf-8")
            environment = {**_machine(accelerator.device), **self._fingerprint}
            steps = environment.pop("num_steps")
            note(self.path, num_steps=steps, environment=environment, **self._about)
        accelerator.wait_for_everyone()
        return step

    def _say_where(self, folder: Path, step: int) -> None:
        log.warning("resumed from %s", folder)
        num_steps = self._fingerprint["num_steps"]
        if step == num_steps:
            log.warning(
                "the run is complete (step %d of %d): nothing is trained. For more steps raise "
                "--train.max_steps; to train anew, --train.resume restart",
                step,
                num_steps,
            )

    def last_metrics(self) -> dict[str, Any]:
        """The newest step's metrics and evaluation in metrics.jsonl; empty at the start of a
        run."""
        lines = read_metrics(self.metrics_path) if self.metrics_path.exists() else []
        return {k: v for line in lines[-2:] for k, v in line.items() if k != "data"}

    def _compare_with(self, state: dict[str, Any]) -> None:
        """What decides weights and differs is an error; what only rounds differently, a warning."""
        now, before = dict(flat(self._settings)), dict(flat(state.get("settings", {})))
        changed = {
            name: f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        }
        saved = state.get("identity", {})
        own = self._identity
        others = [
            f"{name}{_DIGESTS.get(name, '')} (digest {saved.get(name)} -> {own.get(name)})"
            for name in sorted(own.keys() | saved.keys())
            if own.get(name) != saved.get(name)
        ]
        others += [text for name, text in changed.items() if _decides(name)]
        if others:
            raise ValueError(
                f"{self.path} holds another run, at step {state['step']}; of what decides its "
                f"weights, this differs: {'; '.join(others)}. To train this one beside it, set "
                "another --train.name; to put the old one aside and start anew, --train.resume "
                "restart; to continue the old one, give what it was trained with."
            )
        was = state.get("fingerprint", {})
        rounding = [text for name, text in changed.items() if _is_of(name, _ROUNDING)]
        rounding += [
            f"{name}: {was.get(name)} -> {value}"
            for name, value in self._fingerprint.items()
            if was.get(name) != value
        ]
        if rounding and self._accelerator.is_main_process:
            differences = ", ".join(rounding)
            log.warning("the run goes on, not bit-identical: %s", differences)

    def save(
        self, step: int, policy: Any, optimizer: Any, schedule: Any, *, extras: Sequence[Extra] = ()
    ) -> Path:
        """Checkpoint of ``step``, whole or not at all; older ones beyond the limit go."""
        accelerator = self._accelerator

        def write(folder: Path) -> None:
            checkpoint.write_state(accelerator, policy, optimizer, schedule, folder)
            for extra in extras:
                extra.write(folder, is_main=accelerator.is_main_process)

        return checkpoint.save_checkpoint(
            accelerator,
            self.checkpoints,
            step,
            write,
            state={
                "settings": self._settings,
                "identity": self._identity,
                "fingerprint": self._fingerprint,
            },
            keep=self._train.save_total_limit,
        )


def note(folder: Path, **facts: Any) -> None:
    """Puts facts into the run's about.json, in the place of those of the same name."""
    path = folder / "about.json"
    known = json.loads(path.read_bytes()) if path.exists() else {}
    with whole_file(path) as file:
        write_json(file, known | facts)


def _machine(device: torch.device) -> dict[str, Any]:
    """Where the run is."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else f"CPU, {platform.machine()}",
        "CPU cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "version of posttrain": version("posttrain"),
    }


def save_whole(folder: Path, accelerator: Any, write: Callable[[Path], None]) -> Path:
    """``folder`` with the model, whole or not at all: every process calls, the main one writes."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            with whole_folder(folder, replace=True) as path:
                write(path)
        except (OSError, SafetensorError) as raised:
            error = raised
    if not checkpoint.all_ok(accelerator, error is None):
        reason = error or "the main process says why"
        raise checkpoint.CheckpointError(
            f"The model was not written to {folder}: {reason}. The last checkpoint is intact: make "
            "room and start the same command again."
        ) from error
    return folder
