"""Rewards for right answers: 1 right, 0 wrong, None where the sample's own answer cannot be read.

What is judged is the one ``<answer>`` block if the completion has tags (several blocks: 0), else
the whole text. These run in the worker process (``rewards/pool.py``) under a hard time limit; a
completion that exhausts it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from posttrain.rewards.format import answer_block
from posttrain.rewards.reading import (
    answer_in,
    boxed,
    last_number,
    read_answer,
    same_answer,
    written,
)


def math_answer(
    completion: str, sample: Mapping[str, Any], *, column: str = "answer", in_thought: bool = False
) -> float | None:
    """Whether the answer equals ``sample[column]`` mathematically (math-verify: LaTeX, boxed or
    bare, numbers, sets, words).

    Both are read as a whole (``rewards/reading.py``). None where the sample's answer cannot be read
    and the completion does not say the very same. A gold answer written as GSM8K's (``... ####
    72``) is what follows the marks.
    """
    gold = read_answer(gold_text(sample, column))
    if gold is None:
        return None
    text = judged_text(completion, in_thought=in_thought)
    said = None if text is None else answer_in(text)
    if said is not None and same_answer(gold, said):
        return 1.0
    return 0.0 if gold.parsed or gold.is_words or said is None else None


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
    gold = last_number(gold_text(sample, column))
    if gold is None:
        return None
    text = judged_text(completion, in_thought=in_thought)
    found = None if text is None else last_number(", ".join(boxed(text)) or text)
    return 1.0 if found is not None and abs(found - gold) <= Decimal(str(tolerance)) else 0.0


def exact_answer(
    completion: str, sample: Mapping[str, Any], *, column: str = "answer", ignore_case: bool = False
) -> float:
    """Whether the text is ``sample[column]``, white space aside."""
    text = judged_text(completion)
    wanted, found = (" ".join(t.split()) for t in (gold_text(sample, column), text or ""))
    if ignore_case:
        wanted, found = wanted.casefold(), found.casefold()
    return 1.0 if text is not None and wanted == found else 0.0


def choice_answer(
    completion: str, sample: Mapping[str, Any], *, column: str = "answer", in_thought: bool = False
) -> float | None:
    """Whether the letter that is chosen is the sample's.

    Chosen is the letter of the last box; else of the last "answer is C", "Answer: (C)", "option C";
    else the text itself (``C``, ``C. Paris``); else the last bold one; else ``(C)`` or ``C)``,
    where it is the only one. LaTeX text and bold around it do not count. None where the sample's
    answer is no letter.
    """
    gold = re.fullmatch(r"\W*([A-Za-z])\W*", _unset(gold_text(sample, column)))
    if gold is None:
        return None
    text = judged_text(completion, in_thought=in_thought)
    chosen = None if text is None else _chosen(text)
    return 1.0 if chosen == gold[1].upper() else 0.0


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
    for number, way in enumerate(_CHOICES):
        plain = _unset(text) if number == 2 else _unset(text).replace("*", "")
        named = [m["p"] or m["l"] for m in way.finditer(plain)]
        if named:
            return named[-1].upper() if number < 3 or len(set(named)) == 1 else None
    return None


def _unset(text: str) -> str:
    """Without LaTeX that only sets a text, and dollars."""
    return re.sub(
        r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text
    ).replace("$", "")


def gym_answer(completion: str, sample: Mapping[str, Any], *, partial: bool = False) -> float:
    """reasoning-gym's own verifier of ``sample["task"]``; its partial credit only where asked
    for."""
    import reasoning_gym

    text = judged_text(completion)
    entry = {
        "answer": sample["answer"],
        "metadata": sample.get("metadata") or {},
        "question": sample.get("question", ""),
    }
    score = (
        0.0
        if text is None
        else float(reasoning_gym.get_score_answer_fn(str(sample["task"]))(text.strip(), entry))
    )
    return score if partial else float(score >= 1.0)


for _reward in (math_answer, numeric_answer, exact_answer, choice_answer, gym_answer):
    _reward.on_timeout = 0.0  # type: ignore[attr-defined,union-attr]
    _reward.verifies = True  # type: ignore[attr-defined,union-attr]
for _reads in (math_answer, numeric_answer, choice_answer):
    _reads.reads_answers = True  # type: ignore[attr-defined]  # None for a sample whose own answer cannot be read
math_answer.imports = ("math_verify",)  # type: ignore[attr-defined]
gym_answer.imports = ("reasoning_gym",)  # type: ignore[attr-defined]


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
    text = judged_text(completion)
    boxes = boxed(text or "")
    if text is None or boxes or "<answer>" in completion:
        return written(", ".join(boxes) if boxes else text or "")
    if (letter := _chosen(text)) is not None and len(text) > 1:
        return letter
    number = last_number(text)
    return " ".join(text.split()) if number is None else f"{number.normalize():f}"


def gold_text(sample: Mapping[str, Any], column: str) -> str:
    """The sample's answer. Raises ValueError where the column is missing."""
    if sample.get(column) is None:
        raise ValueError(
            f"the sample has no column {column!r}; it has {', '.join(map(str, sample))}"
        )
    return str(sample[column]).rpartition("####")[2].strip()
