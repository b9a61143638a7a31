"""Rewards for right answers: 1 right, 0 wrong, None where the sample's own answer cannot be read.

What is judged is the one ``<answer>`` block if the completion has tags (several blocks: 0), else
the whole text. Golds, completions and votes go through one reader, which reads an answer whole or
says that it cannot: a bare ``11\\sqrt2`` is no 11, and text from which only a part could be read is
compared as it is written. All of this runs in a worker process under a hard time limit; a
completion that exhausts it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from posttrain.rewards import reward
from posttrain.rewards.text import answer_block

# --- verifiers


@reward(verifies=True, reads_answers=True, on_timeout=0.0, imports=("math_verify",))
def math_answer(
    completion: str, sample: Mapping[str, Any], *, column: str = "answer", in_thought: bool = False
) -> float | None:
    """Whether the answer equals ``sample[column]`` mathematically (math-verify: LaTeX, boxed or
    bare, numbers, sets, words).

    Both are read as a whole. None where the sample's answer cannot be read and the completion does
    not say the very same. A gold answer written as GSM8K's (``... #### 72``) is what follows the
    marks.
    """
    gold = read_answer(_gold(sample, column))
    if gold is None:
        return None
    text = judged_text(completion, in_thought=in_thought)
    said = None if text is None else answer_in(text)
    if said is not None and same_answer(gold, said):
        return 1.0
    return 0.0 if gold.parsed or gold.is_words or said is None else None


@reward(verifies=True, reads_answers=True, on_timeout=0.0)
def numeric_answer(
    completion: str,
    sample: Mapping[str, Any],
    *,
    column: str = "answer",
    tolerance: float = 0.0,
    in_thought: bool = False,
) -> float | None:
    """Whether the number in the last box, else the last number of the text, equals
    ``sample[column]`` to ``tolerance``.

    1,234, 1e5, 1.5\\times10^5, fractions and mixed numbers are read; a number that is a part of
    something else (``11\\sqrt2``) is none.
    """
    gold = last_number(_gold(sample, column))
    if gold is None:
        return None
    text = judged_text(completion, in_thought=in_thought)
    found = None if text is None else last_number(", ".join(boxed(text)) or text)
    return 1.0 if found is not None and abs(found - gold) <= Decimal(str(tolerance)) else 0.0


@reward(verifies=True, on_timeout=0.0)
def exact_answer(
    completion: str, sample: Mapping[str, Any], *, column: str = "answer", ignore_case: bool = False
) -> float:
    """Whether the text is ``sample[column]``, white space aside."""
    text = judged_text(completion)
    wanted, found = (" ".join(t.split()) for t in (_gold(sample, column), text or ""))
    if ignore_case:
        wanted, found = wanted.casefold(), found.casefold()
    return 1.0 if text is not None and wanted == found else 0.0


@reward(verifies=True, reads_answers=True, on_timeout=0.0)
def choice_answer(
    completion: str, sample: Mapping[str, Any], *, column: str = "answer", in_thought: bool = False
) -> float | None:
    """Whether the letter that is chosen is the sample's.

    Chosen is the letter of the last box; else of the last "answer is C", "Answer: (C)", "option C";
    else the text itself (``C``, ``C. Paris``); else the last bold one; else ``(C)`` or ``C)``,
    where it is the only one. LaTeX text and bold around it do not count. None where the sample's
    answer is no letter.
    """
    gold = re.fullmatch(r"\W*([A-Za-z])\W*", _unset(_gold(sample, column)))
    if gold is None:
        return None
    text = judged_text(completion, in_thought=in_thought)
    return 1.0 if text is not None and _chosen(text) == gold[1].upper() else 0.0


@reward(verifies=True, on_timeout=0.0, imports=("reasoning_gym",))
def gym_answer(completion: str, sample: Mapping[str, Any], *, partial: bool = False) -> float:
    """reasoning-gym's own verifier of ``sample["task"]``; its partial credit only where asked
    for."""
    import reasoning_gym

    text = judged_text(completion)
    entry = {"answer": sample["answer"], "metadata": sample.get("metadata") or {}}
    entry["question"] = sample.get("question", "")
    if text is None:
        return 0.0
    score = float(reasoning_gym.get_score_answer_fn(str(sample["task"]))(text.strip(), entry))
    return score if partial else float(score >= 1.0)


def _gold(sample: Mapping[str, Any], column: str) -> str:
    if sample.get(column) is None:
        raise ValueError(
            f"the sample has no column {column!r}; it has {', '.join(map(str, sample))}"
        )
    return str(sample[column]).rpartition("####")[2].strip()


# --- where the answer stands


def judged_text(completion: str, *, in_thought: bool = False) -> str | None:
    """What a verifier reads: after the thought, the ``<answer>`` block, or all of it if there are
    no such tags.

    None for a thought that does not end, also one that the prompt began, and for tags that are not
    exactly one block. ``in_thought``: the thought counts too.
    """
    text = str(completion)
    if not in_thought:
        _, closing, reply = text.rpartition("</think>")
        if not closing and ("<think>" in text or getattr(completion, "in_thought", False)):
            return None
        text = reply
    return answer_block(text) if "<answer>" in text or "</answer>" in text else text


def final_answer(completion: str) -> str:
    """What a vote counts: the box, the ``<answer>`` block, the last number or the text; numbers by
    their value. "" for none.

    It is not parsed as mathematics: votes are counted in the training process, which nothing that a
    model writes may stop.
    """
    text = judged_text(completion) or ""
    boxes = boxed(text)
    if boxes or not text or "<answer>" in completion:
        said = _bare(", ".join(boxes) if boxes else text)
        value = last_number(said) if _NUMERIC.fullmatch(said) else None
        return _squeezed(said) if value is None else _digits(value)
    letter, number = _chosen(text), last_number(text)
    if letter is not None and len(text) > 1:
        return letter
    return " ".join(text.split()) if number is None else _digits(number)


def _digits(value: Decimal) -> str:
    return f"{value.normalize():f}"


_LETTER = r"(?:\((?P<p>[A-Za-z])\)|(?P<l>[A-Z])(?![\w'’]))"
_CHOICES = (
    re.compile(
        rf"(?i:\b(?:answer|choice|option)\b)[^.\n\w(]*(?:(?i:is|was|be|choice|option)\b[^.\n\w(]*)*{_LETTER}"
    ),
    re.compile(
        r"\A[\s(*\[]*(?:(?P<p>[A-Za-z])[\s).*:\]]*\Z|(?P<l>[A-Z])[).:]\s(?!.*\([A-Z]\)))", re.DOTALL
    ),
    re.compile(r"\*\*\(?(?P<p>[A-Z])(?P<l>)\)?(?![\w'’])"),
    re.compile(r"\((?P<p>[A-Z])\)|(?<!\w)(?P<l>[A-Z])\)"),
)
"""Ways to name a choice, the most certain first."""


def _chosen(text: str) -> str | None:
    boxes = boxed(text)
    if boxes:
        found = re.match(r"\W*([A-Za-z])(?![A-Za-z])", _unset(boxes[-1]))
        return found[1].upper() if found else None
    bold = _unset(text)
    for number, way in enumerate(_CHOICES):
        plain = bold if number == 2 else bold.replace("*", "")
        named = [m["p"] or m["l"] for m in way.finditer(plain)]
        if named:
            return named[-1].upper() if number < 3 or len(set(named)) == 1 else None
    return None


def _unset(text: str) -> str:
    """Without LaTeX that only sets a text, and dollars."""
    return _LETTERS.sub(r"\1", _TEXT.sub(r"\1", text)).replace("$", "")


_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=[^\s{]))")
NEAR = 40
"""Boxes with at most so many characters between them are parts of one answer."""


def boxed(text: str) -> list[str]:
    """Contents of the last ``\\boxed{}`` and of those right before it."""
    kept: list[str] = []
    start = None
    for match in reversed(list(_BOX.finditer(text))):
        rest = text[match.end() :]
        inside = _inside_braces(rest) if match.group().endswith("{") else rest.split()[0]
        if start is not None and start - match.end() - len(inside) > NEAR:
            break
        start = match.start()
        kept.insert(0, inside)
    return list(dict.fromkeys(kept))


def _inside_braces(text: str) -> str:
    """Up to the brace that closes the one before the text."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return text


