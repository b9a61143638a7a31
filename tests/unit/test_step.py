"""What the step refuses, and what a loss sees."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from posttrain.losses.sft import sft
from posttrain.models.policy import Policy
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.training.step import NonFiniteError, clip_and_check, step_gradient
from posttrain.types import Logps, LossOutput, LossTerm, loss
from tests.helpers import gradients_of, max_difference, random_groups, tiny_gpt2, tiny_llama

GROUPS = random_groups(6, sizes=(1, 3), seed=4)


def run(model, loss=sft, *, max_tokens=1000, coupled=False, groups=GROUPS):
    accelerator = Accelerator(cpu=True)
    policy = Policy(model, PackingConfig())
    plan = plan_step(groups, world_size=1, max_tokens=max_tokens, mode="shared", coupled=coupled)
    return (
        accelerator,
        policy,
        step_gradient(accelerator, policy, groups, plan, loss, mode="shared"),
    )


def test_clipping_scales_the_gradient_to_the_norm_and_leaves_smaller_ones_alone():
    accelerator, policy, result = run(tiny_llama())
    before = gradients_of(policy)
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in before.values()))
    measured = clip_and_check(accelerator, policy, result, GROUPS, max_grad_norm=0.0, step=1)
    assert (
        measured == pytest.approx(float(norm), rel=1e-6)
        and max_difference(gradients_of(policy), before) == 0
    )
    clip_and_check(accelerator, policy, result, GROUPS, max_grad_norm=0.1, step=1)
    clipped = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients_of(policy).values()))
    assert float(clipped) == pytest.approx(0.1, rel=1e-4)


def test_the_norm_of_a_bf16_gradient_is_not_rounded_to_bf16():
    accelerator, policy, result = run(tiny_llama().to(torch.bfloat16))
    exact = torch.sqrt(sum((g.double() ** 2).sum() for g in gradients_of(policy).values()))
    measured = clip_and_check(accelerator, policy, result, GROUPS, max_grad_norm=0.0, step=1)
    assert measured == pytest.approx(float(exact), rel=1e-5)


def test_a_non_finite_log_prob_names_its_row_and_leaves_the_weights():
    model = tiny_llama()
    bad = GROUPS[2].completions[0].token_ids[0]
    only_there = [
        g for g in GROUPS if any(bad in (*g.prompt_ids, *c.token_ids) for c in g.completions)
    ]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    accelerator, policy, result = run(model)
    with pytest.raises(NonFiniteError, match="stopped before the optimizer") as raised:
        clip_and_check(accelerator, policy, result, GROUPS, max_grad_norm=1.0, step=7)
    assert GROUPS[2].where in str(raised.value) or len(only_there) > 5
    assert "Step 7" in str(raised.value)


def test_a_non_finite_gradient_of_a_finite_loss_names_a_parameter():
    def steep(logps: Logps) -> LossOutput:
        return LossOutput(items=torch.sqrt(logps.logps_T - logps.logps_T.detach()))

    accelerator, policy, result = run(tiny_llama(), steep)
    with pytest.raises(NonFiniteError, match="Log-probs are finite; non-finite gradient in model"):
        clip_and_check(accelerator, policy, result, GROUPS, max_grad_norm=1.0, step=1)


def test_losses_never_compute_in_16_bit():
    seen = []

    def product(logps: Logps) -> LossOutput:
        seen.append((logps.logps_T[None] @ logps.logps_T[:, None]).dtype)
        return LossOutput(items=-logps.logps_T)

    accelerator = Accelerator(cpu=True)
    policy = Policy(tiny_llama(), PackingConfig())
    plan = plan_step(GROUPS, world_size=1, max_tokens=1000, mode="shared")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step_gradient(accelerator, policy, GROUPS, plan, product, mode="shared")
    assert seen == [torch.float32]


def test_a_micro_batch_without_a_pair_still_takes_part():
    def pairs(logps: Logps) -> LossOutput:
        sum_S = logps.sum_by_sequence(logps.logps_T)
        items = [
            sum_S[i] - sum_S[j]
            for i in range(len(sum_S))
            for j in range(i + 1, len(sum_S))
            if logps.group_S[i] == logps.group_S[j]
        ]
        return LossOutput(
            terms=[LossTerm(items=torch.stack(items) if items else sum_S.new_zeros(0), unit="pair")]
        )

    whole, split = tiny_gpt2().double(), tiny_gpt2().double()
    run(whole, pairs, coupled=True)
    run(split, pairs, coupled=True, max_tokens=30)
    assert max_difference(gradients_of(whole), gradients_of(split)) < 1e-10


def test_a_coupled_unit_cannot_be_declared_uncoupled():
    @loss(couples_completions=False)
    def wrong(logps: Logps) -> LossOutput:
        return LossOutput(items=logps.logps_T[:2], unit="group")

    with pytest.raises(ValueError, match="couples the completions of a group"):
        run(tiny_gpt2(), wrong)


def test_masks_do_not_outlive_their_micro_batch():
    *_, result = run(tiny_llama())
    assert all(not batch.layout.cache for batch, _ in result.batches)


def test_the_weight_cast_is_shared_by_micro_batches_and_loses_no_gradient(request):
    """bf16 autocast around all micro-batches, with a coupled loss whose first pass runs without
    gradient."""
    from tests.losses_for_tests import all_pairs

    AcceleratorState._reset_state(True)  # accelerate keeps one precision per process
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    gradients = []
    for max_tokens in (1000, 30):
        model = tiny_llama()
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        policy = accelerator.prepare(Policy(model, PackingConfig()))
        plan = plan_step(GROUPS, world_size=1, max_tokens=max_tokens, mode="shared", coupled=True)
        step_gradient(accelerator, policy, GROUPS, plan, all_pairs, mode="shared")
        gradients.append(gradients_of(model))
    whole, split = gradients
    for name in whole:
        assert (
            float((whole[name] - split[name]).norm()) <= 0.05 * float(whole[name].norm()) + 1e-3
        ), name
