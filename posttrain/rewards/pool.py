"""Worker processes for reward functions: a hard time limit, a memory limit, and a crash that ends
no run.

A worker is this module run as a program: one JSON line in, one out, on pipes that the function's
own printing does not touch. One that is over time is killed and replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.rewards.completion import CompletionText, start_clock

WORKER_MEMORY_BYTES = 4 * 2**30
START_SECONDS = 120.0
"""Most time for a worker to start and to import a function."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One call ``function(completion, sample, **options)``."""

    function: str
    """Dotted path."""
    completion: CompletionText
    sample: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a task: a value, or why there is none."""

    value: float | None
    problem: str | None = None
    exhausted: bool = False
    """Out of time or memory, or its process died of it twice."""


class WorkerPool:
    """``run(tasks) -> outcomes``, in order. Workers live until ``close``."""

    def __init__(self, *, size: int, timeout_s: float) -> None:
        if size < 1 or timeout_s <= 0:
            raise ValueError(
                f"rewards need workers >= 1 and timeout_s > 0; got {size} and {timeout_s}."
            )
        self._size, self._timeout_s = size, timeout_s
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Every task once, and once more in a fresh worker if the first one died. A result does not
        depend on which it was."""
        outcomes: dict[int, Outcome] = {}
        again: set[int] = set()
        waiting = list(range(len(tasks)))[::-1]
        busy: dict[_Worker, int] = {}
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.fd, selectors.EVENT_READ, worker)
            while waiting or busy:
                self._hand_out(tasks, waiting, busy, selector)
                left = min(w.deadline for w in busy) - time.monotonic()
                for key, _ in selector.select(timeout=max(left, 0.0)):
                    key.data.receive()
                for worker in list(busy):
                    outcome = worker.outcome(self._timeout_s)
                    if outcome is not None:
                        task = busy.pop(worker)
                        if worker.has_crashed and task not in again:
                            again.add(task)
                            waiting.append(task)
                        else:
                            outcomes[task] = outcome
                    if worker.is_dead:
                        selector.unregister(worker.fd)
                        worker.close()
                        self._workers.remove(worker)
        return [outcomes[i] for i in range(len(tasks))]

    def _hand_out(
        self, tasks: Sequence[Task], waiting: list[int], busy: dict[_Worker, int], selector: Any
    ) -> None:
        """A waiting task to every idle worker; workers are started as they are needed."""
        while waiting:
            worker = next((w for w in self._workers if w not in busy), None)
            if worker is None and len(self._workers) < self._size:
                worker = _Worker()
                self._workers.append(worker)
                selector.register(worker.fd, selectors.EVENT_READ, worker)
            if worker is None:
                return
            busy[worker] = waiting.pop()
            worker.send(tasks[busy[worker]], self._timeout_s)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    def __init__(self) -> None:
        to_child, from_child = os.pipe(), os.pipe()
        command = [
            sys.executable,
            "-m",
            "posttrain.rewards.pool",
            str(to_child[0]),
            str(from_child[1]),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            command,
            pass_fds=(to_child[0], from_child[1]),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_child[0])
        os.close(from_child[1])
        self.fd, self._out = from_child[0], to_child[1]
        self._buffer = b""
        self.is_dead = self.has_crashed = False
        self.deadline = math.inf
        self._is_loaded = False

    def send(self, task: Task, timeout_s: float) -> None:
        self.deadline, self._is_loaded, self._function = (
            time.monotonic() + START_SECONDS,
            False,
            task.function,
        )
        message = {**vars(task), "drawn": vars(task.completion), "timeout_s": timeout_s}
        line = json.dumps(message, default=str).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._out, line) :]
        except BrokenPipeError:
            self.is_dead = True

    def receive(self) -> None:
        data = os.read(self.fd, 1 << 16)
        self._buffer += data
        self.is_dead = self.is_dead or not data

    def outcome(self, timeout_s: float) -> Outcome | None:
        """The answer to the task at hand, once there is one."""
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            answer = json.loads(line)
            if answer == "loaded":  # the function is imported, its own time starts
                self.deadline, self._is_loaded = time.monotonic() + timeout_s, True
                continue
            return Outcome(**answer)
        if self.is_dead:
            self.has_crashed = True
            problem = "the worker process died (killed, or out of memory)" + (
                "" if self._is_loaded else " before the call"
            )
            return Outcome(value=None, problem=problem, exhausted=self._is_loaded)
        if time.monotonic() >= self.deadline:
            self.is_dead = True
            if not self._is_loaded:
                return Outcome(
                    value=None,
                    problem=f"no worker could import {self._function} within {START_SECONDS:g} s",
                )
            return Outcome(value=None, problem=f"took longer than {timeout_s:g} s", exhausted=True)
        return None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what the function started
        self._process.wait()
        os.close(self.fd)
        os.close(self._out)


def load_function(path: str) -> Any:
    """The function of a dotted path, also from the folder that the run was started in."""
    if (
        os.getcwd() not in sys.path
    ):  # a script's own folder is on the path, the folder it is started from is not
        sys.path.append(os.getcwd())
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def checked(value: Any) -> tuple[float | None, str | None]:
    """(value, None) for a finite number or None, else (None, what is wrong)."""
    if value is None:
        return None, None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None, f"returned {type(value).__name__}, not a number or None"
    return (number, None) if math.isfinite(number) else (None, f"returned {number}")


def _limit_this_process() -> None:
    """A killed run leaves no worker behind (Linux); memory is limited where the system can do so
    (macOS cannot)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(read_fd: int, write_fd: int) -> None:
    _limit_this_process()
    out = os.fdopen(write_fd, "w", encoding="utf-8")

    def answer(value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    for line in os.fdopen(read_fd, "r", encoding="utf-8"):
        task = json.loads(line)
        exhausted = False
        try:
            function = load_function(task["function"])
            for module in getattr(function, "imports", ()):
                importlib.import_module(module)
            start_clock(task["timeout_s"])
            answer("loaded")
            text = CompletionText(task["completion"], **task["drawn"])
            value, problem = checked(function(text, task["sample"], **task["options"]))
        except (MemoryError, RecursionError) as error:
            value, problem, exhausted = (
                None,
                (f"ran out of memory or stack ({type(error).__name__})"),
                True,
            )
        except Exception as error:  # noqa: BLE001 - whatever user code raises is reported with its sample
            value, problem = None, f"raised {type(error).__name__}: {str(error)[:500]}"
        answer({"value": value, "problem": problem, "exhausted": exhausted})


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
