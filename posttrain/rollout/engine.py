"""What every rollout engine takes and gives. Token ids are the truth from end to end: text is never
re-encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from posttrain.resolve import settings
from posttrain.rollout.receipt import Receipt

FinishReason = Literal["stop", "length", "repeat", "budget"]
"""stop: a stop token or string; length: ``max_tokens``; repeat: caught in a loop; budget: the
iteration's token budget, to be continued."""


@settings
class SamplingConfig:
    """How completions are drawn. Training samples from the whole distribution: truncation is for
    evaluation."""

    max_tokens: int = 512
    """Most tokens of a completion, over all iterations that it is continued in."""
    temperature: float = 1.0
    """Logits are divided by it; 0: greedy. Log-probs, of the sampler and of the trainer, are those
    at this temperature."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the smallest set of most likely tokens with at least this probability; 1: all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the most likely token's probability; 0: all."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end a completion, beside the tokenizer's stop tokens; they stay part of it."""
    budget_tokens: int = 0
    """Partial rollouts: most tokens of a completion in one iteration; the next continues what is
    unfinished. 0: no limit."""
    repeat_ngram: int = 0
    """Stop a completion when its last ``repeat_ngram`` tokens have occurred ``repeat_times`` times
    in a row; 0: never."""
    repeat_times: int = 4
    """How often in a row."""

    def __post_init__(self) -> None:
        if (
            self.max_tokens < 1
            or self.temperature < 0
            or self.top_k < 0
            or self.budget_tokens < 0
            or self.repeat_ngram < 0
        ):
            raise ValueError(
                "sampling needs max_tokens >= 1 and temperature, top_k, budget_tokens, "
                f"repeat_ngram >= 0; got max_tokens={self.max_tokens}, "
                f"temperature={self.temperature}, top_k={self.top_k}, "
                f"budget_tokens={self.budget_tokens}, repeat_ngram={self.repeat_ngram}."
            )
        if not 0.0 < self.top_p <= 1.0 or not 0.0 <= self.min_p < 1.0:
            raise ValueError(
                f"sampling needs 0 < top_p <= 1 and 0 <= min_p < 1; got {self.top_p} "
                f"and {self.min_p}."
            )
        if self.repeat_times < 2:
            raise ValueError(
                "sampling.repeat_times must be >= 2: one occurrence is no "
                f"repetition; got {self.repeat_times}."
            )

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from less than the whole vocabulary."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """Completions wanted for one prompt. Completion i is drawn from the stream ``seeds[i]``,
    whatever else is in the batch."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    """One non-negative 64-bit integer per completion; position t of a completion draws from (seed,
    t)."""
    prefixes: tuple[tuple[int, ...], ...] = ()
    """Tokens that each completion already has (partial rollouts); empty: none has any."""

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.seeds:
            raise ValueError(
                f"A request needs a prompt token and a seed; got {len(self.prompt_ids)} prompt "
                f"tokens, {len(self.seeds)} seeds."
            )
        if self.prefixes and len(self.prefixes) != len(self.seeds):
            raise ValueError(
                "A request needs one prefix per seed or none; got "
                f"{len(self.prefixes)} for {len(self.seeds)}."
            )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What was drawn for one completion: new tokens only, without prompt and prefix; the stop token
    included."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """One per token: natural log-prob under the distribution it was drawn from (temperature,
    truncation renormalised); under greedy decoding that of the model at temperature 1."""
    finish_reason: FinishReason
    policy_version: int
    """Number of weight updates that the sampling policy had seen."""
    kept_ids: tuple[tuple[int, ...], ...] | None = None
    """One per token: the ids that truncation left to draw from; None without truncation."""


def check_positions(model_config: Any, longest: int) -> None:
    """ValueError if a prompt with its completion, ``longest`` tokens, has more than the positions
    that the model knows."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ValueError(
            f"Prompt and completion may have {longest} tokens, but the model knows {positions} "
            "positions. Lower --sampling.max_tokens or --data.max_prompt_length."
        )


OnFinished = Callable[[int, int, Sampled], None]
"""(index of the request, index of the completion in it, what was drawn): called as soon as a
completion is finished."""


class Engine(Protocol):
    """Draws completions under the present weights of a policy."""

    returns_kept_ids: bool
    """Whether truncated sampling returns the kept sets; an engine that cannot is refused for
    training with truncation."""
    is_reproducible: bool
    """Whether the same call under the same weights gives the same completions."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        on_finished: OnFinished | None = None,
    ) -> list[list[Sampled]]:
        """[request][completion]. Every completion is there: an engine that cannot draw one
        raises."""

    def refresh(self, version: int) -> Receipt:
        """From now on samples come from the policy's present weights, which are the result of
        ``version`` updates. Raises ReceiptError where they would come from others."""
