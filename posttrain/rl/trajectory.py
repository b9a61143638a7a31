"""One record of a completion, from its first token to the Parquet file and the loss, and what
surrounds the model's tokens: what comes after them, which are trained, when they end.

Arrays by token grow as the engine draws and the environment answers. ``to_row`` and ``from_row``
turn any of the records of this room into plain values and back: the journal, checkpoints and
Parquet files all have them in this form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np

from posttrain.data.chat import stop_token_ids
from posttrain.data.prompts import Prompt
from posttrain.rewards import RIGHT, CompletionText
from posttrain.rl.credit import all_equal
from posttrain.rollout.engine import FinishReason, Sampled
from posttrain.types import ELSEWHERE, Completion, Counts, PromptGroup, Ragged

R = TypeVar("R")
_DTYPES = {"token_ids": np.int64, "logps": np.float64, "sampled": bool, "trained": bool}


@dataclass(kw_only=True, eq=False)
class Trajectory:
    """One completion: its tokens, how they came about, and what they are worth.

    Kimi k1.5, arXiv:2501.12599 section 2.6 (partial rollouts): an iteration spends at most
    ``sampling.budget_tokens`` on a completion; an unfinished one keeps its tokens and is continued
    in the next.
    """

    seed: int
    token_ids: Any = ()
    """[tokens] those that the model drew and those that the environment appended."""
    logps: Any = ()
    """[tokens] log-prob under the distribution that drew the token; 0 for the environment's."""
    sampled: Any = None
    """[tokens] whether the model drew it. None: all."""
    trained: Any = None
    """[tokens] whether the loss may predict it, as the environment says. None: all that the model
    drew."""
    kept_ids: Ragged | None = None
    """The ids that truncation left to draw each token from; None without truncation."""
    segments: list[tuple[int, int]] = field(default_factory=list)
    """(end, policy version) of each stretch of tokens, in order."""
    finish_reason: FinishReason | None = None
    """None: to be continued."""
    text: CompletionText = CompletionText("")
    """What the rewards read; set when it is scored."""
    reward: float | None = None
    """Weighted sum of the rewards; None: could not be scored."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """What each reward function gave."""
    verdict: float | None = None
    """What tells right (1 or more) from wrong; None: not judged."""
    problems: Sequence[str] = ()
    """What went wrong in reward functions."""

    def __post_init__(self) -> None:
        if self.sampled is None:
            self.sampled = np.ones(len(self.token_ids), bool)
        if self.trained is None:
            self.trained = self.sampled
        for name, dtype in _DTYPES.items():
            setattr(self, name, np.asarray(getattr(self, name), dtype))
        self.segments = [(int(end), int(version)) for end, version in self.segments]

    @property
    def is_right(self) -> bool | None:
        """None: not judged."""
        return None if self.verdict is None else self.verdict >= RIGHT

    def extend(self, drawn: Sampled) -> None:
        """Append what an engine drew."""
        self._append(drawn.token_ids, drawn.logps, True, drawn.kept_ids)
        self.segments.append((len(self.token_ids), drawn.policy_version))
        self.finish_reason = None if drawn.finish_reason == "budget" else drawn.finish_reason

    def observe(self, token_ids: Sequence[int]) -> None:
        """Append tokens that are not the model's; it goes on after them."""
        kept = None if self.kept_ids is None else [()] * len(token_ids)
        self._append(token_ids, np.zeros(len(token_ids)), False, kept)
        self.finish_reason = None

    def _append(self, token_ids: Any, logps: Any, sampled: bool, kept: Any) -> None:
        new = [sampled] * len(token_ids)
        for name, values in (("token_ids", token_ids), ("logps", logps), ("sampled", new)):
            both = [getattr(self, name), np.asarray(values, _DTYPES[name])]
            setattr(self, name, np.concatenate(both))
        self.trained = self.sampled
        if kept is not None:
            before, after = self.kept_ids or Ragged.of([]), Ragged.of(kept)
            values = np.concatenate([before.values, after.values])
            ends = np.concatenate([before.ends, after.ends + len(before.values)])
            self.kept_ids = Ragged(values=values, ends=ends)

    def progress(self) -> tuple[Any, ...]:
        """What the other ranks need to know: how many tokens, by which policies, how it ended, and
        which may be trained."""
        length = len(self.token_ids)
        return length, self.segments, self.finish_reason, np.packbits(self.trained)

    def follow(self, length: int, segments: Any, finish_reason: Any, trained: Any) -> None:
        """Take over the ``progress`` of a trajectory whose tokens another rank holds."""
        self.token_ids = np.broadcast_to(np.int64(ELSEWHERE), length)
        self.segments, self.finish_reason = segments, finish_reason
        self.sampled = self.trained = np.unpackbits(trained, count=length).astype(bool)

    def tokens_before(self, version: int) -> int:
        """Tokens drawn by policies older than ``version``: they come first."""
        return max((end for end, drawn_by in self.segments if drawn_by < version), default=0)


