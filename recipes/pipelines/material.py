"""Problems, demonstrations and preferences for the pipelines of this folder, all made up.

    python recipes/pipelines/material.py --out DIR [--problems N] [--heldout N] [--general N]

The reasoning task: how many words a list has. The general one: a sentence with a given word. Files:

    problems, heldout          question and answer
    short, long, formatted     demonstrations of the problems: counted once; counted, then checked
                               up to twice; the format, with a guess in three of four
    pairs, pairs_heldout       a counted right answer against a wrong one
    general, general_heldout   prompts
    general_sft, general_pairs a good answer; a good one against one without the word
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

WORDS = """
apple bell bird book bread bridge cake chair clock cloud coat corn cup door drum egg
fire fish fork garden glass glove hat hill horse house key knife lake lamp letter
light map milk moon music paper pen plate rain rice ring river road salt sand ship
shoe snow soup spoon star stone sugar table tea train tree water wind window""".split()
SYSTEM = "Think, then answer."
PLACES = ["on the hill", "by the lake", "in the house", "under the tree", "near the road"]
Row = dict[str, Any]


def answer(thought: str, result: object) -> str:
    return f"<think>{thought}</think><answer>{result}</answer>"


def counted(words: list[str]) -> str:
    return " ".join(f"{i} {word}" for i, word in enumerate(words, start=1))


def demonstration(prompt: str, text: str) -> Row:
    roles = {"system": SYSTEM, "user": prompt, "assistant": text}
    return {"messages": [{"role": role, "content": said} for role, said in roles.items()]}


def pair(prompt: str, chosen: str, rejected: str) -> Row:
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return {"prompt": turns, "chosen": good, "rejected": bad}


def problems(count: int, rng: random.Random) -> dict[str, list[str]]:
    """{question: its words}, all different."""
    found: dict[str, list[str]] = {}
    while len(found) < count:
        words = rng.choices(WORDS, k=rng.randint(3, 8))
        found[f"How many words are in this list? {', '.join(words)}"] = words
    return found


def long_thought(words: list[str], rng: random.Random) -> str:
    checks = [f"Check: {counted(words)}"] * rng.choice([0, 1, 1, 2, 2])
    return ". ".join([counted(words), *checks])


def sentence(word: str, rng: random.Random) -> str:
    return f"The {word} is {rng.choice(PLACES)}."


def wrong(words: list[str], rng: random.Random) -> str:
    other = rng.choice([n for n in range(2, 10) if n != len(words)])
    return answer(rng.choice(["", counted(words[: other % len(words)])]), other)


def material(
    num_problems: int, num_heldout: int, num_general: int, seed: int
) -> dict[str, list[Row]]:
    rng = random.Random(seed)
    listed = list(problems(num_problems + num_heldout, rng).items())
    train, heldout = listed[:num_problems], listed[num_problems:]
    rows: dict[str, list[Row]] = {
        name: [{"question": q, "answer": str(len(w)), "task": "word_count"} for q, w in part]
        for name, part in (("problems", train), ("heldout", heldout))
    }
    once = [answer(counted(words), len(words)) for _, words in train]
    rows["short"] = [demonstration(q, text) for (q, _), text in zip(train, once, strict=True)]
    rows["long"] = [demonstration(q, answer(long_thought(w, rng), len(w))) for q, w in train]
    rows["formatted"] = [
        demonstration(q, answer(counted(w) if rng.random() < 0.25 else "", len(w)))
        for q, w in train
    ]
    for name, part in (("pairs", train), ("pairs_heldout", heldout)):
        rows[name] = [pair(q, answer(counted(w), len(w)), wrong(w, rng)) for q, w in part]
    general = []
    for number in range(num_general):
        word, other = rng.sample(WORDS, 2)
        prompt = f"Write a sentence with the word {word}. ({number})"
        good, bad = (answer(f"The word is {w}", sentence(w, rng)) for w in (word, other))
        general.append((prompt, good, rng.choice([bad, answer("", "No."), answer("", word)])))
    rows["general"] = [{"question": q, "task": "general"} for q, _, _ in general]
    rows["general_sft"] = [demonstration(q, good) for q, good, _ in general]
    rows["general_pairs"] = [pair(*three) for three in general]
    rows["general_heldout"] = rows["general"][-max(1, num_general // 4) :]
    rows["general"] = rows["general"][: -len(rows["general_heldout"])]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--problems", type=int, default=640)
    parser.add_argument("--heldout", type=int, default=100)
    parser.add_argument("--general", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    made = material(asked.problems, asked.heldout, asked.general, asked.seed)
    for name, rows in made.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (asked.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
