"""Reward functions by name and weight -> one number for each completion, every function logged
alone."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any

from posttrain import HOME
from posttrain.resolve import check_options, check_rules, did_you_mean, import_name, settings
from posttrain.rewards import RIGHT, CompletionText, reward
from posttrain.rewards.answers import final_answer
from posttrain.rewards.run import START_SECONDS, Outcome, WorkerPool, score_alone, score_together
from posttrain.types import keyword_options

log = logging.getLogger(__name__)

_MODULES = {f"posttrain.rewards.{module}" for module in ("answers", "code", "text", "model")}
BUILT_IN = {name: f"{home}.{name}" for name, home in HOME.items() if home in _MODULES}


class RewardError(ValueError):
    """Too many completions could not be scored, or the rewards do not fit the data."""


@settings
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
    first_iteration: dict[str, int] = field(default_factory=dict)
    """{name: iteration from which it counts}; before, it is only logged (k1.5's length reward warms
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
        check_rules(
            "rewards",
            self,
            "timeout_s > 0",
            "concurrency >= 1",
            "workers >= 1",
            "0 <= max_unscored <= 1",
        )
        used = {name for terms in (self.functions, *self.by_task.values()) for name in terms}
        for what, names in (("options", self.options), ("first_iteration", self.first_iteration)):
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

    reward: float | None
    """Weighted sum; None if one of its functions gave None."""
    parts: Mapping[str, float | None]
    problems: tuple[str, ...] = ()
    """'name: what went wrong', for functions that failed."""
    verdict: float | None = None
    """What tells right (1 or more) from wrong, the value of ``Rewards.verifier``; None: not
    judged."""


Group = tuple[Mapping[str, Any], Sequence[CompletionText]]
"""(sample, its completions)"""
Weighted = tuple[Callable[..., Any], float]
"""(reward function, weight)"""


class Rewards:
    """``score(groups, iteration=...)``. ``given``: functions passed in from Python, by name, with
    their weight. ``correct_reward``: name of the one that tells right from wrong."""

    def __init__(
        self,
        config: RewardsConfig,
        *,
        given: Mapping[str, Weighted] | None = None,
        correct_reward: str | None = None,
    ) -> None:
        self.config, self._correct_reward, given = config, correct_reward, given or {}
        twice = sorted(set(given) & set(config.functions))
        if twice:
            raise ValueError(
                f"Two rewards have the name {twice[0]!r}: one is a function, one is in "
                "rewards.functions."
            )
        self._weights = config.functions | {name: weight for name, (_, weight) in given.items()}
        self.functions = {name: function for name, (function, _) in given.items()}
        """All that score, by name."""
        for terms in (config.functions, *config.by_task.values()):
            for name in terms:
                self.functions.setdefault(name, reward_function(name))
        if not self.functions:
            raise ValueError(
                "There is no reward. Set --rewards.functions '{math_answer: 1.0}', or by_task."
            )
        if correct_reward is not None and correct_reward not in self.functions:
            raise ValueError(
                f"evaluation.correct_reward is one of the rewards {', '.join(self.functions)}; "
                f"got {correct_reward!r}."
            )
        self._declared = {name: reward.of(f) for name, f in self.functions.items()}
        for name, options in config.options.items():
            check_options(f"The reward {name}", options, keyword_options(self.functions[name]))
        self._pool = WorkerPool(size=config.workers, timeout_s=config.timeout_s)
        self._seen: list[tuple[Mapping[str, Any], Sequence[Scored]]] = []
        self._iteration = -1

    @property
    def names(self) -> list[str]:
        """Of the functions, in the order in which they run."""
        return sorted(self.functions, key=lambda name: self._declared[name].grouped)

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
        """The reward that tells right from wrong for a sample: ``correct_reward``, else the one
        verifier (``@reward(verifies=True)``) among its rewards, else the only one; None where that
        leaves a choice."""
        if self._correct_reward is not None:
            return self._correct_reward
        names = list(self.weights_of(sample))
        found = [name for name in names if self._declared[name].verifies] or names
        return found[0] if len(found) == 1 else None

    def needs_verifier(self, sample: Mapping[str, Any], what: str) -> None:
        """ValueError where ``verifier`` is None."""
        if self.verifier(sample) is None:
            names = list(self.weights_of(sample))
            raise ValueError(
                f"{what} needs to know which of the rewards {', '.join(names)} tells a right "
                f"answer from a wrong one. Name it: --evaluation.correct_reward {names[0]}."
            )

    def unreadable(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
        """{verifier: where the samples are whose own answers it cannot read}. Of them a completion
        is unscored unless it says the very same."""
        found: dict[str, list[str]] = {}
        probe = CompletionText(r"\boxed{4}")
        for name in [n for n, declared in self._declared.items() if declared.reads_answers]:
            pairs = [(s, probe) for s in samples if name in self.weights_of(s)]
            for (sample, _), outcome in zip(pairs, self._score_alone(name, pairs), strict=True):
                if outcome.value is None:
                    place = f"{_where(sample)}: {outcome.problem or ''}"
                    found.setdefault(name, []).append(place)
        return found

    def alike(self, sample: Mapping[str, Any], texts: Sequence[CompletionText]) -> list[str]:
        """Each text's answer, or the first of the answers before that the sample's verifier takes
        for the same."""
        said = [final_answer(text) for text in texts]
        name = self.verifier(sample)
        if name is None or not self._declared[name].reads_answers:
            return said
        first = dict(zip(reversed(said), reversed(texts), strict=True))
        column = self.config.options.get(name, {}).get("column", "answer")
        pairs = list(combinations(dict.fromkeys(said), 2))
        asked = [({**sample, column: one}, first[other]) for one, other in pairs]
        same: dict[str, str] = {}
        for (one, other), outcome in zip(pairs, self._score_alone(name, asked), strict=True):
            if (outcome.value or 0.0) >= RIGHT:
                same.setdefault(other, same.get(one, one))
        return [same.get(answer, answer) for answer in said]

    def score(self, groups: Sequence[Group], *, iteration: int = 0) -> list[list[Scored]]:
        """[group][completion]. Raises RewardError when more than ``max_unscored`` of the
        iteration's have no total."""
        found: list[list[dict[str, Outcome]]] = [[{} for _ in texts] for _, texts in groups]
        for name in self.names:
            both = zip(groups, found, strict=True)
            wanted = [(group, row) for group, row in both if name in self.weights_of(group[0])]
            outcomes = iter(self._run(name, wanted) if wanted else ())
            for (_, texts), row in wanted:
                for text, known in zip(texts, row, strict=True):
                    known[name] = self._settled(name, next(outcomes), text)
        scored = [
            [self._scored(sample, known, iteration) for known in row]
            for (sample, _), row in zip(groups, found, strict=True)
        ]
        _warn(groups, scored)
        self._check_unscored(groups, scored, iteration)
        return scored

    def _run(
        self, name: str, wanted: Sequence[tuple[Group, Sequence[Mapping[str, Outcome]]]]
    ) -> list[Outcome]:
        """The outcomes of the groups' completions, in their order."""
        function = partial(self.functions[name], **self.config.options.get(name, {}))
        pairs = [(sample, text) for (sample, texts), _ in wanted for text in texts]
        timeout_s = self.config.timeout_s
        if self._declared[name].grouped:
            calls = []
            for (sample, texts), row in wanted:
                before = {n: [known[n].value for known in row] for n in row[0]}
                calls.append((partial(function, texts, sample, before), len(texts)))
            return score_together(calls, timeout_s)
        if self._declared[name].batched:
            call = partial(function, [text for _, text in pairs], [sample for sample, _ in pairs])
            return score_together([(call, len(pairs))], START_SECONDS + timeout_s * len(pairs))
        return self._score_alone(name, pairs)

    def _score_alone(
        self, name: str, pairs: Sequence[tuple[Mapping[str, Any], CompletionText]]
    ) -> list[Outcome]:
        function, options = self.functions[name], self.config.options.get(name, {})
        path = _dotted_path(function)
        if path is None or inspect.iscoroutinefunction(function):
            calls = [partial(function, text, sample, **options) for sample, text in pairs]
            return score_alone(calls, self.config.timeout_s, concurrency=self.config.concurrency)
        return self._pool.run(path, pairs, options)

    def _settled(self, name: str, outcome: Outcome, text: CompletionText) -> Outcome:
        value = self._declared[name].on_timeout if outcome.exhausted else outcome.value
        if value is not None and self.config.must_end and text.finish_reason != "stop":
            value = min(value, 0.0)
        return replace(outcome, value=value)

    def _scored(
        self, sample: Mapping[str, Any], outcomes: Mapping[str, Outcome], iteration: int
    ) -> Scored:
        parts = {name: outcome.value for name, outcome in outcomes.items()}
        reward: float | None = 0.0
        for name, weight in self.weights_of(sample).items():
            if weight != 0 and iteration >= self.config.first_iteration.get(name, 0):
                value = parts[name]
                reward = None if value is None or reward is None else reward + weight * value
        verifier = self.verifier(sample)  # of another task: the total tells right from wrong
        return Scored(
            reward=reward,
            parts=parts,
            problems=tuple(f"{name}: {o.problem}" for name, o in outcomes.items() if o.problem),
            verdict=None if verifier is None else parts.get(verifier, reward),
        )

    def _check_unscored(
        self, groups: Sequence[Group], scored: Sequence[Sequence[Scored]], iteration: int
    ) -> None:
        if iteration != self._iteration and len(self._seen) >= MIN_PROMPTS:
            self._seen = []
        self._iteration = iteration
        self._seen += [(sample, row) for (sample, _), row in zip(groups, scored, strict=True)]
        count = sum(len(row) for _, row in self._seen)
        unscored = [(sample, s) for sample, row in self._seen for s in row if s.reward is None]
        if len(self._seen) >= MIN_PROMPTS and len(unscored) > self.config.max_unscored * count:
            sample, first = unscored[0]
            raise RewardError(
                f"{len(unscored)} of {count} completions could not be scored (limit "
                f"{self.config.max_unscored:.0%}), the first of {_where(sample)}: "
                f"{'; '.join(first.problems) or 'a reward gave None'}. Correct the reward or the "
                "data, or raise --rewards.max_unscored."
            )


def by_name(functions: Mapping[Callable[..., Any], float]) -> dict[str, Weighted]:
    """{function: weight} -> {name: (function, weight)}. Raises ValueError for two functions of one
    name, such as two lambdas."""
    named: dict[str, Weighted] = {}
    for function, weight in functions.items():
        name = getattr(function, "__name__", type(function).__name__)
        if name in named:
            raise ValueError(
                f"Two rewards have the name {name!r}; logs and weights go by name. "
                "Give each its own with def."
            )
        named[name] = (function, weight)
    return named


def trl_rewards(functions: Any) -> dict[str, Weighted]:
    """Reward functions as TRL takes them, by name with weight 1: one or a list of
    ``f(prompts, completions, **columns) -> list``, plain or async.

    As there, ``completions`` are lists of one message where the prompts are conversations, else
    texts, and ``columns`` are those of the rows.
    """
    listed = functions if isinstance(functions, list | tuple) else [functions]
    if models := [f for f in listed if not callable(f)]:
        raise ValueError(
            f"reward_funcs has {models[0]!r}. A reward model is config.rewards: functions "
            "{reward_model: 1.0}, options {reward_model: {model: FOLDER}}."
        )
    return by_name({_as_batched(function): 1.0 for function in listed})


def _as_batched(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(completions: Sequence[str], samples: Sequence[Mapping[str, Any]]) -> Any:
        names = ("prompt", "messages", "question", "problem")
        prompts = [next((s[n] for n in names if n in s), None) for s in samples]
        said = [
            [{"role": "assistant", "content": str(text)}] if isinstance(prompt, list) else str(text)
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        keys = {key for sample in samples for key in sample} - {"prompt", "_where"}
        columns = {key: [sample.get(key) for sample in samples] for key in keys}
        found = function(prompts=prompts, completions=said, **columns)
        return asyncio.run(found) if inspect.iscoroutine(found) else found

    call.__name__ = call.__qualname__ = getattr(function, "__name__", type(function).__name__)
    return reward(batched=True)(call)


def reward_function(name: str) -> Callable[..., Any]:
    """A built-in one by its name, another by its dotted path. ValueError where there is none."""
    wanted = (
        f"A reward is one of {', '.join(BUILT_IN)}, or the dotted path of a function "
        "(completion, sample) -> float | None"
    )
    if name not in BUILT_IN and "." not in name:
        raise ValueError(f"{wanted}; got {name!r}.{did_you_mean(name, BUILT_IN)}")
    return import_name(BUILT_IN.get(name, name), wanted=wanted)


def _dotted_path(function: Callable[..., Any]) -> str | None:
    """Where a worker can import it from; None for closures, lambdas and functions of a script."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
    is_importable = module not in (None, "__main__") and not set("<.") & set(name)
    return f"{module}.{name}" if is_importable else None


def _warn(groups: Sequence[Group], scored: Sequence[Sequence[Scored]]) -> None:
    failed = [
        f"reward {'; '.join(s.problems)}; completion {k} of {_where(sample)}: {texts[k]!r:.120}"
        for (sample, texts), row in zip(groups, scored, strict=True)
        for k, s in enumerate(row)
        if s.problems
    ]
    for line in failed[:3]:
        log.warning("%s", line)
    if len(failed) > 3:
        log.warning("... and %d more completions with a failing reward", len(failed) - 3)


def _where(sample: Mapping[str, Any]) -> str:
    return str(sample.get("_where") or "a sample")