@dataclass(kw_only=True, eq=False)
class TrajectoryGroup:
    """A prompt and its completions, from their first token to their rewards."""

    index: int
    """Of the prompt in the data."""
    prompt: Prompt
    trajectories: list[Trajectory]
    rank: int = 0
    """The process that draws and scores it, and holds its tokens and texts."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each reward function; set when it is scored."""

    @property
    def is_finished(self) -> bool:
        """Whether every completion is."""
        return all(t.finish_reason is not None for t in self.trajectories)

    @property
    def texts(self) -> list[CompletionText]:
        """[completion] what the rewards read."""
        return [t.text for t in self.trajectories]

    def has_signal(self, name: str = "") -> bool:
        """Whether two completions have different rewards: in all, or of the function ``name``."""
        values = [t.parts.get(name, t.reward) for t in self.trajectories]
        return not all_equal([v for v in values if v is not None])


_RECORDS = {
    "trajectories": Trajectory,
    "groups": PromptGroup,
    "completions": Completion,
    "counts": Counts,
}
"""What the fields of a record hold that are records themselves."""


def to_row(value: Any) -> Any:
    """Plain values of a record, for JSON and Parquet: arrays as lists, records as dictionaries."""
    if is_dataclass(value):
        return {f.name: to_row(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: to_row(v) for name, v in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [to_row(v) for v in value]
    return str(value) if isinstance(value, str) else value


def from_row(record: type[R], row: Mapping[str, Any]) -> R:
    """The record that ``to_row`` gave, also after a trip through JSON."""

    def read(name: str, value: Any) -> Any:
        if isinstance(value, list) and name in _RECORDS:
            return [from_row(_RECORDS[name], v) for v in value]
        if not isinstance(value, Mapping):
            return value
        if value.keys() == {"values", "ends"}:
            return Ragged(**{n: np.asarray(v, np.int64) for n, v in value.items()})
        if name in _RECORDS:
            return from_row(_RECORDS[name], value)
        return {n: read("", v) for n, v in value.items()}

    return record(**{name: read(name, value) for name, value in row.items()})


_OPENING_TOKENS = 8  # enough for <think> and what follows it


class Environment(Protocol):
    """Answers the model. A function of the trajectory alone: a run that is resumed asks again."""

    def step(self, trajectory: Trajectory, prompt: Prompt) -> Sequence[int] | None:
        """The tokens that follow when the model stopped, not the model's and never trained; None:
        it is finished. Together they have at most ``sampling.max_tokens``."""

    def trained(self, trajectory: Trajectory) -> Any:
        """[tokens] which of a finished trajectory's tokens the loss may predict; of those that the
        model drew."""

    def text(self, trajectory: Trajectory, prompt: Prompt) -> CompletionText:
        """What the rewards read of a finished trajectory."""


@dataclass(frozen=True)
class SingleTurn:
    """The model's first stop is the end. Subclass it and write ``step`` for more turns."""

    tokenizer: Any
    stop_ids: Collection[int] = ()
    """Further tokens that end a completion (the engine's), beside the tokenizer's."""

    def step(self, trajectory: Trajectory, prompt: Prompt) -> Sequence[int] | None:
        """Finished."""
        return None

    def trained(self, trajectory: Trajectory) -> Any:
        """All that the model drew."""
        return trajectory.sampled

    @cached_property
    def _ends(self) -> set[int | None]:
        return {*stop_token_ids(self.tokenizer), *self.stop_ids, self.tokenizer.pad_token_id}

    def text(self, trajectory: Trajectory, prompt: Prompt) -> CompletionText:
        """Without the tokens that end it and padding; other special tokens (<think>, say) are part
        of the text."""
        kept = [i for i in trajectory.token_ids.tolist() if i not in self._ends]
        opening = self.tokenizer.decode(prompt.ids[-_OPENING_TOKENS:], skip_special_tokens=False)
        return CompletionText(
            self.tokenizer.decode(kept, skip_special_tokens=False),
            num_tokens=len(trajectory.token_ids),
            finish_reason=trajectory.finish_reason or "budget",
            in_thought=opening.rstrip().endswith("<think>"),
            kept_ids=None if trajectory.kept_ids is None else trajectory.kept_ids.tolist(),
        )
