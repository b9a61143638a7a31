"""How a vLLM server gets the trainer's weights, and the proof that it draws from them.

They go through a folder that both see, or are broadcast from GPU to GPU over NCCL. The trainer
notes name, dtype, shape and checksum of every tensor that it hands over, and its own log-probs of a
fixed probe. The engine notes the same of what arrived, says where the model holds something else,
and returns the probe's log-probs under the new weights. The two are compared before a token is
drawn; the first wrong tensor is named.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from posttrain.files import put_in_place
from posttrain.models.policy import in_eval_mode, plain_attention

PROBE_TOKENS = 16
TOLERANCE_NATS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Most mean |difference| of the probe's log-probs, by the coarser dtype of the two sides. Measured:
2e-5 in float32. A logit of 16 to 32 has steps of 0.125 in bfloat16."""


class ReceiptError(ValueError):
    """The engine does not hold what it was handed. Never tried again: the run stops."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"The vLLM server does not have the trainer's weights: {what}. Nothing was trained on "
            "it. Is the server that of launch/vllm.sh, of the same model, and reads it the same "
            "folder?"
        )


class TensorNote(NamedTuple):
    """What is known of one tensor."""

    name: str
    dtype: str
    shape: list[int]
    checksum: str
    """BLAKE2b of its bytes, 32 hex digits."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What an engine says of the weights that it draws from."""

    version: int
    tensors: int = 0
    """Tensors whose checksums were compared; 0: the engine reads the trainer's own weights."""
    read_back: int = 0
    """Those of them that were also compared with what the engine's model holds."""
    probe_gap_nats: float = 0.0
    """Mean |log-prob of the engine - log-prob of the trainer| over the probe."""


def note(name: str, tensor: Tensor) -> TensorNote:
    """The note of a tensor, as launch/vllm_reload.py makes it in the server."""
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    checksum = hashlib.blake2b(data, digest_size=16).hexdigest()
    return TensorNote(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), checksum)


def notes_of(tensors: Iterable[tuple[str, Tensor]]) -> list[TensorNote]:
    """Of named tensors, in their order."""
    return [note(name, tensor) for name, tensor in tensors]


