"""The gradient of a step depends on the global batch alone: not on micro-batches, packing, prefix
sharing, chunks of the LM head, checkpointing, or the split of groups over the token budget.
float64, 1e-10, against one sequence at a time."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from accelerate import Accelerator

from posttrain.losses.sft import sft
from posttrain.models.policy import Policy
from posttrain.packing.plan import PackingConfig, plan_step, row_tokens
from posttrain.training.step import step_gradient
from posttrain.types import PromptGroup, as_loss
from tests.helpers import (
    gradients_of,
    max_difference,
    random_groups,
    reference_gradient,
    tiny_gpt2,
    token_mean,
)
from tests.losses_for_tests import (
    all_pairs,
    all_pairs_reference,
    surprising_pairs,
    surprising_pairs_reference,
)

LOSSES = {"sft": sft, "all_pairs": as_loss(all_pairs), "surprising_pairs": surprising_pairs}
GROUPS = random_groups(9, seed=3)
TOLERANCE = 1e-10


@functools.cache
def budgets() -> dict[str, int]:
    """Token budgets that give one, two and five micro-batches of the packed groups, and one that
    cuts the larger groups apart."""
    total = sum(row_tokens(g, mode="shared") for g in GROUPS)
    longest = max(
        row_tokens(PromptGroup(prompt_ids=g.prompt_ids, completions=[c]), mode="shared")
        for g in GROUPS
        for c in g.completions
    )
    found = {}
    for tokens in range(total, longest, -1):
        plan = plan_step(GROUPS, world_size=1, max_tokens=tokens, mode="shared", coupled=True)
        found.setdefault(len(plan.ranks[0]), tokens)
    return {"one": found[1], "two": found[2], "five": found[5], "split": longest}


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    model = tiny_gpt2().double().eval()
    return {
        "sft": reference_gradient(model, GROUPS, token_mean),
        "all_pairs": reference_gradient(model, GROUPS, all_pairs_reference),
        "surprising_pairs": reference_gradient(
            model, GROUPS, lambda _: surprising_pairs_reference(model, GROUPS)
        ),
    }


MATRIX = list(
    itertools.product(
        ["sft", "all_pairs", "surprising_pairs"],
        ["shared", "packed", "single"],
        ["one", "two", "five", "split"],
        [1, 7, 512],
        [False, True],
    )
)


@pytest.mark.parametrize(("loss_name", "mode", "budget", "chunk", "checkpointing"), MATRIX)
def test_gradient_is_that_of_one_sequence_at_a_time(
    references, loss_name, mode, budget, chunk, checkpointing
):
    loss = LOSSES[loss_name]
    model = tiny_gpt2().double().train()
    if checkpointing:
        model.activation_checkpointing_enable()
    policy = Policy(model, PackingConfig(mode=mode, logits_chunk=chunk))
    plan = plan_step(
        GROUPS,
        world_size=1,
        max_tokens=budgets()[budget],
        mode=mode,
        coupled=loss.couples_completions,
    )
    result = step_gradient(Accelerator(cpu=True), policy, GROUPS, plan, loss, mode=mode)
    wanted_loss, wanted_gradient = references[loss_name]
    assert abs(result.loss - wanted_loss) < TOLERANCE
    assert max_difference(gradients_of(model), wanted_gradient) < TOLERANCE


def test_the_matrix_really_has_one_two_and_five_micro_batches_and_split_groups():
    plans = {
        name: plan_step(GROUPS, world_size=1, max_tokens=tokens, mode="shared", coupled=True)
        for name, tokens in budgets().items()
    }
    counts = {name: len(plan.ranks[0]) for name, plan in plans.items()}
    assert (counts["one"], counts["two"], counts["five"]) == (1, 2, 5)
    assert any(m.coupled_group is not None for m in plans["split"].ranks[0])


def test_dropout_with_a_split_group_has_the_gradient_of_its_own_masks():
    """Gradient caching runs every part twice; with dropout both runs must draw the same masks, or
    the vector does not fit.

    Finite differences along a random direction, the random state fixed, give the truth."""
    model = tiny_gpt2(dropout=0.3).double().train()
    policy = Policy(model, PackingConfig(mode="packed"))
    plan = plan_step(
        GROUPS, world_size=1, max_tokens=budgets()["split"], mode="packed", coupled=True
    )
    accelerator = Accelerator(cpu=True)

    def value() -> float:
        torch.manual_seed(5)
        return step_gradient(accelerator, policy, GROUPS, plan, all_pairs, mode="packed").loss

    value()
    gradient = gradients_of(model)
    generator = torch.Generator().manual_seed(1)
    direction = {
        n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in model.named_parameters()
    }
    slope = sum(float((gradient[n] * direction[n]).sum()) for n in gradient)
    step = 1e-6
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.add_(direction[n], alpha=sign * step)
        sides.append(value())
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.sub_(direction[n], alpha=sign * step)
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=1e-6)
