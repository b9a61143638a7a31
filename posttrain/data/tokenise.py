"""Rows to token ids within ``max_length``, in this process or several; every row comes out kept, cut or counted."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from posttrain.data.chat import ChatEncoder
from posttrain.data.config import DataConfig, Format
from posttrain.data.readers import Row
from posttrain.data.report import OVERLONG, PROMPT_FILLS
from posttrain.data.schema import normalise
from posttrain.types import Completion, PromptGroup

_CHUNK_ROWS = 256


@dataclass(kw_only=True, frozen=True)
class Encoded:
    """One row's outcome: a group, or the reason why there is none."""

    group: PromptGroup | None
    """None if the row is dropped."""

    reason: str = ""
    """Why it is dropped. Default: it is not."""

    num_cut_tokens: int = 0
    """Tokens cut from the end of the completion. Default 0: it is whole."""


@dataclass(kw_only=True, frozen=True)
class RowEncoder:
    """Row to Encoded: what a worker process needs."""

    encoder: ChatEncoder
    """Template and tokenizer."""

    format: Format
    """The source's format, never auto."""

    config: DataConfig
    """Its columns, max_length and overlong are read."""

    def __call__(self, row: Row) -> Encoded:
        """ValueError naming file and row for a row that cannot be trained on, or is too long under overlong=error."""
        conversation = normalise(row, self.format, self.config.columns)
        meta = {"file": row.file, "row": row.row_number}
        if self.encoder.template is None and conversation.text is not None:
            group = self.encoder.encode_text(*conversation.text, meta=meta)
        else:
            group = self.encoder.encode(conversation.messages, trained=conversation.trained, tools=conversation.tools, meta=meta)
        return fit(group, self.config)

    def chunk(self, rows: list[Row]) -> list[Encoded]:
        """Many rows: one message between processes."""
        return [self(row) for row in rows]


def fit(group: PromptGroup, config: DataConfig) -> Encoded:
    """The group within max_length tokens. What follows the last trained token is cut off first: it changes no loss."""
    completion = _until_last_trained(group.completions[0], len(group.completions[0].token_ids))
    length = len(group.prompt_ids) + len(completion.token_ids)
    if length > config.max_length:
        advice = f"{length} tokens, more than data.max_length={config.max_length}"
        if config.overlong == "error":
            raise ValueError(
                f"{group.where}: {advice}. Raise --data.max_length, shorten the row, or set --data.overlong truncate or drop."
            )
        room = config.max_length - len(group.prompt_ids)
        if config.overlong == "drop" or room < 1:
            return Encoded(group=None, reason=OVERLONG if config.overlong == "drop" else PROMPT_FILLS)
        whole = len(completion.token_ids)
        completion = _until_last_trained(completion, room)
        cut = whole - len(completion.token_ids)
    else:
        cut = 0
    kept = PromptGroup(prompt_ids=group.prompt_ids, completions=[completion], meta=group.meta)
    return Encoded(group=kept, num_cut_tokens=cut)


def encode_rows(rows: Iterable[Row], encode: RowEncoder, *, num_proc: int) -> Iterator[Encoded]:
    """In the order of the rows. Worker processes are spawned: a script that asks for several needs a `__main__`
    guard."""
    if num_proc == 1:
        yield from map(encode, rows)
        return
    import multiprocessing

    iterator = iter(rows)
    chunks = iter(lambda: list(itertools.islice(iterator, _CHUNK_ROWS)), [])
    with multiprocessing.get_context("spawn").Pool(num_proc, initializer=_start_worker, initargs=(encode,)) as pool:
        for results in pool.imap(_work, chunks):
            yield from results


def prompt_hash(group: PromptGroup) -> int:
    """64 bits that are equal for equal prompts, on every machine."""
    return int.from_bytes(hashlib.blake2b(np.asarray(group.prompt_ids, "<i4").tobytes(), digest_size=8).digest(), "little")


def _until_last_trained(completion: Completion, limit: int) -> Completion:
    """At most ``limit`` tokens, and none after the last trained one. The first token is trained, so one is left."""
    end = min(limit, len(completion.token_ids))
    while not completion.loss_mask[end - 1]:
        end -= 1
    if end == len(completion.token_ids):
        return completion
    return Completion(token_ids=completion.token_ids[:end], loss_mask=completion.loss_mask[:end])


_worker: RowEncoder | None = None


def _start_worker(encode: RowEncoder) -> None:
    global _worker
    _worker = encode


def _work(rows: list[Row]) -> list[Encoded]:
    assert _worker is not None
    return _worker.chunk(rows)
