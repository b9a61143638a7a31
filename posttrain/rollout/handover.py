"""How a vLLM server gets the trainer's weights: through a folder that both see, or broadcast from
GPU to GPU over NCCL."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from posttrain.files import put_in_place
from posttrain.rollout.receipt import TensorNote, notes_of, notes_of_folder

Call = Callable[..., dict[str, Any]]
"""(method, path, body) -> the server's answer; raises ServerError."""


class Handover(Protocol):
    """Called on the main process only, while no rank samples."""

    sent: Sequence[TensorNote]
    """What was handed over last, for the comparison with the server's receipt."""

    def take(self) -> None:
        """The trainer's present weights are what the server shall have."""

    def send(self, call: Call) -> None:
        """They go into the paused server; again after a restart of it."""

    def forget(self) -> None:
        """The server may be another one now: connections to it are gone."""


class FolderHandover:
    """A folder of safetensors that the server reloads in place, through launch/vllm_reload.py
    (every device)."""

    def __init__(self, folder: Path, save_weights: Callable[[Path], None]) -> None:
        self._folder, self._save_weights = folder, save_weights
        self.sent: Sequence[TensorNote] = ()

    def take(self) -> None:
        """Written aside, then put in place by a rename."""
        target, partial = self._folder / "current", self._folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._save_weights(partial)
        put_in_place(partial, target)

    def send(self, call: Call) -> None:
        """The server reads the folder."""
        path = str((self._folder / "current").resolve())
        self.sent = notes_of_folder(self._folder / "current")
        call(
            "POST", "/collective_rpc", {"method": "reload_policy", "kwargs": {"weights_path": path}}
        )

    def forget(self) -> None:
        """A folder has no connection."""


class NCCLHandover:
    """vLLM's own trainer endpoint: every weight is broadcast to the server's workers, nothing
    touches a disk (CUDA).

    Needs vLLM in the trainer's environment too, and a server started with
    ``--weight-transfer-config '{"backend": "nccl"}'``. ``model`` gives the policy with its adapters
    merged.
    """

    def __init__(
        self, *, url: str, address: str, port: int, timeout_s: float, model: Callable[[], nn.Module]
    ) -> None:
        try:
            import vllm.distributed.weight_transfer.nccl_engine  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "vllm.handover=nccl uses vLLM's trainer side, which this environment does not "
                f"have ({error}). Install vLLM beside posttrain, or use --vllm.handover folder."
            ) from error
        self._url, self._address, self._port, self._timeout_s = url, address, port, timeout_s
        self._model = model
        self._endpoint: Any = None
        self.sent: Sequence[TensorNote] = ()

    def take(self) -> None:
        """The live weights are sent: they do not change while an iteration samples."""

    def send(self, call: Call) -> None:
        """Opens the process group on the first call; then broadcasts."""
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        source = ModuleSource(self._model())
        self.sent = notes_of(source)
        if self._endpoint is None:
            workers = int(call("GET", "/get_world_size")["world_size"])
            self._endpoint = NCCLTrainerWeightTransferEngine.trainer_init(
                NCCLTrainerInitInfo(
                    master_address=self._address, master_port=self._port, world_size=workers + 1
                ),
                client=HTTPVLLMWeightSyncClient(self._url, timeout=self._timeout_s),
                source=source,
            )
        self._endpoint.source = source
        self._endpoint.send_weights()

    def forget(self) -> None:
        """Leaves the process group of the server that is gone."""
        if self._endpoint is not None:
            self._endpoint.shutdown()
            self._endpoint = None
