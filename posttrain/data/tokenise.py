"""Rows to token ids within ``max_length``, in this process or several; every row comes out kept,
cut or counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np

from posttrain.data.chat import ChatEncoder
from posttrain.data.config import DataConfig, Purpose
from posttrain.data.layouts import SAME, read_sample
from posttrain.data.messages import Message, is_trained, located
from posttrain.data.readers import Row
from posttrain.data.report import ALL_TIED, OVERLONG, PROMPT_FILLS, SAME_SIDES
from posttrain.data.row import Sample
from posttrain.types import SCORE_SLOT, Completion, Pair, PromptGroup

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

    layout: str = ""
    """How the row was read."""

    columns: tuple[tuple[str, str], ...] = ()
    """(column, ``used`` or ``carried``)."""


LAYOUTS_OF: dict[Purpose, tuple[str, ...]] = {
    "sft": ("messages", "prompt_completion"),
    "preference": ("pairs", "ranked", "labelled"),
    "reward": ("pairs", "ranked"),
}
"""What each purpose trains on."""
_ADVICE = {
    "sft": (
        "`posttrain prep sft` keeps the best answer of each prompt; --data.format reads such a "
        "row as a demonstration"
    ),
    "preference": "`posttrain prep pairs` makes comparisons of rated or scattered answers",
    "reward": (
        "a reward model compares answers: `posttrain prep pairs` makes pairs of labelled or "
        "rated answers"
    ),
}


def check_layout(layout: str, purpose: Purpose) -> None:
    """ValueError if such rows are not what the purpose trains on."""
    if layout not in LAYOUTS_OF[purpose]:
        raise ValueError(
            f"{layout} rows are no {purpose} data, which is "
            f"{', '.join(LAYOUTS_OF[purpose])}; {_ADVICE[purpose]}"
        )


@dataclass(kw_only=True, frozen=True)
class RowEncoder:
    """Row to Encoded: what a worker process needs."""

    encoder: ChatEncoder
    """Template and tokenizer."""

    config: DataConfig
    """Its format, columns, carry, max_length and overlong are read."""

    purpose: Purpose = "sft"
    """``reward`` adds a score slot to every completion and trains nothing else. Default sft."""

    def __post_init__(self) -> None:
        """A layout that is set must be one of the purpose."""
        name = self.config.format
        if name != "auto":
            try:
                check_layout(SAME.get(name, name), self.purpose)
            except ValueError as error:
                raise ValueError(
                    f"data.format={name}: {error}. Leave it at auto, or use the trainer that "
                    "these rows are for."
                ) from error

    def __call__(self, row: Row) -> Encoded:
        """ValueError naming file and row for a row that cannot be trained on, or is too long under
        overlong=error."""
        how, meta = self.config, {"file": row.file, "row": row.row_number}
        with located(row.where):
            sample = read_sample(
                row.values, format=how.format, columns=how.columns, carry=how.carry
            )
            check_layout(sample.layout, self.purpose)
            _check_answers(sample, self.purpose)
        return self.encode(sample, meta)

    def encode(self, sample: Sample, meta: dict[str, Any]) -> Encoded:
        """The same for what was read."""
        answers = sample.answers[:1] if self.purpose == "sft" else sample.answers
        encoded = [self._group(sample, answer.messages, meta) for answer in answers]
        prompt = encoded[0].prompt_ids
        if any(not np.array_equal(group.prompt_ids, prompt) for group in encoded):
            raise ValueError(
                f"{encoded[0].where}: the chat template writes the prompt differently before "
                "different completions, so it is not one prompt. Put {% generation %} markers "
                "into the template and pass it with --data.chat_template."
            )
        completions = [group.completions[0] for group in encoded]
        pairs = None
        if self.purpose != "sft" and sample.layout == "labelled":
            labels = [{None: 0, True: 1, False: -1}[answer.label] for answer in answers]
            both = zip(completions, labels, strict=True)
            completions, pairs = [c.with_columns(label=label) for c, label in both], []
        elif self.purpose != "sft":
            pairs = compared_pairs(sample)
        group = PromptGroup(prompt_ids=prompt, completions=completions, pairs=pairs, meta=meta)
        fitted = fit(group, self.config, scored=self.purpose == "reward")
        return replace(fitted, layout=sample.layout, columns=tuple(sample.columns.items()))

    def _group(self, sample: Sample, answer: list[Message], meta: dict[str, Any]) -> PromptGroup:
        """Prompt and answer; an assistant's message is trained unless its weight is 0. Of a
        comparison's prompt nothing is."""
        if self.encoder.template is None and sample.is_text:
            return self.encoder.encode_text(
                sample.prompt[0]["content"], answer[0]["content"], meta=meta
            )
        messages = [*sample.prompt, *answer]
        first = 0 if self.purpose == "sft" else len(sample.prompt)
        trained = [i >= first and is_trained(m) for i, m in enumerate(messages)]
        clean = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        return self.encoder.encode(clean, trained=trained, tools=sample.tools, meta=meta)


