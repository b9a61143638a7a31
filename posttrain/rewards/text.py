"""Rewards for the form of a completion: tags, language, length (in tokens), repetition."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from posttrain.rewards import RIGHT, lengths, reward


def think_answer_format(
    completion: str, sample: Mapping[str, Any], *, opened: bool = False
) -> float:
    """1 if the completion is ``<think>...</think><answer>...</answer>`` and nothing else, each tag
    exactly once; else 0.

    DeepSeek-AI 2025, arXiv:2501.12948 section 2.2.2 and table 1. White space may stand around and
    between the blocks. ``opened``: the prompt's template already ends in ``<think>``, so the
    completion has no opening tag. Neither block may be empty.
    """
    text = f"<think>{completion}" if opened else completion
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    shape = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
    match = re.fullmatch(shape, text, flags=re.DOTALL)
    return 1.0 if match and all(part.strip() for part in match.groups()) else 0.0


def answer_block(completion: str) -> str | None:
    """What stands in the one ``<answer>`` block; None if there is no block or more than one."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    found = re.search(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    return found[1].strip() if found else None


SCRIPTS = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt"), "LATIN"),
    **dict.fromkeys(("ru", "uk"), "CYRILLIC"),
    "zh": "CJK",
    "ja": "CJK HIRAGANA KATAKANA",
    "ar": "ARABIC",
    "he": "HEBREW",
    "el": "GREEK",
    "ko": "HANGUL",
    "hi": "DEVANAGARI",
    "th": "THAI",
}


def language_consistency(
    completion: str, sample: Mapping[str, Any], *, language: str = "en"
) -> float:
    """Words of the target language / all words of the chain of thought; 1 without words.

    The chain of thought runs from ``<think>``, which the prompt may hold instead, to the last
    ``</think>``; without either tag it is the whole text. The tags themselves are no words.

    DeepSeek-AI 2025, arXiv:2501.12948v2 eq. 7. A word is of the language if its letters are of the
    language's script; languages of one script are not told apart. Each Chinese, Japanese or Thai
    character counts as a word. ``sample["language"]`` goes before the option.
    """
    wanted = str(sample.get("language") or language)
    if wanted not in SCRIPTS:
        raise ValueError(
            f"language_consistency knows {', '.join(sorted(SCRIPTS))}; got {wanted!r}."
        )
    scripts = SCRIPTS[wanted].split()
    before, closed, _ = completion.rpartition("</think>")
    text = before if closed else completion
    _, opened, inside = text.partition("<think>")
    words = _words(re.sub(r"</?(?:think|answer)>", " ", inside if opened else text))
    if not words:
        return 1.0
    return sum(all(_script(c) in scripts for c in word) for word in words) / len(words)


def _words(text: str) -> list[str]:
    found: list[str] = []
    for piece in re.findall(r"[^\W\d_]+", text):
        for is_word, run in groupby(piece, key=_is_word):
            letters = "".join(run)
            found += letters if is_word else [letters]
    return found


def _is_word(character: str) -> bool:
    return _script(character) in ("CJK", "HIRAGANA", "KATAKANA", "THAI")


def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0].split("-")[0]


Scores = Mapping[str, Sequence[float | None]]
"""{reward: its value for each completion of the prompt}"""


@reward(grouped=True)
def k15_length(
    completions: Sequence[str],
    sample: Mapping[str, Any],
    scores: Scores,
    *,
    correct_reward: str = "",
) -> list[float]:
    """lambda_i = 1/2 - (len_i - min) / (max - min) for a right answer, min(0, lambda_i) for a wrong
    one; 0 if all are as long.

    Kimi k1.5, arXiv:2501.12599 section 2.3.3; lengths within the group. ``correct_reward``: the
    reward that tells right (1 or more) from wrong; by default the first. Its weight warms up by
    ``rewards.first_iteration``: first none, then constant for the rest of training.
    """
    right = _is_right("k15_length", scores, correct_reward)
    length = lengths(completions)
    shortest, longest = min(length), max(length)
    if shortest == longest:
        return [0.0] * len(length)
    weights = [0.5 - (n - shortest) / (longest - shortest) for n in length]
    return [w if ok else min(0.0, w) for w, ok in zip(weights, right, strict=True)]


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


@reward(grouped=True)
def cosine_length(
    completions: Sequence[str],
    sample: Mapping[str, Any],
    scores: Scores,
    *,
    max_tokens: int,
    correct_reward: str = "",
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> list[float]:
    """From ``right[0]`` at length 0 to ``right[1]`` at max_tokens along half a cosine, wrong
    answers along their own; ``exceeded`` where the length reaches max_tokens (the sampling limit).

    Yeo et al. 2025, arXiv:2502.03373 section 3.2: CosFn(t, T, a, b) = b + (a - b)(1 + cos(t pi /
    T)) / 2. ``correct_reward`` as in ``k15_length``.
    """
    result = []
    judged = _is_right("cosine_length", scores, correct_reward)
    for n, ok in zip(lengths(completions), judged, strict=True):
        start, end = right if ok else wrong
        inside = end + 0.5 * (start - end) * (1 + math.cos(math.pi * n / max_tokens))
        result.append(exceeded if n >= max_tokens else inside)
    return result


def _is_right(name: str, scores: Scores, correct_reward: str) -> list[bool]:
    if not scores:
        raise ValueError(
            f"{name} needs another reward that tells right from wrong; it is the only one."
        )
    return [(score or 0.0) >= RIGHT for score in scores[correct_reward or next(iter(scores))]]


def repetition_penalty(
    completion: str, sample: Mapping[str, Any], *, ngram: int = 3, weight: float = 1.0
) -> float:
    """-weight (1 - distinct / all) over the n-grams of words; 0 for a text of fewer words. Yeo et
    al. 2025, arXiv:2502.03373."""
    words = completion.lower().split()
    grams = list(zip(*(words[i:] for i in range(ngram)), strict=False))
    return -weight * (1 - len(set(grams)) / len(grams)) if grams else 0.0
