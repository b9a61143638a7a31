"""Runs the stages that are not done. What a stage is, how it went and why it would run again is in
``<root>/.stages/<stage>.json``; a killed pipeline reads it and goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import AcquireReturnProxy, FileLock, Timeout

from posttrain.files import free_name_beside, is_locked, replace_text
from posttrain.pipeline.stages import OUT_OPTIONS, TRAINERS, Stage, merged

_MARK = "POSTTRAIN_STAGE"
"""Environment variable of every process of a stage: a killed pipeline leaves them behind."""
_GOES_ON = (*TRAINERS, "sample")
"""Commands that go on in a folder that a killed one left."""


Execute = Callable[[list[str], Path, str, Callable[[str], None]], int]
"""(command, log, mark of the stage's processes, tell its last line) -> exit code."""
Show = Callable[[Stage], AbstractContextManager[Callable[[str], None]]]
"""What is around a stage while it runs; it gives a function that is told the stage's last line."""


def _ignore(line: str) -> None:
    pass


class StageFailed(ValueError):
    """A stage's command ended with an error; the message has the end of what it printed."""


@dataclass(frozen=True)
class Verdict:
    """What running the pipeline would do with a stage."""

    state: str
    """done, running, failed (both are run again and go on), waiting."""
    why: str
    """Why it is not done; empty if it is."""
    seconds: float = 0.0


class Pipeline:
    """The stages of one file in one folder."""

    def __init__(
        self, stages: Sequence[Stage], *, root: Path, name: str, execute: Execute | None = None
    ) -> None:
        """``execute`` runs a command and gives its exit code (default: ``run_command``)."""
        self.stages, self.root, self.name = list(stages), root, name
        self._execute = execute or run_command
        self._is_interrupted = False
        self.records = root / ".stages"

    def record(self, stage: Stage) -> dict[str, Any]:
        """What was written of it; empty: it never ran."""
        path = self.records / f"{stage.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def verdict(self, stage: Stage) -> Verdict:
        """From its record."""
        record = self.record(stage)
        if not record:
            return Verdict("waiting", "never ran")
        seconds = float(record["seconds"])
        if not record["identity"]:
            return Verdict("waiting", "is forced to run again", seconds)
        if record["identity"] != stage.identity:
            return Verdict("waiting", _difference(record["decides"], stage.decides), seconds)
        if record["state"] == "running":
            is_held = is_locked(self._lock(stage))
            how = "goes on" if stage.command in _GOES_ON else "starts anew"
            why = "is being run" if is_held else f"was interrupted, and {how}"
            return Verdict("running" if is_held else "waiting", why, seconds)
        missing = _missing(stage)
        if record["state"] == "done" and missing:
            return Verdict("waiting", f"{missing[0]} is gone", seconds)
        problem = (record.get("problem") or "").splitlines()
        return Verdict(record["state"], problem[-1] if problem else "", seconds)

    def _lock(self, stage: Stage) -> Path:
        return self.records / f"{stage.name}.lock"

    def run(self, stage: Stage, *, tell: Callable[[str], None] = _ignore) -> None:
        """To its end, unless it is done. Raises StageFailed."""
        with self._hold(stage):
            before, record = self.verdict(stage), self.record(stage)
            if before.state == "done":
                return
            self._check_needs(stage)
            end_leftovers(stage)
            goes_on = record.get("identity") == stage.identity
            self._make_room(stage, goes_on=goes_on)
            command = self.command(stage)
            record = {
                "identity": stage.identity,
                "decides": stage.decides,
                "state": "running",
                "seconds": before.seconds if goes_on else 0.0,
                "command": shlex.join(command),
            }
            self._write(stage, record)
            began = time.monotonic()
            try:
                code = self._execute(command, self.log(stage), _mark(stage), tell)
            finally:
                end_leftovers(stage)
                record["seconds"] += time.monotonic() - began
                self._write(stage, record)
            if self._is_interrupted:
                return
            problem = self._problem(stage, code)
            state = "failed" if problem else "done"
            self._write(stage, record | {"state": state, "problem": problem})
            if problem:
                raise StageFailed(
                    f"Stage {stage.name} failed. What it printed is in {self.log(stage)}; its "
                    f"end:\n{problem}"
                )
            if stage.command in TRAINERS:
                _drop_checkpoints(stage.folder)

    def run_all(
        self, stages: Sequence[Stage], *, jobs: int = 1, show: Show = lambda _: nullcontext(_ignore)
    ) -> None:
        """Each after those that it needs, ``jobs`` at a time, which share the cores: threads that
        spin for the same core make each other many times slower. After a failure nothing more
        begins."""
        if jobs > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        left = {stage.name: stage for stage in stages}
        error: BaseException | None = None
        running: dict[Future[None], Stage] = {}
        with ThreadPoolExecutor(jobs) as pool, self._ended_on_interrupt(running):
            while left or running:
                busy = {*left, *(stage.name for stage in running.values())}
                for stage in [s for s in left.values() if not busy.intersection(s.needs)]:
                    if len(running) < jobs:
                        running[pool.submit(self._run_shown, stage, show)] = left.pop(stage.name)
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    del running[future]
                    error = error or future.exception()
                if error is not None:
                    left.clear()
        self.describe()
        if error is not None:
            raise error

    def _run_shown(self, stage: Stage, show: Show) -> None:
        with show(stage) as tell:
            self.run(stage, tell=tell)

    @contextmanager
    def _ended_on_interrupt(self, running: Mapping[Any, Stage]) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            self._is_interrupted = True
            while not all(future.done() for future in running):  # one may be about to begin
                for stage in running.values():
                    end_leftovers(stage)
                time.sleep(0.05)
            raise

    def _hold(self, stage: Stage) -> AcquireReturnProxy:
        """The stage's lock, until the end of a ``with``."""
        try:
            return FileLock(self._lock(stage)).acquire(timeout=5)  # others look for a moment
        except Timeout as error:
            raise ValueError(
                f"Stage {stage.name} of {self.root} is being run by another process. Wait for it, "
                "or look with `posttrain pipeline status`."
            ) from error

    def _make_room(self, stage: Stage, *, goes_on: bool) -> None:
        """What an earlier, other stage of this name left is moved aside; what cannot be gone on
        with is deleted."""
        folder = stage.folder
        if folder.exists() and not goes_on:
            if stage.command in TRAINERS:
                _drop_checkpoints(folder)
            folder.rename(free_name_beside(folder))
        elif folder.exists() and stage.command not in _GOES_ON:
            shutil.rmtree(folder)
        if stage.command not in TRAINERS:  # those make their own
            folder.mkdir(parents=True, exist_ok=True)

    def _check_needs(self, stage: Stage) -> None:
        for needed in (s for s in self.stages if s.name in stage.needs):
            verdict = self.verdict(needed)
            if verdict.state != "done":
                raise ValueError(
                    f"Stage {stage.name} needs {needed.name}, which is not done: "
                    f"{verdict.why or verdict.state}. Run it first (--only {needed.name}), or all."
                )

    def with_dependents(self, names: Collection[str]) -> list[Stage]:
        """The stages of these names, and all that take something of them, however far."""
        found = set(names)
        for stage in self.stages:
            found |= {stage.name} if found.intersection(stage.needs) else set()
        return [stage for stage in self.stages if stage.name in found]

    def force(self, stage: Stage) -> None:
        """It is not done, whatever it was; its folder is moved aside when it runs."""
        record = self.record(stage)
        if record:
            with self._hold(stage):
                self._write(stage, record | {"identity": ""})

    def command(self, stage: Stage) -> list[str]:
        """What is executed, after ``posttrain`` or ``python``. A trainer's settings are written
        into a file."""
        if stage.command in TRAINERS:
            place = {"train": {"run_dir": str(self.root), "name": stage.name}}
            path = self.records / f"{stage.name}.yaml"
            replace_text(path, yaml.safe_dump(merged(stage.settings, place), sort_keys=False))
            launch = ["--launch", stage.launch] if stage.launch else []
            launch += ["--processes", str(stage.processes)] if stage.processes else []
            command = ["posttrain", *stage.words, "--config", str(path), *launch]
            many = int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) > 1
            return ["srun", "--ntasks-per-node=1", *command] if many else command
        out = OUT_OPTIONS.get(stage.command, {})
        words = [*stage.words, *(w for o, n in out.items() for w in (o, str(stage.folder / n)))]
        for name, value in stage.settings.items():
            words += option(name, value)
        return words if stage.command == "python" else ["posttrain", *words]

    def log(self, stage: Stage) -> Path:
        """All that it printed, over all tries."""
        return self.records / f"{stage.name}.log"

    def _problem(self, stage: Stage, code: int) -> str:
        """What went wrong, or ""."""
        if code == 0:
            missing = _missing(stage)
            return f"it ended well, but did not write {missing[0]}" if missing else ""
        said = _tail(self.log(stage), 15)
        if code < 0:  # e.g. for want of memory
            return f"{said}\nended by {signal.Signals(-code).name}".lstrip()
        return said or f"exit code {code}, without a word"

    def _write(self, stage: Stage, record: dict[str, Any]) -> None:
        replace_text(self.records / f"{stage.name}.json", json.dumps(record, indent=1))
        self.describe()

    def describe(self) -> dict[str, Any]:
        """Writes ``pipeline.json``, which `posttrain report` reads: every stage with its state and
        figures."""
        described = {"name": self.name, "stages": [self._described(s) for s in self.stages]}
        with FileLock(self.records / ".describe.lock"):
            replace_text(self.root / "pipeline.json", json.dumps(described, indent=1))
        return described

    def _described(self, stage: Stage) -> dict[str, Any]:
        verdict = self.verdict(stage)
        figures: dict[str, float] = {}
        if verdict.state == "done" and stage.command in ("eval", "sample", "select"):
            found = json.loads(stage.outputs["figures"].read_text())
            figures = {_NAMES[name]: value for name, value in found.items() if name in _NAMES}
        return {
            "name": stage.name,
            "command": stage.decides["run"],
            "state": verdict.state,
            "why": verdict.why,
            "seconds": verdict.seconds or None,
            "needs": stage.needs,
            "folder": str(stage.folder.relative_to(self.root)),
            "figures": figures,
        }


