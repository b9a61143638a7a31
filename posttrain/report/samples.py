"""Samples of runs, packed for the viewer: token by token where the tokenizer is at hand."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.report.run import Run, json_lines
from posttrain.rewards import RIGHT

MOST = 10_000
"""Samples of a page."""
_MOST_NATS = 16.0
_BROKEN = "\ufffd"


class Samples:
    """Columns of samples, and the arrays of all their tokens one after another."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {
            name: []
            for name in "run step held_out prompt finish reward correct advantage length "
            "count text problems parts".split()
        }
        self.prompts = _Numbered()
        self.pieces = _Numbered()
        self._tokens: list[np.ndarray[Any, Any]] = []
        self._logps: list[np.ndarray[Any, Any]] = []
        self._flags: list[np.ndarray[Any, Any]] = []
        self.total = 0
        """Samples that there are in the runs' folders."""

    def add(self, *, prompt: tuple[str, str], **values: Any) -> None:
        """One sample; its prompt is (place, text)."""
        self.columns["prompt"].append(self.prompts[prompt])
        for name, value in values.items():
            self.columns[name].append(value)

    def add_tokens(self, pieces: Sequence[int], logps: Any, trained: Any, sampled: Any) -> None:
        """Of the sample that was added last."""
        self._tokens.append(np.asarray(pieces, np.uint32))
        nats = np.clip(-np.asarray(logps, np.float64), 0.0, _MOST_NATS)
        self._logps.append(np.rint(255 * np.sqrt(nats / _MOST_NATS)).astype(np.uint8))
        self._flags.append(np.asarray(trained, np.uint8) | (np.asarray(sampled, np.uint8) << 1))

    def packed(self, runs: Sequence[str]) -> bytes:
        """Length of the JSON text (4 bytes), the text, then numbers of pieces (4 bytes each),
        square roots of nats and flags (a byte each)."""
        head = {
            "runs": list(runs),
            "prompts": self.prompts.values,
            "pieces": self.pieces.values,
            "most_nats": _MOST_NATS,
            "total": self.total,
            "columns": self.columns,
        }
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
        text += b" " * (-len(text) % 4)
        arrays = [np.concatenate(a) for a in (self._tokens, self._logps, self._flags) if a]
        return len(text).to_bytes(4, "little") + text + b"".join(a.tobytes() for a in arrays)

    def __len__(self) -> int:
        return len(self.columns["run"])


class _Numbered:
    """Values by the number that each gets when it is first asked for."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def __getitem__(self, value: Any) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    @property
    def values(self) -> list[Any]:
        return list(self._numbers)


def read_samples(runs: Sequence[Run], *, most: int = MOST) -> Samples:
    """Rollouts and held-out answers; of too many, whole iterations, evenly over the run."""
    found = Samples()
    for number, run in enumerate(runs):
        folder = run.folder / "rollouts"
        tokens = Tokens(tokenizer_of(run), found.pieces)
        answers = sorted(folder.glob("held_out_*.jsonl"))
        counts = {path: sum(1 for _ in json_lines(path)) for path in answers}
        for path in _chosen(counts, most // (4 * len(runs)), of=lambda path: path.stem):
            step = int(re.findall(r"\d+", path.stem)[0])
            for row in json_lines(path):
                _add_answer(found, row, tokens, run=number, step=step)
        iterations = sorted(folder.glob("iteration_*.parquet"))
        sizes = {path: _num_rows(path) for path in iterations}
        found.total += sum(sizes.values()) + sum(counts.values())
        left = most // len(runs) * (number + 1) - len(found)
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


def _add_answer(found: Samples, row: Mapping[str, Any], tokens: Tokens, **known: Any) -> None:
    parts = {k: v for k, v in (row.get("rewards") or {}).items()}
    found.add(
        prompt=(str(row.get("where") or ""), tokens.text(row.get("prompt_ids"))),
        held_out=1,
        finish=row.get("finish_reason"),
        reward=row.get("reward"),
        correct=row.get("correct"),
        advantage=None,
        length=row.get("tokens"),
        count=0,
        text=row.get("text") or "",
        problems=[],
        parts=parts,
        **known,
    )


def _add_iteration(found: Samples, path: Path, tokens: Tokens, *, run: int, of: Run) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if not len(table):
        return
    by_token = {n: _split(table[n]) for n in ("token_ids", "logps", "trained", "sampled")}
    rows = table.drop_columns([*by_token, "kept_ids", "segments"]).to_pylist()
    step = of.step_of(rows[0]["iteration"])
    numbers = tokens.pieces(by_token["token_ids"])
    for i, row in enumerate(rows):
        pieces = numbers[i]
        found.add(
            prompt=(row["where"], tokens.text(row.get("prompt_ids"))),
            run=run,
            step=step,
            held_out=0,
            finish=row["finish_reason"],
            reward=row["reward"],
            correct=None if row["verdict"] is None else row["verdict"] >= RIGHT,
            advantage=row["advantage"],
            length=len(by_token["token_ids"][i]),
            count=len(pieces),
            text="" if len(pieces) else row["text"],
            problems=[p for p in row["problems"] or () if p],
            parts={p["name"]: p["value"] for p in row["parts"] or ()},
        )
        if len(pieces):
            found.add_tokens(pieces, *(by_token[n][i] for n in ("logps", "trained", "sampled")))


def _split(column: Any) -> list[np.ndarray[Any, Any]]:
    """The arrays of a column of lists."""
    whole = column.combine_chunks()
    whole = whole.chunk(0) if hasattr(whole, "chunk") else whole
    ends = np.asarray(whole.offsets)
    values = np.asarray(whole.values)
    return [values[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def tokenizer_of(run: Run) -> Any | None:
    """The run's tokenizer, without loading torch; None where it is in none of the known places."""
    from tokenizers import Tokenizer

    from posttrain.models.embedded import EMBEDDED, cached_folder

    names = [run.settings.get("model.tokenizer"), run.settings.get("model.name")]
    places = [run.folder / "final", run.folder / "best"]
    for name in filter(None, names):
        places += [Path(name), run.folder.parent.parent / name]
        if name in EMBEDDED:
            places.append(cached_folder(name))
    for place in places:
        if (place / "tokenizer.json").exists():
            return Tokenizer.from_file(str(place / "tokenizer.json"))
    return next((t for name in filter(None, names) if (t := _from_hub_cache(name))), None)


def _from_hub_cache(name: str) -> Any | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from tokenizers import Tokenizer

    try:
        path = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:  # a path
        return None
    return Tokenizer.from_file(path) if isinstance(path, str) else None


class Tokens:
    """Token ids to numbers of pieces of text."""

    def __init__(self, tokenizer: Any | None, pieces: _Numbered) -> None:
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
