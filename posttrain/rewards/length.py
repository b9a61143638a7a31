"""Rewards and penalties for length and repetition. Lengths are tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.rewards.completion import lengths


def k15_length(
    completions: Sequence[str],
    sample: Mapping[str, Any],
    scores: Mapping[str, Sequence[float | None]],
    *,
    correct: str = "",
) -> list[float]:
    """lambda_i = 1/2 - (len_i - min) / (max - min) for a right answer, min(0, lambda_i) for a wrong
    one; 0 if all are as long.

    Kimi k1.5, arXiv:2501.12599 section 2.3.3; lengths within the group. ``correct``: the reward
    that tells right (> 0) from wrong; by default the first. Its weight warms up by
    ``rewards.starts``: first none, then constant for the rest of training.
    """
    if not scores:
        raise ValueError(
            "k15_length needs another reward that tells right from wrong; it is the only one."
        )
    right = scores[correct or next(iter(scores))]
    length = lengths(completions)
    shortest, longest = min(length), max(length)
    if shortest == longest:
        return [0.0] * len(length)
    weights = [0.5 - (n - shortest) / (longest - shortest) for n in length]
    return [w if (r or 0.0) > 0 else min(0.0, w) for w, r in zip(weights, right, strict=True)]


k15_length.grouped = True  # type: ignore[attr-defined]


def overlong_penalty(
    completion: str, sample: Mapping[str, Any], *, max_tokens: int, cache_tokens: int
) -> float:
    """0 up to max_tokens - cache_tokens, then linearly down to -1 at max_tokens, -1 beyond.

    Yu et al. 2025 (DAPO), arXiv:2503.14476 eq. 13; there 20480 and 4096.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise ValueError(
            "overlong_penalty needs 0 < cache_tokens <= max_tokens; got "
            f"{cache_tokens} and {max_tokens}."
        )
    (n,) = lengths([completion])
    return float(min(0.0, max(-1.0, (max_tokens - cache_tokens - n) / cache_tokens)))


def cosine_length(
    completions: Sequence[str],
    sample: Mapping[str, Any],
    scores: Mapping[str, Sequence[float | None]],
    *,
    max_tokens: int,
    correct: str = "",
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> list[float]:
    """From ``right[0]`` at length 0 to ``right[1]`` at max_tokens along half a cosine, wrong
    answers along their own; ``exceeded`` where the length reaches max_tokens (the sampling limit).

    Yeo et al. 2025, arXiv:2502.03373 section 3.2: CosFn(t, T, a, b) = b + (a - b)(1 + cos(t pi /
    T)) / 2.
    """
    judged = scores[correct or next(iter(scores))]
    result = []
    for n, r in zip(lengths(completions), judged, strict=True):
        start, end = right if (r or 0.0) > 0 else wrong
        inside = end + 0.5 * (start - end) * (1 + math.cos(math.pi * n / max_tokens))
        result.append(exceeded if n >= max_tokens else inside)
    return result


cosine_length.grouped = True  # type: ignore[attr-defined]


def repetition_penalty(
    completion: str, sample: Mapping[str, Any], *, ngram: int = 3, weight: float = 1.0
) -> float:
    """-weight (1 - distinct / all) over the n-grams of words; 0 for a text of fewer words. Yeo et
    al. 2025, arXiv:2502.03373."""
    words = completion.lower().split()
    grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return -weight * (1 - len(set(grams)) / len(grams)) if grams else 0.0
