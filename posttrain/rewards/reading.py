"""What an answer says: one reader for golds, completions and votes. It reads an answer whole, or
says that it cannot.

A bare ``11\\sqrt2`` is no 11: text from which only a part could be read is compared as it is
written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

MAX_CHARACTERS = 2000
"""Longest answer that is parsed as mathematics; of longer prose its end is searched."""
WHOLE_CHARACTERS = 200
"""Longest text that may be an answer and nothing else."""
NEAR = 40
"""Boxes with at most so many characters between them are parts of one answer."""

_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_POWER = r"(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(?:\{(?P<p>[-+]?\d{1,3})\}|(?P<q>[-+]?\d{1,3}))"
_NUMERIC = re.compile(
    rf"""(?:(?P<sign>[-+])\s*)?(?:
        (?P<whole>\d+)?\s*\\[dt]?frac\s*(?:\{{(?P<a>[-+]?\d+)\}}\s*\{{(?P<b>\d+)\}}|(?P<c>\d)(?P<d>\d))
      | (?:(?P<mixed>\d+)\s+)?(?P<top>{_NUMBER})\s*/\s*(?P<bottom>\d+)
      | (?P<number>{_NUMBER})(?:[eE](?P<e>[-+]?\d{{1,3}})\b|\s*{_POWER})?
    )""",
    re.VERBOSE | re.ASCII,
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\}|,\\!|\\,|\\ )\d{3})+(?![\d])", re.ASCII)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{]))")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SAID = re.compile(r"(?i)\banswer\b\W{0,3}(?:is|:|=|equals|was)+[\s:*]*(?:equal to\s+)?")
_WORDS = re.compile(r"[^\W\d_][^\W\d_ ,.'()\-/]*(?:[ ,.'()\-/]+[^\W\d_]+)*[.)]?")
_SPELLED = {"pi": r"\pi", "infinity": r"\infty", "inf": r"\infty"}
_BASE = re.compile(r"(\d[\dA-F]*)_\{?(\d+)\}?")
_LETTERS = re.compile(r"\\(?:mathbf|mathrm|mathit|vec|hat|mathsf|boldsymbol|bm)\s*\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|operatorname)\s*\{([^{}]*)\}")
_WORD_RUN = re.compile(
    r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}|(?i:it|is|an|at|by|of|to|in|on|or|no|if|we|so|be|as|do)(?![A-Za-z]))"
)
"""Letters that are no product of variables."""
_FUNCTIONS = ("sin", "cos", "tan", "log", "exp", "sqrt")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")
_ANGLE = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\b\s*[({]?\s*)(\d+)\s*\^\s*\{?\\circ\}?")
_JOINED_BEFORE = re.compile(
    r"(?:[\w^_\\{}\]!]|(?<=\w)\.|[-+*/×^_]\s*|\\(?:times|cdot|pm|div|sqrt|left[(\[])\s*)$"
)
_JOINED_BEFORE_SIGN = re.compile(r"[\w)}\]!]\s*$")
_LISTED_BEFORE = re.compile(r"[\w)}]\s*,\s*$")
_JOINED_AFTER = re.compile(r"[A-Za-z](?![A-Za-z])|[\d_^!{\\]|\s*[-+*/×^]\s*[\w\\(]|\s*\\[a-zA-Z]")
_UNIT_AFTER = re.compile(r"\s*(?:\\(?:text|mbox|mathrm|quad|right)\b|\\[%$)\],;! ]|\^\s*\{?\\circ)")
"""What a number must not touch to be one of its own, and what may follow it all the same."""


@dataclass(frozen=True)
class Answer:
    """An answer as it was read."""

    written: str
    """The text without white space and without what only sets it, for a comparison letter by
    letter."""
    parsed: tuple[Any, ...] = ()
    """What math-verify makes of it; empty: it is words, or cannot be read as a whole."""
    is_words: bool = False
    """Words, or a number with its base: only the same ones say the same."""


def same_answer(gold: Answer, other: Answer) -> bool:
    """Whether both say the same: the same text, or mathematically equal. Not symmetric: ``x = 5``
    is said for 5."""
    if gold.written == other.written:
        return True
    if not gold.parsed or not other.parsed:
        return False
    from math_verify import verify

    return bool(verify(list(gold.parsed), list(other.parsed), timeout_seconds=None))


@lru_cache(maxsize=4096)
def read_answer(text: str) -> Answer | None:
    """The whole text as one answer; None if there is nothing in it."""
    bare = _bare(text)
    if not bare:
        return None
    words = " ".join(_TEXT.sub(r"\1", bare).strip("()[]. ").split())
    if (
        _WORDS.fullmatch(words)
        and words.casefold() not in _SPELLED
        and not re.search(r"\\(?!text|mbox|mathrm)", bare)
    ):
        return Answer(written=words.casefold(), is_words=True)
    if _BASE.fullmatch(bare):
        return Answer(written=_squeezed(bare), is_words=True)
    bare = _SPELLED.get(bare.casefold(), bare)
    if len(bare) > MAX_CHARACTERS:
        return Answer(written=_squeezed(bare))
    return Answer(written=_squeezed(bare), parsed=_parsed(bare))


def answer_in(text: str) -> Answer | None:
    """The answer that a text gives: its last box (boxes side by side are one answer); the text
    itself, where it is nothing but an answer; what follows the last "answer is"; else the last
    formula or number, whichever comes later.

    None if there is none, or only a part of something else.
    """
    boxes = boxed(text)
    if boxes:
        return read_answer(", ".join(boxes))
    short = text.strip()
    prose = len(short) > WHOLE_CHARACTERS or "\n" in short or re.search(r"\$|\\[(\[]", _bare(short))
    whole = None if prose else read_answer(short)
    if whole is not None and (whole.parsed or whole.is_words):
        return whole
    return _answer_in_prose(text) or whole


def _answer_in_prose(text: str) -> Answer | None:
    tail = text[-MAX_CHARACTERS:]
    said = [m.end() for m in _SAID.finditer(tail)]
    if said:
        tail = re.split(r"(?<=[^\d\s])\.(?:\s|$)|\.\s*$|\n", tail[said[-1] :].lstrip(), maxsplit=1)[
            0
        ]
        whole = read_answer(tail)
        if whole is not None and (whole.parsed or whole.is_words):
            return whole
    formulas = list(_MATH.finditer(tail))
    after = tail[formulas[-1].end() :] if formulas else tail
    number = _last_number_match(after)
    if number is not None:
        return read_answer(number) if number else None
    if formulas:
        return read_answer(next(g for g in formulas[-1].groups() if g))
    return read_answer(tail) if said else None


def boxed(text: str) -> list[str]:
    """Contents of the last ``\\boxed{}`` and of those right before it."""
    found: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        inside = (
            inside_braces(text[match.end() :])
            if match.group().endswith("{")
            else text[match.end() :].split()[0]
        )
        found.append((match.start(), match.end() + len(inside), inside))
    kept = found[-1:]
    for one in reversed(found[:-1]):
        if kept[0][0] - one[1] > NEAR:
            break
        kept.insert(0, one)
    return list(dict.fromkeys(inside for _, _, inside in kept))


def inside_braces(text: str) -> str:
    """Up to the brace that closes the one before the text."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return text


