"""What every rollout engine takes and gives, and what all have in common: from logits to tokens,
and when a completion ends. Token ids are the truth from end to end: text is never re-encoded.

A draw depends on the logits and on (seed, position) alone, never on what else is in the batch. The
race of exponentials: with E_v independent standard exponentials, argmax_v p_v / E_v is a draw from
p (the Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030, on the scale of probabilities).
Numbers come from a counter-based generator keyed by seed and position (Philox: Salmon et al. 2011).
A small change of the logits seldom changes the winner, which the inverse CDF does not have. It is
run twice, over blocks of ids and over the ids of the block that won: the same distribution from
V / 256 + 256 numbers instead of V.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from posttrain.resolve import check_rules, settings
from posttrain.rollout.handover import Receipt

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
        check_rules(
            "sampling",
            self,
            "max_tokens >= 1",
            "temperature >= 0",
            "top_k >= 0",
            "0 < top_p <= 1",
            "0 <= min_p < 1",
            "budget_tokens >= 0",
            "repeat_ngram >= 0",
            "repeat_times >= 2",
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
    """Tokens that each completion already has (partial rollouts). Default: none has any."""

    def __post_init__(self) -> None:
        vars(self).update(prefixes=self.prefixes or ((),) * len(self.seeds))
        assert self.prompt_ids and self.seeds and len(self.prefixes) == len(self.seeds), self


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What was drawn for one completion: new tokens only, without prompt and prefix; the stop token
    included."""

    token_ids: Sequence[int]
    logps: Sequence[float]
    """One per token: natural log-prob under the distribution it was drawn from (temperature,
    truncation renormalised); under greedy decoding that of the model at temperature 1."""
    finish_reason: FinishReason
    policy_version: int
    """Number of weight updates that the sampling policy had seen."""
    kept_ids: Sequence[Sequence[int]] | None = None
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


BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One token for each row."""

    token_ids_B: Tensor
    logps_B: Tensor
    """Natural log-prob under the distribution that it was drawn from; greedy: under the model at
    temperature 1."""
    kept_BV: Tensor | None
    """bool: what truncation left; None without truncation."""


def draw(
    logits_BV: Tensor, sampling: SamplingConfig, *, seeds: Sequence[int], positions: Sequence[int]
) -> Drawn:
    """The token of each row: of the whole vocabulary, of what top-k, top-p and min-p leave of it,
    or the likeliest.

    Computes in at least float32. ``seeds``: 64-bit keys; ``positions``: index of the token in its
    completion.
    """
    scores_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    if sampling.temperature == 0:
        token_ids_B = scores_BV.argmax(-1)
        logps_B = scores_BV.gather(1, token_ids_B[:, None])[:, 0] - torch.logsumexp(scores_BV, -1)
        return Drawn(token_ids_B=token_ids_B, logps_B=logps_B, kept_BV=None)
    if sampling.temperature != 1.0:
        scores_BV = scores_BV / sampling.temperature
    kept_BV = kept_by_truncation(scores_BV, sampling) if sampling.truncates else None
    if kept_BV is not None:
        scores_BV = scores_BV.masked_fill(~kept_BV, float("-inf"))
    top_B = scores_BV.amax(-1, keepdim=True)
    weights_BV = torch.exp(scores_BV - top_B)
    token_ids_B, total_B = _race(weights_BV, seeds, positions)
    logps_B = scores_BV.gather(1, token_ids_B[:, None])[:, 0] - top_B[:, 0] - total_B.log()
    return Drawn(token_ids_B=token_ids_B, logps_B=logps_B, kept_BV=kept_BV)


def kept_by_truncation(scores_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """bool [B, V]: top-k, then top-p of what is left, then min-p of that."""
    warpers: list[LogitsProcessor] = []
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        scores_BV = warper(None, scores_BV)
    return scores_BV.isfinite()


def _race(
    weights_BV: Tensor, seeds: Sequence[int], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(winners [B], sums of the weights [B]); a winner has a positive weight."""
    num_rows, vocabulary = weights_BV.shape
    num_blocks = -(-vocabulary // BLOCK)
    padded = F.pad(weights_BV, (0, num_blocks * BLOCK - vocabulary))
    in_blocks = padded.view(num_rows, num_blocks, BLOCK)
    by_block = in_blocks.sum(-1)
    rivals = _exponentials(seeds, positions, num_blocks + BLOCK).to(by_block)
    block_B = (by_block / rivals[:, :num_blocks]).argmax(-1)
    inside = in_blocks[torch.arange(num_rows, device=block_B.device), block_B]
    winner_B = (inside / rivals[:, num_blocks:]).argmax(-1)
    return block_B * BLOCK + winner_B, by_block.sum(-1)


def _exponentials(seeds: Sequence[int], positions: Sequence[int], count: int) -> Tensor:
    """[B, count] standard exponentials of (seed, position): -log of a uniform number with 53 bits,
    never 0 or 1."""
    keys = np.array([[s % 2**64, t] for s, t in zip(seeds, positions, strict=True)], np.uint64)
    bits = np.stack([np.random.Philox(key=key).random_raw(count) for key in keys])
    return torch.from_numpy(-np.log(((bits >> np.uint64(11)) + 0.5) * 2.0**-53))


_TOKENS_PER_CHARACTER = 4  # a character can be spread over this many byte tokens


@dataclass(frozen=True)
class StopRule:
    """When a completion ends: stop token or string, repetition, length, the iteration's budget; in
    this order. Ask ``reason(prefix, drawn)`` after every token. Raises ValueError for stop strings
    without ``decode``, which turns ids into text."""

    sampling: SamplingConfig
    stop_ids: Collection[int]
    decode: Callable[[Sequence[int]], str] | None

    def __post_init__(self) -> None:
        if self.sampling.stop_strings and self.decode is None:
            raise ValueError("sampling.stop_strings need a tokenizer; give the engine one.")

    def reason(self, prefix: Sequence[int], drawn: Sequence[int]) -> FinishReason | None:
        """Why the completion ``prefix + drawn`` ends with its last token; None: it goes on."""
        s = self.sampling
        if drawn[-1] in self.stop_ids or self._ends_in_string(prefix, drawn):
            return "stop"
        needed = s.repeat_ngram * s.repeat_times
        if needed and repeats(
            [*prefix[-needed:], *drawn[-needed:]], ngram=s.repeat_ngram, times=s.repeat_times
        ):
            return "repeat"
        if len(prefix) + len(drawn) >= s.max_tokens:
            return "length"
        return "budget" if s.budget_tokens and len(drawn) >= s.budget_tokens else None

    def _ends_in_string(self, prefix: Sequence[int], drawn: Sequence[int]) -> bool:
        """A stop string ends in the text of the last token (it may begin in earlier ones, also of
        the prefix)."""
        if self.decode is None or not self.sampling.stop_strings:
            return False
        window = max(map(len, self.sampling.stop_strings)) * _TOKENS_PER_CHARACTER
        tail = [*prefix[-window:], *drawn[-window:]][-window:]
        text, before = self.decode(tail), self.decode(tail[:-1])
        return any(text.count(stop) > before.count(stop) for stop in self.sampling.stop_strings)


def repeats(token_ids: Sequence[int], *, ngram: int, times: int) -> bool:
    """Whether the last ``ngram`` tokens, or any shorter stretch of them, stand ``times`` times in a
    row at the end.

    A stretch shorter than ``ngram`` must fill as many tokens as ``times`` n-grams would.
    """
    needed = ngram * times
    if len(token_ids) < needed:
        return False
    end = list(token_ids[-needed:])
    return any(end[:-period] == end[period:] for period in range(1, ngram + 1))
