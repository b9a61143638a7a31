"""Reward functions by name and weight -> one number for each completion, every function logged
alone.

A reward is a plain function ``(completion, sample) -> float | None``; ``async def`` too.
``completion`` is a ``CompletionText``, ``sample`` the row. None: cannot be scored (never 0).
Attributes of the function say more:

    my_reward.grouped = True   (completions, sample, scores) -> list, for the completions of one
                               prompt; ``scores`` holds
                                 what the functions before it gave, by name
    my_reward.batched = True     (completions, samples) -> list, for all completions at once
    my_reward.verifies = True   it tells right (> 0) from wrong (0): accuracy, pass@k and the
                                prompts' success rates are its
    my_reward.on_timeout = 0.0   its value where it runs out of time or memory; default None
    my_reward.imports = ("x",)   modules that it imports when called: a worker loads them before its
                                 time starts

Plain functions that can be imported by name run in worker processes under a hard time limit; all
others in threads of this process, where a hanging call is given up but goes on. ``timeout_s`` holds
for each call from its start; the one call of a batched function has it once for each completion,
and 120 s more for what it loads.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from posttrain.rewards.answers import final_answer
from posttrain.rewards.calls import scored_alone, scored_async, scored_together
from posttrain.rewards.completion import CompletionText
from posttrain.rewards.pool import START_SECONDS, Outcome, Task, WorkerPool, load_function

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
    """{name: weight} for every sample: a built-in (math_answer, numeric_answer, exact_answer,
    choice_answer, gym_answer, code_tests, think_answer_format, language_consistency, k15_length,
    overlong_penalty, cosine_length, repetition_penalty, reward_model, llm_judge), or the dotted
    path of a function. The reward is the weighted sum."""
    by_task: dict[str, dict[str, float]] = field(default_factory=dict)
    """{task: {name: weight}}: further functions for samples of one task (mixed data)."""
    task_column: str = "task"
    """Column that names the task."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{name: keyword options}, for example {overlong_penalty: {max_tokens: 512, cache_tokens:
    128}}."""
    starts: dict[str, int] = field(default_factory=dict)
    """{name: first iteration that counts it}; before, it is only logged (k1.5's length reward warms
    up so)."""
    must_end: bool = False
    """A completion that did not end by itself (it reached sampling.max_tokens, or was caught in a
    loop) counts as wrong: what a function gives for it is at most 0. Verifiers read the answer and
    not what follows, so without this a policy can learn to answer and to go on until the limit.
    DAPO's softer way is overlong_penalty; rollout.mask_truncated leaves them out of the loss (Yu et
    al. 2025, arXiv:2503.14476 section 3.4)."""
    timeout_s: float = 10.0
    """Most seconds for one call; for a batched function, of each completion of its one call, which
    has 120 s more to load."""
    concurrency: int = 16
    """Most calls at a time of an async function, or of one that cannot be imported by name
    (threads)."""
    workers: int = 2
    """Worker processes."""
    max_unscored: float = 0.5
    """The run stops when more than this share of an iteration's completions cannot be scored. Each
    process counts its own, and judges once they are of 8 prompts; iterations of fewer are counted
    together."""

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(
                f"rewards.concurrency is a number of calls >= 1; got {self.concurrency}."
            )
        if not 0 <= self.max_unscored <= 1:
            raise ValueError(f"rewards.max_unscored is a share in [0, 1]; got {self.max_unscored}.")
        used = {name for terms in (self.functions, *self.by_task.values()) for name in terms}
        for what, names in (("options", self.options), ("starts", self.starts)):
            unused = sorted(set(names) - used)
            if unused:
                raise ValueError(
                    f"rewards.{what} names {unused}, which rewards.functions and "
                    "rewards.by_task do not use."
                )


MIN_PROMPTS = 8
"""Prompts whose completions must have been seen before ``max_unscored`` stops a run: one bad row is
not a broken reward."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One completion's reward."""

    total: float | None
    """Weighted sum; None if one of its functions gave None."""
    parts: Mapping[str, float | None]
    problems: tuple[str, ...] = ()
    """'name: what went wrong', for functions that failed."""

    verdict: float | None = None
    """What tells right (> 0) from wrong: the value of ``Rewards.verifier``; None: not judged."""


