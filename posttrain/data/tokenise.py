"""Rows to token ids within ``max_length``, in this process or several; every row comes out kept, cut or counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.data.chat import ChatEncoder
from posttrain.data.comparisons import PREFERENCE_REQUIRED, Comparison, normalise_comparison
from posttrain.data.config import DataConfig, Format, Purpose
from posttrain.data.readers import Row
from posttrain.data.report import ALL_TIED, OVERLONG, PROMPT_FILLS, SAME_SIDES
from posttrain.data.schema import normalise
from posttrain.types import SCORE_SLOT, Completion, PromptGroup

_CHUNK_ROWS = 256  # of one message between processes


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

    purpose: Purpose = "sft"
    """``reward`` adds a score slot to every completion and trains nothing else. Default sft."""

    def __call__(self, row: Row) -> Encoded:
        """ValueError naming file and row for a row that cannot be trained on, or is too long under overlong=error."""
        meta = {"file": row.file, "row": row.row_number}
        if self.format in PREFERENCE_REQUIRED:
            group = self._compare(normalise_comparison(row, self.format, self.config.columns), meta)
            return fit(group, self.config, scored=self.purpose == "reward")
        conversation = normalise(row, self.format, self.config.columns)
        if self.encoder.template is None and conversation.text is not None:
            group = self.encoder.encode_text(*conversation.text, meta=meta)
        else:
            group = self.encoder.encode(conversation.messages, trained=conversation.trained, tools=conversation.tools, meta=meta)
        return fit(group, self.config)

    def _compare(self, row: Comparison, meta: dict[str, Any]) -> PromptGroup:
        """Every completion after the prompt they share; a template that writes the prompt in two ways is a ValueError."""
        if self.encoder.template is None and row.text is not None:
            encoded = [self.encoder.encode_text(row.text[0], side, meta=meta) for side in row.text[1]]
        else:
            untrained = [False] * len(row.prompt)
            encoded = [
                self.encoder.encode(
                    [*row.prompt, *side], trained=[*untrained, *(m["role"] == "assistant" for m in side)], meta=meta
                )
                for side in row.completions
            ]
        prompt = encoded[0].prompt_ids
        if any(group.prompt_ids != prompt for group in encoded):
            raise ValueError(
                f"{encoded[0].where}: the chat template writes the prompt differently before different completions, so it is not "
                "one prompt. Put {% generation %} markers into the template and pass it with --data.chat_template."
            )
        completions = [replace(g.completions[0], label=label) for g, label in zip(encoded, row.labels, strict=True)]
        return PromptGroup(prompt_ids=prompt, completions=completions, pairs=row.pairs, meta=meta)


def fit(group: PromptGroup, config: DataConfig, *, scored: bool = False) -> Encoded:
    """The group within max_length tokens per sequence.

    What follows the last trained token is cut off first: it changes no loss. Under ``scored`` nothing is: a reward model reads
    the whole text, and every completion gets the slot in which its score is read.
    """
    completions = [c if scored else _until_last_trained(c, len(c.token_ids)) for c in group.completions]
    length = len(group.prompt_ids) + max(len(c.token_ids) for c in completions)
    cut = 0
    if length > config.max_length:
        advice = f"{length} tokens, more than data.max_length={config.max_length}"
        if config.overlong == "error":
            raise ValueError(
                f"{group.where}: {advice}. Raise --data.max_length, shorten the row, or set --data.overlong truncate or drop."
            )
        room = config.max_length - len(group.prompt_ids)
        if config.overlong == "drop" or room < 1:
            return Encoded(group=None, reason=OVERLONG if config.overlong == "drop" else PROMPT_FILLS)
        whole = sum(len(c.token_ids) for c in completions)
        completions = [_head(c, room) if scored else _until_last_trained(c, room) for c in completions]
        cut = whole - sum(len(c.token_ids) for c in completions)
    if group.pairs is not None and any(completions[p.chosen].token_ids == completions[p.rejected].token_ids for p in group.pairs):
        return Encoded(group=None, reason=SAME_SIDES)
    if group.pairs is not None and not group.pairs and all(c.label is None for c in completions):
        return Encoded(group=None, reason=ALL_TIED)
    if scored:
        completions = [
            replace(c, token_ids=[*c.token_ids, SCORE_SLOT], loss_mask=[0] * len(c.token_ids) + [1]) for c in completions
        ]
    return Encoded(group=replace(group, completions=completions), num_cut_tokens=cut)


def _head(completion: Completion, limit: int) -> Completion:
    return replace(completion, token_ids=completion.token_ids[:limit], loss_mask=completion.loss_mask[:limit])


def encode_rows(rows: Iterable[Row], encode: RowEncoder, *, num_proc: int) -> Iterator[Encoded]:
    """In the order of the rows. Worker processes are spawned: a script that asks for several needs a `__main__`
    guard."""
    if num_proc == 1:
        yield from map(encode, rows)
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(num_proc, initializer=_start_worker, initargs=(encode,)) as pool:
        yield from pool.imap(_work, rows, chunksize=_CHUNK_ROWS)


def prompt_hash(group: PromptGroup) -> int:
    """64 bits that are equal for equal prompts, on every machine."""
    return int.from_bytes(hashlib.blake2b(np.asarray(group.prompt_ids, "<i4").tobytes(), digest_size=8).digest(), "little")


def _until_last_trained(completion: Completion, limit: int) -> Completion:
    """At most ``limit`` tokens, and none after the last trained one. The first token is trained, so one is left."""
    end = min(limit, len(completion.token_ids))
    while not completion.loss_mask[end - 1]:
        end -= 1
    return completion if end == len(completion.token_ids) else _head(completion, end)


_worker: RowEncoder | None = None


def _start_worker(encode: RowEncoder) -> None:
    global _worker
    _worker = encode


def _work(row: Row) -> Encoded:
    assert _worker is not None
    return _worker(row)
