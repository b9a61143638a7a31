"""Where reward functions run, each call under a time limit that starts when the call starts.

Worker processes: one that is over time is killed and replaced, memory is limited, and a crash ends
no run. Threads of this process: a call that is over time is given up and goes on, but neither later
calls nor the end of the interpreter wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import importlib
import inspect
import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe
from typing import Any

from posttrain.resolve import import_name
from posttrain.rewards import CompletionText, reward, start_clock

WORKER_MEMORY_BYTES = 4 * 2**30
START_SECONDS = 120.0
"""Most time for a worker to start and to import a function."""

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a call: a value, or why there is none."""

    value: float | None = None
    problem: str | None = None
    exhausted: bool = False
    """Out of time or memory, or its process died of it twice."""


class _OutOfTime(Exception):
    """A call was given up."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"took longer than {timeout_s:g} s")


def _outcome(found: Any) -> Outcome:
    """Of what a call returned or raised."""
    if isinstance(found, _OutOfTime):
        return Outcome(problem=str(found), exhausted=True)
    if isinstance(found, MemoryError | RecursionError):
        problem = f"ran out of memory or stack ({type(found).__name__})"
        return Outcome(problem=problem, exhausted=True)
    if isinstance(found, BaseException):
        return Outcome(problem=f"raised {type(found).__name__}: {str(found)[:500]}")
    if found is None:
        return Outcome()
    try:
        value = float(found)
    except (TypeError, ValueError):
        return Outcome(problem=f"returned {type(found).__name__}, not a number or None")
    return Outcome(value=value) if math.isfinite(value) else Outcome(problem=f"returned {value}")


# --- worker processes


class WorkerPool:
    """Worker processes. They start when they are needed and live until ``close``."""

    def __init__(self, *, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._workers = [_Worker() for _ in range(size)]
        self._idle = list(self._workers)
        # its threads live as long as the workers, which end with their thread
        self._threads = ThreadPoolExecutor(size)

    def run(
        self,
        function: str,
        pairs: Sequence[tuple[Mapping[str, Any], CompletionText]],
        options: Mapping[str, Any],
    ) -> list[Outcome]:
        """The outcomes of ``function(completion, sample, **options)`` for pairs (sample,
        completion), in their order. A call whose worker dies is made once more in a fresh one, so
        that a result does not depend on which worker it was. ``function``: dotted path."""
        call = {"function": function, "options": options, "timeout_s": self._timeout_s}
        tasks = [{**call, "sample": s, "text": text, "drawn": vars(text)} for s, text in pairs]
        return list(self._threads.map(self._score, tasks))

    def _score(self, task: dict[str, Any]) -> Outcome:
        worker = self._idle.pop()
        try:
            outcome, died = worker.score(task)
            return worker.score(task)[0] if died else outcome
        finally:
            self._idle.append(worker)

    def close(self) -> None:
        """Ends the workers; calls that run are waited for."""
        self._threads.shutdown(cancel_futures=True)
        self._threads = ThreadPoolExecutor(len(self._workers))
        for worker in self._workers:
            worker.stop()


class _Worker:
    """A process that calls functions, one at a time: JSON in, JSON out, on a pipe that the
    functions' own printing does not touch. It is started again after it ended."""

    def __init__(self) -> None:
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def score(self, task: dict[str, Any]) -> tuple[Outcome, bool]:
        """What came of the task, and whether the process died of it."""
        limit_s, problem = START_SECONDS, "the worker process died (killed, or out of memory)"
        late = Outcome(problem=f"no worker could import {task['function']} within {limit_s:g} s")
        dead = Outcome(problem=f"{problem} before the call")
        try:
            pipe = self._pipe()
            pipe.send_bytes(json.dumps(task, default=str).encode())
            while pipe.poll(limit_s):
                answer = json.loads(pipe.recv_bytes())
                if answer != "loaded":
                    return Outcome(**answer), False
                limit_s = task["timeout_s"]
                late = _outcome(_OutOfTime(limit_s))
                dead = Outcome(problem=problem, exhausted=True)
            outcome, died = late, False
        except (EOFError, OSError):
            outcome, died = dead, True
        self.stop()
        return outcome, died

    def _pipe(self) -> Connection:
        if self._running is None:
            ours, theirs = Pipe()
            path = os.pathsep.join(p for p in sys.path if p)
            code = f"from posttrain.rewards.run import serve; serve({theirs.fileno()})"
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            theirs.close()
            self._running = process, ours
        return self._running[1]

    def stop(self) -> None:
        """Kills the process and what its function started."""
        if self._running is not None:
            process, pipe = self._running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pipe.close()
            self._running = None