def compared_pairs(sample: Sample) -> list[Pair]:
    """Every pair of rated answers of different rank, with the row's margin, else the difference of
    their scores, else 0."""
    answers = sample.answers
    pairs = []
    for (i, better), (j, worse) in permutations(enumerate(answers), 2):
        if better.rank is not None and worse.rank is not None and better.rank < worse.rank:
            margin = sample.margin_of(better, worse) or 0.0
            pairs.append(Pair(chosen=i, rejected=j, margin=margin, weight=sample.weight))
    return pairs


def _check_answers(sample: Sample, purpose: Purpose) -> None:
    if purpose != "sft":
        if sample.layout != "labelled" and len(sample.answers) < 2:
            raise ValueError(f"a comparison needs at least two answers; got {len(sample.answers)}")
        if not all(any(map(is_trained, answer.messages)) for answer in sample.answers):
            raise ValueError("every assistant message of an answer has weight 0: nothing to train")
        return
    said = [m for m in (*sample.prompt, *sample.answers[0].messages) if m["role"] == "assistant"]
    if any(not m["content"].strip() and not m.get("tool_calls") for m in said):
        raise ValueError(
            "an assistant turn is empty, which teaches to say nothing. Remove or fill it"
        )
    if not any(map(is_trained, said)):
        raise ValueError("every assistant message has weight 0: nothing to train. Remove the row")


def fit(group: PromptGroup, config: DataConfig, *, scored: bool = False) -> Encoded:
    """The group within max_length tokens per sequence.

    What follows the last trained token is cut off first: it changes no loss. Under ``scored``
    nothing is: a reward model reads the whole text, and every completion gets the slot in which its
    score is read.
    """
    completions = [_cut(c, len(c.token_ids), scored) for c in group.completions]
    length, num_cut = len(group.prompt_ids) + max(len(c.token_ids) for c in completions), 0
    if length > config.max_length:
        if config.overlong == "error":
            raise ValueError(
                f"{group.where}: {length} tokens, more than data.max_length={config.max_length}. "
                "Raise --data.max_length, shorten the row, or set --data.overlong truncate or drop."
            )
        if config.overlong == "drop":
            return Encoded(group=None, reason=OVERLONG)
        room = config.max_length - len(group.prompt_ids)
        if room < 1:
            return Encoded(group=None, reason=PROMPT_FILLS)
        whole, completions = completions, [_cut(c, room, scored) for c in completions]
        num_cut = sum(len(c.token_ids) for c in whole) - sum(len(c.token_ids) for c in completions)
    if any(
        np.array_equal(completions[p.chosen].token_ids, completions[p.rejected].token_ids)
        for p in group.pairs or ()
    ):
        return Encoded(group=None, reason=SAME_SIDES)
    if group.pairs == [] and not any(c.columns.get("label") for c in completions):
        return Encoded(group=None, reason=ALL_TIED)
    if scored:
        completions = [
            replace(c, token_ids=[*c.token_ids, SCORE_SLOT], loss_mask=[0] * len(c.token_ids) + [1])
            for c in completions
        ]
    return Encoded(group=replace(group, completions=completions), num_cut_tokens=num_cut)


def _cut(completion: Completion, limit: int, scored: bool) -> Completion:
    """At most ``limit`` tokens and, unless it is scored, none after the last trained one. The first
    token is trained, so one is left."""
    ids, mask = completion.token_ids, completion.loss_mask
    end = min(limit, len(ids))
    while not scored and not mask[end - 1]:
        end -= 1
    whole = end == len(ids)
    return completion if whole else replace(completion, token_ids=ids[:end], loss_mask=mask[:end])


def encode_rows(rows: Iterable[Row], encode: RowEncoder, *, num_proc: int) -> Iterator[Encoded]:
    """In the order of the rows. Worker processes are spawned: a script that asks for several needs
    a `__main__` guard."""
    if num_proc == 1:
        yield from map(encode, rows)
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(
        num_proc, initializer=_start_worker, initargs=(encode,)
    ) as pool:
        yield from pool.imap(_work, rows, chunksize=_CHUNK_ROWS)


def prompt_hash(group: PromptGroup) -> int:
    """64 bits that are equal for equal prompts, on every machine."""
    return int.from_bytes(
        hashlib.blake2b(np.asarray(group.prompt_ids, "<i4").tobytes(), digest_size=8).digest(),
        "little",
    )


def sequence_key(group: PromptGroup, completion: Completion) -> bytes:
    """16 bytes that name a sequence and its trained tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for values, dtype in (
        (group.prompt_ids, "<i4"),
        (completion.token_ids, "<i4"),
        (completion.loss_mask, "u1"),
    ):
        array = np.asarray(values, dtype)
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(array.tobytes())
    for name, value in sorted(group.inputs.items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.digest()


def digest_of_groups(groups: Iterable[PromptGroup]) -> str:
    """16 hex digits of groups in their order: tokens, masks, labels and pairs."""
    content = hashlib.sha256()
    for group in groups:
        for completion in group.completions:
            content.update(sequence_key(group, completion))
            labels = {n: v for n, v in completion.columns.items() if isinstance(v, float)}
            content.update(repr(labels).encode())
        content.update(repr(group.pairs and list(group.pairs)).encode())
    return content.hexdigest()[:16]


_worker: RowEncoder | None = None


def _start_worker(encode: RowEncoder) -> None:
    global _worker
    _worker = encode


def _work(row: Row) -> Encoded:
    assert _worker is not None
    return _worker(row)
