"""The folder of a run: resolved settings, metrics, checkpoints, the final model. Everything in it
survives a kill.

runs/<name>/  config.yaml  metrics.jsonl  checkpoints/step_N/  final/
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from posttrain.files import whole_file, whole_folder
from posttrain.training import checkpoint
from posttrain.training.config import TrainConfig, flat_settings
from posttrain.training.metrics import read_metrics
from posttrain.training.sharding import broadcast_object

log = logging.getLogger(__name__)

_CHANGE_NO_NUMBER = tuple(
    f"train.{name}" for name in ("run_dir", "name", "log_every", "save", "resume", "trackers")
)


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
        self, train: TrainConfig, accelerator: Any, settings: dict[str, Any], *, num_steps: int
    ) -> None:
        self.path = train.folder
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._lock = FileLock(self.path / ".lock")  # the system releases it with the process
        self._train, self._accelerator = train, accelerator
        self._settings = settings
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
                "--train.name, delete the folder, or set --train.resume auto to continue it."
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

    def resume(
        self,
        policy: Any,
        optimizer: Any,
        schedule: Any,
        *,
        run: dict[str, Any],
        extras: Sequence[Extra] = (),
    ) -> int:
        """Puts the newest valid checkpoint into the three and returns its step; 0 and an empty
        metrics file without one.

        ``run``: what else decides the numbers (data, loss, mode). ValueError for other ``data``; a
        warning names what else differs from the saved run.
        """
        self._fingerprint.update(run)
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
            log.warning("resumed from %s", folder)
        if accelerator.is_main_process:
            if step:
                checkpoint.cut_metrics(self.metrics_path, step)
            else:
                self.metrics_path.unlink(missing_ok=True)
            with whole_file(self.path / "config.yaml") as file:
                file.write_text(yaml.safe_dump(self._settings, sort_keys=False), encoding="utf-8")
        accelerator.wait_for_everyone()
        return step

    def last_metrics(self) -> dict[str, Any]:
        """The newest step's metrics and evaluation in metrics.jsonl; empty at the start of a
        run."""
        lines = read_metrics(self.metrics_path) if self.metrics_path.exists() else []
        return {k: v for line in lines[-2:] for k, v in line.items() if k != "data"}

    def _compare_with(self, state: dict[str, Any]) -> None:
        """Other data are refused: a step of the run means certain rows. What else differs is a
        warning."""
        now = {**flat_settings(self._settings), **self._fingerprint}
        before = {**flat_settings(state.get("settings", {})), **state.get("fingerprint", {})}
        if (was := before.get("data")) != now.get("data") and "data" in self._fingerprint:
            raise ValueError(
                f"{self.path} was trained on other data to step {state['step']}: rows, order, "
                f"tokenizer or options differ (digest {was}, now {now['data']}). Give the same "
                "data; or, to start anew, set another --train.name or delete the folder."
            )
        changed = [
            f"{k}: {before.get(k)} -> {now.get(k)}"
            for k in sorted(now.keys() | before.keys())
            if now.get(k) != before.get(k) and not k.startswith(_CHANGE_NO_NUMBER)
        ]
        if changed and self._accelerator.is_main_process:
            differences = ", ".join(changed)
            log.warning("the resumed run is another, so not bit-identical: %s", differences)

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
            state={"settings": self._settings, "fingerprint": self._fingerprint},
            keep=self._train.save_total_limit,
        )

    def save_final(self, write: Callable[[Path], None]) -> Path:
        """``final/``, whole or not at all."""
        final = self.path / "final"
        error: Exception | None = None
        if self._accelerator.is_main_process:
            try:
                with whole_folder(final, replace=True) as folder:
                    write(folder)
            except (OSError, SafetensorError) as raised:
                error = raised
        if not checkpoint.all_ok(self._accelerator, error is None):
            reason = error or "the main process says why"
            raise checkpoint.CheckpointError(
                f"The final model was not written to {final}: {reason}. The last checkpoint is "
                "intact: make room and start the same command again."
            ) from error
        return final
