"""Scored completions -> groups to train: advantages, the KL inside the reward, log-probs before the
first update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from posttrain.algorithms import Algorithm
from posttrain.models.policy import in_eval_mode
from posttrain.training.collect import ScoredGroup
from posttrain.training.forward import Forward, ForwardPlan, forward_values
from posttrain.training.sharding import gather_object
from posttrain.types import Completion, PromptGroup


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """Which tokens are trained, and what is computed before the first update."""

    mask_truncated: bool = False
    """Completions that reached sampling.max_tokens are scored but not trained (DAPO's overlong
    filtering)."""
    keep_old_segments: bool = False
    """Partial rollouts: tokens drawn in earlier iterations are trained too; else they count as
    prompt, outside of the loss and of every log-ratio (Kimi k1.5). A completion that was finished
    earlier and waited for the others of its group is then only part of their baseline."""


def trained_groups(
    scored: Sequence[ScoredGroup],
    *,
    algorithm: Algorithm,
    config: CreditConfig,
    version: int,
    proximal: bool,
    policy: nn.Module,
    reference: Forward | None,
    plan: ForwardPlan,
) -> list[PromptGroup]:
    """One group for each, with advantages. ``proximal``: log-probs under the present policy are
    kept, because it will be updated more than once on them."""
    groups = [_group(s, config, version) for s in scored]
    kl_in_reward = algorithm.beta > 0 and algorithm.kl_in != "loss"
    logps: list[dict[tuple[int, int], list[float]]] = [{}, {}]
    if (proximal or kl_in_reward) and any(group.num_trained for group in groups):
        forwards: list[Forward] = [lambda _, batch: policy(batch)]
        if kl_in_reward:
            assert reference is not None
            forwards.append(reference)
        off_totals = kl_in_reward and algorithm.kl_in == "reward"
        measured = (
            [_group(s, config, version, measured=True) for s in scored] if off_totals else groups
        )
        logps = _values_of_all(plan, policy, measured, forwards)
    totals = [s.totals for s in scored]
    if kl_in_reward and algorithm.kl_in == "token_reward":
        by_token = _token_returns(groups, totals, logps, algorithm)
        advantages: Any = [[0.0 for _ in row] for row in totals]
    else:
        by_token = None
        if kl_in_reward:
            totals = [
                [
                    None if r is None else r - algorithm.beta * sum(_k1(logps, (g, k)))
                    for k, r in enumerate(row)
                ]
                for g, row in enumerate(totals)
            ]
        advantages = algorithm.advantages(totals, **algorithm.advantage_options)

    def credited(g: int, k: int, c: Completion) -> Completion:
        made = _advantaged(c, advantages[g][k], logps[0].get((g, k)) if proximal else None)
        if by_token is None or not c.num_trained:
            return made
        return replace(
            made, token_advantages=_spread([0.0 if a is None else a for a in by_token[g][k]], c)
        )

    return [
        replace(group, completions=[credited(g, k, c) for k, c in enumerate(group.completions)])
        for g, group in enumerate(groups)
    ]


def _group(
    scored: ScoredGroup, config: CreditConfig, version: int, *, measured: bool = False
) -> PromptGroup:
    """``measured``: completions that are scored but not trained have a loss mask too: their KL is
    part of their reward."""
    completions = []
    for trajectory, score in zip(scored.group.trajectories, scored.scores, strict=True):
        is_masked = config.mask_truncated and trajectory.finish_reason == "length" and not measured
        is_trained = score.total is not None and not is_masked
        old = 0 if config.keep_old_segments else trajectory.tokens_before(version)
        completions.append(
            Completion(
                token_ids=tuple(trajectory.token_ids),
                loss_mask=tuple(
                    int(is_trained and t >= old) for t in range(len(trajectory.token_ids))
                ),
                sampler_logps=tuple(trajectory.logps),
                kept_ids=None
                if trajectory.kept_ids is None
                else tuple(map(tuple, trajectory.kept_ids)),
            )
        )
    file, _, row = str(scored.prompt.sample.get("_where", "")).rpartition(":")
    return PromptGroup(
        prompt_ids=scored.prompt.ids,
        completions=completions,
        pairs=(),
        meta={"file": file or "prompts", "row": row},
    )


def _values_of_all(
    plan: ForwardPlan, policy: nn.Module, groups: Sequence[PromptGroup], forwards: Sequence[Forward]
) -> list[dict[tuple[int, int], list[float]]]:
    """For each forward: {(group, completion): its trained tokens' values}, of all ranks, in eval
    mode."""
    with in_eval_mode(policy):
        mine = [
            {ref: v.tolist() for ref, v in values.items()}
            for values in forward_values(plan, groups, forwards)
        ]
    parts = gather_object(plan.accelerator, mine)
    every = [{ref: v for part in parts for ref, v in part[f].items()} for f in range(len(forwards))]
    return every if len(every) > 1 else [*every, {}]


def _k1(logps: Sequence[dict[tuple[int, int], list[float]]], ref: tuple[int, int]) -> list[float]:
    """log pi - log pi_ref of each trained token."""
    return [p - q for p, q in zip(logps[0].get(ref, []), logps[1].get(ref, []), strict=True)]


def _token_returns(
    groups: Sequence[PromptGroup],
    totals: Sequence[Sequence[float | None]],
    logps: Any,
    algorithm: Algorithm,
) -> list[list[list[float | None]]]:
    """[group][completion][trained token]: r - beta sum of the KL from the token on, normalised over
    all tokens of the batch.

    Hu et al. 2025 (REINFORCE++), arXiv:2501.03262 eq. 6 and 8, with discount 1.
    """
    flat: list[list[float | None]] = []
    for g, row in enumerate(totals):
        for k, total in enumerate(row):
            returns: list[float | None] = []
            behind = 0.0
            for kl in reversed(_k1(logps, (g, k))):
                behind += kl
                returns.append(None if total is None else total - algorithm.beta * behind)
            flat.append(returns[::-1])
    normalised = iter(algorithm.advantages(flat, **algorithm.advantage_options))
    return [[next(normalised) for _ in row] for row in totals]


def _advantaged(
    completion: Completion, advantage: float | None, proximal: Sequence[float] | None
) -> Completion:
    mask = completion.loss_mask if advantage is not None else (0,) * len(completion.token_ids)
    logps = None if proximal is None else _spread(proximal, completion)
    return replace(completion, advantage=advantage or 0.0, loss_mask=mask, proximal_logps=logps)


def _spread(values: Sequence[float], completion: Completion) -> tuple[float, ...]:
    """Values of the trained tokens at their places, 0 elsewhere."""
    given = iter(values)
    return tuple(next(given) if m else 0.0 for m in completion.loss_mask)


def has_signal(group: PromptGroup) -> bool:
    """Whether an advantage is not exactly 0."""
    return any(
        (c.advantage or any(c.token_advantages or ())) and c.num_trained for c in group.completions
    )