def limit_this_process() -> None:
    """A killed run leaves no worker behind (Linux); memory is limited where the system can do so
    (macOS cannot)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(WORKER_MEMORY_BYTES, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(fd: int) -> None:
    """A worker's own program: answers each task with "loaded" and an outcome until the pipe
    ends."""
    limit_this_process()
    pipe = Connection(fd)
    while True:
        task = json.loads(pipe.recv_bytes())
        try:
            function = import_name(task["function"], wanted="a reward is a function")
            for module in reward.of(function).imports:
                importlib.import_module(module)
            start_clock(task["timeout_s"])
            pipe.send_bytes(b'"loaded"')
            text = CompletionText(task["text"], **task["drawn"])
            found = function(text, task["sample"], **task["options"])
        except Exception as error:  # noqa: BLE001 - reported with its sample
            found = error
        pipe.send_bytes(json.dumps(vars(_outcome(found))).encode())


# --- threads of this process


def score_alone(calls: Sequence[Call], timeout_s: float, *, concurrency: int) -> list[Outcome]:
    """The outcomes of calls that score one completion each, coroutine functions too; at most
    ``concurrency`` of them run at a time."""
    return [_outcome(found) for found in _finish(calls, timeout_s, concurrency)]


def score_together(calls: Sequence[tuple[Call, int]], timeout_s: float) -> list[Outcome]:
    """The outcomes of calls, one after the other, each with the number of completions that it
    scores: their values, or for each the failure of its call."""
    found = _finish([partial(_listed, *call) for call in calls], timeout_s, 1)
    return [
        _outcome(value)
        for values, (_, count) in zip(found, calls, strict=True)
        for value in (values if isinstance(values, list) else [values] * count)
    ]


def _listed(call: Call, count: int) -> list[Any]:
    values = list(call())
    if len(values) != count:
        raise ValueError(f"returned {len(values)} values for {count} completions")
    return values


def _finish(calls: Sequence[Call], timeout_s: float, concurrency: int) -> list[Any]:
    """What each call returned or raised; _OutOfTime for those that were given up.

    The event loop runs in a thread of its own: a coroutine that blocks it makes all out of time
    once the loop should have been done.
    """
    done: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
    main = _gather(calls, timeout_s, concurrency, _device_setter())
    run = contextvars.copy_context().run
    threading.Thread(target=run, args=(lambda: done.put(asyncio.run(main)),), daemon=True).start()
    may_block = any(map(inspect.iscoroutinefunction, calls))
    most_s = timeout_s * (math.ceil(len(calls) / concurrency) + 1) if may_block else None
    try:
        return done.get(timeout=most_s)
    except queue.Empty:
        return [_OutOfTime(timeout_s)] * len(calls)


async def _gather(
    calls: Sequence[Call], timeout_s: float, concurrency: int, use_device: Callable[[], None]
) -> list[Any]:
    asyncio.get_running_loop().set_default_executor(_ThreadForEach(use_device))
    places = asyncio.Semaphore(concurrency)

    async def one(call: Call) -> Any:
        async with places:
            limit = asyncio.timeout(timeout_s)
            try:
                async with limit:
                    is_async = inspect.iscoroutinefunction(call)
                    return await (call() if is_async else asyncio.to_thread(_attempt, call))
            except BaseException as error:  # noqa: BLE001 - reported with its sample
                return _OutOfTime(timeout_s) if limit.expired() else error

    return await asyncio.gather(*map(one, calls))


def _attempt(call: Call) -> Any:
    try:
        return call()
    except BaseException as error:  # noqa: BLE001 - reported with its sample
        return error


class _ThreadForEach(ThreadPoolExecutor):
    """A daemon thread for each call (``asyncio.to_thread``): none waits for a free one, and none is
    waited for at the end."""

    def __init__(self, use_device: Callable[[], None]) -> None:
        super().__init__()
        self._use_device = use_device

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    self._use_device()
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                    future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


def _device_setter() -> Callable[[], None]:
    """Gives a new thread this thread's CUDA device: torch keeps one for each thread, and a new one
    begins with the first."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())
