"""Run by `accelerate launch`: every algorithm's step gradient on these ranks against the paper's
objective, as JSON on rank 0."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

from posttrain.models.policy import Policy
from posttrain.packing.plan import PackingConfig, count_units, plan_step
from posttrain.rl.credit import has_signal
from posttrain.training.launch import make_accelerator
from posttrain.training.reference import frozen_copy
from posttrain.training.step import step_gradient
from tests.helpers import gradients_of, max_difference, tiny_gpt2
from tests.property.test_policy_invariance import (
    MODELS,
    OPTIONS,
    algorithm_of,
    make_groups,
    value_of,
)


def main(out: Path) -> None:
    accelerator, _ = make_accelerator(precision="fp32", project_dir=out.parent)
    frozen = frozen_copy(Policy(tiny_gpt2(seed=9).double(), PackingConfig()))
    results = []
    for name, later in itertools.product(OPTIONS, (False, True)):
        algorithm = algorithm_of(name)
        groups = make_groups(algorithm, later=later)
        plain = tiny_gpt2().double().eval()
        value_of(name, groups, plain, MODELS["reference"]).backward()
        skips = algorithm.skips(first_update=not later)
        used = [g for g in groups if has_signal(g)] if skips else groups
        plan = replace(
            plan_step(
                used,
                world_size=accelerator.num_processes,
                max_tokens=60,
                mode="shared",
                coupled=False,
            ),
            counts=count_units(groups),
        )
        model = tiny_gpt2().double().train()
        policy = accelerator.prepare(Policy(model, PackingConfig()))

        loss = algorithm.objective
        reference = (lambda _, batch: frozen(batch).logps_T) if loss.reference else None
        step_gradient(accelerator, policy, used, plan, loss, mode="shared", reference=reference)
        wanted = gradients_of(plain)
        results.append(
            {
                "algorithm": name,
                "later": later,
                "micro_batches": [sum(not m.is_dummy for m in rank) for rank in plan.ranks],
                "skipped": len(groups) - len(used),
                "gradient": max_difference(gradients_of(model), wanted),
                "largest": max(float(g.abs().max()) for g in wanted.values()),
            }
        )
        accelerator.free_memory()
    if accelerator.is_main_process:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
