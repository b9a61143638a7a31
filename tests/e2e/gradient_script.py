"""Run by `accelerate launch`: the step gradient of this topology, against one sequence at a time,
as JSON on rank 0."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from posttrain.losses.sft import sft
from posttrain.models.policy import Policy
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.training.launch import make_accelerator
from posttrain.training.step import step_gradient
from posttrain.types import as_loss
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
    as_rollouts,
    k15_loss,
    k15_reference,
    policy_loss,
    policy_reference,
)


def main(out: Path) -> None:
    accelerator, _ = make_accelerator(precision="fp32", project_dir=out.parent)
    # 9 groups; 1 group, so that one rank has nothing to do; 3 long ones, so that one rank has more
    # micro-batches than the other
    batches = {
        "many": random_groups(9, seed=3),
        "one": random_groups(1, sizes=(4,), seed=5),
        "three": random_groups(3, sizes=(1,), seed=5, max_prompt=18),
    }
    rollouts = {name: as_rollouts(groups, seed=7) for name, groups in batches.items()}
    policy_losses = [
        ((name, groups), (loss, reference(groups)), "shared", tokens, False)
        for name, groups in rollouts.items()
        for loss, reference in ((policy_loss, policy_reference), (k15_loss, k15_reference))
        for tokens in (24, 1000)
    ]
    results = []
    for (batch_name, groups), (loss, reference), mode, tokens, checkpointing in itertools.chain(
        itertools.product(
            batches.items(),
            ((sft, token_mean), (all_pairs, all_pairs_reference)),
            ("shared", "packed"),
            (24, 60, 1000),
            (False, True),
        ),
        policy_losses,
    ):
        wanted_loss, wanted = reference_gradient(tiny_gpt2().double().eval(), groups, reference)
        model = tiny_gpt2().double().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        policy = accelerator.prepare(Policy(model, PackingConfig(mode=mode, logits_chunk=7)))
        plan = plan_step(
            groups,
            world_size=accelerator.num_processes,
            max_tokens=tokens,
            mode=mode,
            coupled=as_loss(loss).couples_completions,
        )
        result = step_gradient(accelerator, policy, groups, plan, loss, mode=mode)
        results.append(
            {
                "case": [batch_name, loss.__name__, mode, tokens, checkpointing],
                "ranks": accelerator.num_processes,
                "micro_batches": [sum(not m.is_dummy for m in rank) for rank in plan.ranks],
                "coupled": any(m.coupled_group is not None for rank in plan.ranks for m in rank),
                "loss": abs(result.loss - wanted_loss),
                "gradient": max_difference(gradients_of(model), wanted),
            }
        )
        accelerator.free_memory()
    if accelerator.is_main_process:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
