"""`posttrain plan` and the check at a run's start: phases, limits, and the questions asked the
other way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain import LoraConfig, ModelConfig, PackingConfig
from posttrain.cli.main import main
from posttrain.cli.plan import find_method
from posttrain.memory import plan as planner
from posttrain.memory import solve
from posttrain.memory.architecture import architecture_of
from posttrain.memory.job import Job, Rollout
from posttrain.memory.limits import available_bytes, parse_bytes
from posttrain.memory.plan import LIBRARIES_BYTES, memory_plan
from posttrain.memory.published import ring_bytes, zero_communication
from posttrain.memory.report import update_by_checkpointing
from posttrain.memory.states import parameters_of
from posttrain.precision import PRECISIONS
from posttrain.rewards.compose import RewardsConfig
from posttrain.rollout.engine import SamplingConfig
from posttrain.trainers.memory import job_of
from posttrain.trainers.rl import RLConfig
from posttrain.trainers.sft import SFTConfig
from tests.tiny import model_folder, write_rows

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))
KIND = {
    "demo_cold_start": "sft",
    "dpo_smollm2": "dpo",
    "reward_smollm2": "reward",
    "sft_smollm2": "sft",
}  # the others: rl


@pytest.fixture(scope="module")
def job() -> Job:
    """A 7B Llama on an accelerator."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        parameters = parameters_of(AutoModelForCausalLM.from_config(config))
    assert sum(p.numel for p in parameters) == 6_738_415_616
    return Job(
        method="dpo",
        arch=architecture_of(config, parameters),
        parameters=tuple(parameters),
        precision=PRECISIONS["bf16"],
        max_tokens=4096,
        completions=2,
        device="cuda",
        flex=True,
        reference=tuple(replace(p, trainable=False) for p in parameters),
    )


def test_phases_hold_what_they_say(job):
    plan = memory_plan(job)
    assert plan.phases["update"]["weights"] == 4 * job.num_params
    assert plan.phases["update"]["reference"] == pytest.approx(2 * job.num_params, rel=0.03), (
        "only embedding and norms stay fp32"
    )
    assert (
        plan.phases["optimizer step"]["moments"] == 8 * job.num_params
        and "activations" not in plan.phases["optimizer step"]
    )
    assert "gradients" not in plan.phases["save"] and plan.worst == "update"
    live = plan.total("update") - LIBRARIES_BYTES["cuda"] - plan.phases["update"]["allocator"]
    assert plan.live_bytes == live
    cached = memory_plan(replace(job, reference=()))
    assert plan.total("save") > cached.total("save") and "reference" not in cached.phases["update"]


def test_zero_stages_of_a_7b_model(job):
    """States per rank near the paper's 16 bytes; stage 3 sends half as much again; one micro-batch
    more costs stages 2 and 3."""
    small = replace(job, reference=(), max_tokens=128, checkpointing=True)
    plans = [memory_plan(small.sharded(s, 64)) for s in range(4)]
    assert [p.peak_bytes for p in plans] == sorted([p.peak_bytes for p in plans], reverse=True)
    two = plans[2].phases["optimizer step"]
    assert two["weights"] == 2 * job.num_params and two["master"] == pytest.approx(
        4 * job.num_params / 64, rel=1e-6
    )
    assert (
        plans[1].sent_bytes
        == plans[2].sent_bytes
        == ring_bytes((4 + 2) * job.num_params, num_devices=64, bytes_each=1)
    )
    for accumulation in (1, 4):
        for stage in range(4):  # in one dtype it is the paper's count
            whole = replace(small, precision=PRECISIONS["fp32"]).sharded(stage, 64)
            elements = zero_communication(
                job.num_params, zero_stage=stage, accumulation=accumulation
            )
            assert planner.sent_bytes(whole, micro_batches=accumulation) == ring_bytes(
                elements, num_devices=64, bytes_each=4
            )
    host = memory_plan(replace(small, offload=frozenset({"optimizer"})).sharded(2, 64)).host
    assert host["moments"] == pytest.approx(8 * job.num_params / 64, rel=1e-6)


