"""DeepSeek-R1's language consistency."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from posttrain.rewards.format import R1_TAGS

SCRIPTS = {
    "en": "LATIN",
    "de": "LATIN",
    "fr": "LATIN",
    "es": "LATIN",
    "it": "LATIN",
    "pt": "LATIN",
    "zh": "CJK",
    "ru": "CYRILLIC",
    "uk": "CYRILLIC",
    "ar": "ARABIC",
    "he": "HEBREW",
    "el": "GREEK",
    "ko": "HANGUL",
    "hi": "DEVANAGARI",
    "th": "THAI",
    "ja": "CJK HIRAGANA KATAKANA",
}

_TAGS = re.compile(rf"</?(?:{'|'.join(R1_TAGS)})>")


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
    words = _words(_TAGS.sub(" ", _thought(completion)))
    if not words:
        return 1.0
    return sum(all(_script(c) in scripts for c in word) for word in words) / len(words)


def _thought(completion: str) -> str:
    before, closed, _ = completion.rpartition("</think>")
    text = before if closed else completion
    _, opened, inside = text.partition("<think>")
    return inside if opened else text


def _words(text: str) -> list[str]:
    found: list[str] = []
    for piece in re.findall(r"[^\W\d_]+", text):
        run = ""
        for character in piece:
            if _script(character) in ("CJK", "HIRAGANA", "KATAKANA", "THAI"):
                found += [run, character] if run else [character]
                run = ""
            else:
                run += character
        if run:
            found.append(run)
    return found


def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0].split("-")[0]
