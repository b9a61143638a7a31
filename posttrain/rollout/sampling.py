"""From logits to tokens, and when a completion ends. A draw depends on the logits and on (seed,
position) alone, never on what else is in the batch.

The race of exponentials: with E_v independent standard exponentials, argmax_v p_v / E_v is a draw
from p (the Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030, on the scale of probabilities).
Numbers come from a counter-based generator keyed by seed and position (Philox: Salmon et al. 2011).
A small change of the logits seldom changes the winner, which the inverse CDF does not have. It is
run twice, over blocks of ids and over the ids of the block that won: the same distribution from
V / 256 + 256 numbers instead of V.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from posttrain.rollout.engine import FinishReason, SamplingConfig

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