def test_the_inverse_questions_agree_with_the_plan(job):
    limit = 80e9
    on_64 = job.sharded(3, 64)
    tokens = solve.max_tokens(on_64, limit)
    assert solve.fits(replace(on_64, max_tokens=tokens), limit) and tokens > 4096
    assert not solve.fits(replace(on_64, max_tokens=tokens + 16), limit)
    assert not solve.fits(replace(on_64, max_tokens=int(1.25 * tokens)), limit)
    devices = solve.min_devices(job, limit, zero_stage=3)
    assert (
        devices > 1
        and solve.fits(job.sharded(3, devices), limit)
        and not solve.fits(job.sharded(3, devices - 1), limit)
    )
    assert solve.min_devices(job, limit, zero_stage=0) is None, "copies do not get smaller"
    stage = solve.cheapest_zero(job, limit, num_devices=64)
    assert solve.fits(job.sharded(stage, 64), limit) and not solve.fits(
        job.sharded(stage - 1, 64), limit
    )
    assert solve.cheapest_zero(job, 1e9, num_devices=64) is None and solve.max_tokens(job, 1e9) == 0


def test_the_advice_is_one_change_that_fits(job):
    assert solve.advice(job, 1e12) is None
    peak = memory_plan(job).peak_bytes
    assert solve.advice(job, peak - 1) == "--reference.cache true"
    policy = replace(job, reference=())
    assert (
        solve.advice(policy, memory_plan(policy).peak_bytes - 1)
        == "--model.gradient_checkpointing true"
    )
    on_8 = replace(policy, checkpointing=True).sharded(0, 8)
    assert solve.advice(on_8, 80e9) == "launch/zero2.yaml with zero_stage: 1"
    assert "devices" in solve.advice(replace(policy, checkpointing=True), 40e9)


def test_adapters_are_an_item_of_their_own(tmp_path):
    config = SFTConfig(model=ModelConfig(name=str(model_folder(tmp_path)), lora=LoraConfig(rank=4)))
    lora = job_of(config, "sft", precision=PRECISIONS["bf16"], device="cpu", wants_reference=False)
    for held in (
        memory_plan(lora).phases["update"],
        memory_plan(lora.sharded(2, 2)).phases["update"],
    ):
        size = held["weights"] // (lora.num_params - lora.trainable_params)
        assert held["LoRA"] == size * lora.trainable_params > 0 and held["weights"] == size * (
            lora.num_params - lora.trainable_params
        )
        assert held["gradients"] < held["weights"]
    by_policy = update_by_checkpointing(memory_plan(lora))
    assert by_policy["on"] < by_policy["off"] == memory_plan(lora).total("update")


def test_a_larger_budget_holds_more_completions_not_longer_ones(tmp_path):
    """What the solver asks about is the run that the settings with such a budget start."""
    folder = str(model_folder(tmp_path))

    def of(max_tokens: int) -> Job:
        rewards = RewardsConfig(functions={"math_answer": 1.0})
        config = RLConfig(
            model=ModelConfig(name=folder),
            rewards=rewards,
            sampling=SamplingConfig(max_tokens=48),
            packing=PackingConfig(max_tokens=max_tokens),
        )
        return job_of(
            config, "rl", precision=PRECISIONS["bf16"], device="cpu", wants_reference=False
        )

    assert replace(of(1024), max_tokens=2048) == of(2048)
    assert (of(1024).row_completions, of(2048).row_completions) == (22, 43)
    assert memory_plan(replace(of(1024), max_tokens=2048)).phases == memory_plan(of(2048)).phases