def number_of(text: str) -> Decimal | None:
    """The text as one number; None if it is more or less than that."""
    bare = _bare(text)
    return last_number(bare) if _NUMERIC.fullmatch(bare) else None


def written(text: str) -> str:
    """The text as an answer is compared letter by letter: a number by its value, else without white
    space and settings."""
    value = number_of(text)
    return _squeezed(_bare(text)) if value is None else f"{value.normalize():f}"


def last_number(text: str) -> Decimal | None:
    """The last number of a text: 1,234, 1{,}234, -5, 1e5, 1.5\\times10^5, a fraction, a mixed
    number. None if there is none, or if the last one is a part of something else (11\\sqrt2,
    2^{10}, 7!, 2x)."""
    written = _last_number_match(text)
    match = _NUMERIC.fullmatch(written) if written else None
    if match is None:
        return None
    g = match.groupdict()
    try:
        if g["number"]:
            value = Decimal(g["number"]).scaleb(int(g["e"] or g["p"] or g["q"] or 0))
        elif g["top"]:
            value = Decimal(g["top"]) / Decimal(g["bottom"]) + Decimal(g["mixed"] or 0)
        else:
            value = Decimal(g["a"] or g["c"]) / Decimal(g["b"] or g["d"]) + Decimal(g["whole"] or 0)
    except (InvalidOperation, ZeroDivisionError):
        return None
    return -value if g["sign"] == "-" else value


