"""What a plan holds beside the update: a learned reward, copies for a sampler, what saving gathers,
what is offloaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from posttrain import LoraConfig, ModelConfig
from posttrain.cli.main import main
from posttrain.plan import check
from posttrain.plan import job as jobs
from posttrain.plan.job import Job, Scoring
from posttrain.plan.price import memory_plan
from posttrain.plan.states import parameters_of
from posttrain.plan.trace import LiveStorages, twin_of
from posttrain.precision import PRECISIONS
from posttrain.trainers.sft import SFTConfig
from posttrain.training import sharding
from posttrain.training.config import UserFacingError
from tests.tiny import model_folder

RECIPE = str(Path(__file__).parents[2] / "recipes" / "configs" / "sft_smollm2.yaml")


def job_of(folder: Path, *, rank: int = 0) -> Job:
    lora = LoraConfig(rank=abs(rank), quantize_4bit=rank < 0)
    config = SFTConfig(model=ModelConfig(name=str(folder), lora=lora))
    return jobs.job_of(
        config, "sft", precision=PRECISIONS["bf16"], device="cpu", wants_reference=False
    )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_of(model_folder(tmp_path))


def test_a_learned_reward_has_its_own_forward(job):
    """Against the storages of a real forward of one full row."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config).eval()
    scoring = Scoring(
        model=twin_of(model, device="meta"),
        precision=PRECISIONS["fp32"],
        max_tokens=512,
        completions=1,
    )
    live = LiveStorages()
    with torch.no_grad(), live:
        live.watch(model)
        model(torch.randint(1, 64, (1, 512)), use_cache=False)
    held = sum(p.num_bytes for p in parameters_of(model))
    plan = memory_plan(replace(job, method="rl", scoring=scoring))
    score = plan.phases["score"]
    assert held + score["activations"] == pytest.approx(live.peak_bytes, rel=0.05)
    assert score["reward model"] == plan.phases["update"]["reward model"] == held
    assert "score" not in memory_plan(job).phases


def test_a_server_is_handed_a_merged_copy(tmp_path):
    lora = job_of(model_folder(tmp_path), rank=4)
    assert "rollout" not in memory_plan(lora).phases
    handed = memory_plan(replace(lora, merges_adapters=True)).phases["rollout"]
    assert handed["rollout copy"] == sum(p.num_bytes for p in lora.parameters)


def test_saving_gathers_a_sharded_model(job):
    whole, largest = (
        sum(p.num_bytes for p in job.parameters),
        max(p.num_bytes for p in job.parameters),
    )
    on_gpu = memory_plan(replace(job, device="cuda").sharded("fsdp2", 4))
    assert (
        on_gpu.phases["save"]["gathered weights"] == largest
        and on_gpu.host["gathered weights"] == whole
    )
    on_cpu = memory_plan(job.sharded("fsdp2", 4))
    assert on_cpu.phases["save"]["gathered weights"] == largest + whole and not on_cpu.host
    assert "gathered weights" not in memory_plan(job.sharded("zero2", 4)).phases["save"]


def test_offloading_frees_a_gpu_and_not_a_cpu(job):
    on = job.sharded("zero2", 2)
    away = replace(on, offload=frozenset({"optimizer"}))
    gpu = [memory_plan(replace(j, device="cuda")) for j in (on, away)]
    moved = gpu[0].phases["update"]["moments"] + gpu[0].phases["update"]["master"]
    assert (
        "moments" not in gpu[1].phases["update"]
        and gpu[1].host["moments"] + gpu[1].host["master"] == moved > 0
    )
    cpu = [memory_plan(j) for j in (on, away)]
    assert (
        cpu[1].phases["update"]["moments"] == cpu[0].phases["update"]["moments"] and not cpu[1].host
    )


def test_offloading_is_read_from_the_launch(monkeypatch):
    def launched(**zero):
        plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
        return SimpleNamespace(deepspeed_plugin=plugin)

    monkeypatch.setattr(sharding, "is_deepspeed", lambda accelerator: True)
    cpu, none = {"device": "cpu"}, {"device": "none"}
    assert sharding.offloads(launched(stage=2)) == frozenset()
    assert sharding.offloads(launched(offload_optimizer=cpu, offload_param=none)) == {"optimizer"}
    assert sharding.offloads(launched(offload_optimizer=cpu, offload_param=cpu)) == {
        "optimizer",
        "weights",
    }
    monkeypatch.setattr(sharding, "is_deepspeed", lambda accelerator: False)
    assert sharding.offloads(SimpleNamespace()) == frozenset()


def test_what_does_not_fit_into_main_memory_is_refused(job, monkeypatch):
    plan = memory_plan(
        replace(job, device="cuda", offload=frozenset({"optimizer"})).sharded("zero2", 2)
    )
    needed = 2 * sum(plan.host.values())
    monkeypatch.setattr(check, "available_bytes", lambda: needed)
    check._check_host(plan, 2)
    monkeypatch.setattr(check, "available_bytes", lambda: needed - 1)
    with pytest.raises(UserFacingError, match="main memory for 2 processes"):
        check._check_host(plan, 2)


def test_weights_in_4_bit_are_never_sharded(tmp_path):
    pytest.importorskip("bitsandbytes")
    quantised = job_of(model_folder(tmp_path), rank=-4)
    assert "4 bit cannot be sharded" in quantised.sharded("fsdp2", 2).refused
    assert quantised.sharded("zero2", 2).refused is None


@pytest.mark.parametrize("rank", [0, -4])
def test_the_command_traces_the_step(rank, tmp_path, capsys):
    arguments = [
        "plan",
        RECIPE,
        "--model.name",
        str(model_folder(tmp_path)),
        "--packing.max_tokens",
        "200",
        "--traced",
    ]
    if rank:
        pytest.importorskip("bitsandbytes")
        arguments += ["--model.lora.rank", "4", "--model.lora.quantize_4bit", "true"]
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert sum(plan["traced_bytes_by_category"].values()) == plan["traced_bytes"] > 0
    update = plan["phases_bytes"]["update"]
    replayed = sum(update.get(name, 0) for name in plan["traced_bytes_by_category"])
    assert replayed == pytest.approx(plan["traced_bytes"], rel=0.01)
    assert main(arguments) == 0
    assert "traced with every layer" in capsys.readouterr().out