def test_what_no_launch_runs_is_not_advised(job):
    rl = replace(job, method="rl", rollout=Rollout(max_rows=8, kv_cache_bytes=1e9, capacity=1000))
    assert "ZeRO-1 or ZeRO-2" in rl.sharded(3, 64).refused and rl.sharded(2, 64).refused is None
    assert (
        solve.min_devices(rl, 80e9, zero_stage=3) is None
        and solve.cheapest_zero(rl, 30e9, num_devices=64) is None
    )
    assert "launch/zero2.yaml on" in solve.advice(
        replace(rl, checkpointing=True, reference=()), 60e9
    )
    assert "adamw" in replace(job, optimizer="sgd").sharded(2, 8).refused
    assert "bf16-pure" in replace(job, precision=PRECISIONS["bf16-pure"]).sharded(1, 8).refused
    offloads = replace(job, offload=frozenset({"optimizer"}))
    assert (
        "FSDP2" in offloads.sharded(3, 8).refused
        and offloads.sharded(3, 8, engine="deepspeed").refused is None
    )


def test_shards_of_a_gpu_are_cut_on_the_host(job):
    """A 34B model of fp32 weights, 136 GB, never was on one device of 80 GB."""
    large = replace(
        job, parameters=job.parameters * 5, reference=(), max_tokens=256, checkpointing=True
    )
    plan = memory_plan(large.sharded(3, 64))
    assert plan.phases["load"]["weights"] == pytest.approx(4 * large.num_params / 64, rel=1e-6)
    assert plan.peak_bytes < 80e9 and solve.min_devices(large, 80e9, zero_stage=3) is not None
    assert (
        memory_plan(replace(large, device="cpu").sharded(3, 2)).phases["load"]["weights"]
        == 4 * large.num_params
    )


def test_deepspeed_holds_bf16_weights_from_the_start(job):
    plan = memory_plan(job.sharded(2, 8))
    assert plan.phases["load"]["weights"] == plan.phases["update"]["weights"] == 2 * job.num_params
    assert (
        plan.phases["update"]["reference"] == 2 * job.num_params
        and plan.phases["update"]["communication"] == 2 * 50_000_000
    )
    assert job.sharded(2, 8).sharded(1, 4) == job.sharded(1, 4)