def notes_of_folder(folder: Path) -> list[TensorNote]:
    """Of every tensor in a folder of safetensors."""
    from safetensors import safe_open

    notes = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            notes += [note(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118 - no dict
    return notes


def check_tensors(sent: Sequence[TensorNote], answers: Sequence[Any], *, held: bool = True) -> int:
    """Compare what was sent with what each worker of the server says; how many tensors every worker
    also read back from its model. Raises ReceiptError, which names the first wrong tensor.

    An answer is ``{"tensors": [[name, dtype, shape, checksum], ...], "differs": [names],
    "missing": [names], "read_back": int}``. ``held``: whether ``differs`` (tensors that arrived
    whole, while the model holds something else) and ``missing`` (parameters that no tensor
    renewed) are errors.
    """
    if not sent:
        raise ReceiptError("the trainer handed no tensor over")
    if not answers:
        raise ReceiptError("no worker of the server returned a receipt")
    for worker, answer in enumerate(answers):
        if not isinstance(answer, Mapping) or "tensors" not in answer:
            raise ReceiptError(f"worker {worker} returned no receipt, but {answer!r:.100}")
        problem = _first_difference(sent, [TensorNote(*row) for row in answer["tensors"]])
        if problem is None and held and answer.get("differs"):
            problem = f"{answer['differs'][0]} arrived whole, but its model holds something else"
        if problem is None and held and answer.get("missing"):
            problem = f"its parameter {answer['missing'][0]} was renewed by no tensor"
        if problem is not None:
            raise ReceiptError(f"worker {worker}: {problem}")
    return min(int(answer.get("read_back", 0)) for answer in answers)


def _first_difference(sent: Sequence[TensorNote], got: Sequence[TensorNote]) -> str | None:
    """In the order of ``sent``. The order of arrival is free: loaders read files as they like."""
    arrived: dict[str, TensorNote] = {}
    for one in got:
        if one.name in arrived:
            return f"{one.name} arrived twice"
        arrived[one.name] = one
    for wanted in sent:
        found = arrived.pop(wanted.name, None)
        if found is None:
            return f"{wanted.name} did not arrive ({len(got)} of {len(sent)} tensors did)"
        for what in ("shape", "dtype", "checksum"):
            mine, its = getattr(wanted, what), getattr(found, what)
            if mine != its:
                also = [w.name for w in sent if w.checksum == its] if what == "checksum" else []
                hint = f"; that is the content of {also[0]}" if also else ""
                return f"{wanted.name} has {what} {its}, the trainer sent {mine}{hint}"
    return f"{next(iter(arrived))} arrived, but was not sent" if arrived else None


def probe_ids(vocabulary: int) -> list[int]:
    """The same tokens in every run, from all over the vocabulary."""
    return [7919 * (i + 1) % vocabulary for i in range(PROBE_TOKENS)]


@torch.no_grad()
def probe_logps(model: nn.Module, ids: Sequence[int], *, compute: torch.dtype) -> list[float]:
    """log pi of each of ``ids`` but the first, at temperature 1, by the trainer's own model."""
    device = next(model.parameters()).device
    row = torch.tensor([list(ids)], device=device)
    mixed = compute in (torch.bfloat16, torch.float16)
    with (
        in_eval_mode(model),
        plain_attention(model),
        torch.autocast(device.type, dtype=compute if mixed else torch.bfloat16, enabled=mixed),
    ):
        logits = model(input_ids=row, use_cache=False).logits[0, :-1]
    logps = torch.log_softmax(logits.float(), dim=-1).gather(1, row[0, 1:, None])[:, 0]
    return [float(p) for p in logps.cpu()]


def check_probe(mine: Sequence[float], its: Sequence[float], *, dtypes: Iterable[str]) -> float:
    """Mean |difference| of the probe's log-probs. Raises ReceiptError above the tolerance of the
    coarser of ``dtypes``, and where one is not a number."""
    if len(mine) != len(its):
        raise ReceiptError(f"it gave {len(its)} of the probe's {len(mine)} log-probs")
    gap = sum(abs(a - b) for a, b in zip(mine, its, strict=True)) / len(mine)
    limit = max(TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["bfloat16"]) for dtype in dtypes)
    if not gap <= limit:
        raise ReceiptError(
            f"all tensors arrived, but its log-probs of the probe differ from the trainer's by "
            f"{gap:.3g} nats on the mean token (limit {limit:g})"
        )
    return gap


Call = Callable[..., dict[str, Any]]
"""(method, path, body) -> the server's answer; raises ServerError."""


class Handover(Protocol):
    """Called on the main process only, while no rank samples."""

    def take(self) -> None:
        """The trainer's present weights are what the server shall have."""

    def send(self, call: Call) -> Sequence[TensorNote]:
        """They go into the paused server; again after a restart of it. Returns what was sent, for
        the comparison with the server's receipt."""

    def forget(self) -> None:
        """The server may be another one now: connections to it are gone."""


class FolderHandover:
    """A folder of safetensors that the server reloads in place, through launch/vllm_reload.py
    (every device)."""

    def __init__(self, folder: Path, save_weights: Callable[[Path], None]) -> None:
        self._folder, self._save_weights = folder, save_weights

    def take(self) -> None:
        """Written aside, then put in place by a rename."""
        partial = self._folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._save_weights(partial)
        put_in_place(partial, self._folder / "current")

    def send(self, call: Call) -> Sequence[TensorNote]:
        """The server reads the folder."""
        folder = self._folder / "current"
        sent = notes_of_folder(folder)
        arguments = {"weights_path": str(folder.resolve())}
        call("POST", "/collective_rpc", {"method": "reload_policy", "kwargs": arguments})
        return sent

    def forget(self) -> None:
        """A folder has no connection."""


class NCCLHandover:
    """vLLM's own trainer endpoint: every weight is broadcast to the server's workers, nothing
    touches a disk (CUDA). The live weights are sent: they do not change while an iteration samples.

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

    def take(self) -> None:
        """Nothing to keep: the live weights are sent."""

    def send(self, call: Call) -> Sequence[TensorNote]:
        """Opens the process group on the first call; then broadcasts."""
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        source = ModuleSource(self._model())
        if self._endpoint is None:
            workers = int(call("GET", "/get_world_size")["world_size"])
            self._endpoint = NCCLTrainerWeightTransferEngine.trainer_init(
                NCCLTrainerInitInfo(
                    master_address=self._address, master_port=self._port, world_size=workers + 1
                ),
                client=HTTPVLLMWeightSyncClient(self._url, timeout=self._timeout_s),
                source=source,
            )
        sent = notes_of(source)
        self._endpoint.source = source
        self._endpoint.send_weights()
        return sent

    def forget(self) -> None:
        """Leaves the process group of the server that is gone."""
        if self._endpoint is not None:
            self._endpoint.shutdown()
            self._endpoint = None
