"""One partition of the prompts: read from its spill file, made into rows, written as Parquet.
Partitions are independent."""

from __future__ import annotations

import hashlib
import json
import marshal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.data.messages import message_text
from posttrain.data.prep.contamination import EvaluationSet
from posttrain.data.prep.options import Layout, PrepConfig, TokenCounter
from posttrain.data.prep.rows import (
    CONTAMINATED,
    NEAR_DUPLICATE,
    Located,
    Outcome,
    OutRow,
    keep_short,
    outcome_of,
)
from posttrain.data.row import Answer, Sample

SHOWN = 10
_TOKENS_AT_ONCE = 512
OUTPUT_COLUMNS = frozenset(
    "prompt chosen rejected margin chosen_score rejected_score weight completions ranks scores "
    "completion label messages tools source row prompt_id".split()
)
"""Columns of any layout: one that is carried along under such a name is written as raw_<name>."""


@dataclass(kw_only=True)
class Statistics:
    """What manifest and report say of the rows; adds up over partitions."""

    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    chosen_lengths: Counter[int] = field(default_factory=Counter)
    """Characters, in bins of powers of two: bin b holds 2^b to 2^(b+1) - 1."""
    rejected_lengths: Counter[int] = field(default_factory=Counter)
    margins: Counter[float] = field(default_factory=Counter)
    """Rounded to two significant digits."""
    longer_chosen: int = 0
    unequal_lengths: int = 0
    shown: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """(order drawn by the seed, row): the first ten are shown."""

    def add(self, other: Statistics) -> None:
        """Sums, and the first ten of both."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
        self.longer_chosen += other.longer_chosen
        self.unequal_lengths += other.unequal_lengths
        self.shown = sorted(self.shown + other.shown, key=lambda item: item[0])[:SHOWN]


@dataclass(kw_only=True)
class Extra:
    """Columns of the output beyond those of its layout: the same in all of its files."""

    message_keys: set[str] = field(default_factory=set)
    """Of messages, beside role and content."""
    columns: set[str] = field(default_factory=set)
    """``tools`` and ``weight`` where a row has them, and what is carried along by name."""

    def add(self, sample: Sample, carried: Mapping[str, Any]) -> None:
        """What a sample has."""
        for message in chain(sample.prompt, *(a.messages for a in sample.answers)):
            if len(message) > 2:
                self.message_keys.update(message.keys() - {"role", "content"})
        self.columns.update(
            carried, ["tools"] if sample.tools else [], ["weight"] if sample.weight != 1 else []
        )


@dataclass(kw_only=True)
class PartitionJob:
    """What a worker process needs."""

    number: int
    folder: Path
    """Holds spill/ and gets train/, test/ and rejects/."""
    config: PrepConfig
    representatives: dict[str, str]
    evaluation: EvaluationSet | None
    count_tokens: TokenCounter | None
    extra: Extra


def spill_record(
    sample: Sample, identity: str, source: str, row: int, carried: Mapping[str, Any]
) -> bytes:
    """A sample as one record of its partition: its length and marshal, which is several times as
    fast as JSON."""
    answers = [[a.messages, a.rank, a.score, a.label] for a in sample.answers]
    rest = [
        sample.layout,
        sample.prompt,
        answers,
        sample.tools,
        sample.margin,
        sample.weight,
        carried,
    ]
    record = marshal.dumps([identity, source, row, *rest])
    return len(record).to_bytes(8) + record


def _read_spill(path: Path) -> dict[str, list[Located]]:
    """{prompt id: its samples}, both in the order of the data."""
    prompts: dict[str, list[Located]] = {}
    with path.open("rb") as file:
        for record in _records(file):
            identity, source, row, layout, prompt, answers, tools, margin, weight, carried = record
            made = [
                Answer(messages=m, rank=rank, score=score, label=label)
                for m, rank, score, label in answers
            ]
            sample = Sample(
                prompt=prompt,
                answers=made,
                layout=layout,
                tools=tools,
                margin=margin,
                weight=weight,
            )
            prompts.setdefault(identity, []).append(
                Located(sample=sample, source=source, row=row, carried=carried)
            )
    return prompts


def _records(file: BinaryIO) -> Iterator[list[Any]]:
    while size := int.from_bytes(file.read(8)):
        yield marshal.loads(file.read(size))


def run_partition(job: PartitionJob) -> Statistics:
    """Writes the partition's rows and rejects, and returns its statistics."""
    config, statistics = job.config, Statistics()
    outcomes: dict[str, Outcome] = {}
    for identity, samples in _read_spill(job.folder / "spill" / f"{job.number:05d}").items():
        reason = _reason_against(identity, samples, job)
        if reason is None:
            outcomes[identity] = outcome_of(identity, samples, config)
        else:
            dropped, count = [(located, reason) for located in samples], len(samples)
            outcomes[identity] = Outcome(
                num_samples=count, num_dropped_samples=count, dropped=dropped
            )
    lengths = _token_lengths([row for o in outcomes.values() for row in o.rows], job.count_tokens)
    written: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    with (job.folder / "rejects" / f"{job.number:05d}.jsonl").open(
        "w", encoding="utf-8"
    ) as rejects:
        for identity, outcome in outcomes.items():
            keep_short(outcome, config, lengths)
            side = (
                "test" if _is_test(job.representatives.get(identity, identity), config) else "train"
            )
            written[side].extend(row.values for row in outcome.rows)
            _count(statistics, identity, outcome, side, config)
            for located, reason in outcome.dropped:
                rejects.write(
                    json.dumps(
                        {"file": located.source, "row": located.row, "reason": reason},
                        ensure_ascii=False,
                    )
                    + "\n"
                )
    for side, rows in written.items():
        if rows:
            _write_parquet(
                job.folder / side / f"{job.number:05d}.parquet", rows, config.layout, job.extra
            )
    return statistics


