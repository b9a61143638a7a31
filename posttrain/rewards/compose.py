"""Reward functions by name and weight -> one number for each completion, every function logged alone.

A reward is a plain function ``(completion, sample) -> float | None``; ``async def`` too. ``completion`` is a ``CompletionText``,
``sample`` the row. None: cannot be scored (never 0). Attributes of the function say more:

    my_reward.grouped = True     (completions, sample, scores) -> list, for the completions of one prompt; ``scores`` holds
                                 what the functions before it gave, by name
    my_reward.batched = True     (completions, samples) -> list, for all completions at once
    my_reward.on_timeout = 0.0   its value where it runs out of time or memory; default None

Plain functions that can be imported by name run in worker processes under a hard time limit, ``isolated`` or not; functions
that cannot (closures) run in threads, where a hanging one is given up but goes on.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

from posttrain.rewards.completion import CompletionText
from posttrain.rewards.pool import Outcome, Task, WorkerPool, checked, load_function

log = logging.getLogger(__name__)

BUILT_IN = {
    name: f"posttrain.rewards.{module}.{name}"
    for module, names in {
        "answers": ("math_answer", "numeric_answer", "exact_answer", "choice_answer", "gym_answer"),
        "code": ("code_tests",),
        "format": ("think_answer_format",),
        "language": ("language_consistency",),
        "model": ("reward_model",),
        "judge": ("llm_judge",),
        "length": ("k15_length", "overlong_penalty", "cosine_length", "repetition_penalty"),
    }.items()
    for name in names
}


class RewardError(ValueError):
    """Too many completions could not be scored, or the rewards do not fit the data."""


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """Which functions score a completion, and with what weight."""

    functions: dict[str, float] = field(default_factory=dict)
    """{name: weight} for every sample: a built-in (math_answer, numeric_answer, exact_answer, choice_answer, gym_answer,
    code_tests, think_answer_format, language_consistency, k15_length, overlong_penalty, cosine_length, repetition_penalty,
    reward_model, llm_judge), or the dotted path of a function. The reward is the weighted sum."""
    by_task: dict[str, dict[str, float]] = field(default_factory=dict)
    """{task: {name: weight}}: further functions for samples of one task (mixed data)."""
    task_column: str = "task"
    """Column that names the task."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{name: keyword options}, for example {overlong_penalty: {max_tokens: 512, cache_tokens: 128}}."""
    starts: dict[str, int] = field(default_factory=dict)
    """{name: first iteration that counts it}; before, it is only logged (k1.5's length reward warms up so)."""
    timeout_s: float = 10.0
    """Most seconds for one call."""
    workers: int = 2
    """Worker processes."""
    max_unscored: float = 0.5
    """The run stops when more than this share of an iteration's completions cannot be scored."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"rewards.max_unscored is a share in [0, 1]; got {self.max_unscored}.")
        used = {name for terms in (self.functions, *self.by_task.values()) for name in terms}
        for what, names in (("options", self.options), ("starts", self.starts)):
            unused = sorted(set(names) - used)
            if unused:
                raise ValueError(f"rewards.{what} names {unused}, which rewards.functions and rewards.by_task do not use.")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One completion's reward."""

    total: float | None
    """Weighted sum; None if one of its functions gave None."""
    parts: Mapping[str, float | None]
    problems: tuple[str, ...] = ()
    """'name: what went wrong', for functions that failed."""

    def judged_by(self, name: str) -> float | None:
        """What the function ``name`` gave; of a sample that it does not score (mixed tasks), the total."""
        return self.parts[name] if name in self.parts else self.total


Group = tuple[Mapping[str, Any], Sequence[CompletionText]]
"""(sample, its completions)"""


