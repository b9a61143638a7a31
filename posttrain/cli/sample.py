"""`posttrain sample`: several verified answers of each problem, into Parquet files; `posttrain
select`: training rows of them."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.eval import Answering, declare_shared, stream_tasks
from posttrain.files import replace_text, whole_file, write_json

if TYPE_CHECKING:
    from posttrain.rl.evaluate import Evaluation

_SETTINGS = "part-settings.json"
_DECIDE = (
    "reward also reward_options samples temperature top_p max_tokens stop_strings must_end "
    "template system seed problems part task"
).split()


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments; imports nothing heavy."""
    add = parser.add_argument
    parser.description = (
        "Draws --samples answers of each problem and writes them with their rewards, a Parquet "
        "file for every --part problems. Start the same command again after an interruption: it "
        "goes on behind the last part."
    )
    add("model", metavar="MODEL", help="embedded model, run, folder or hub id")
    add("--task", nargs="+", required=True, metavar="ROWS", help="files of rows, or gym:NAME")
    add("--out", required=True, metavar="DIR", help="folder of part-00000.parquet, ...")
    add("--part", type=int, default=64, metavar="N", help="problems in a file (default: 64)")
    add("--figures", metavar="FILE", help="accuracy, length and cut-off answers, as JSON")
    declare_shared(parser, samples=8, temperature=1.0)


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each part."""
    from posttrain.rl.samples import sample_rows, write_rows

    if arguments.part < 1:
        raise ValueError(f"--part is a number of problems >= 1; got {arguments.part}.")
    out = Path(arguments.out)
    _continue(out, arguments)
    rows = islice(stream_tasks(arguments), arguments.problems or None)
    totals: Counter[str] = Counter()
    with closing(Answering(arguments)) as answer:
        for number, part in enumerate(_parts(rows, arguments.part)):
            path = out / f"part-{number:05d}.parquet"
            if path.exists():
                _check_part(path, part)
                print(f"part {number}: is there", flush=True)
                continue
            began = time.perf_counter()
            prompts, counts = answer.prompts(part, skip_long=True)
            totals["too long"] += counts["too long"]
            if not prompts:
                continue
            evaluation = answer(prompts, seed=arguments.seed * 10**9 + number)
            write_rows(path, sample_rows(evaluation), {"problems": _digest(part)})
            seconds = time.perf_counter() - began
            print(f"part {number}: {_told(evaluation, seconds)}", flush=True)
    if totals["too long"]:
        print(f"{totals['too long']} problems were left out: too long for the model")
    if arguments.figures:
        write_json(Path(arguments.figures), _figures(arguments.out))


def _figures(out: str) -> dict[str, float]:
    """Of all parts, those of earlier starts too, by the names that `posttrain eval` uses."""
    from posttrain.rl.samples import stored_answers

    drawn = [a for _, answers in stored_answers([out]) for a in answers]
    judged = [a["correct"] for a in drawn if a["correct"] is not None]
    return {
        **({"eval_pass@1": statistics.fmean(judged)} if judged else {}),
        "eval_length": statistics.fmean(len(a["token_ids"]) for a in drawn),
        "eval_truncated": statistics.fmean(a["finish_reason"] == "length" for a in drawn),
    }


def _parts(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while part := list(islice(rows, size)):
        yield part


def _told(evaluation: Evaluation, seconds: float) -> str:
    known = [ok for row in evaluation.correct for ok in row if ok is not None]
    tokens = [len(t.token_ids) for g in evaluation.groups for t in g.trajectories]
    right = f"{statistics.fmean(known):.0%} right" if known else "none judged"
    return (
        f"{len(evaluation.groups)} problems, {right}, {statistics.fmean(tokens):.0f} tokens each, "
        f"{sum(tokens) / seconds:.0f} tokens/s"
    )


def _continue(out: Path, arguments: argparse.Namespace) -> None:
    """ValueError where the folder holds answers drawn in another way."""
    from posttrain.models.load import trained_source
    from posttrain.training.identity import source_digest

    settings = {name: getattr(arguments, name) for name in _DECIDE}
    settings["model"] = source_digest(trained_source(arguments.model))
    settings = json.loads(json.dumps(settings))
    path = out / _SETTINGS
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} has files that sample did not write. Give another --out.")
        replace_text(path, json.dumps(settings, indent=1))
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if there.get(name) != value:
            raise ValueError(
                f"{out} holds answers drawn with {name} {there.get(name)!r}; now it is {value!r}. "
                "Give another --out, or delete the folder."
            )


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    from posttrain.rl.rollouts import digest

    return digest([json.dumps(row, sort_keys=True, default=str) for row in rows])


def _check_part(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow.parquet as pq

    if pq.read_metadata(path).metadata[b"problems"].decode() != _digest(rows):
        raise ValueError(
            f"{path} holds answers to other problems: --task has changed. Give another --out."
        )


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


def declare_select(parser: argparse.ArgumentParser) -> None:
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


def run_select(arguments: argparse.Namespace) -> None:
    """Prints what came of it."""
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
