"""What surrounds the model's tokens: what comes after them, which are trained, when it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from posttrain.data.chat import stop_token_ids
from posttrain.data.prompts import Prompt
from posttrain.rewards import CompletionText
from posttrain.rl.trajectory import Trajectory

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