MAX_CHARACTERS = 2000
"""Longest answer that is parsed as mathematics; of longer prose its end is searched."""
WHOLE_CHARACTERS = 200
"""Longest text that may be an answer and nothing else."""
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SAID = re.compile(r"(?i)\banswer\b\W{0,3}(?:is|:|=|equals|was)+[\s:*]*(?:equal to\s+)?")
_END_OF_SENTENCE = re.compile(r"(?<=[^\d\s])\.(?:\s|$)|\.\s*$|\n")


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
    return _answer_in_prose(text[-MAX_CHARACTERS:]) or whole


def _answer_in_prose(tail: str) -> Answer | None:
    said = [m.end() for m in _SAID.finditer(tail)]
    if said:
        tail = _END_OF_SENTENCE.split(tail[said[-1] :].lstrip(), maxsplit=1)[0]
        whole = read_answer(tail)
        if whole is not None and (whole.parsed or whole.is_words):
            return whole
    formulas = list(_MATH.finditer(tail))
    number = _last_number_match(tail[formulas[-1].end() :] if formulas else tail)
    if number is not None:
        return read_answer(number)
    if formulas:
        return read_answer(next(g for g in formulas[-1].groups() if g))
    return read_answer(tail) if said else None


# --- what it says


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
_SCIENTIFIC = re.compile(r"(?<![\w\\.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?![\w.])")


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
    return Answer(_squeezed(bare), _parsed(bare) if len(bare) <= MAX_CHARACTERS else ())