def run_command(command: list[str], log: Path, mark: str, tell: Callable[[str], None]) -> int:
    """As a process of its own."""
    programs = {"posttrain": ["-m", "posttrain.cli.main"], "python": []}
    if command[0] in programs:
        command = [sys.executable, *programs[command[0]], *command[1:]]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, _MARK: mark},
            start_new_session=True,
        )
    while (code := process.poll()) is None:
        tell(_tail(log, 1))
        time.sleep(0.1)
    return code


_NAMES = {
    "eval_pass@1": "accuracy",
    "eval_pass@1_ci95": "accuracy_ci95",
    "accuracy": "accuracy",
    "accuracy_ci95": "accuracy_ci95",
    "eval_length": "mean_tokens",
    "eval_reward/think_answer_format": "format_rate",
    "eval_truncated": "truncated",
    "eval_reward/reward_model": "reward_model",
    "eval_reward/llm_judge": "llm_judge",
    "margin_nats": "margin_nats",
    "answers": "answers",
    "rows": "rows",
}
"""Figures that are compared over stages, and what they are called there."""


def _missing(stage: Stage) -> list[Path]:
    """Outputs that are not there, but for those that not every run of its command has."""
    optional = {"best", "test"} if stage.command != "python" else set()
    return [p for n, p in stage.outputs.items() if n not in optional and not p.exists()]


