"""From logits to tokens. A draw depends on the logits and on (seed, position) alone, never on what
else is in the batch.

The race of exponentials: with E_v independent standard exponentials, argmax_v p_v / E_v is a draw
from p (the Gumbel-max trick, Maddison et al. 2014, arXiv:1411.0030, on the scale of probabilities).
Numbers come from a counter-based generator keyed by seed, position and id. A small change of the
logits seldom changes the winner, which the inverse CDF does not have. It is run twice, over blocks
of ids and over the ids of the block that won: the same distribution from V / 256 + 256 numbers
instead of V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.data.mixture import mixed64
from posttrain.rollout.engine import SamplingConfig

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
    """bool [B, V]: top-k, then top-p of what is left, then min-p of that. Equal scores at an edge
    stay together."""
    kept_BV = torch.ones_like(scores_BV, dtype=torch.bool)
    if 0 < sampling.top_k < scores_BV.shape[-1]:
        kept_BV = scores_BV >= scores_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
    if sampling.top_p < 1.0:
        ordered, order = scores_BV.masked_fill(~kept_BV, float("-inf")).sort(
            dim=-1, descending=True
        )
        probs = torch.softmax(ordered, -1)
        before = probs.cumsum(-1) - probs
        least = ordered.masked_fill(before >= sampling.top_p, float("inf")).amin(-1, keepdim=True)
        kept_BV = kept_BV & (scores_BV >= least)
    if sampling.min_p > 0.0:
        best = scores_BV.amax(-1, keepdim=True)
        kept_BV = kept_BV & (scores_BV >= best + float(np.log(sampling.min_p)))
    return kept_BV


def _race(
    weights_BV: Tensor, seeds: Sequence[int], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(winners [B], sums of the weights [B]); a winner has a positive weight."""
    num_rows, vocabulary = weights_BV.shape
    num_blocks = -(-vocabulary // BLOCK)
    padded = F.pad(weights_BV, (0, num_blocks * BLOCK - vocabulary)).view(
        num_rows, num_blocks, BLOCK
    )
    by_block = padded.sum(-1)
    keys = _keys(seeds, positions)
    blocks = torch.arange(num_blocks, device=weights_BV.device).expand(num_rows, -1)
    block_B = (by_block / _exponentials(keys, blocks, like=by_block)).argmax(-1)
    inside = padded[torch.arange(num_rows, device=block_B.device), block_B]
    ids = block_B[:, None] * BLOCK + torch.arange(BLOCK, device=block_B.device)
    winner_B = (inside / _exponentials(keys, ids + 2**32, like=inside)).argmax(-1)
    return block_B * BLOCK + winner_B, by_block.sum(-1)


def _keys(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """[B] uint64 from (seed, position)."""
    seed = np.array([s % 2**64 for s in seeds], dtype=np.uint64)
    return _mix(_mix(seed) ^ np.array(positions, dtype=np.uint64))


def _exponentials(keys: np.ndarray, counters: Tensor, *, like: Tensor) -> Tensor:
    """Standard exponentials [B, n] of (key, counter): -log of a uniform number with 53 bits, never
    0 or 1."""
    bits = _mix(keys[:, None] ^ _mix(counters.cpu().numpy().astype(np.uint64)))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(-np.log(uniform)).to(device=like.device, dtype=like.dtype)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64: adds the golden ratio, then mixes all 64 bits."""
    with np.errstate(over="ignore"):
        return mixed64(x + np.uint64(0x9E3779B97F4A7C15))