def _parsed(bare: str) -> tuple[Any, ...]:
    """What math-verify reads; empty if it reads less than there is."""
    from math_verify import LatexExtractionConfig, parse

    text = _LETTERS.sub(r"\1", bare) if not _TEXT.fullmatch(bare) else bare
    text = _REPEATING.sub(_fraction_of, text)
    text = _ANGLE.sub(r"\1\\frac{\2\\pi}{180}", text)
    text = _SCIENTIFIC.sub(r"\1\\times10^{\2}", text)
    found = parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)
    return () if len(found) < 2 or _lost(text, str(found[-1])) else tuple(found)


def _fraction_of(match: re.Match[str]) -> str:
    """0.1\\overline{6} as a fraction."""
    whole, fixed, cycle = match.groups()
    bottom = (10 ** len(cycle) - 1) * 10 ** len(fixed)
    top = int(f"{whole or 0}{fixed}{cycle}") - int(f"{whole or 0}{fixed}")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _lost(text: str, read: str) -> bool:
    """Whether digits, letters or signs of the text are in nothing that was read; a unit in words
    may be."""
    said = re.sub(r"\\(?:begin|end)\{\w+\}", " ", _TEXT.sub(" ", text))
    if said.strip() == "0.5":  # read as \\frac{1}{2}
        return False
    letters = re.sub(r"\\[a-zA-Z]+|[A-Za-z]{2,}", " ", said)
    words = [w for w in _WORD_RUN.findall(said) if w not in _FUNCTIONS]
    return (
        re.findall(r"\d", said) != re.findall(r"\d", read)
        or any(c.isalpha() and c not in read for c in letters)
        or any(word.casefold() in read.casefold() for word in words)
    )


# --- numbers

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
_JOINED_BEFORE = re.compile(
    r"(?:[\w^_\\{}\]!]|(?<=\w)\.|[-+*/×^_]\s*|\\(?:times|cdot|pm|div|sqrt|left[(\[])\s*)$"
)
_JOINED_BEFORE_SIGN = re.compile(r"[\w)}\]!]\s*$")
_LISTED_BEFORE = re.compile(r"[\w)}]\s*,\s*$")
_JOINED_AFTER = re.compile(r"[A-Za-z](?![A-Za-z])|[\d_^!{\\]|\s*[-+*/×^]\s*[\w\\(]|\s*\\[a-zA-Z]")
_UNIT_AFTER = re.compile(r"\s*(?:\\(?:text|mbox|mathrm|quad|right)\b|\\[%$)\],;! ]|\^\s*\{?\\circ)")
"""What a number must not touch to be one of its own, and what may follow it all the same."""


def last_number(text: str) -> Decimal | None:
    """The last number of a text: 1,234, 1{,}234, -5, 1e5, 1.5\\times10^5, a fraction, a mixed
    number. None if there is none, or if the last one is a part of something else (11\\sqrt2,
    2^{10}, 7!, 2x)."""
    match = _NUMERIC.fullmatch(_last_number_match(text) or "")
    if match is None:
        return None
    g = match.groupdict()
    try:
        if g["number"]:
            value = Decimal(g["number"]).scaleb(int(g["e"] or g["p"] or g["q"] or 0))
        else:
            top, bottom = g["top"] or g["a"] or g["c"], g["bottom"] or g["b"] or g["d"]
            value = Decimal(top) / Decimal(bottom) + Decimal(g["mixed"] or g["whole"] or 0)
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
    before, number, after = plain[: match.start()], match.group(), plain[match.end() :]
    joined = _JOINED_BEFORE_SIGN if number[0] in "+-" else _JOINED_BEFORE
    in_list = _LISTED_BEFORE.search(before) and re.match(r"\s*(?:\\right)?[)\]}]", after)
    opens_list = re.search(r"[(\[]\s*$", before) and re.match(r"\s*,", after)
    goes_on = _JOINED_AFTER.match(after) and not _UNIT_AFTER.match(after)
    return "" if joined.search(before) or in_list or opens_list or goes_on else number


def _plain(text: str) -> str:
    """Without thousands separators, with one minus sign and a digit before each point."""
    text = re.sub("[\u2212\u2013]", "-", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?<![\w.,}])\.(?=[0-9])", "0.", text)
    return _THOUSANDS.sub(lambda m: re.sub(r"\D", "", m.group()), text)


def _bare(text: str) -> str:
    """Without what encloses and sets it: dollars, boxes, a full stop, thousands separators,
    bold."""
    bare, before = _plain(text).strip(), None
    while bare != before:
        before = bare
        bare = bare.strip().strip("*").strip()
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            inner = bare.removeprefix(opening).removesuffix(closing)
            if len(bare) - len(inner) == len(opening + closing) and inner and opening not in inner:
                bare = inner
        box = _BOX.match(bare)
        if box and box.group().endswith("{"):
            inner = bare[box.end() : -1]
            bare = inner if _inside_braces(bare[box.end() :]) == inner else bare
        bare = bare[:-1] if bare.endswith((".", ",")) else bare
    return bare


def _squeezed(text: str) -> str:
    setting = r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad)(?![a-zA-Z])|\s|\\ |~"
    return re.sub(r"\{(\w)\}", r"\1", re.sub(setting, "", text))
