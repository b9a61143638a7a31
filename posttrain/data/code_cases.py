"""Generated test cases of a programming problem: which are trusted, by what submissions known to be
right print on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def agreed_cases(
    outputs: Sequence[Sequence[str | None]], *, agree: int = 7, passing: int = 9
) -> dict[int, str] | None:
    """{case: expected output} of the cases to keep; None: leave the problem out.

    ``outputs[submission][case]``, None where a submission failed. A case is kept if at least
    ``agree`` submissions print the same, the problem if at least ``passing`` of them print that on
    every kept case. Kimi k1.5, arXiv:2501.12599 section 2.3.5, for 10 submissions.
    """
    if not len(outputs) < 2 * agree <= 2 * len(outputs) or not 1 <= passing <= len(outputs):
        raise ValueError(
            f"agree is a majority of the submissions and passing a part; got {agree}, "
            f"{passing} of {len(outputs)}."
        )
    kept: dict[int, str] = {}
    for case, printed in enumerate(zip(*outputs, strict=True)):
        ((text, count),) = Counter(p for p in printed if p is not None).most_common(1) or [("", 0)]
        if count >= agree:
            kept[case] = text
    passed = sum(all(row[case] == text for case, text in kept.items()) for row in outputs)
    return kept if kept and passed >= passing else None
