"""A run folder as plain values, also of a run that goes on or was killed; its samples, packed for
the viewer token by token where the tokenizer is at hand."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from posttrain.resolve import flat
from posttrain.rewards import RIGHT

METRICS = "metrics.jsonl"
MOST = 10_000
"""Samples of a page."""
_MOST_NATS = 16.0
_BROKEN = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    """Flat: ``optimizer.lr``."""
    about: Mapping[str, Any]
    """about.json: environment, memory, method; empty for runs before there was one."""
    data: Mapping[str, Any]
    """Counts of rows."""
    steps: Sequence[Mapping[str, Any]]
    """Metrics of training steps, in order."""
    held_out: Sequence[Mapping[str, Any]]
    """The same for evaluations."""

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run; None where it is not known."""
        return self.about.get("num_steps") or self.settings.get("train.max_steps") or None

    def step_of(self, iteration: int) -> int:
        """The first optimizer step on what an iteration sampled; where it was not logged, counted
        by the updates of each iteration."""
        found = (s["step"] for s in self.steps if s.get("iteration") == iteration)
        updates = self.settings.get("rollout.updates", 1) * self.settings.get("rollout.epochs", 1)
        return next(found, iteration * updates + 1)


def is_done(folder: Path) -> bool:
    """Whether a run folder has a final model, and no metrics that came a minute after
    it: a run that goes on writes these."""
    final, metrics = folder / "final", folder / METRICS
    return final.exists() and metrics.stat().st_mtime < final.stat().st_mtime + 60


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs; those of one name have their parents' too. ValueError for a folder that is none."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else os.fspath(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> Run:
    """ValueError where there are no metrics."""
    if not (folder / METRICS).exists():
        raise ValueError(
            f"{folder} has no {METRICS}: it is no folder of a run, of a pipeline or of "
            "`posttrain prep`. Give one, such as runs/sft."
        )
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, dict[str, Any]] = {}
    data: dict[str, Any] = {}
    for line in json_lines(folder / METRICS):
        data = line.pop("data", data)
        # a run that goes on from a checkpoint may repeat steps: the last ones count
        of = steps if "loss" in line else held_out
        if len(line) > 1:
            of[line["step"]] = line
    config, about = folder / "config.yaml", folder / "about.json"
    return Run(
        name=name,
        folder=folder,
        settings=dict(flat(yaml.safe_load(config.read_text("utf-8")))) if config.exists() else {},
        about=json.loads(about.read_bytes()) if about.exists() else {},
        data=data,
        steps=[steps[s] for s in sorted(steps)],
        held_out=[held_out[s] for s in sorted(held_out)],
    )


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines; a line that is torn (the last one of a run that was killed,
    or writes it just now) is left out."""
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


class Numbered(dict[Any, int]):
    """Values by the number that each gets when it is first asked for."""

    def __missing__(self, value: Any) -> int:
        self[value] = len(self)
        return self[value]


class Samples:
    """Rows of samples, and the arrays of their tokens one after another."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.prompts, self.pieces = Numbered(), Numbered()
        self._arrays: list[tuple[np.ndarray[Any, Any], ...]] = []
        self.total = 0
        """Samples that there are in the runs' folders."""

    def add_tokens(self, pieces: Sequence[int], logps: Any, trained: Any, sampled: Any) -> None:
        """Of the next row."""
        nats = np.clip(-np.asarray(logps, np.float64), 0.0, _MOST_NATS)
        roots = np.rint(255 * np.sqrt(nats / _MOST_NATS)).astype(np.uint8)
        flags = np.asarray(trained, np.uint8) | (np.asarray(sampled, np.uint8) << 1)
        self._arrays.append((np.asarray(pieces, np.uint32), roots, flags))

    def packed(self, runs: Sequence[str]) -> bytes:
        """Length of the JSON text (4 bytes), the text, then numbers of pieces (4 bytes each),
        square roots of nats and flags (a byte each)."""
        head = {
            "runs": list(runs),
            "prompts": list(self.prompts),
            "pieces": list(self.pieces),
            "most_nats": _MOST_NATS,
            "total": self.total,
            "columns": {name: [row[name] for row in self.rows] for name in self.rows[0]},
        }
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        text += b" " * (-len(text) % 4)
        arrays = (np.concatenate(part).tobytes() for part in zip(*self._arrays, strict=True))
        return len(text).to_bytes(4, "little") + text + b"".join(arrays)