class Rewards:
    """``score(groups, iteration=...)``. ``given``: functions passed in from Python, by name, with their weight."""

    def __init__(self, config: RewardsConfig, *, given: Mapping[str, tuple[Callable[..., Any], float]] | None = None) -> None:
        self.config = config
        self._functions: dict[str, Callable[..., Any]] = {name: f for name, (f, _) in (given or {}).items()}
        self._weights = {**config.functions, **{name: weight for name, (_, weight) in (given or {}).items()}}
        for terms in (config.functions, *config.by_task.values()):
            for name in terms:
                self._functions.setdefault(name, _resolve(name))
        if not self._functions:
            raise ValueError("There is no reward. Set --rewards.functions '{math_answer: 1.0}', or rewards.by_task.")
        self._check_options()
        self._pool = WorkerPool(size=config.workers, timeout_s=config.timeout_s)

    @property
    def names(self) -> list[str]:
        """Of the functions, in the order in which they run."""
        return sorted(self._functions, key=lambda name: getattr(self._functions[name], "grouped", False))

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()

    def weights_of(self, sample: Mapping[str, Any]) -> dict[str, float]:
        """{name: weight} of a sample. Raises RewardError for a task without any."""
        task = sample.get(self.config.task_column)
        if self.config.by_task and task not in self.config.by_task and not self._weights:
            raise RewardError(
                f"rewards.by_task knows the tasks {', '.join(self.config.by_task)}, but a sample's column "
                f"{self.config.task_column!r} is {task!r}. Add it, or set rewards.functions for all samples."
            )
        return {**self._weights, **self.config.by_task.get(str(task), {})}

    def score(self, groups: Sequence[Group], *, iteration: int = 0) -> list[list[Scored]]:
        """[group][completion]. Raises RewardError when more than ``max_unscored`` of them have no total."""
        weights = [self.weights_of(sample) for sample, _ in groups]
        parts: list[list[dict[str, float | None]]] = [[{} for _ in texts] for _, texts in groups]
        problems: list[list[list[str]]] = [[[] for _ in texts] for _, texts in groups]
        for name in self.names:
            at = [(g, k) for g, (_, texts) in enumerate(groups) if name in weights[g] for k in range(len(texts))]
            for (g, k), outcome in zip(at, self._run(name, groups, at, parts), strict=True):
                value = getattr(self._functions[name], "on_timeout", None) if outcome.exhausted else outcome.value
                parts[g][k][name] = value
                if outcome.problem is not None:
                    problems[g][k].append(f"{name}: {outcome.problem}")
        scored = [
            [
                Scored(total=self._total(parts[g][k], weights[g], iteration), parts=parts[g][k], problems=tuple(problems[g][k]))
                for k in range(len(texts))
            ]
            for g, (_, texts) in enumerate(groups)
        ]
        self._report(groups, scored)
        return scored

    def _total(self, parts: Mapping[str, float | None], weights: Mapping[str, float], iteration: int) -> float | None:
        total = 0.0
        for name, weight in weights.items():
            if iteration < self.config.starts.get(name, 0) or weight == 0:
                continue
            value = parts[name]
            if value is None:
                return None
            total += weight * value
        return total

    def _report(self, groups: Sequence[Group], scored: Sequence[Sequence[Scored]]) -> None:
        failed = [(g, k, s) for g, row in enumerate(scored) for k, s in enumerate(row) if s.problems]
        for g, k, s in failed[:3]:
            log.warning("reward %s; completion %d of %s: %.120r", "; ".join(s.problems), k, _where(groups[g][0]), groups[g][1][k])
        if len(failed) > 3:
            log.warning("... and %d more completions with a failing reward", len(failed) - 3)
        flat = [s for row in scored for s in row]
        missing = sum(s.total is None for s in flat)
        if flat and missing > self.config.max_unscored * len(flat):
            first = next(((g, s) for g, row in enumerate(scored) for s in row if s.total is None))
            why = "; ".join(first[1].problems) or "a reward gave None"
            raise RewardError(
                f"{missing} of {len(flat)} completions could not be scored (limit {self.config.max_unscored:.0%}), the first of "
                f"{_where(groups[first[0]][0])}: {why}. Correct the reward or the data, or raise --rewards.max_unscored."
            )

    def _run(
        self, name: str, groups: Sequence[Group], at: Sequence[tuple[int, int]], parts: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[Outcome]:
        function, options = self._functions[name], self.config.options.get(name, {})
        texts, samples = [groups[g][1][k] for g, k in at], [groups[g][0] for g, _ in at]
        if getattr(function, "grouped", False):
            return self._run_grouped(function, options, groups, at, parts)
        if getattr(function, "batched", False):
            return _guarded(lambda: function(texts, samples, **options), len(at))
        if inspect.iscoroutinefunction(function):
            calls = [(lambda t=t, s=s: function(t, s, **options)) for t, s in zip(texts, samples, strict=True)]
            return asyncio.run(_gather(calls, self.config.timeout_s))
        path = _dotted_path(function)
        if path is None:
            return _in_threads([(lambda t=t, s=s: function(t, s, **options)) for t, s in zip(texts, samples, strict=True)],
                               self.config.timeout_s)  # fmt: skip
        return self._pool.run(
            [
                Task(
                    function=path,
                    completion=str(t),
                    num_tokens=t.num_tokens,
                    finish_reason=t.finish_reason,
                    sample=s,
                    options=options,
                )
                for t, s in zip(texts, samples, strict=True)
            ]
        )

    def _run_grouped(
        self,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        groups: Sequence[Group],
        at: Sequence[tuple[int, int]],
        parts: Sequence[Sequence[Mapping[str, Any]]],
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for g in dict.fromkeys(g for g, _ in at):
            sample, texts = groups[g]
            scores = {name: [part.get(name) for part in parts[g]] for name in parts[g][0]}
            outcomes += _guarded(lambda t=texts, s=sample, sc=scores: function(t, s, sc, **options), len(texts))
        return outcomes

    def _check_options(self) -> None:
        for name, options in self.config.options.items():
            known = {n for n, p in inspect.signature(self._functions[name]).parameters.items() if p.kind is p.KEYWORD_ONLY}
            unknown = sorted(set(options) - known)
            if unknown:
                raise ValueError(f"rewards.options.{name} has {unknown}; {name} knows {', '.join(sorted(known)) or 'none'}.")


def _resolve(name: str) -> Callable[..., Any]:
    try:
        return load_function(BUILT_IN.get(name, name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"A reward is one of {', '.join(BUILT_IN)}, or the dotted path of a function (completion, sample) -> float | None; "
            f"got {name!r} ({error})."
        ) from error


def _dotted_path(function: Callable[..., Any]) -> str | None:
    """Where a worker can import it from; None for closures, lambdas and functions of a script."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    return None if module in (None, "__main__") or "<" in name or "." in name else f"{module}.{name}"


def _guarded(call: Callable[[], Any], count: int) -> list[Outcome]:
    """Of a function that scores several at once: its values, or its failure for each."""
    try:
        values = list(call())
        if len(values) != count:
            raise ValueError(f"returned {len(values)} values for {count} completions")
    except Exception as error:  # noqa: BLE001 - whatever user code raises is reported with its samples
        return [Outcome(value=None, problem=f"raised {type(error).__name__}: {error}")] * count
    return [Outcome(value=v, problem=p) for v, p in map(checked, values)]


async def _gather(calls: Sequence[Callable[[], Any]], timeout_s: float) -> list[Outcome]:
    async def one(call: Callable[[], Any]) -> Outcome:
        try:
            value, problem = checked(await asyncio.wait_for(call(), timeout_s))
        except TimeoutError:
            return Outcome(value=None, problem=f"took longer than {timeout_s:g} s", exhausted=True)
        except Exception as error:  # noqa: BLE001
            return Outcome(value=None, problem=f"raised {type(error).__name__}: {error}")
        return Outcome(value=value, problem=problem)

    return list(await asyncio.gather(*(one(call) for call in calls)))


def _in_threads(calls: Sequence[Callable[[], Any]], timeout_s: float) -> list[Outcome]:
    pool = ThreadPoolExecutor(max_workers=8)
    outcomes = []
    for future in [pool.submit(call) for call in calls]:
        try:
            value, problem = checked(future.result(timeout_s))
            outcomes.append(Outcome(value=value, problem=problem))
        except FutureTimeout:
            outcomes.append(Outcome(value=None, problem=f"took longer than {timeout_s:g} s", exhausted=True))
        except Exception as error:  # noqa: BLE001
            outcomes.append(Outcome(value=None, problem=f"raised {type(error).__name__}: {error}"))
    pool.shutdown(wait=False, cancel_futures=True)
    return outcomes


def _where(sample: Mapping[str, Any]) -> str:
    return str(sample.get("_where") or "a sample")
