"""Scored completions -> groups to train: advantages, the KL inside the reward, log-probs before the
first update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from posttrain.algorithms import Algorithm, Rollout
from posttrain.models.policy import in_eval_mode
from posttrain.training.collect import ScoredGroup
from posttrain.training.forward import Compute, ForwardPlan, Ref, forward_values
from posttrain.training.sharding import gather_object
from posttrain.training.step import Reference
from posttrain.types import Completion, Forward, PromptGroup, Ragged


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
    reference: Reference | None,
    plan: ForwardPlan,
) -> list[PromptGroup]:
    """One group for each, with the columns that the algorithm gives. ``proximal``: log-probs under
    the present policy are kept, because it will be updated more than once on them."""
    groups = [_group(s, config, version) for s in scored]
    if not any(group.num_trained for group in groups):
        return groups  # all unscored or cut: the iteration says so
    computes: dict[str, Compute] = {}
    if proximal or algorithm.needs("policy") or algorithm.needs("reference"):
        computes["logps"] = lambda _, batch: policy(batch)
    if algorithm.needs("reference"):
        assert reference is not None
        computes["reference_logps"] = lambda groups, batch: Forward(reference(groups, batch))
    # the reward of a completion that is scored but not trained may have its KL taken off, too
    measured = groups
    if algorithm.needs("reference"):
        measured = [_group(s, config, version, measured=True) for s in scored]
    logps: dict[str, dict[Ref, Any]] = {}
    if computes:
        logps = _values_of_all(plan, policy, measured, computes)
    rollouts = [
        [
            _rollout(s, k, measured[g], groups[g], {n: v.get((g, k)) for n, v in logps.items()})
            for k in range(len(s.scores))
        ]
        for g, s in enumerate(scored)
    ]
    columns = algorithm.columns(rollouts)

    def credited(g: int, k: int, completion: Completion) -> Completion:
        given = columns[g][k]
        if given is None:
            completion = replace(completion, loss_mask=np.zeros_like(completion.loss_mask))
        elif proximal and completion.num_trained:
            given = {**given, "proximal_logps": logps["logps"][g, k]}
        counted = measured[g].completions[k].loss_mask
        return completion.with_columns(
            **{n: _spread(v, counted) for n, v in (given or {"advantage": 0.0}).items()}
        )

    return [
        replace(group, completions=[credited(g, k, c) for k, c in enumerate(group.completions)])
        for g, group in enumerate(groups)
    ]


def _group(
    scored: ScoredGroup, config: CreditConfig, version: int, *, measured: bool = False
) -> PromptGroup:
    """``measured``: completions that are scored but not trained have a loss mask too."""
    completions = []
    for trajectory, score in zip(scored.group.trajectories, scored.scores, strict=True):
        is_masked = config.mask_truncated and trajectory.finish_reason == "length" and not measured
        old = 0 if config.keep_old_segments else trajectory.tokens_before(version)
        mask = np.arange(len(trajectory.token_ids)) >= old
        columns: dict[str, Any] = {"sampler_logps": trajectory.logps}
        if trajectory.kept_ids is not None:
            columns["kept_ids"] = Ragged.of(trajectory.kept_ids)
        completions.append(
            Completion(
                token_ids=trajectory.token_ids,
                loss_mask=mask & (score.total is not None and not is_masked),
                columns=columns,
            )
        )
    file, _, row = str(scored.prompt.sample.get("_where", "")).rpartition(":")
    return PromptGroup(
        prompt_ids=scored.prompt.ids,
        completions=completions,
        pairs=(),
        meta={"file": file or "prompts", "row": row},
    )


def _rollout(
    scored: ScoredGroup, k: int, measured: PromptGroup, group: PromptGroup, logps: dict[str, Any]
) -> Rollout:
    score, completion = scored.scores[k], measured.completions[k]
    known = {name: value for name, value in logps.items() if value is not None}
    none = np.zeros(0) if not completion.num_trained else None
    return Rollout(
        reward=score.total,
        parts=score.parts,
        weights=scored.weights,
        token_ids=completion.token_ids[completion.trained],
        text=str(scored.texts[k]),
        finish_reason=str(scored.group.trajectories[k].finish_reason),
        is_trained=group.completions[k].num_trained > 0,
        **{"logps": none, "reference_logps": none, **known},
    )


def _values_of_all(
    plan: ForwardPlan,
    policy: nn.Module,
    groups: Sequence[PromptGroup],
    computes: dict[str, Compute],
) -> dict[str, dict[Ref, Any]]:
    """For each of ``computes``: {(group, completion): array of its trained tokens' log-probs}, of
    all ranks, in eval mode."""
    with in_eval_mode(policy):
        mine = [
            {ref: forward.logps_T.double().cpu().numpy() for ref, forward in values.items()}
            for values in forward_values(plan, groups, list(computes.values()))
        ]
    ranks = gather_object(plan.accelerator, mine)
    return {
        name: {ref: v for rank in ranks for ref, v in rank[i].items()}
        for i, name in enumerate(computes)
    }


def _spread(values: Any, counted: Any) -> Any:
    """An array of the counted tokens at their places, 0 elsewhere; a number as it is."""
    if not np.ndim(values):
        return values
    spread = np.zeros(len(counted))
    spread[counted] = values
    return spread


def has_signal(group: PromptGroup) -> bool:
    """Whether an advantage is not exactly 0."""
    return any(np.any(c.columns.get("advantage", 0.0)) and c.num_trained for c in group.completions)
