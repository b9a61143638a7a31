"""`posttrain pipeline run|status|graph`: whole recipes of stages."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from posttrain.cli import eval as evaluation
from posttrain.cli.train import TRAINERS, classes_of
from posttrain.report.page import duration
from posttrain.resolve import among, find_shipped

if TYPE_CHECKING:
    from posttrain.pipeline.run import Pipeline, Show
    from posttrain.pipeline.stages import Stage

_LOOKS_LIKE_FILE = re.compile(r"[^\s{}]+\.(jsonl|json|parquet|csv|ya?ml|txt|py|gz)")


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments; imports nothing heavy."""
    actions = parser.add_subparsers(dest="action", metavar="run|status|graph", required=True)
    run = actions.add_parser("run", help="run what is not done; start it again after a kill")
    status = actions.add_parser("status", help="what is done, what would run and why")
    graph = actions.add_parser("graph", help="the stages and what they need, as SVG")
    for sub in (run, status, graph):
        add = sub.add_argument
        add("file", metavar="FILE|NAME", help="a pipeline, or a shipped one (recipes/pipelines)")
        add("--size", default="", help="one of the file's sizes")
        add("--quick", action="store_true", help="the size's shorter version")
        add("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable")
        add("--out", metavar="DIR", help="default: runs/<name>-<size>")
    add = run.add_argument
    add("--only", action="append", metavar="STAGE", help="not the others; may repeat")
    again = "also if it is done, and all that depends on it"
    add("--force", action="append", default=[], metavar="STAGE", help=again)
    add("--dry-run", action="store_true", help="check every stage, and show its command")
    add("--jobs", type=int, default=1, metavar="N", help="stages at the same time (default: 1)")
    add("--executor", choices=("local", "slurm"), default="local", help="slurm: a job for each")
    add("--sbatch", default="", metavar="OPTIONS", help="slurm: for all, '--partition gpu'")
    graph.add_argument("--svg", metavar="FILE", help="default: graph.svg in the pipeline's folder")


def run(arguments: argparse.Namespace) -> None:
    """Reads the file, then runs, tells or draws."""
    from posttrain.pipeline.run import StageFailed

    pipeline = _read(arguments)
    try:
        {"run": _run, "status": _status, "graph": _graph}[arguments.action](pipeline, arguments)
    except StageFailed as error:  # with lines of the stage's own
        print(f"posttrain pipeline: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        print("interrupted: start the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _read(arguments: argparse.Namespace) -> Pipeline:
    from posttrain.pipeline.run import Pipeline
    from posttrain.pipeline.stages import read_stages

    path = find_shipped(arguments.file, "recipes/pipelines", "FILE")
    words = [pair.partition("=") for pair in arguments.set]
    if wrong := [pair for pair, (_, sign, _) in zip(arguments.set, words, strict=True) if not sign]:
        raise ValueError(f"--set takes NAME=VALUE; got {wrong[0]!r}.")
    size = f"{arguments.size}{'-quick' if arguments.quick else ''}"
    name = "-".join(filter(None, (path.stem, size)))
    root = Path(arguments.out or f"runs/{name}")
    stages = read_stages(
        path,
        root=root,
        size=arguments.size,
        quick=arguments.quick,
        variables={key: yaml.safe_load(value) for key, _, value in words},
    )
    return Pipeline(stages, root=root, name=name)


def _run(pipeline: Pipeline, arguments: argparse.Namespace) -> None:
    stages = _chosen(pipeline, [*(arguments.only or []), *arguments.force])
    for stage in pipeline.stages:
        if pipeline.verdict(stage).state != "done":
            check(stage, pipeline, arguments.parse)
    forced = pipeline.with_dependents(arguments.force)
    if arguments.dry_run:
        for stage in pipeline.stages:
            verdict = pipeline.verdict(stage)
            why = "is forced to run again" if stage in forced else verdict.why
            print(f"{stage.name}: {'waiting' if why else verdict.state}{why and f' ({why})'}")
            print(f"  $ {shlex.join(pipeline.command(stage))}")
        return
    for stage in forced:
        pipeline.force(stage)
    wanted = [stages[name] for name in arguments.only] if arguments.only else pipeline.stages
    if arguments.executor == "slurm":
        _submit(pipeline, wanted, arguments)
        return
    with _display(pipeline, len(wanted)) as show:
        pipeline.run_all(wanted, jobs=arguments.jobs, show=show)
    left = [s.name for s in pipeline.stages if pipeline.verdict(s).state != "done"]
    print(f"{pipeline.name}: {'left: ' + ', '.join(left) if left else 'done'}. Look at it with")
    print(f"  posttrain report {pipeline.root}")


def _chosen(pipeline: Pipeline, names: Sequence[str]) -> dict[str, Stage]:
    stages = {stage.name: stage for stage in pipeline.stages}
    for name in names:
        if name not in stages:
            raise ValueError(f"There is no stage {name!r}; {among(name, stages)}")
    return stages


def check(stage: Stage, pipeline: Pipeline, parse: Callable[[list[str]], Any]) -> None:
    """ValueError for an option, a setting, a reward, a launch file or a path that is not there.
    ``parse`` parses posttrain's command lines."""
    from posttrain.pipeline.stages import texts

    try:
        if stage.command in TRAINERS:
            _check_trainer(stage, pipeline)
        elif stage.command != "python":
            arguments = _parsed(parse, pipeline.command(stage)[1:])
            if stage.command == "eval":
                evaluation.check_mode(arguments)
            models = getattr(arguments, "models", [getattr(arguments, "model", None)])
            _check_models([name for name in models if name], pipeline)
            rewards = [getattr(arguments, "reward", None), *getattr(arguments, "also", [])]
            _check_rewards([name for name in rewards if name])
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"Stage {stage.name}: {error}") from error
    if stage.launch:
        find_shipped(stage.launch, "launch", f"Stage {stage.name}: launch")
    for text in texts([stage.words, stage.settings]):
        is_made = text.startswith(f"{pipeline.root}/")
        if _LOOKS_LIKE_FILE.fullmatch(text) and not is_made and not Path(text).exists():
            raise ValueError(f"Stage {stage.name}: {text} is not there (in {Path.cwd()}).")


