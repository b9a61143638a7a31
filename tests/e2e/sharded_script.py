"""Run by `accelerate launch`: gradients and weights of this topology against one process, as JSON
on rank 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from posttrain.losses.sft import sft
from posttrain.models.policy import Policy
from posttrain.models.sharding import whole_state
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.training import sharding
from posttrain.training.launch import make_accelerator
from posttrain.training.optimizer import OptimizerConfig, build_optimizer
from posttrain.training.step import (
    NonFiniteError,
    clip_and_check,
    step_gradient,
)
from posttrain.types import as_loss
from tests.helpers import random_groups, reference_gradient, tiny_gpt2, token_mean
from tests.losses_for_tests import all_pairs, all_pairs_reference
from tests.measured_states import measured_states

# eps far above rounding: GPT-2's key biases have gradient 0, and AdamW would divide the rounding
# error by itself
OPTIMIZER = OptimizerConfig(
    lr=1e-2, eps=1e-3, weight_decay=0.1, schedule="constant", max_grad_norm=0.5
)


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| over all tensors of b together."""
    assert set(b) <= set(a), (sorted(b), sorted(a))
    difference = sum(
        float((a[n].detach().double() - b[n].detach().double()).square().sum()) for n in b
    )
    return (difference / sum(float(t.detach().double().square().sum()) for t in b.values())) ** 0.5


def one_process(
    model: nn.Module, groups: Any, value: Any, steps: int
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm and weights after ``steps`` updates, every sequence alone, torch's own
    AdamW and clipping."""
    optimizer = build_optimizer(model, OPTIMIZER)
    for _ in range(steps):
        loss, gradient = reference_gradient(model, groups, value)
        for name, p in model.named_parameters():
            p.grad = gradient.get(name)
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.grad is not None], OPTIMIZER.max_grad_norm
        )
        optimizer.step()
        optimizer.zero_grad()
    return loss, float(norm), {n: p.detach() for n, p in model.named_parameters()}


CASES = [
    ("many", "sft", False, 24),
    ("many", "sft", True, 24),
    ("many", "pairs", True, 24),
    ("many", "pairs", False, 1000),
    ("one", "sft", False, 24),
    ("one", "pairs", True, 24),
    ("three", "sft", True, 24),
    ("three", "pairs", False, 24),
]
"""Batch, loss, tied head, token budget; a rank without work, a rank with more micro-batches, groups
over the budget."""


def run_case(
    accelerator: Any, model: nn.Module, groups: Any, loss: Any, tokens: int
) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """(plan, figures of the third update, weights after it on rank 0)."""
    policy = Policy(model, PackingConfig(logits_chunk=7))
    policy, optimizer = sharding.prepare(accelerator, policy, build_optimizer(policy, OPTIMIZER))
    plan = plan_step(
        groups,
        world_size=accelerator.num_processes,
        max_tokens=tokens,
        mode="shared",
        coupled=as_loss(loss).couples_completions,
    )
    figures: dict[str, Any] = {}
    for step in range(3):
        result = step_gradient(accelerator, policy, groups, plan, loss, mode="shared")
        norm = clip_and_check(
            accelerator, policy, result, groups, max_grad_norm=OPTIMIZER.max_grad_norm, step=step
        )
        states = gather_object([measured_states(accelerator, policy, optimizer)])
        figures = {"loss": result.loss, "norm": norm, "states": states}
        sharding.take_step(accelerator, policy, optimizer)
    state = whole_state(model, keep=accelerator.is_main_process, only_trained=False)
    step_gradient(accelerator, policy, groups, plan, loss, mode="shared")
    if accelerator.process_index == 1:
        sharding.local_gradients(accelerator, policy)[0].fill_(float("nan"))
    try:
        clip_and_check(accelerator, policy, result, groups, max_grad_norm=1.0, step=3)
        stopped = False
    except NonFiniteError:
        stopped = True
    figures["all_stop"] = all(gather_object([stopped]))
    accelerator.free_memory()
    return plan, figures, state


def main(out: Path, precise: bool) -> None:
    accelerator, _ = make_accelerator(precision="fp32", project_dir=out.parent)
    if sharding.is_deepspeed(accelerator):  # nothing is small enough to stay whole
        accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    dtype = torch.float64 if precise else torch.float32
    batches = {
        "many": random_groups(9, seed=3),
        "one": random_groups(1, sizes=(4,), seed=5),
        "three": random_groups(3, sizes=(1,), seed=5, max_prompt=18),
    }
    losses = {"sft": (sft, token_mean), "pairs": (all_pairs, all_pairs_reference)}
    results = []
    for case in CASES:
        name, loss_name, tied, tokens = case
        groups, (loss, value) = batches[name], losses[loss_name]
        plan, figures, state = run_case(
            accelerator, tiny_gpt2(tied=tied).to(dtype).train(), groups, loss, tokens
        )
        if accelerator.is_main_process:
            alone = tiny_gpt2(tied=tied).to(dtype).eval()
            wanted_loss, wanted_norm, weights = one_process(alone, groups, value, 3)
            results.append(
                {
                    "case": case,
                    "kind": sharding.kind(accelerator),
                    "states": figures["states"],
                    "all_stop": figures["all_stop"],
                    "parameters": [list(p.shape) for p in alone.parameters()],
                    "micro_batches": [sum(not m.is_dummy for m in rank) for rank in plan.ranks],
                    "coupled": any(
                        m.coupled_group is not None for rank in plan.ranks for m in rank
                    ),
                    "errors": [
                        abs(figures["loss"] / wanted_loss - 1),
                        abs(figures["norm"] / wanted_norm - 1),
                        relative(state, weights),
                    ],
                }
            )
    if accelerator.is_main_process:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "float64")