def _reason_against(identity: str, samples: list[Located], job: PartitionJob) -> str | None:
    if job.config.near_duplicates == "drop" and identity in job.representatives:
        return NEAR_DUPLICATE
    if job.evaluation is not None:
        texts = {message_text(m) for s in samples for m in s.sample.prompt}
        texts |= {a.text for s in samples for a in s.sample.answers}
        if any(job.evaluation.overlaps(text) for text in texts):
            return CONTAMINATED
    return None


def _token_lengths(rows: list[OutRow], count_tokens: TokenCounter | None) -> dict[int, int]:
    """Tokens of every row's longest conversation, by id() of the row."""
    if count_tokens is None:
        return {}
    conversations = [
        (id(row), (c, row.located.sample.tools)) for row in rows for c in row.conversations
    ]
    lengths: dict[int, int] = {}
    for at in range(0, len(conversations), _TOKENS_AT_ONCE):
        part = conversations[at : at + _TOKENS_AT_ONCE]
        for (key, _), n in zip(part, count_tokens([c for _, c in part]), strict=True):
            lengths[key] = max(n, lengths.get(key, 0))
    return lengths


def _draw(*parts: Any) -> str:
    return hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def _is_test(representative: str, config: PrepConfig) -> bool:
    """By a hash of seed and prompt: independent of all other prompts and of their order."""
    return int(_draw("split", config.seed, representative), 16) < config.test_fraction * 2**64


def _count(
    statistics: Statistics, identity: str, outcome: Outcome, side: str, config: PrepConfig
) -> None:
    statistics.counts.update(
        {
            "prompts": 1,
            "samples": outcome.num_samples,
            "dropped_samples": outcome.num_dropped_samples,
            "built": outcome.num_built,
            f"written_{side}": len(outcome.rows),
        }
    )
    statistics.dropped.update(reason for _, reason in outcome.dropped)
    statistics.dropped.update(outcome.dropped_answers)
    for k, row in enumerate(outcome.rows):
        if config.layout == "pairs":
            chosen, rejected = (
                sum(len(message_text(m)) for m in row.values[n]) for n in ("chosen", "rejected")
            )
            statistics.chosen_lengths[chosen.bit_length() - 1] += 1
            statistics.rejected_lengths[rejected.bit_length() - 1] += 1
            statistics.unequal_lengths += chosen != rejected
            statistics.longer_chosen += chosen > rejected
            if row.values["margin"] is not None:
                statistics.margins[float(f"{row.values['margin']:.2g}")] += 1
        statistics.shown.append((_draw("shown", config.seed, identity, k), row.values))
    if len(statistics.shown) > 50 * SHOWN:
        statistics.shown = sorted(statistics.shown, key=lambda item: item[0])[:SHOWN]


def _write_parquet(path: Path, rows: list[dict[str, Any]], layout: Layout, extra: Extra) -> None:
    """Arguments of calls, schemas and carried objects are JSON text: Arrow would give each the keys
    of all others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    calls = pa.list_(
        pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    )
    kinds = {"weight": pa.int8(), "tool_calls": calls}
    keys = [
        (key, kinds.get(key, pa.string()))
        for key in ("role", "content", *sorted(extra.message_keys))
    ]
    conversation = pa.list_(pa.struct(keys))
    columns: dict[str, list[tuple[str, Any]]] = {
        "pairs": [
            ("prompt", conversation),
            ("chosen", conversation),
            ("rejected", conversation),
            ("margin", pa.float64()),
            ("chosen_score", pa.float64()),
            ("rejected_score", pa.float64()),
        ],
        "groups": [
            ("prompt", conversation),
            ("completions", pa.list_(conversation)),
            ("ranks", pa.list_(pa.int32())),
            ("scores", pa.list_(pa.float64())),
        ],
        "labelled": [("prompt", conversation), ("completion", conversation), ("label", pa.bool_())],
        "sft": [("messages", conversation)],
    }
    known = {"weight": pa.float64()}
    schema = pa.schema(
        [*columns[layout], ("source", pa.string()), ("row", pa.int64()), ("prompt_id", pa.string())]
        + [(name, known.get(name, pa.string())) for name in sorted(extra.columns)]
    )
    if "tool_calls" in extra.message_keys:
        rows = [{k: _with_text_arguments(v) for k, v in row.items()} for row in rows]
    texts = [name for name in extra.columns if name not in known]
    rows = (
        [row | {n: as_text(row[n]) for n in texts if n in row} for row in rows] if texts else rows
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")


def _with_text_arguments(value: Any) -> Any:
    """The value with the arguments of every call in it as JSON text, as they are on the wire."""
    if isinstance(value, list):
        return [_with_text_arguments(v) for v in value]
    if isinstance(value, dict) and "arguments" in value:
        return value | {"arguments": as_text(value["arguments"])}
    if isinstance(value, dict):
        return {
            k: _with_text_arguments(v) if k in ("tool_calls", "function") else v
            for k, v in value.items()
        }
    return value


def as_text(value: Any) -> str | None:
    """The value as a column of texts holds it: a text as it is, anything else as JSON."""
    return (
        value
        if value is None or isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, default=str)
    )
