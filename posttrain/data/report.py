"""What became of every row: nothing is cut or left out without being counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PROMPT_FILLS = "prompt fills max_length"
OVERLONG = "longer than max_length"
SAME_SIDES = "chosen and rejected are the same tokens"
ALL_TIED = "all completions are tied"


def column_counts(seen: Mapping[tuple[tuple[str, str], ...], int]) -> dict[str, dict[str, int]]:
    """{use: {column: rows}} of how often each set of (column, use) was seen."""
    counts: dict[str, Counter[str]] = {}
    for columns, rows in seen.items():
        for name, use in columns:
            counts.setdefault(use, Counter())[name] += rows
    return {use: dict(sorted(names.items())) for use, names in sorted(counts.items())}


@dataclass(kw_only=True, frozen=True)
class SourceReport:
    """Counts of one source. num_read = num_kept + the sum of dropped."""

    source: str
    """As written in the config."""

    layouts: dict[str, int]
    """Layout to the number of rows that were read so."""

    mask_from: str
    """Where the loss mask comes from: markers (of the template), trl (its training template),
    prefixes, none (raw text)."""

    num_read: int
    """Rows in the source."""

    num_kept: int
    """Rows that can be trained on, truncated ones among them."""

    num_truncated: int
    """Rows whose completion was cut."""

    num_cut_tokens: int
    """Tokens that were cut from them."""

    num_tokens: int
    """Prompt and completion tokens of the kept rows."""

    num_trained_tokens: int
    """Tokens of the kept rows under the loss mask."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Reason to number of rows left out."""

    columns: dict[str, dict[str, int]] = field(default_factory=dict)
    """``used`` and ``carried``: {column: rows that have it}; keys of messages and answers as
    ``messages.key``."""

    from_cache: bool = False
    """Whether the tokens were read from the cache. Default False: tokenised now."""

    @property
    def num_dropped(self) -> int:
        """Rows left out, for whatever reason."""
        return sum(self.dropped.values())


@dataclass(kw_only=True, frozen=True)
class DataReport:
    """Counts of all sources, and how the rows were divided."""

    train: Sequence[SourceReport]
    """One per source of data.train."""

    eval: Sequence[SourceReport] = ()
    """One per source of data.eval. Default: none."""

    num_train_rows: int
    """Rows that are trained on: kept less held out."""

    num_eval_rows: int
    """Rows that are evaluated on."""

    def counts(self) -> dict[str, int]:
        """Totals over the training sources: read, kept, truncated, dropped, tokens,
        trained_tokens."""
        names = ("read", "kept", "truncated", "dropped", "tokens", "trained_tokens")
        return {name: sum(getattr(s, f"num_{name}") for s in self.train) for name in names}

    def dropped(self) -> dict[str, int]:
        """Reason to number of rows left out, over the training sources."""
        return dict(sum((Counter(s.dropped) for s in self.train), Counter()))

    def render(self) -> Table:
        """A table for the terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=f"Data: {self.num_train_rows:,} rows to train on, "
            f"{self.num_eval_rows:,} to evaluate on"
        )
        table.add_column("source", overflow="fold")
        for name in ("read", "kept", "cut", "dropped", "tokens", "trained"):
            table.add_column(name, justify="right")
        for use, sources in (("", self.train), (" (eval)", self.eval)):
            for s in sources:
                how = (
                    f"{', '.join(s.layouts)}, mask from "
                    f"{s.mask_from}{', cached' if s.from_cache else ''}"
                )
                numbers = (s.num_read, s.num_kept, s.num_truncated, s.num_dropped)
                tokens = (s.num_tokens, s.num_trained_tokens)
                table.add_row(
                    escape(f"{s.source.rpartition('/')[2]}{use}") + f"\n{how}",
                    *(f"{n:,}" for n in numbers + tokens),
                )
        lost = [f"{n:,} rows dropped: {reason}" for reason, n in sorted(self.dropped().items())]
        for use, said in (("used", "read"), ("carried", "not read, carried along")):
            columns = sum(
                (Counter(s.columns.get(use)) for s in (*self.train, *self.eval)), Counter()
            )
            names = ", ".join(f"{name} ({n:,})" for name, n in sorted(columns.items()))
            lost += [escape(f"{said}: {names}")] if columns else []
        cut = sum(s.num_cut_tokens for s in self.train)
        if cut:
            lost.insert(0, f"{cut:,} tokens cut from {self.counts()['truncated']:,} completions")
        table.caption = "\n".join(lost) or None
        return table
