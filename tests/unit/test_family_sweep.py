"""Every causal family of transformers trains exactly: log-probs and gradient against a plain loop
over the model's own forward, in the mode that the table says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.models.policy import Policy, plain_attention
from posttrain.packing.batch import pack
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.training.selfcheck import SelfCheckError, self_check
from posttrain.types import PromptGroup
from tests.family_table import MODES, NOT_BUILT, build, document, families
from tests.helpers import gradients_of, random_groups

TRAIN_ONLY = {"reformer"}
"""Has no gradient in eval mode."""


def ending_in_a_trained_token(groups: list[PromptGroup]) -> list[PromptGroup]:
    return [
        replace(
            g, completions=[replace(c, loss_mask=[*c.loss_mask[:-1], 1]) for c in g.completions]
        )
        for g in groups
    ]


GROUPS = ending_in_a_trained_token(
    random_groups(2, sizes=(2, 3), seed=3, max_prompt=12, max_completion=20)
)


def trained_values(policy: Policy, groups: list[Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """(values of every completion in order, gradient of their sum) through the policy."""
    mode = policy.forward_mode
    plan = plan_step(
        groups, world_size=1, max_tokens=500, mode=mode.mode, length_limit=mode.length_limit
    )
    values = {}
    policy.zero_grad()
    for micro_batch in plan.ranks[0]:
        batch = pack(groups, micro_batch.parts, mode=mode.mode)
        logps_T = policy(batch).logps_T
        logps_T.sum().backward()
        values |= {ref: logps_T[batch.sequence_T == s] for s, ref in enumerate(batch.refs)}
    return torch.cat([values[ref] for ref in sorted(values)]).detach(), gradients_of(policy.model)


def own_values(model: Any, groups: list[Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same by a plain loop over the model's own forward."""
    model.zero_grad()
    values = []
    for group in groups:
        for c in group.completions:
            ids = torch.tensor([[*group.prompt_ids, *c.token_ids]])
            inputs = {n: torch.as_tensor(v) for n, v in group.inputs.items()}
            with plain_attention(model):
                logits = model(input_ids=ids[:, :-1], use_cache=False, **inputs).logits[0]
            logps = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
            values.append(logps[len(group.prompt_ids) - 1 :][torch.tensor(c.loss_mask)])
    torch.cat(values).sum().backward()
    return torch.cat(values).detach(), gradients_of(model)


def assert_trains_exactly(policy: Policy, groups: list[Any]) -> None:
    wanted, wanted_gradient = own_values(policy.model, groups)
    got, gradient = trained_values(policy, groups)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert gradient.keys() == wanted_gradient.keys()
    limit = 1e-3 * max(float(g.abs().max()) for g in wanted_gradient.values())
    for name, wanted in wanted_gradient.items():
        torch.testing.assert_close(gradient[name], wanted, atol=limit, rtol=0)


def mode_of(policy: Policy) -> str:
    try:
        self_check(policy, GROUPS, max_tokens=500)
    except SelfCheckError as error:
        assert "is not causal" in str(error)
        return "not causal"
    return "own" if policy.forward_mode.own_logits else policy.forward_mode.mode


@pytest.mark.parametrize("family", families())
def test_trains_exactly_in_the_mode_of_the_table(family):
    if family in NOT_BUILT:
        with pytest.raises(Exception):  # noqa: B017 - each for its own reason
            build(family)
        return
    policy = Policy(build(family), PackingConfig())
    mode = mode_of(policy)
    policy.train(family in TRAIN_ONLY)
    if mode != "not causal":
        assert_trains_exactly(policy, GROUPS)
    assert MODES.get(family) == mode, (
        f'not in the table: got "{family}": "{mode}" ({policy.forward_mode.reason})'
    )


def test_the_documentation_is_current():
    path, text = document()
    assert path.read_text() == text, "run python -m tests.family_table"
