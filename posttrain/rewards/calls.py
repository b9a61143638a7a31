"""Reward functions that run in this process: in threads, each call under a time limit that starts
when the call starts.

A thread cannot be killed: a call that is over time is given up and goes on, but neither later calls
nor the end of the interpreter wait for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from posttrain.rewards.pool import Outcome, checked

Call = Callable[[], Any]


def scored_alone(calls: Sequence[Call], timeout_s: float, *, concurrency: int) -> list[Outcome]:
    """The outcome of calls that score one completion each, at most ``concurrency`` of them at a
    time."""
    return [_outcome(found) for found in _in_threads(calls, timeout_s, concurrency)]


def scored_together(call: Call, count: int, timeout_s: float) -> list[Outcome]:
    """The outcomes of one call that scores ``count`` completions: its values, or its failure for
    each."""

    def listed() -> list[Any]:
        values = list(call())
        if len(values) != count:
            raise ValueError(f"returned {len(values)} values for {count} completions")
        return values

    (found,) = _in_threads([listed], timeout_s, 1)
    return (
        [_outcome(found)] * count
        if isinstance(found, BaseException)
        else [_outcome(v) for v in found]
    )


def scored_async(calls: Sequence[Call], timeout_s: float, *, concurrency: int) -> list[Outcome]:
    """The outcome of each coroutine; at most ``concurrency`` of them run at a time.

    Their event loop runs in a thread of its own: a call that blocks it makes all out of time once
    the loop should have been done.
    """
    most_s = timeout_s * (math.ceil(len(calls) / concurrency) + 1)
    (found,) = _in_threads([lambda: asyncio.run(_gather(calls, timeout_s, concurrency))], most_s, 1)
    return [_outcome(found)] * len(calls) if isinstance(found, BaseException) else list(found)


async def _gather(calls: Sequence[Call], timeout_s: float, concurrency: int) -> list[Outcome]:
    asyncio.get_running_loop().set_default_executor(_ThreadForEach())
    places = asyncio.Semaphore(concurrency)

    async def one(call: Call) -> Outcome:
        async with places:
            try:
                return _outcome(await asyncio.wait_for(call(), timeout_s))
            except TimeoutError:
                return _outcome(_OutOfTime(f"took longer than {timeout_s:g} s"))
            except Exception as error:  # noqa: BLE001
                return _outcome(error)

    return list(await asyncio.gather(*map(one, calls)))


class _OutOfTime(Exception):
    """A call was given up."""


class _ThreadForEach(ThreadPoolExecutor):
    """A daemon thread for each call (``asyncio.to_thread``): none waits for a free one, and none is
    waited for at the end."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


def _in_threads(calls: Sequence[Call], timeout_s: float, concurrency: int) -> list[Any]:
    """What each call returned or raised; _OutOfTime for those that were given up. Calls start in
    their order."""
    results: list[Any] = [None] * len(calls)
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    waiting = list(range(len(calls)))[::-1]
    deadlines: dict[int, float] = {}
    use_device = _device_setter()
    while waiting or deadlines:
        while waiting and len(deadlines) < concurrency:
            i = waiting.pop()
            deadlines[i] = time.monotonic() + timeout_s
            target = contextvars.copy_context().run
            threading.Thread(
                target=target, args=(_work, i, calls[i], use_device, done), daemon=True
            ).start()
        try:
            i, found = done.get(timeout=max(min(deadlines.values()) - time.monotonic(), 0.0))
            if i in deadlines:
                results[i] = found
                del deadlines[i]
        except queue.Empty:
            for i in [i for i, deadline in deadlines.items() if time.monotonic() >= deadline]:
                results[i] = _OutOfTime(f"took longer than {timeout_s:g} s")
                del deadlines[i]
    return results


def _work(
    i: int, call: Call, use_device: Callable[[], None], done: queue.SimpleQueue[tuple[int, Any]]
) -> None:
    try:
        use_device()
        done.put((i, call()))
    except BaseException as error:  # noqa: BLE001 - whatever user code raises is reported with its sample
        done.put((i, error))


def _device_setter() -> Callable[[], None]:
    """Gives a new thread this thread's CUDA device: torch keeps one for each thread, and a new one
    begins with the first."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return lambda: None
    device = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(device)


def _outcome(found: Any) -> Outcome:
    if isinstance(found, _OutOfTime):
        return Outcome(value=None, problem=str(found), exhausted=True)
    if isinstance(found, BaseException):
        return Outcome(value=None, problem=f"raised {type(found).__name__}: {found}")
    value, problem = checked(found)
    return Outcome(value=value, problem=problem)