def option(name: str, value: Any) -> list[str]:
    """``--max-tokens 48`` of max_tokens: 48. True: the flag alone; False: nothing; a list: several
    values."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool) or value is None:
        return [flag] if value else []
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    return [flag, *(str(v) for v in (value if isinstance(value, list) else [value]))]


def end_leftovers(stage: Stage) -> None:
    """Ends every process of the stage. The caller holds its lock, so they belong to nobody."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == _mark(stage) and process.pid != os.getpid():
                process.kill()
                left.append(process)
        except (psutil.Error, OSError):
            continue
    psutil.wait_procs(left, timeout=30)


def _mark(stage: Stage) -> str:
    return str(stage.folder.resolve())


def _drop_checkpoints(folder: Path) -> None:
    """Of a finished run, or of one that is another by now: nothing goes on from them, and each is
    several times its model."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _tail(path: Path, lines: int) -> str:
    """The last lines that say something."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [
        f"{key} is {json.dumps(now.get(key))}, was {json.dumps(before.get(key))}"
        if not key.startswith(("stage ", "the content of "))
        else f"{key} is another"
        for key in [*now, *(k for k in before if k not in now)]
        if before.get(key) != now.get(key)
    ]
    more = f", and {len(changed) - 2} more" if len(changed) > 2 else ""
    return "; ".join(changed[:2]) + more
