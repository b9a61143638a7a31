"""Rewards for right answers: 1 right, 0 wrong, None where the sample's own answer cannot be read.

What is judged is the one ``<answer>`` block if the completion has tags (several blocks: 0), else the whole text. These run
in the worker process (``rewards/pool.py``) under a hard time limit; a completion that exhausts it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from posttrain.rewards.format import answer_block

MAX_CHARACTERS = 2000
"""Longest answer that is parsed as mathematics; of a longer text its end."""
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:\s*/\s*[0-9]+)?|[-+]?\.[0-9]+")


def math_answer(completion: str, sample: Mapping[str, Any], *, column: str = "answer") -> float | None:
    """Whether the final expression equals ``sample[column]`` mathematically (math-verify: LaTeX, boxed, plain numbers, sets).

    A gold answer written as GSM8K's (``... #### 72``) is what follows the marks.
    """
    from math_verify import parse, verify

    gold = _parsed_gold(gold_text(sample, column))
    if not gold:
        return None
    text = judged_text(completion)
    if text is None:
        return 0.0
    found = parse(text[-MAX_CHARACTERS:], parsing_timeout=None)
    return 1.0 if found and verify(list(gold), found, timeout_seconds=None) else 0.0


def numeric_answer(completion: str, sample: Mapping[str, Any], *, column: str = "answer", tolerance: float = 0.0) -> float | None:
    """Whether the last number of the text equals ``sample[column]`` to ``tolerance`` (absolute). Thousands commas are read."""
    gold = last_number(gold_text(sample, column))
    if gold is None:
        return None
    text = judged_text(completion)
    found = None if text is None else last_number(text)
    return 1.0 if found is not None and abs(found - gold) <= Decimal(str(tolerance)) else 0.0


def exact_answer(completion: str, sample: Mapping[str, Any], *, column: str = "answer", ignore_case: bool = False) -> float:
    """Whether the text is ``sample[column]``, white space aside."""
    text = judged_text(completion)
    wanted, found = (" ".join(t.split()) for t in (gold_text(sample, column), text or ""))
    if ignore_case:
        wanted, found = wanted.casefold(), found.casefold()
    return 1.0 if text is not None and wanted == found else 0.0


def choice_answer(completion: str, sample: Mapping[str, Any], *, column: str = "answer") -> float | None:
    """Whether the last letter named as a choice is the sample's.

    A choice is named by ``(C)``, ``C)``, ``Answer: C``, ``**C**``, ``\\boxed{C}``, or C alone.
    """
    gold = gold_text(sample, column).strip().strip("()").upper()
    if not re.fullmatch(r"[A-Z]", gold):
        return None
    text = judged_text(completion)
    if text is None:
        return 0.0
    if re.fullmatch(r"\s*\(?([A-Za-z])[).]?\s*", text):
        return 1.0 if text.strip().strip("().").upper() == gold else 0.0
    named = re.findall(
        r"\\boxed\{\(?([A-Z])\)?\}|\(([A-Z])\)|(?i:answer|choice|option)(?: is|:)?\**\s+\(?([A-Z])\b|\b([A-Z])\)"
        r"|\*\*([A-Z])\*\*",
        text,
    )
    return 1.0 if named and next(g for g in named[-1] if g) == gold else 0.0


def gym_answer(completion: str, sample: Mapping[str, Any], *, partial: bool = False) -> float:
    """reasoning-gym's own verifier of ``sample["task"]``; its partial credit only where asked for."""
    import reasoning_gym

    text = judged_text(completion)
    entry = {"answer": sample["answer"], "metadata": sample.get("metadata") or {}, "question": sample.get("question", "")}
    score = 0.0 if text is None else float(reasoning_gym.get_score_answer_fn(str(sample["task"]))(text.strip(), entry))
    return score if partial else float(score >= 1.0)


for _reward in (math_answer, numeric_answer, exact_answer, choice_answer, gym_answer):
    _reward.on_timeout = 0.0  # type: ignore[attr-defined,union-attr]
math_answer.imports = ("math_verify",)  # type: ignore[attr-defined]
gym_answer.imports = ("reasoning_gym",)  # type: ignore[attr-defined]


def judged_text(completion: str) -> str | None:
    """The ``<answer>`` block, or the whole text if it has no tags; None for tags that are not exactly one block."""
    if "<answer>" not in completion and "</answer>" not in completion:
        return str(completion)
    return answer_block(completion)


def final_answer(completion: str) -> str:
    """What a vote counts: the ``<answer>`` block, else the last ``\\boxed{}``, else the last number, else the text."""
    text = judged_text(completion) or ""
    boxed = text.rpartition("\\boxed{")
    number = None if boxed[1] or text != completion else last_number(text)
    return " ".join((_inside_braces(boxed[2]) if boxed[1] else text if number is None else f"{number.normalize():f}").split())


def _inside_braces(text: str) -> str:
    """Up to the brace that closes the one before the text."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return text


def gold_text(sample: Mapping[str, Any], column: str) -> str:
    """The sample's answer. Raises ValueError where the column is missing."""
    if sample.get(column) is None:
        raise ValueError(f"the sample has no column {column!r}; it has {', '.join(map(str, sample))}")
    return str(sample[column]).rpartition("####")[2].strip()


def last_number(text: str) -> Decimal | None:
    """The last number written in ASCII digits; a fraction a/b is divided. None without one."""
    for written in reversed(_NUMBER.findall(text)):
        top, _, bottom = written.replace(",", "").partition("/")
        try:
            return Decimal(top.strip()) / Decimal(bottom.strip() or 1)
        except (InvalidOperation, ZeroDivisionError):
            continue
    return None


@lru_cache(maxsize=4096)
def _parsed_gold(text: str) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None))