def read_samples(runs: Sequence[Run], *, most: int = MOST) -> Samples:
    """Rollouts and held-out answers; of too many, whole iterations, evenly over the run."""
    found = Samples()
    for number, run in enumerate(runs):
        folder = run.folder / "rollouts"
        tokens = Tokens(tokenizer_of(run), found.pieces)
        answers = {p: list(json_lines(p)) for p in sorted(folder.glob("held_out_*.jsonl"))}
        counts = {path: len(rows) for path, rows in answers.items()}
        for path in _chosen(counts, most // (4 * len(runs)), of=lambda path: path.stem):
            known = {"run": number, "step": int(re.findall(r"\d+", path.stem)[0]), "held_out": 1}
            found.rows += [_answer(found, row, tokens) | known for row in answers[path]]
        sizes = {path: _num_rows(path) for path in sorted(folder.glob("iteration_*.parquet"))}
        found.total += sum(sizes.values()) + sum(counts.values())
        left = most // len(runs) * (number + 1) - len(found.rows)
        for path in _chosen(sizes, left, of=lambda path: path.stem.partition("_rank")[0]):
            _add_iteration(found, path, tokens, run=number, of=run)
    return found


def _chosen(sizes: Mapping[Path, int], most: int, of: Callable[[Path], str]) -> list[Path]:
    """Files with at most so many rows in all: those ``of`` some iterations, evenly spaced, the last
    one among them."""
    groups = [list(files) for _, files in itertools.groupby(sizes, key=of)]
    every = 1
    while every < len(groups) and sum(sizes[f] for g in groups[::-every] for f in g) > most:
        every += 1
    return [file for group in groups[::-every][::-1] for file in group]


def _num_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def _answer(found: Samples, row: Mapping[str, Any], tokens: Tokens) -> dict[str, Any]:
    """The columns of a held-out answer."""
    return {
        "prompt": found.prompts[row["where"] or "", tokens.text(row["prompt_ids"])],
        "finish": row["finish_reason"],
        "reward": row["reward"],
        "correct": row["correct"],
        "advantage": None,
        "length": row["tokens"],
        "count": 0,
        "text": row["text"],
        "problems": [],
        "parts": row["rewards"],
    }


def _add_iteration(found: Samples, path: Path, tokens: Tokens, *, run: int, of: Run) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    by_token = {n: table[n].to_numpy() for n in ("token_ids", "logps", "trained", "sampled")}
    rows = table.drop_columns([*by_token, "kept_ids", "segments"]).to_pylist()
    step = of.step_of(rows[0]["iteration"])
    for i, (row, pieces) in enumerate(zip(rows, tokens.pieces(by_token["token_ids"]), strict=True)):
        known = {
            "run": run,
            "step": step,
            "held_out": 0,
            "prompt": found.prompts[row["where"], tokens.text(row["prompt_ids"])],
            "finish": row["finish_reason"],
            "reward": row["reward"],
            "correct": None if row["verdict"] is None else row["verdict"] >= RIGHT,
            "advantage": row["advantage"],
            "length": len(by_token["token_ids"][i]),
            "count": len(pieces),
            "text": "" if pieces else row["text"],
            "problems": [p for p in row["problems"] or () if p],
            "parts": {p["name"]: p["value"] for p in row["parts"] or ()},
        }
        found.rows.append(known)
        if pieces:
            found.add_tokens(pieces, *(by_token[n][i] for n in ("logps", "trained", "sampled")))


def tokenizer_of(run: Run) -> Any | None:
    """The run's tokenizer, without loading torch; None where it is in none of the known places."""
    from tokenizers import Tokenizer

    found = next((file for file in _tokenizer_files(run) if file.exists()), None)
    return None if found is None else Tokenizer.from_file(str(found))


def _tokenizer_files(run: Run) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from posttrain.models.embedded import EMBEDDED, cached_folder

    folders = [run.folder / "final", run.folder / "best"]
    names = (run.settings.get("model.tokenizer"), run.settings.get("model.name"))
    for name in filter(None, names):
        folders += [Path(name), run.folder.parent.parent / name]
        folders += [cached_folder(name)] if name in EMBEDDED else []
    yield from (folder / "tokenizer.json" for folder in folders)
    for name in filter(None, names):
        with suppress(HFValidationError):  # a path
            found = try_to_load_from_cache(name, "tokenizer.json")
            yield from [Path(found)] if isinstance(found, str) else []


class Tokens:
    """Token ids to numbers of pieces of text."""

    def __init__(self, tokenizer: Any | None, pieces: Numbered) -> None:
        self._tokenizer: Any = tokenizer
        self._pieces = pieces
        self._number: dict[int, int] = {}
        """By token id; -1 for a part of a character."""
        self._texts: dict[tuple[int, ...], str] = {}
        if tokenizer is not None:
            # a piece is what a token adds after another: at the start decoders drop spaces
            self._anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
            self._start = tokenizer.decode(self._anchor, skip_special_tokens=False)

    def text(self, ids: Sequence[int] | None) -> str:
        """The whole text, special tokens too."""
        if self._tokenizer is None or not ids:
            return ""
        key = tuple(ids)
        if key not in self._texts:
            self._texts[key] = self._tokenizer.decode(ids, skip_special_tokens=False)
        return self._texts[key]

    def pieces(self, sequences: Sequence[Any]) -> list[list[int]]:
        """Numbers of each sequence's pieces, as many as it has tokens. A character of several
        tokens is the piece of the last; the others are empty. Nothing without a tokenizer, or for
        tokens that it does not know."""
        if self._tokenizer is None:
            return [[] for _ in sequences]
        known = self._number
        new = sorted({int(t) for ids in sequences for t in np.unique(ids)} - known.keys())
        for token, text in zip(new, self._added([[t] for t in new]), strict=True):
            known[token] = -1 if _BROKEN in text else self._pieces[text]
        return [self._repaired(ids.tolist(), [known[t] for t in ids.tolist()]) for ids in sequences]

    def _added(self, several: list[list[int]]) -> Iterator[str]:
        whole = [self._anchor + ids for ids in several]
        for text in self._tokenizer.decode_batch(whole, skip_special_tokens=False):
            yield text.removeprefix(self._start)

    def _repaired(self, ids: list[int], numbers: list[int]) -> list[int]:
        """Parts of characters put together."""
        if -1 not in numbers:
            return numbers
        at = 0
        while at < len(ids):
            end = at + 1
            if numbers[at] == -1:
                text = next(self._added([ids[at:end]]))
                while _BROKEN in text and end < len(ids) and numbers[end] == -1 and end - at < 8:
                    end += 1
                    text = next(self._added([ids[at:end]]))
                if _BROKEN in text:  # no whole character: each part is shown as what it is
                    end = at + 1
                    text = _BROKEN
                numbers[at:end] = [self._pieces[""]] * (end - at - 1) + [self._pieces[text]]
            at = end
        return numbers
