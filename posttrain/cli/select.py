"""`posttrain select`: answers that `posttrain sample` wrote into training rows."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NUMBER, _COUNT = {"type": float, "metavar": "X"}, {"type": int, "metavar": "N"}
_FLAG, _CODE = {"action": "store_true"}, {"metavar": "CODE"}
_FILTERS: dict[str, tuple[dict[str, Any], str]] = {
    "ended": (_FLAG, "only answers that ended by themselves"),
    "format": (_FLAG, "only <think>...</think><answer>...</answer>"),
    "language": (_CODE, "only answers whose every word is of this language's script, e.g. en"),
    "min_reward": (_NUMBER, "least value of the reward --by"),
    "max_tokens": (_COUNT, "longest answer"),
    "max_paragraph": (_COUNT, "most characters of a paragraph"),
    "no_code": (_FLAG, "no blocks of code"),
    "max_repeated": (_NUMBER, "largest share of repeated 3-grams of words, e.g. 0.3"),
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments; imports nothing heavy."""
    add = parser.add_argument
    parser.description = (
        "Chooses among the answers of each problem and writes rows for sft, or pairs for dpo. What "
        "is left out is counted by reason; empty and repeated answers always are."
    )
    add("samples", nargs="+", metavar="SAMPLES", help="folders or files that sample wrote")
    add("--out", required=True, metavar="FILE", help="JSON lines")
    takes = (
        "correct: all right answers; shortest: the shortest right one; best: the highest reward; "
        "pairs: the shortest right one against longer wrong ones and right ones 1.5 times as long"
    )
    add("--figures", metavar="FILE", help="answers, rows and reasons as counted, as JSON")
    add("--take", choices=("correct", "shortest", "best", "pairs"), default="correct", help=takes)
    add("--by", default="", metavar="REWARD", help="for best and --min-reward (default: the sum)")
    add(
        "--at-most", type=int, default=0, metavar="N", help="rows of a problem (default: all, or 1)"
    )
    add("--system", metavar="TEXT", help="system message of the rows that have none")
    for name, (kind, text) in _FILTERS.items():
        add(f"--{name.replace('_', '-')}", help=text, **kind)


def run(arguments: argparse.Namespace) -> None:
    """Prints what came of it."""
    from posttrain.files import whole_file, write_json
    from posttrain.rl.samples import Filters, select, stored_answers

    filters = Filters(**{name: getattr(arguments, name) for name in _FILTERS})
    counts: Counter[str] = Counter()
    problems = used = written = read = 0
    with whole_file(Path(arguments.out)) as path, path.open("w", encoding="utf-8") as file:
        for where, answers in stored_answers(arguments.samples):
            if "row" not in answers[0]:
                raise ValueError(f"{where}: these answers are not of `posttrain sample`.")
            chosen: Any = select(
                answers,
                arguments.take,
                by=arguments.by,
                at_most=arguments.at_most,
                filters=filters,
                counts=counts,
            )
            problems, read, used = problems + 1, read + len(answers), used + bool(chosen)
            for one in chosen:
                row = training_row(json.loads(answers[0]["row"]), one, system=arguments.system)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
        if not written:  # and no file
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts.most_common() if n)
            where = ", ".join(arguments.samples)
            raise ValueError(f"None of {read:,} answers of {where} was chosen: {reasons}.")
    print(f"{read:,} answers to {problems:,} problems; {used:,} problems have a row")
    for reason, count in counts.most_common():
        if count:
            print(f"  {count:,} left out: {reason}")
    print(f"wrote {written:,} rows to {arguments.out}")
    if arguments.figures:
        write_json(
            Path(arguments.figures), {"answers": read, "rows": written, "left out": dict(counts)}
        )


def training_row(
    problem: Mapping[str, Any], chosen: Any, *, system: str | None = None
) -> dict[str, Any]:
    """A problem with its answer as a conversation, other columns carried along; with a pair of
    answers, what dpo reads alone."""
    from posttrain.data.layouts import read_prompt

    read = read_prompt(dict(problem))
    prompt = list(read.prompt)
    if system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    if isinstance(chosen, tuple):
        turns = [[{"role": "assistant", "content": answer["text"]}] for answer in chosen]
        return {"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}
    kept = {k: v for k, v in problem.items() if read.columns.get(k) != "used"}
    if read.answers and "answer" not in kept:
        kept["answer"] = read.answers[0].text
    return {**kept, "messages": [*prompt, {"role": "assistant", "content": chosen["text"]}]}