def _check_trainer(stage: Stage, pipeline: Pipeline) -> None:
    import tempfile

    from posttrain.training.config import parse_config

    kind, _ = classes_of(stage.command)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(stage.settings, file)
        file.flush()
        parse = functools.partial(parse_config, kind, description="")
        config = _parsed(parse, ["--config", file.name])
    named = [config.model, *getattr(config, "teachers", ())]
    _check_models([m.model if hasattr(m, "model") else m.name for m in named], pipeline)
    if hasattr(config, "rewards"):
        of_tasks = config.rewards.by_task.values()
        _check_rewards([n for names in (config.rewards.functions, *of_tasks) for n in names])


def _check_models(names: Sequence[str], pipeline: Pipeline) -> None:
    from posttrain.models.embedded import EMBEDDED
    from posttrain.models.load import resolve_source

    for name in names:
        is_made = name.startswith(f"{pipeline.root}/")
        if not is_made and name not in EMBEDDED:  # which would be unpacked
            resolve_source(name)


def _check_rewards(names: Sequence[str]) -> None:
    from posttrain.rewards.compose import reward_function

    for name in names:
        reward_function(name)


def _parsed(parse: Callable[[list[str]], Any], words: list[str]) -> Any:
    """What a parser makes of the words. ValueError with what it says before it gives up."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return parse(words)
    except SystemExit as error:
        said = heard.getvalue().partition("error: ")[2]
        raise ValueError(" ".join(said.split())) from error


@contextlib.contextmanager
def _display(pipeline: Pipeline, count: int) -> Iterator[Show]:
    """Lines for the beginnings and ends of stages; in a terminal, below them, what those that run
    said last."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(highlight=False, soft_wrap=True, markup=False)
    one_line = Column(no_wrap=True, overflow="ellipsis")
    said = TextColumn("{task.fields[said]}", markup=False, table_column=one_line)
    running = Progress(
        TimeElapsedColumn(), said, console=console, transient=True, disable=not console.is_terminal
    )
    numbers = itertools.count(1)

    @contextlib.contextmanager
    def show(stage: Stage) -> Iterator[Callable[[str], None]]:
        verdict = pipeline.verdict(stage)
        is_done = verdict.state == "done"
        why = f"done ({duration(verdict.seconds)})" if is_done else verdict.why or verdict.state
        command = "" if is_done else f"\n  $ {shlex.join(pipeline.command(stage))}"
        console.print(f"[{next(numbers)}/{count}] {stage.name}: {why}{command}")
        task = running.add_task("", total=None, said=stage.name)
        try:
            yield lambda line: running.update(task, said=f"{stage.name}: {line}")
        finally:
            running.remove_task(task)
        if not is_done:
            console.print(f"  {stage.name}: {duration(pipeline.verdict(stage).seconds)}")

    with running:
        yield show


def _submit(pipeline: Pipeline, stages: list[Stage], arguments: argparse.Namespace) -> None:
    from posttrain.pipeline.slurm import queued_jobs, submit

    states = {s.name: pipeline.verdict(s).state for s in pipeline.stages}
    queued = queued_jobs(pipeline)
    for name, job in queued.items():
        print(f"{name}: job {job}, submitted before")
    left = [s for s in stages if states[s.name] not in ("done", "running") and s.name not in queued]
    for stage in left:
        elsewhere = [name for name in stage.needs if name not in queued]
        if running := [name for name in elsewhere if states[name] == "running"]:
            raise ValueError(
                f"Stage {stage.name} needs {running[0]}, which is being run now: a job cannot be "
                "told to wait for it. Submit again when it is done, or name other stages (--only)."
            )
    words = [sys.executable, "-m", "posttrain.cli.main", "pipeline", "run", arguments.file]
    words += ["--size", arguments.size] if arguments.size else []
    words += ["--quick"] if arguments.quick else []
    words += [w for pair in arguments.set for w in ("--set", pair)]
    words += ["--out", str(pipeline.root), "--only"]
    jobs = submit(pipeline, left, run=words, options=shlex.split(arguments.sbatch), queued=queued)
    for name, job in jobs.items():
        print(f"{name}: job {job}")


def _status(pipeline: Pipeline, arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    pipeline.describe()
    table = Table("stage", "state", "time", "why")
    for stage in pipeline.stages:
        verdict = pipeline.verdict(stage)
        spent = duration(verdict.seconds) if verdict.seconds else ""
        table.add_row(stage.name, verdict.state, spent, escape(verdict.why))
    Console().print(table)


def _graph(pipeline: Pipeline, arguments: argparse.Namespace) -> None:
    from posttrain.report.pipeline import graph

    path = Path(arguments.svg or pipeline.root / "graph.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    svg = graph(pipeline.describe()["stages"], {}, style="background: white")
    path.write_text(svg, encoding="utf-8")
    print(path)
