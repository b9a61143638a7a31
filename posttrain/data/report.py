"""What became of every row: nothing is cut or left out without being counted. And a look at what is
trained: one sample in colours, and whether any end is ever trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.types import PromptGroup

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from posttrain.data.tokenise import Encoded

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


@dataclass(kw_only=True)
class SourceReport:
    """Counts of one source. num_read = num_kept + the sum of dropped."""

    source: str
    """As written in the config."""
    mask_from: str
    """Where the loss mask comes from: markers (of the template), trl (its training template),
    prefixes, none (raw text)."""
    num_read: int = 0
    """Rows in the source."""
    num_kept: int = 0
    """Rows that can be trained on, truncated ones among them."""
    num_truncated: int = 0
    """Rows whose completion was cut."""
    num_cut_tokens: int = 0
    """Tokens that were cut from them."""
    num_tokens: int = 0
    """Prompt and completion tokens of the kept rows."""
    num_trained_tokens: int = 0
    """Tokens of the kept rows under the loss mask."""
    layouts: dict[str, int] = field(default_factory=dict)
    """Layout to the number of rows that were read so."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason to number of rows left out."""
    columns: dict[str, dict[str, int]] = field(default_factory=dict)
    """``used`` and ``carried``: {column: rows that have it}; keys of messages and answers as
    ``messages.key``."""
    from_cache: bool = False
    """Whether the tokens were read from the cache."""

    def counted(self, results: Iterable[Encoded]) -> Iterator[PromptGroup]:
        """The groups of the kept rows. The counts are complete after the last."""
        layouts, dropped = Counter[str](), Counter[str]()
        columns = Counter[tuple[tuple[str, str], ...]]()
        for result in results:
            self.num_read += 1
            layouts[result.layout] += 1
            columns[result.columns] += 1
            if result.group is None:
                dropped[result.reason] += 1
                continue
            self.num_kept += 1
            self.num_truncated += result.num_cut_tokens > 0
            self.num_cut_tokens += result.num_cut_tokens
            self.num_tokens += result.group.num_tokens_shared
            self.num_trained_tokens += result.group.num_trained
            yield result.group
        self.layouts, self.dropped = dict(layouts), dict(dropped)
        self.columns = column_counts(columns)


@dataclass(kw_only=True, frozen=True)
class DataReport:
    """Counts of all sources, and how the rows were divided."""

    train: Sequence[SourceReport]
    """One per source of data.train."""
    eval: Sequence[SourceReport] = ()
    """One per source of data.eval."""
    num_train_rows: int
    """Rows that are trained on: kept less held out."""
    num_eval_rows: int
    """Rows that are evaluated on."""

    def counts(self) -> dict[str, int]:
        """Totals over the training sources: read, kept, truncated, dropped, tokens,
        trained_tokens."""
        names = ("read", "kept", "truncated", "tokens", "trained_tokens")
        totals = {name: sum(getattr(s, f"num_{name}") for s in self.train) for name in names}
        return {**totals, "dropped": sum(self.dropped().values())}

    def dropped(self) -> dict[str, int]:
        """Reason to number of rows left out, over the training sources."""
        return dict(sum((Counter(s.dropped) for s in self.train), Counter()))

    def columns(self) -> dict[str, dict[str, int]]:
        """``used`` and ``carried`` of all sources: {column: rows that have it}."""
        return {
            use: dict(sorted(sum(counters, Counter()).items()))
            for use in ("used", "carried")
            if any(counters := [Counter(s.columns.get(use)) for s in (*self.train, *self.eval)])
        }

    def render(self) -> Table:
        """A table for the terminal."""
        from rich.markup import escape
        from rich.table import Table

        rows = f"{self.num_train_rows:,} rows to train on, {self.num_eval_rows:,} to evaluate on"
        table = Table(title=f"Data: {rows}")
        table.add_column("source", overflow="fold")
        for name in ("read", "kept", "cut", "dropped", "tokens", "trained"):
            table.add_column(name, justify="right")
        for number, s in enumerate((*self.train, *self.eval)):
            name = s.source.rpartition("/")[2] + (" (eval)" if number >= len(self.train) else "")
            how = f"{', '.join(s.layouts)}, mask from {s.mask_from}"
            counts = (s.num_read, s.num_kept, s.num_truncated, sum(s.dropped.values()))
            numbers = (*counts, s.num_tokens, s.num_trained_tokens)
            cached = ", cached" if s.from_cache else ""
            table.add_row(escape(name) + f"\n{how}{cached}", *(f"{n:,}" for n in numbers))
        cut = sum(s.num_cut_tokens for s in self.train)
        of = f"from {self.counts()['truncated']:,} completions"
        lost = [f"{cut:,} tokens cut {of}"] if cut else []
        lost += [f"{n:,} rows dropped: {reason}" for reason, n in sorted(self.dropped().items())]
        said = {"used": "read", "carried": "not read, carried along"}
        for use, columns in self.columns().items():
            listed = ", ".join(f"{name} ({n:,})" for name, n in columns.items())
            lost.append(escape(f"{said[use]}: {listed}"))
        table.caption = "\n".join(lost) or None
        return table


def check_stop_trained(groups: Iterable[PromptGroup], stop_ids: Iterable[int]) -> None:
    """ValueError if no completion trains a stop token: the model would never learn to end its
    answer."""
    stops, number = set(stop_ids), 0
    for number, group in enumerate(groups, start=1):  # noqa: B007
        for c in group.completions:
            if any(m and t in stops for t, m in zip(c.token_ids, c.loss_mask, strict=True)):
                return
    raise ValueError(
        f"No stop token is ever trained: none of the {number} samples has one of the ids "
        f"{sorted(stops)} under its loss mask, so the model would not learn to end an answer. "
        "Either every sample is cut (raise --data.max_length), or the chat template writes no "
        "end-of-turn token (set --data.chat_template), or the tokenizer has no EOS token."
    )


def highlight_sample(group: PromptGroup, tokenizer: Any) -> Text:
    """The group's text as the model sees it, trained tokens in bold green, all others dim.

    A piece is what the decoded text gains by its tokens, so characters of several tokens and
    leading spaces come out right; a character split between two pieces goes to the second.
    """
    from rich.text import Text

    out = Text()
    for k, completion in enumerate(group.completions):
        ids = [*group.prompt_ids, *completion.token_ids]
        mask = [0] * len(group.prompt_ids) + [int(bool(m)) for m in completion.loss_mask]
        if k:
            out.append("\n" + "-" * 20 + "\n", style="dim")
        shown = 0
        for border in range(1, len(ids) + 1):
            is_last = border == len(ids)
            if not is_last and mask[border] == mask[border - 1]:
                continue
            text = tokenizer.decode(
                ids[:border], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            text = text if is_last else text.rstrip("\ufffd")
            out.append(text[shown:], style="bold green" if mask[border - 1] else "dim")
            shown = max(shown, len(text))
    return out
