"""Run by `accelerate launch`: model states of every rank between backward and update, and what the
planner says of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from posttrain.losses.sft import sft
from posttrain.models.heads import Scorer, load_reward_model
from posttrain.models.load import LoraConfig, ModelConfig, load_model, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.plan.states import parameters_of, run_states
from posttrain.training import sharding
from posttrain.training.launch import make_accelerator
from posttrain.training.optimizer import OptimizerConfig, build_optimizer
from posttrain.training.step import step_gradient
from posttrain.types import as_loss
from tests.helpers import random_groups
from tests.losses_for_tests import all_pairs
from tests.measured_states import measured_states

CASES = [("policy", 0), ("policy", 4), ("reward", 0), ("reward", 4)]
"""SFT, DPO and RL hold a policy; rank of the adapters, 0: none."""


def watch_gathered(policy: torch.nn.Module) -> list[int]:
    """Elements of ZeRO-3's weights that are whole on this rank, after each module's forward."""
    seen: list[int] = []

    def count(*_: Any) -> None:
        weights = [p for p in policy.parameters() if hasattr(p, "ds_numel")]
        seen.append(sum(p.ds_numel for p in weights if p.numel() == p.ds_numel))

    for module in policy.modules():
        module.register_forward_hook(count)
    return seen


def main(folder: str, out: Path, precision: str) -> None:
    accelerator, plan = make_accelerator(precision=precision, project_dir=out.parent)
    groups = random_groups(6, sizes=(2,), seed=3)
    kind = sharding.kind(accelerator)
    results = []
    for role, rank in CASES:
        config = ModelConfig(name=folder, lora=LoraConfig(rank=rank))
        torch.manual_seed(0)
        model: Any
        if role == "reward":
            model = load_reward_model(config, load_tokenizer(config), dtype=plan.load_dtype)
            policy: Any = Scorer(model, PackingConfig(), device_type="cpu")
            loss: Any = all_pairs
        else:
            model = load_model(config, dtype=plan.load_dtype)
            policy, loss = Policy(model, PackingConfig()), sft
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parameters = parameters_of(model)
        elements = sum(p.numel for p in parameters)
        predicted = run_states(
            parameters,
            precision=plan,
            sharding=kind,
            num_devices=2,
            whole_below=10 * 32,
        )
        optimizer: Any
        policy, optimizer = sharding.prepare(
            accelerator, policy, build_optimizer(policy, OptimizerConfig(), plan=plan)
        )
        rows = plan_step(
            groups,
            world_size=2,
            max_tokens=200,
            mode="shared",
            coupled=as_loss(loss).couples_completions,
        )
        gathered = watch_gathered(policy)
        for _ in range(2):
            step_gradient(accelerator, policy, groups, rows, loss, mode="shared")
            states = gather_object([measured_states(accelerator, policy, optimizer)])
            sharding.take_step(accelerator, policy, optimizer)
        results.append(
            {
                "case": [role, rank],
                "kind": kind,
                "trained": trained,
                "measured": states,
                "predicted": predicted,
                "gathered": max(gathered, default=0),
                "parameters": elements,
            }
        )
        accelerator.free_memory()
    if accelerator.is_main_process:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
