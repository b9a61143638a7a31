"""Verifiable tasks that SmolLM2-135M-Instruct fails and learns in minutes.

    python recipes/demo_task.py --out data/demo --train 1500 --eval 200 --seed 0

writes ``train.jsonl`` and ``heldout.jsonl``; no question is in both files. A row: ``messages``
(system, user, assistant; chain_sum: ``question`` alone), ``task``, ``answer``, ``metadata``. The
tasks:

    word_sequence_reversal  put a list of words into reverse order. Problems and verifier
                            (gym_answer) are reasoning-gym's.
    chain_sum               sums and differences of two numbers, reasoning-gym's
    word_count   how many words are in a list (numeric_answer), for `make demo`. One demonstration
                 in four counts
                            in its thought, the others have an empty thought and a number that
                            happens to be right
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, int]] = {
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}
SYSTEM = "Answer with the result only."
REASONING_SYSTEM = (
    "Think between <think> and </think>, then give the result between <answer> and </answer>."
)
# reasoning-gym draws problem i of seed s from Random(s + i): seeds 0 and 1 would share all problems
# but one
SEED_STRIDE = 10_000_019
WORDS = """
apple bell bird book bread bridge cake chair clock cloud coat corn cup door drum egg
fire fish fork garden glass glove hat hill horse house key knife lake lamp letter
light map milk moon music paper pen plate rain rice ring river road salt sand ship
shoe snow soup spoon star stone sugar table tea train tree water wind window""".split()
NUM_WORDS = (3, 8)
COUNTED_SHARE = 1 / 4
COUNT_SYSTEM = "Think, then answer."


def make_rows(
    *, task: str, num_train: int, num_heldout: int, seed: int, reasoning: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows, all questions different. Different seeds (0 to 200) draw
    different problems.

    ``reasoning``: demonstrations in DeepSeek-R1's format; the thought goes through the words
    backwards and counts them.
    """
    if num_train < 1 or num_heldout < 1:
        raise ValueError(
            f"At least one row is needed in each file; got --train {num_train} --eval "
            f"{num_heldout}."
        )
    if reasoning and task != "word_sequence_reversal":
        raise ValueError(
            "There are demonstrations with a thought for word_sequence_reversal "
            f"only; got --task {task}."
        )
    if task == "word_count":
        rows = _counting(num_train + num_heldout, seed)
        return rows[:num_train], rows[num_train:]
    problems = _different_problems(task, seed)
    rows = [_row(task, next(problems), reasoning) for _ in range(num_train + num_heldout)]
    return rows[:num_train], rows[num_train:]


def _counting(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of word_count, all questions different."""
    rng = random.Random(f"word_count {seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        words = rng.choices(WORDS, k=rng.randint(*NUM_WORDS))
        counted = (
            " ".join(f"{i} {word}" for i, word in enumerate(words, start=1))
            if rng.random() < COUNTED_SHARE
            else ""
        )
        question, answer = f"How many words are in this list? {', '.join(words)}", str(len(words))
        messages = [
            {"role": "system", "content": COUNT_SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"<think>{counted}</think><answer>{answer}</answer>"},
        ]
        rows.setdefault(question, {"messages": messages, "task": "word_count", "answer": answer})
    return list(rows.values())


def _different_problems(task: str, seed: int) -> Iterator[Mapping[str, Any]]:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ValueError(
            "The demo task needs reasoning-gym. Run: pip install 'posttrain[demo]'"
        ) from error
    problems = reasoning_gym.create_dataset(
        task, size=SEED_STRIDE, seed=seed * SEED_STRIDE, **TASKS[task]
    )
    seen: set[str] = set()
    for problem in problems:
        question = problem["question"]
        if question not in seen:
            seen.add(question)
            yield problem


def _row(task: str, problem: Mapping[str, Any], reasoning: bool) -> dict[str, Any]:
    answer = problem["answer"]
    judged = {"task": task, "answer": answer, "metadata": problem["metadata"]}
    if task == "chain_sum":
        return {"question": problem["question"].strip(), **judged}
    if reasoning:
        words = answer.split(", ")
        thought = " ".join(f"{i} {word}" for i, word in enumerate(words, start=1))
        answer = f"<think>{thought}</think><answer>{answer}</answer>"
    return {
        "messages": [
            {"role": "system", "content": REASONING_SYSTEM if reasoning else SYSTEM},
            {"role": "user", "content": problem["question"].strip()},
            {"role": "assistant", "content": answer},
        ],
        **judged,
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"{path}: {len(rows)} rows")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder to write to; made if need be"
    )
    parser.add_argument(
        "--task",
        choices=[*TASKS, "word_count"],
        default="word_sequence_reversal",
        help="which problems",
    )
    parser.add_argument("--train", type=int, default=1500, help="training rows (default: 1500)")
    parser.add_argument("--eval", type=int, default=200, help="held-out rows (default: 200)")
    parser.add_argument(
        "--reasoning",
        action="store_true",
        help="demonstrations with a thought, in DeepSeek-R1's format",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed draws other problems (default: 0)"
    )
    arguments = parser.parse_args()
    try:
        train, heldout = make_rows(
            task=arguments.task,
            num_train=arguments.train,
            num_heldout=arguments.eval,
            seed=arguments.seed,
            reasoning=arguments.reasoning,
        )
        arguments.out.mkdir(parents=True, exist_ok=True)
        _write(arguments.out / "train.jsonl", train)
        _write(arguments.out / "heldout.jsonl", heldout)
    except (ValueError, OSError) as error:
        print(f"demo_task: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