@dataclass(kw_only=True)
class _Seen:
    """What came of an iteration's completions so far."""

    iteration: int = -1
    prompts: int = 0
    completions: int = 0
    unscored: int = 0
    first: str = ""
    """Where the first unscored one is from, and why."""


_PROBE = CompletionText(r"\boxed{4}")

Group = tuple[Mapping[str, Any], Sequence[CompletionText]]
"""(sample, its completions)"""
Parts = Sequence[Sequence[Mapping[str, Any]]]
"""[group][completion] {name: what the functions before gave}"""


class Rewards:
    """``score(groups, iteration=...)``. ``given``: functions passed in from Python, by name, with
    their weight."""

    def __init__(
        self,
        config: RewardsConfig,
        *,
        given: Mapping[str, tuple[Callable[..., Any], float]] | None = None,
        correct: str | None = None,
    ) -> None:
        self.config, self._correct = config, correct
        twice = sorted(set(given or {}) & set(config.functions))
        if twice:
            raise ValueError(
                f"Two rewards have the name {twice[0]!r}: one was given as a "
                "function, one by rewards.functions."
            )
        self._functions: dict[str, Callable[..., Any]] = {
            name: f for name, (f, _) in (given or {}).items()
        }
        self._weights = {
            **config.functions,
            **{name: weight for name, (_, weight) in (given or {}).items()},
        }
        for terms in (config.functions, *config.by_task.values()):
            for name in terms:
                self._functions.setdefault(name, _resolve(name))
        if not self._functions:
            raise ValueError(
                "There is no reward. Set --rewards.functions '{math_answer: 1.0}', "
                "or rewards.by_task."
            )
        self._check_options()
        if correct is not None and correct not in self._functions:
            raise ValueError(
                "evaluation.correct is one of the rewards "
                f"{', '.join(self._functions)}; got {correct!r}."
            )
        self._pool = WorkerPool(size=config.workers, timeout_s=config.timeout_s)
        self._seen = _Seen()

    @property
    def names(self) -> list[str]:
        """Of the functions, in the order in which they run."""
        return sorted(
            self._functions, key=lambda name: getattr(self._functions[name], "grouped", False)
        )

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()

    def weights_of(self, sample: Mapping[str, Any]) -> dict[str, float]:
        """{name: weight} of a sample. Raises RewardError for a task without any."""
        task = sample.get(self.config.task_column)
        if self.config.by_task and task not in self.config.by_task and not self._weights:
            raise RewardError(
                f"rewards.by_task knows the tasks {', '.join(self.config.by_task)}, but a sample's "
                f"column {self.config.task_column!r} is {task!r}. Add it, or set rewards.functions "
                "for all samples."
            )
        return {**self._weights, **self.config.by_task.get(str(task), {})}

    def verifier(self, sample: Mapping[str, Any]) -> str | None:
        """The reward that tells right from wrong for a sample: ``correct``, else the one verifier
        (``my_reward.verifies``) among its rewards, else the only one it has; None where that leaves
        a choice."""
        weights = self.weights_of(sample)
        verifiers = [name for name in weights if getattr(self._functions[name], "verifies", False)]
        found = [self._correct] if self._correct is not None else verifiers or list(weights)
        return found[0] if len(found) == 1 else None

    def needs_verifier(self, sample: Mapping[str, Any], what: str) -> None:
        """ValueError where ``verifier`` is None."""
        if self.verifier(sample) is None:
            names = list(self.weights_of(sample))
            raise ValueError(
                f"{what} needs to know which of the rewards {', '.join(names)} tells a right "
                f"answer from a wrong one. Name it: --evaluation.correct {names[0]}."
            )

    def unreadable(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
        """{verifier: where the samples are whose own answers it cannot read}. Of them a completion
        is unscored unless it says the very same."""
        found: dict[str, list[str]] = {}
        for name, function in self._functions.items():
            path = _dotted_path(function) if getattr(function, "reads_answers", False) else None
            mine = [s for s in samples if name in self.weights_of(s)]
            if path is not None:
                tasks = [
                    Task(
                        function=path,
                        completion=_PROBE,
                        sample=s,
                        options=self.config.options.get(name, {}),
                    )
                    for s in mine
                ]
                outcomes = self._pool.run(tasks)
                places = [
                    f"{_where(s)}: {o.problem or ''}"
                    for s, o in zip(mine, outcomes, strict=True)
                    if o.value is None
                ]
                found |= {name: places} if places else {}
        return found

    def alike(self, sample: Mapping[str, Any], texts: Sequence[CompletionText]) -> list[str]:
        """Each text's answer, or the first of the answers before that the sample's verifier takes
        for the same."""
        said = [final_answer(text) for text in texts]
        name = self.verifier(sample)
        function = self._functions.get(name or "")
        path = (
            _dotted_path(function)
            if function is not None and getattr(function, "reads_answers", False)
            else None
        )
        if path is None or len(set(said)) < 2:
            return said
        options = self.config.options.get(name or "", {})
        column = options.get("column", "answer")
        firsts = {
            answer: text for answer, text in zip(reversed(said), reversed(texts), strict=True)
        }
        kinds = list(dict.fromkeys(said))
        pairs = [(one, other) for i, one in enumerate(kinds) for other in kinds[i + 1 :]]
        tasks = [
            Task(
                function=path,
                completion=firsts[other],
                sample={**sample, column: one},
                options=options,
            )
            for one, other in pairs
        ]
        same: dict[str, str] = {}
        for (one, other), outcome in zip(pairs, self._pool.run(tasks), strict=True):
            if outcome.value is not None and outcome.value > 0:
                same.setdefault(other, same.get(one, one))
        return [same.get(answer, answer) for answer in said]

    def score(self, groups: Sequence[Group], *, iteration: int = 0) -> list[list[Scored]]:
        """[group][completion]. Raises RewardError when more than ``max_unscored`` of the
        iteration's have no total."""
        weights = [self.weights_of(sample) for sample, _ in groups]
        parts: list[list[dict[str, float | None]]] = [[{} for _ in texts] for _, texts in groups]
        problems: list[list[list[str]]] = [[[] for _ in texts] for _, texts in groups]
        for name in self.names:
            at = [
                (g, k)
                for g, (_, texts) in enumerate(groups)
                if name in weights[g]
                for k in range(len(texts))
            ]
            for (g, k), outcome in zip(at, self._run(name, groups, at, parts), strict=True):
                value = (
                    getattr(self._functions[name], "on_timeout", None)
                    if outcome.exhausted
                    else outcome.value
                )
                if (
                    value is not None
                    and self.config.must_end
                    and groups[g][1][k].finish_reason != "stop"
                ):
                    value = min(value, 0.0)
                parts[g][k][name] = value
                if outcome.problem is not None:
                    problems[g][k].append(f"{name}: {outcome.problem}")
        scored = [
            [
                self._scored(
                    self._total(parts[g][k], weights[g], iteration),
                    parts[g][k],
                    problems[g][k],
                    verifier,
                )
                for k in range(len(texts))
            ]
            for g, (sample, texts) in enumerate(groups)
            for verifier in [self.verifier(sample)]
        ]
        self._report(groups, scored)
        self._check_unscored(groups, scored, iteration)
        return scored

    @staticmethod
    def _scored(
        total: float | None,
        parts: Mapping[str, float | None],
        problems: list[str],
        verifier: str | None,
    ) -> Scored:
        verdict = (
            None if verifier is None else parts.get(verifier, total)
        )  # total: of another task than the verifier's
        return Scored(total=total, parts=parts, problems=tuple(problems), verdict=verdict)

    def _total(
        self, parts: Mapping[str, float | None], weights: Mapping[str, float], iteration: int
    ) -> float | None:
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
        failed = [
            (g, k, s) for g, row in enumerate(scored) for k, s in enumerate(row) if s.problems
        ]
        for g, k, s in failed[:3]:
            log.warning(
                "reward %s; completion %d of %s: %.120r",
                "; ".join(s.problems),
                k,
                _where(groups[g][0]),
                groups[g][1][k],
            )
        if len(failed) > 3:
            log.warning("... and %d more completions with a failing reward", len(failed) - 3)

    def _check_unscored(
        self, groups: Sequence[Group], scored: Sequence[Sequence[Scored]], iteration: int
    ) -> None:
        if iteration != self._seen.iteration and self._seen.prompts >= MIN_PROMPTS:
            self._seen = _Seen()
        seen = self._seen
        seen.iteration = iteration
        for (sample, _), row in zip(groups, scored, strict=True):
            unscored = [s for s in row if s.total is None]
            seen.prompts += 1
            seen.completions += len(row)
            seen.unscored += len(unscored)
            if unscored and not seen.first:
                seen.first = (
                    f"{_where(sample)}: {'; '.join(unscored[0].problems) or 'a reward gave None'}"
                )
        if (
            seen.prompts >= MIN_PROMPTS
            and seen.unscored > self.config.max_unscored * seen.completions
        ):
            raise RewardError(
                f"{seen.unscored} of {seen.completions} completions could not be scored (limit "
                f"{self.config.max_unscored:.0%}), the first of {seen.first}. Correct the reward "
                "or the data, or raise --rewards.max_unscored."
            )

    def _run(
        self, name: str, groups: Sequence[Group], at: Sequence[tuple[int, int]], parts: Parts
    ) -> list[Outcome]:
        function, options = self._functions[name], self.config.options.get(name, {})
        texts, samples = [groups[g][1][k] for g, k in at], [groups[g][0] for g, _ in at]
        calls = [partial(function, t, s, **options) for t, s in zip(texts, samples, strict=True)]
        timeout_s = self.config.timeout_s
        if getattr(function, "grouped", False):
            outcomes: list[Outcome] = []
            for g in dict.fromkeys(g for g, _ in at):
                sample, answers = groups[g]
                scores = {before: [part.get(before) for part in parts[g]] for before in parts[g][0]}
                outcomes += scored_together(
                    partial(function, answers, sample, scores, **options), len(answers), timeout_s
                )
            return outcomes
        if getattr(function, "batched", False):
            return scored_together(
                lambda: function(texts, samples, **options),
                len(at),
                START_SECONDS + timeout_s * len(at),
            )
        if inspect.iscoroutinefunction(function):
            return scored_async(calls, timeout_s, concurrency=self.config.concurrency)
        path = _dotted_path(function)
        if path is None:
            return scored_alone(calls, timeout_s, concurrency=self.config.concurrency)
        pairs = zip(texts, samples, strict=True)
        return self._pool.run(
            [Task(function=path, completion=t, sample=s, options=options) for t, s in pairs]
        )

    def _check_options(self) -> None:
        for name, options in self.config.options.items():
            known = {
                n
                for n, p in inspect.signature(self._functions[name]).parameters.items()
                if p.kind is p.KEYWORD_ONLY
            }
            unknown = sorted(set(options) - known)
            if unknown:
                raise ValueError(
                    f"rewards.options.{name} has {unknown}; {name} knows "
                    f"{', '.join(sorted(known)) or 'none'}."
                )


def by_name(
    functions: Mapping[Callable[..., Any], float],
) -> dict[str, tuple[Callable[..., Any], float]]:
    """{function: weight} -> {name: (function, weight)}. Raises ValueError for two functions of one
    name, such as two lambdas."""
    named: dict[str, tuple[Callable[..., Any], float]] = {}
    for function, weight in functions.items():
        name = getattr(function, "__name__", type(function).__name__)
        if name in named:
            raise ValueError(
                f"Two rewards have the name {name!r}; logs and weights go by name. "
                "Give each its own with def."
            )
        named[name] = (function, weight)
    return named


def _resolve(name: str) -> Callable[..., Any]:
    try:
        return load_function(BUILT_IN.get(name, name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"A reward is one of {', '.join(BUILT_IN)}, or the dotted path of a function "
            f"(completion, sample) -> float | None; got {name!r} ({error})."
        ) from error


def _dotted_path(function: Callable[..., Any]) -> str | None:
    """Where a worker can import it from; None for closures, lambdas and functions of a script."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    return (
        None if module in (None, "__main__") or "<" in name or "." in name else f"{module}.{name}"
    )


def _where(sample: Mapping[str, Any]) -> str:
    return str(sample.get("_where") or "a sample")
