"""One partition of the prompts: read from its spill file, made into rows, written as Parquet. Partitions are independent."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.prep.contamination import EvaluationSet
from posttrain.data.prep.formats import Answer, Sample
from posttrain.data.prep.options import Layout, PrepConfig, TokenCounter
from posttrain.data.prep.rows import CONTAMINATED, NEAR_DUPLICATE, Located, Outcome, OutRow, keep_short, outcome_of

SHOWN = 10
_TOKENS_AT_ONCE = 512


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
class PartitionJob:
    """What a worker process needs."""

    number: int
    folder: Path
    """Holds spill/ and gets train/, test/ and rejects/."""
    config: PrepConfig
    representatives: dict[str, str]
    evaluation: EvaluationSet | None
    count_tokens: TokenCounter | None


def spill_record(sample: Sample, identity: str, source: str, row: int) -> str:
    """A sample as one line of its partition."""
    answers = [[a.messages, a.rank, a.score, a.label] for a in sample.answers]
    return json.dumps([identity, source, row, sample.scattered, sample.prompt, answers], ensure_ascii=False)


def _read_spill(path: Path) -> dict[str, list[Located]]:
    """{prompt id: its samples}, both in the order of the data."""
    prompts: dict[str, list[Located]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            identity, source, row, scattered, prompt, answers = json.loads(line)
            made = [Answer(messages=m, rank=rank, score=score, label=label) for m, rank, score, label in answers]
            sample = Sample(prompt=prompt, answers=made, scattered=scattered)
            prompts.setdefault(identity, []).append(Located(sample=sample, source=source, row=row))
    return prompts


def run_partition(job: PartitionJob) -> Statistics:
    """Writes the partition's rows and rejects, and returns its statistics."""
    config, statistics = job.config, Statistics()
    outcomes: dict[str, Outcome] = {}
    for identity, samples in _read_spill(job.folder / "spill" / f"{job.number:05d}.jsonl").items():
        reason = _reason_against(identity, samples, job)
        if reason is None:
            outcomes[identity] = outcome_of(identity, samples, config)
        else:
            dropped, count = [(located, reason) for located in samples], len(samples)
            outcomes[identity] = Outcome(num_samples=count, num_dropped_samples=count, dropped=dropped)
    lengths = _token_lengths([row for o in outcomes.values() for row in o.rows], job.count_tokens)
    written: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    with (job.folder / "rejects" / f"{job.number:05d}.jsonl").open("w", encoding="utf-8") as rejects:
        for identity, outcome in outcomes.items():
            keep_short(outcome, config, lengths)
            side = "test" if _is_test(job.representatives.get(identity, identity), config) else "train"
            written[side].extend(row.values for row in outcome.rows)
            _count(statistics, identity, outcome, side, config)
            for located, reason in outcome.dropped:
                rejects.write(
                    json.dumps({"file": located.source, "row": located.row, "reason": reason}, ensure_ascii=False) + "\n"
                )
    for side, rows in written.items():
        if rows:
            _write_parquet(job.folder / side / f"{job.number:05d}.parquet", rows, config.layout)
    return statistics


def _reason_against(identity: str, samples: list[Located], job: PartitionJob) -> str | None:
    if job.config.near_duplicates == "drop" and identity in job.representatives:
        return NEAR_DUPLICATE
    if job.evaluation is not None:
        texts = {m["content"] for s in samples for m in s.sample.prompt}
        texts |= {a.text for s in samples for a in s.sample.answers}
        if any(job.evaluation.overlaps(text) for text in texts):
            return CONTAMINATED
    return None


def _token_lengths(rows: list[OutRow], count_tokens: TokenCounter | None) -> dict[int, int]:
    """Tokens of every row's longest conversation, by id() of the row."""
    if count_tokens is None:
        return {}
    conversations = [(id(row), c) for row in rows for c in row.conversations]
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


def _count(statistics: Statistics, identity: str, outcome: Outcome, side: str, config: PrepConfig) -> None:
    statistics.counts.update(
        {"prompts": 1, "samples": outcome.num_samples, "dropped_samples": outcome.num_dropped_samples,
         "built": outcome.num_built, f"written_{side}": len(outcome.rows)}
    )  # fmt: skip
    statistics.dropped.update(reason for _, reason in outcome.dropped)
    statistics.dropped.update(outcome.dropped_answers)
    for k, row in enumerate(outcome.rows):
        if config.layout == "pairs":
            chosen, rejected = (sum(len(m["content"]) for m in row.values[n]) for n in ("chosen", "rejected"))
            statistics.chosen_lengths[chosen.bit_length() - 1] += 1
            statistics.rejected_lengths[rejected.bit_length() - 1] += 1
            statistics.unequal_lengths += chosen != rejected
            statistics.longer_chosen += chosen > rejected
            if row.values["margin"] is not None:
                statistics.margins[float(f"{row.values['margin']:.2g}")] += 1
        statistics.shown.append((_draw("shown", config.seed, identity, k), row.values))
    if len(statistics.shown) > 50 * SHOWN:
        statistics.shown = sorted(statistics.shown, key=lambda item: item[0])[:SHOWN]


def _write_parquet(path: Path, rows: list[dict[str, Any]], layout: Layout) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    conversation = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    columns: dict[str, list[tuple[str, Any]]] = {
        "pairs": [("prompt", conversation), ("chosen", conversation), ("rejected", conversation), ("margin", pa.float64()),
                  ("chosen_score", pa.float64()), ("rejected_score", pa.float64())],
        "groups": [("prompt", conversation), ("completions", pa.list_(conversation)), ("ranks", pa.list_(pa.int32())),
                   ("scores", pa.list_(pa.float64()))],
        "labelled": [("prompt", conversation), ("completion", conversation), ("label", pa.bool_())],
        "sft": [("messages", conversation)],
    }  # fmt: skip
    schema = pa.schema([*columns[layout], ("source", pa.string()), ("row", pa.int64()), ("prompt_id", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
