"""DeepSeek-R1's language consistency."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

SCRIPTS = {
    "en": "LATIN", "de": "LATIN", "fr": "LATIN", "es": "LATIN", "it": "LATIN", "pt": "LATIN", "zh": "CJK", "ru": "CYRILLIC",
    "uk": "CYRILLIC", "ar": "ARABIC", "he": "HEBREW", "el": "GREEK", "ko": "HANGUL", "hi": "DEVANAGARI", "th": "THAI",
    "ja": "CJK HIRAGANA KATAKANA",
}  # fmt: skip


def language_consistency(completion: str, sample: Mapping[str, Any], *, language: str = "en") -> float:
    """Words of the target language / all words of the chain of thought (the ``<think>`` block, else all of it); 1 without words.

    DeepSeek-AI 2025, arXiv:2501.12948v2 eq. 7. A word is of the language if its letters are of the language's script; languages
    of one script are not told apart. Each Chinese, Japanese or Thai character counts as a word. ``sample["language"]`` goes
    before the option.
    """
    wanted = str(sample.get("language") or language)
    if wanted not in SCRIPTS:
        raise ValueError(f"language_consistency knows {', '.join(sorted(SCRIPTS))}; got {wanted!r}.")
    scripts = SCRIPTS[wanted].split()
    block = re.search(r"<think>(.*?)(</think>|$)", completion, flags=re.DOTALL)
    words = _words(block.group(1) if block else completion)
    if not words:
        return 1.0
    return sum(_is_of(word, scripts) for word in words) / len(words)


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


def _is_of(word: str, scripts: list[str]) -> bool:
    return all(_script(c) in scripts for c in word)


def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ")[0].split("-")[0]
