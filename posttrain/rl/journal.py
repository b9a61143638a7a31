"""What cannot be computed again the same way is written down as it comes: rollouts of a server,
results of rewards.

One file of JSON lines per iteration and rank. A run that was killed finds in it what the iteration
already had and goes on from there. The last line may be torn: it is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.rl.trajectory import to_row
from posttrain.rollout.engine import Engine, Request, Sampled, SamplingConfig


class Journal:
    """``once(key, compute)``: the value written under the key, else computed now and written."""

    def __init__(self, path: Path, *, run: str) -> None:
        """``run`` names what decides the values (settings, ranks, weights): a journal of another is
        discarded."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, Any] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        good = 0
        for line in lines[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if good == 0 and entry != {"run": run}:
                break
            if good:
                self._values[entry["key"]] = entry["value"]
            good += len(line) + 1
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._write({"run": run})

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def get(self, key: str) -> Any | None:
        """The value under the key, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Written before it returns: a killed process loses nothing that was put."""
        self._values[key] = value
        self._write({"key": key, "value": value})

    def once(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value under the key; computed and put the first time. As JSON has it, also the first
        time."""
        if key not in self._values:
            self.put(key, json.loads(json.dumps(compute())))
        return self._values[key]

    def close(self) -> None:
        """Ends writing."""
        self._file.close()


def digest(value: Any) -> str:
    """Return a digest of ``repr(value)``."""
    return hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def fingerprint(weights: Iterable[Tensor], *, per_tensor: int = 64) -> str:
    """A digest of some elements of every tensor: an update of the weights changes it, and it needs
    no pass over them."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in weights:
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // per_tensor)].cpu().contiguous()
        found.update(picked.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _sampled(row: dict[str, Any]) -> Sampled:
    kept = row["kept_ids"]
    lists = {"token_ids": tuple(row["token_ids"]), "logps": tuple(row["logps"])}
    return Sampled(**{**row, **lists, "kept_ids": kept and tuple(map(tuple, kept))})


def journalled(
    engine: Engine,
    journal: Journal,
    requests: Sequence[Request],
    sampling: SamplingConfig,
) -> list[list[Sampled]]:
    """``engine.generate``, with what the journal has taken from there.

    A call of a reproducible engine is written as a whole. A killed one is repeated whole: only the
    same batch gives the same bits. Of another engine each completion is written when finished.
    """
    if engine.is_reproducible:
        entries = journal.once(
            f"generate {digest(requests)}",
            lambda: to_row(engine.generate(requests, sampling)),
        )
        return [[_sampled(entry) for entry in row] for row in entries]

    def key(request: Request, k: int) -> str:
        return (
            f"completion {request.seeds[k]} "
            f"{digest((request.prompt_ids, request.prefixes[k] if request.prefixes else ()))}"
        )

    left: list[Request] = []
    for request in requests:
        wanted = [k for k in range(len(request.seeds)) if journal.get(key(request, k)) is None]
        if wanted:
            prefixes = tuple(request.prefixes[k] for k in wanted if request.prefixes)
            seeds = tuple(request.seeds[k] for k in wanted)
            left.append(Request(prompt_ids=request.prompt_ids, seeds=seeds, prefixes=prefixes))
    if left:
        engine.generate(
            left,
            sampling,
            on_finished=lambda i, k, drawn: journal.put(key(left[i], k), to_row(drawn)),
        )
    return [[_sampled(journal.get(key(r, k))) for k in range(len(r.seeds))] for r in requests]  # type: ignore[arg-type]
