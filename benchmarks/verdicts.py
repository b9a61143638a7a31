"""Verifiers against labels: solutions of GSM8K by four models, each labelled right or wrong by its
authors.

    python benchmarks/verdicts.py gsm8k_model_solutions_400.jsonl.gz

A row: ``ground_truth`` (ends in "A: 18") and, by model, {"solution", "is_correct"}.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import Counter

from posttrain.rewards.answers import math_answer, numeric_answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows")
    path = parser.parse_args().rows
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as file:
        rows = [json.loads(line) for line in file]
    said = [
        (
            solution["solution"],
            row["ground_truth"].rpartition("A:")[2].strip(),
            solution["is_correct"],
        )
        for row in rows
        for solution in row.values()
        if isinstance(solution, dict)
    ]
    for verify in (math_answer, numeric_answer):
        began = time.perf_counter()
        seen = Counter((label, verify(text, {"answer": gold})) for text, gold, label in said)
        seconds = (time.perf_counter() - began) / len(said)
        print(f"{verify.__name__}: {len(said)} solutions, {1000 * seconds:.2f} ms each")
        for (label, verdict), count in sorted(seen.items(), key=str):
            print(f"  labelled {'right' if label else 'wrong'}, verdict {verdict}: {count}")


if __name__ == "__main__":
    main()
