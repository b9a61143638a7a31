"""Rows per second and memory of `posttrain prep pairs` on dialogues like Anthropic HH's.

    python benchmarks/prep_speed.py --rows hh_harmless_300.jsonl.gz --count 100000 python
    benchmarks/prep_speed.py --rows hh_harmless_300.jsonl.gz --count 1000000 --skip-near-duplicates

The rows of --rows are varied until there are --count of them, no two prompts alike: words are drawn
anew from all rows' words at every tenth place. Without --rows, dialogues of like lengths are
generated. Each run is the real command in a fresh process, start and report included. Memory: the
largest sum of resident bytes over the command and its worker processes (shared pages counted for
each), looked at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import spread

WORDS = (
    "what would you do if somebody asked how to make a bad thing look good and not get caught "
    "by anyone at all"
).split()


def dialogues(path: str | None) -> list[dict[str, str]]:
    """Rows with `chosen` and `rejected`, each one text."""
    if path:
        from posttrain.data import read_rows

        return [
            {side: row.values[side] for side in ("chosen", "rejected")} for row in read_rows(path)
        ]
    rng = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(rng.choices(WORDS, k=max(4, int(rng.lognormvariate(0, 0.6) * mean))))

    made = []
    for _ in range(300):
        shared = (
            f"\n\nHuman: {text(30)}\n\nAssistant: {text(40)}\n\nHuman: {text(20)}\n\nAssistant:"
        )
        made.append({"chosen": f"{shared} {text(40)}", "rejected": f"{shared} {text(40)}"})
    return made


def write_varied(rows: list[dict[str, str]], count: int, path: Path) -> None:
    """``count`` rows; the shared part of both sides is varied in the same way."""
    rng = random.Random(1)
    words = sorted({w for row in rows for w in row["chosen"].split(" ") if w.isalpha()})
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            row = rows[number % len(rows)]
            cut = row["chosen"].index("\n\nAssistant:")
            if row["rejected"][:cut] != row["chosen"][:cut]:
                continue
            first = row["chosen"][:cut].split(" ")
            for at in range(1 + rng.randrange(10), len(first), 10):
                first[at] = rng.choice(words)
            start = f"{' '.join(first)} {number}"
            out.write(
                json.dumps({side: start + row[side][cut:] for side in ("chosen", "rejected")})
                + "\n"
            )


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(
                tree_bytes(int(child)) for child in (task / "children").read_text().split()
            )
    except OSError:  # gone meanwhile
        pass
    return total


def run(source: Path, folder: Path, *options: str) -> dict[str, Any]:
    """One run of the command: rows/s and peak bytes."""
    out = folder / "out"
    command = [
        sys.executable,
        "-m",
        "posttrain.cli.main",
        "prep",
        "pairs",
        str(source),
        "--out",
        str(out),
        *options,
    ]
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stdout.read()[-3000:]}")  # type: ignore[union-attr]
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    shutil.rmtree(out)
    return {
        "rows_per_s": counts["read"] / seconds,
        "peak_bytes": peak,
        "seconds": seconds,
        "counts": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="file of dialogues with chosen and rejected")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-near-duplicates", action="store_true")
    args = parser.parse_args()
    kinds = {"exact duplicates": ("--test-fraction", "0.05")}
    if not args.skip_near_duplicates:
        kinds["near-duplicates too"] = (*kinds["exact duplicates"], "--near-duplicates", "split")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_varied(dialogues(args.rows), args.count, folder / "rows.jsonl")
        results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for number in range(args.rounds):
            for kind, options in kinds.items():
                results[kind].append(run(folder / "rows.jsonl", folder, *options))
                print(f"round {number}, {kind}: {json.dumps(results[kind][-1])}", file=sys.stderr)
        size = (folder / "rows.jsonl").stat().st_size / 1e9
    print(
        "| search for | rows | input, GB | rows/s | seconds | peak, GB |\n|---|---|---|---|---|---|"
    )
    for kind, runs in results.items():
        columns = [spread([r["rows_per_s"] for r in runs]), spread([r["seconds"] for r in runs])]
        columns.append(spread([r["peak_bytes"] / 1e9 for r in runs]))
        print(f"| {kind} | {runs[0]['counts']['read']:,} | {size:.2f} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