def _last_number_match(text: str) -> str | None:
    """The last number as it is written, without separators; "" if it is a part of something else;
    None if there is none."""
    plain = _plain(text)
    match = None
    for match in _NUMERIC.finditer(plain):  # noqa: B007 - the last one
        pass
    if match is None:
        return None
    before, after, written = plain[: match.start()], plain[match.end() :], match.group()
    joined = _JOINED_BEFORE_SIGN if written[0] in "+-" else _JOINED_BEFORE
    in_list = _LISTED_BEFORE.search(before) and re.match(r"\s*(?:\\right)?[)\]}]", after)
    opens_list = re.search(r"[(\[]\s*$", before) and re.match(r"\s*,", after)
    if (
        joined.search(before)
        or in_list
        or opens_list
        or (_JOINED_AFTER.match(after) and not _UNIT_AFTER.match(after))
    ):
        return ""
    return written


def _plain(text: str) -> str:
    """Without thousands separators, with one minus sign and a digit before each point."""
    text = (
        text.replace("\u2212", "-")
        .replace("\u2013", "-")
        .replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac")
    )
    text = re.sub(r"(?<![\w.,}])\.(?=[0-9])", "0.", text)
    return _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m.group()), text)


def _bare(text: str) -> str:
    """Without what encloses and sets it: dollars, boxes, a full stop, thousands separators,
    bold."""
    bare = _plain(text).strip()
    while True:
        before = bare
        bare = bare.strip().strip("*").strip()
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = bare[len(opening) : -len(closing)]
            if (
                bare.startswith(opening)
                and bare.endswith(closing)
                and len(bare) > len(opening + closing)
                and opening not in inner
            ):
                bare = inner
        match = _BOX.match(bare)
        if (
            match
            and match.group().endswith("{")
            and inside_braces(bare[match.end() :]) == bare[match.end() : -1]
        ):
            bare = bare[match.end() : -1]
        if bare.endswith(".") or bare.endswith(","):
            bare = bare[:-1]
        if bare == before:
            return bare


def _squeezed(text: str) -> str:
    text = re.sub(
        r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad)(?![a-zA-Z])|\s|\\ |~", "", text
    )
    return re.sub(r"\{(\w)\}", r"\1", text)


def _parsed(bare: str) -> tuple[Any, ...]:
    """What math-verify reads; empty if it reads less than there is."""
    from math_verify import LatexExtractionConfig, parse

    text = _LETTERS.sub(r"\1", bare) if not _TEXT.fullmatch(bare) else bare
    text = _REPEATING.sub(_fraction_of, text)
    text = _ANGLE.sub(r"\1\\frac{\2\\pi}{180}", text)
    text = re.sub(
        r"(?<![\w\\.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?![\w.])", r"\1\\times10^{\2}", text
    )
    found = parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    if len(found) < 2 or _lost(text, found):
        return ()
    return tuple(found)


def _fraction_of(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, cycle = match.groups()
    bottom = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    top = int(f"{whole or 0}{fixed}{cycle}") - int(f"{whole or 0}{fixed}")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _lost(text: str, found: Sequence[Any]) -> bool:
    """Whether digits, letters or signs of the text are in nothing that was read; a unit in words
    may be."""
    said, read = re.sub(r"\\(?:begin|end)\{\w+\}", " ", _TEXT.sub(" ", text)), str(found[-1])
    if said.strip() == "0.5":  # read as \\frac{1}{2}
        return False
    if re.findall(r"\d", said) != re.findall(r"\d", read):
        return True
    if any(c.isalpha() and c not in read for c in re.sub(r"\\[a-zA-Z]+|[A-Za-z]{2,}", " ", said)):
        return True
    return any(
        word.casefold() in read.casefold()
        for word in _WORD_RUN.findall(said)
        if word not in _FUNCTIONS
    )