def test_sampling_in_the_process_adds_a_phase(job):
    rollout = Rollout(max_rows=64, kv_cache_bytes=4e9, capacity=1000)
    plan = memory_plan(replace(job, method="rl", rollout=rollout))
    each = 2**19 * 1000
    assert rollout.cache_bytes(job.arch, 2) == each * (4 * 10**9 // each)
    assert plan.phases["rollout"]["KV cache"] > 3e9 and "KV cache" not in plan.phases["update"]
    assert plan.phases["update"]["rollout copy"] == pytest.approx(2 * job.num_params, rel=0.03)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(path, tmp_path, capsys):
    model = str(model_folder(tmp_path / "model"))
    arguments = ["plan", str(path), "--model.name", model, "--packing.max_tokens", "256"]
    assert find_method(str(path), []) == KIND.get(path.stem, "rl")
    if path.stem == "sft_smollm2":
        assert (
            find_method(str(path), ["--loss", "0.5*ipo"])
            == find_method(str(path), ["--loss=orpo"])
            == "dpo"
        )
        with pytest.raises(ValueError, match="--method sft, reward or dpo"):
            find_method(str(path), ["--loss", "my_losses.focal"])
    capsys.readouterr()  # what libraries said while the model was made
    assert main([*arguments, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert (
        plan["method"] == KIND.get(path.stem, "rl") and plan["fits"] and plan["max_tokens"] == 256
    )
    assert set(plan["phases_bytes"]) >= {"load", "update", "optimizer step", "save", "resume"}
    assert (
        main(
            [
                *arguments,
                "--devices",
                "4",
                "--zero",
                "0,3",
                "--device-memory",
                "80GB",
                "--offload",
                "optimizer",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert (
        "ZeRO-3 (fsdp2)" in shown and "fits" in shown and "80.0 GB" in shown and "moments" in shown
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_is_enough_where_the_data_is_here(path, tmp_path, capsys):
    """No weights, no tokenizer: the longest prompt is then the longest that is allowed."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(
        (model_folder(tmp_path / "whole") / "config.json").read_bytes()
    )
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    capsys.readouterr()
    assert (
        main(
            [
                "plan",
                str(path),
                "--model.name",
                str(tmp_path / "model"),
                "--data.train",
                f"[{rows}]",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)[0]["phases_bytes"]["update"]["weights"] > 0


def test_the_command_and_its_mistakes(tmp_path):
    def run(*arguments):
        command = [
            sys.executable,
            "-m",
            "posttrain.cli.main",
            "plan",
            str(next(p for p in CONFIGS if p.stem == "sft_smollm2")),
            "--model.name",
            model,
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True)

    model = str(model_folder(tmp_path / "model"))
    solved = run("--solve", "max-tokens", "--device-memory", "2GB")
    assert (
        solved.returncode == 0
        and "--packing.max_tokens" in solved.stdout
        and "GB = 1e9" in solved.stdout
    ), solved.stderr
    wrong = run("--device-memory", "80 potatoes")
    assert wrong.returncode == 2 and "80GiB" in wrong.stderr and "Traceback" not in wrong.stderr


def test_units():
    assert (parse_bytes("80GB"), parse_bytes("80 GiB"), parse_bytes("1.5e3"[:3])) == (
        80 * 10**9,
        80 * 2**30,
        1,
    )
    with pytest.raises(ValueError, match="unit"):
        parse_bytes("80 G")


def test_a_cgroup_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("123456789\n")
    assert available_bytes(cgroup=tmp_path) == 123456789
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(cgroup=tmp_path) > 123456789


def test_a_run_says_its_memory_and_is_refused_where_it_cannot_fit(tmp_path, capsys, monkeypatch):
    from posttrain import PackingConfig, SFTConfig, SFTTrainer, TrainConfig
    from posttrain.trainers import memory
    from posttrain.training.config import UserFacingError

    model = str(model_folder(tmp_path / "model"))
    rows = [{"prompt": f"{a}+{a}", "completion": str(2 * a)} for a in range(8)]
    train = TrainConfig(run_dir=str(tmp_path), max_steps=1, batch_size=4, precision="fp32")
    config = SFTConfig(train=train, packing=PackingConfig(max_tokens=256))
    monkeypatch.setattr(memory, "available_bytes", lambda: 10**8)
    with pytest.raises(UserFacingError, match=r"needs .* GB.*--train.force true"):
        SFTTrainer(model=model, train_dataset=rows, config=config).train()
    forced = replace(config, train=replace(train, force=True))
    SFTTrainer(model=model, train_dataset=rows, config=forced).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert [line.split()[1] for line in said] == ["at", "at", "predicted"]
    assert "peak resident" in said[-1] and "0.10 GB" in said[1]
    found = re.search(r"longest row had (\d+) of 256 tokens", said[-1])
    assert found and 20 < int(found[1]) < 256


def test_the_end_of_a_run_compares_the_longest_row_too(job, capsys, monkeypatch):
    """What is sampled stays as it was planned: it is the peak where rows turn out short."""
    from posttrain.trainers import memory

    on_cpu = replace(job, device="cpu", flex=False, reference=())
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda: 200 * 10**9)
    for rollout in (None, Rollout(max_rows=64, kv_cache_bytes=130e9, capacity=2048)):
        plan = memory_plan(replace(on_cpu, rollout=rollout))
        short = (
            memory_plan(replace(on_cpu, max_tokens=1000)).peak_bytes
            if rollout is None
            else plan.total("rollout")
        )
        assert short < plan.peak_bytes
        check = memory.MemoryCheck(plan=plan, limit_bytes=None, is_main=True)
        for longest, error in ((4096, plan.peak_bytes), (1000, short)):
            check.finish(SimpleNamespace(device=SimpleNamespace(type="cpu")), longest_row=longest)
            said = capsys.readouterr().out
            assert ("longest row" in said) == (longest < 4096) and said.strip().endswith(
                f"({100 * (error / 200e9 - 1):+.0f} %)"
            )
