"""Training rows that come in a stream, read once and in order: ``datasets.IterableDataset``, a
generator behind ``__iter__``."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.data.chat import ChatEncoder
from posttrain.data.config import DataConfig, Purpose
from posttrain.data.readers import Row
from posttrain.data.table import digest_of_groups
from posttrain.data.tokenise import RowEncoder
from posttrain.types import PromptGroup


class StreamedGroups:
    """Batches of a stream, one step after the other, tokenised as they come.

    Every rank reads the whole stream. At its end it begins anew (an epoch). ``check`` is called
    with every batch before it is trained. A resumed run reads again what was trained and compares
    it: a ValueError where the stream gives other rows.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        config: DataConfig,
        purpose: Purpose,
        batch_size: int,
        check: Callable[[list[PromptGroup]], None],
    ) -> None:
        self._rows, self._batch_size, self._check = rows, batch_size, check
        self._encode = RowEncoder(encoder=ChatEncoder(tokenizer), config=config, purpose=purpose)
        self._groups = self._read()
        self._step, self._batch = -1, list[PromptGroup]()
        self._digest = hashlib.sha256()
        self.dropped = 0

    def batch(self, step: int) -> list[PromptGroup]:
        """The groups of a step: the last one asked for, or the next."""
        if step != self._step:
            if step != self._step + 1:
                raise ValueError(
                    f"A stream goes forward: step {step} was asked for after step {self._step}."
                )
            self._batch = [next(self._groups) for _ in range(self._batch_size)]
            self._check(self._batch)
            self._digest.update(digest_of_groups(self._batch).encode())
            self._step = step
        return self._batch

    def _read(self) -> Iterator[PromptGroup]:
        epoch = 0
        while True:
            kept = 0
            for number, values in enumerate(self._rows, start=1):
                found = self._encode(Row(file="<stream>", row_number=number, values=values))
                if found.group is None:
                    self.dropped += 1
                    if self.dropped == 1:
                        warnings.warn(
                            f"Row {number} of the stream is left out: {found.reason}. Further ones "
                            "are left out without a word.",
                            stacklevel=2,
                        )
                    continue
                kept += 1
                yield found.group
            if not kept:
                again = (
                    " when it was read again: an iterator can be read only once" if epoch else ""
                )
                raise ValueError(f"The stream of training rows gave no row to train on{again}.")
            epoch += 1

    def write(self, folder: Path, *, is_main: bool) -> None:
        """How far the stream was read, and a digest of it, into a checkpoint."""
        if is_main:
            state = {"steps": self._step + 1, "digest": self._digest.hexdigest()[:16]}
            (folder / "stream.json").write_text(json.dumps(state), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Reads the stream up to where the checkpoint was."""
        state = json.loads((folder / "stream.json").read_bytes())
        for step in range(self._step + 1, state["steps"]):
            self.batch(step)
        if self._digest.hexdigest()[:16] != state["digest"]:
            raise ValueError(
                f"The stream gives other rows than those of the first {state['steps']} steps of "
                "this run. Give the same stream, or start anew: --train.resume restart."
            )
