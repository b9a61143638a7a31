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

from posttrain import LoraConfig, ModelConfig, PackingConfig, SFTTrainer, TrainConfig
from posttrain.cli.main import main
from posttrain.cli.plan import find_method
from posttrain.plan import check, price
from posttrain.plan.check import available_bytes
from posttrain.plan.job import Job, Rollout, job_of
from posttrain.plan.price import LIBRARIES_BYTES, memory_plan
from posttrain.plan.report import parse_bytes, update_by_checkpointing
from posttrain.plan.states import parameters_of, ring_bytes, zero_communication
from posttrain.precision import PRECISIONS
from posttrain.rewards.compose import RewardsConfig
from posttrain.rollout.engine import SamplingConfig
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
        model = AutoModelForCausalLM.from_config(config)
    parameters = tuple(parameters_of(model))
    assert sum(p.numel for p in parameters) == 6_738_415_616
    return Job(
        method="dpo",
        model=model,
        parameters=parameters,
        precision=PRECISIONS["bf16"],
        packing=PackingConfig(max_tokens=4096),
        completions=2,
        device="cuda",
        reference=parameters,
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
    small = replace(job, reference=(), checkpointing=True).with_tokens(128)
    kinds = ("whole", "zero1", "zero2", "fsdp2")
    plans = [memory_plan(small.sharded(kind, 64)) for kind in kinds]
    assert [p.peak_bytes for p in plans] == sorted([p.peak_bytes for p in plans], reverse=True)
    two = plans[2].phases["optimizer step"]
    assert two["weights"] == 2 * job.num_params and two["master"] == pytest.approx(
        4 * job.num_params / 64, rel=1e-6
    )
    assert (
        plans[1].sent_bytes()
        == plans[2].sent_bytes()
        == ring_bytes((4 + 2) * job.num_params, num_devices=64, bytes_each=1)
    )
    for accumulation in (1, 4):
        for stage, kind in enumerate(kinds):  # in one dtype it is the paper's count
            whole = replace(small, precision=PRECISIONS["fp32"]).sharded(kind, 64)
            elements = zero_communication(
                job.num_params, zero_stage=stage, accumulation=accumulation
            )
            assert memory_plan(whole).sent_bytes(accumulation) == ring_bytes(
                elements, num_devices=64, bytes_each=4
            )
    host = memory_plan(replace(small, offload=frozenset({"optimizer"})).sharded("zero2", 64)).host
    assert host["moments"] == pytest.approx(8 * job.num_params / 64, rel=1e-6)


def test_the_inverse_questions_agree_with_the_plan(job):
    limit = 80e9
    on_64 = job.sharded("fsdp2", 64)
    tokens = price.max_tokens(on_64, limit)
    assert price.fits(on_64.with_tokens(tokens), limit) and tokens > 4096
    assert not price.fits(on_64.with_tokens(tokens + 16), limit)
    assert not price.fits(on_64.with_tokens(int(1.25 * tokens)), limit)
    devices = price.min_devices(job, limit, sharding="fsdp2")
    assert (
        devices > 1
        and price.fits(job.sharded("fsdp2", devices), limit)
        and not price.fits(job.sharded("fsdp2", devices - 1), limit)
    )
    assert price.min_devices(job, limit, sharding="whole") is None, "copies do not get smaller"
    kinds = ("whole", "zero1", "zero2", "fsdp2")
    kind = price.cheapest_zero(job, limit, num_devices=64)
    assert price.fits(job.sharded(kind, 64), limit) and not price.fits(
        job.sharded(kinds[kinds.index(kind) - 1], 64), limit
    )
    assert price.cheapest_zero(job, 1e9, num_devices=64) is None and price.max_tokens(job, 1e9) == 0


def test_the_advice_is_one_change_that_fits(job):
    assert price.advice(job, 1e12) is None
    peak = memory_plan(job).peak_bytes
    assert price.advice(job, peak - 1) == "--reference.cache true"
    policy = replace(job, reference=())
    assert (
        price.advice(policy, memory_plan(policy).peak_bytes - 1)
        == "--model.gradient_checkpointing true"
    )
    on_8 = replace(policy, checkpointing=True).sharded("whole", 8)
    assert price.advice(on_8, 80e9) == "launch/zero2.yaml with zero_stage: 1"
    assert "devices" in price.advice(replace(policy, checkpointing=True), 40e9)


def test_adapters_are_an_item_of_their_own(tmp_path):
    config = SFTConfig(model=ModelConfig(name=str(model_folder(tmp_path)), lora=LoraConfig(rank=4)))
    lora = job_of(config, "sft", precision=PRECISIONS["bf16"], device="cpu", wants_reference=False)
    for held in (
        memory_plan(lora).phases["update"],
        memory_plan(lora.sharded("zero2", 2)).phases["update"],
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

    larger = of(1024).with_tokens(2048)
    assert memory_plan(larger).phases == memory_plan(of(2048)).phases
    assert (
        larger.trace().items
        == replace(of(2048), completions=43, completion_tokens=None).trace().items
    )


def test_what_no_launch_runs_is_not_advised(job):
    rl = replace(job, method="rl", rollout=Rollout(max_rows=8, kv_cache_bytes=1e9, capacity=1000))
    assert (
        "ZeRO-1 or ZeRO-2" in rl.sharded("fsdp2", 64).refused
        and rl.sharded("zero2", 64).refused is None
    )
    assert (
        price.min_devices(rl, 80e9, sharding="fsdp2") is None
        and price.cheapest_zero(rl, 30e9, num_devices=64) is None
    )
    assert "launch/zero2.yaml on" in price.advice(
        replace(rl, checkpointing=True, reference=()), 60e9
    )
    assert "adamw" in replace(job, optimizer="sgd").sharded("zero2", 8).refused
    assert (
        "bf16-pure" in replace(job, precision=PRECISIONS["bf16-pure"]).sharded("zero1", 8).refused
    )
    offloads = replace(job, offload=frozenset({"optimizer"}))
    assert (
        "FSDP2" in offloads.sharded("fsdp2", 8).refused
        and offloads.sharded("zero3", 8).refused is None
    )


def test_shards_of_a_gpu_are_cut_on_the_host(job):
    """A 34B model of fp32 weights, 136 GB, never was on one device of 80 GB."""
    large = replace(
        job, parameters=job.parameters * 5, reference=(), checkpointing=True
    ).with_tokens(256)
    plan = memory_plan(large.sharded("fsdp2", 64))
    assert plan.phases["load"]["weights"] == pytest.approx(4 * large.num_params / 64, rel=1e-6)
    assert plan.peak_bytes < 80e9
    assert price.min_devices(large, 80e9, sharding="fsdp2") is not None
    on_cpu = replace(large, device="cpu").sharded("fsdp2", 2)
    assert memory_plan(on_cpu).phases["load"]["weights"] == 4 * large.num_params


def test_deepspeed_holds_bf16_weights_from_the_start(job):
    plan = memory_plan(job.sharded("zero2", 8))
    assert plan.phases["load"]["weights"] == plan.phases["update"]["weights"] == 2 * job.num_params
    assert (
        plan.phases["update"]["reference"] == 2 * job.num_params
        and plan.phases["update"]["communication"] == 2 * 50_000_000
    )
    assert job.sharded("zero2", 8).sharded("zero1", 4) == job.sharded("zero1", 4)


def test_sampling_in_the_process_adds_a_phase(job):
    rollout = Rollout(max_rows=64, kv_cache_bytes=4e9, capacity=1000)
    plan = memory_plan(replace(job, method="rl", rollout=rollout))
    each = 2**19 * 1000
    slots, row = each * (4 * 10**9 // each), 2**19 * 4096
    assert plan.phases["rollout"]["KV cache"] == slots + row
    assert "KV cache" not in plan.phases["update"]
    assert plan.phases["update"]["rollout copy"] == pytest.approx(2 * job.num_params, rel=0.03)


def teachers_of(path, model):
    """A plan reads the configs of teachers, which are here no more than the recipe's own model."""
    return ["--teachers", f"[{{model: {model}}}]"] if path.stem == "distill_smollm2" else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_can_be_planned(path, tmp_path, capsys):
    model = str(model_folder(tmp_path / "model"))
    arguments = ["plan", str(path), "--model.name", model, "--packing.max_tokens", "256"]
    arguments += teachers_of(path, model)
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
                *teachers_of(path, str(tmp_path / "model")),
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
    from posttrain.training.config import UserFacingError

    model = str(model_folder(tmp_path / "model"))
    rows = [{"prompt": f"{a}+{a}", "completion": str(2 * a)} for a in range(8)]
    train = TrainConfig(run_dir=str(tmp_path), max_steps=1, batch_size=4, precision="fp32")
    config = SFTConfig(train=train, packing=PackingConfig(max_tokens=256))
    monkeypatch.setattr(check, "available_bytes", lambda: 10**8)
    with pytest.raises(UserFacingError, match=r"needs .* GB.*--train.force true"):
        SFTTrainer(model=model, train_dataset=rows, config=config).train()
    monkeypatch.setattr(check, "peak_rss_bytes", lambda: 10**6)  # else rows are no percent of it
    forced = replace(config, train=replace(train, force=True))
    SFTTrainer(model=model, train_dataset=rows, config=forced).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert [line.split()[1] for line in said] == ["at", "at", "predicted"]
    assert "peak resident" in said[-1] and "0.10 GB" in said[1]
    found = re.search(r"longest row had (\d+) of 256 tokens", said[-1])
    assert found and 20 < int(found[1]) < 256


def test_a_model_that_cannot_be_traced_trains_all_the_same(tmp_path, capsys, monkeypatch):
    def fails(job):
        raise NotImplementedError("no fake kernel\nof this operator")

    monkeypatch.setattr(check, "memory_plan", fails)
    rows = [{"prompt": f"{a}+{a}", "completion": str(2 * a)} for a in range(8)]
    train = TrainConfig(run_dir=str(tmp_path), max_steps=1, batch_size=4, precision="fp32")
    model = str(model_folder(tmp_path / "model"))
    SFTTrainer(model=model, train_dataset=rows, config=SFTConfig(train=train)).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert said == ["memory: not planned (NotImplementedError: no fake kernel)"]


def test_the_end_of_a_run_compares_the_longest_row_too(job, capsys, monkeypatch):
    """What is sampled stays as it was planned: it is the peak where rows turn out short."""
    on_cpu = replace(job, device="cpu", reference=())
    monkeypatch.setattr(check, "peak_rss_bytes", lambda: 200 * 10**9)
    for rollout in (None, Rollout(max_rows=64, kv_cache_bytes=130e9, capacity=2048)):
        plan = memory_plan(replace(on_cpu, rollout=rollout))
        short = (
            memory_plan(on_cpu.with_tokens(1000)).peak_bytes
            if rollout is None
            else plan.total("rollout")
        )
        assert short < plan.peak_bytes
        done = check.MemoryCheck(plan=plan, is_main=True)
        for longest, error in ((4096, plan.peak_bytes), (1000, short)):
            done.finish(SimpleNamespace(device=SimpleNamespace(type="cpu")), longest_row=longest)
            said = capsys.readouterr().out
            assert ("longest row" in said) == (longest < 4096) and said.strip().endswith(
                f"({100 * (error / 200e9 - 1):+.0f} %)"
            )
        monkeypatch.setattr(check, "peak_rss_bytes", lambda: 10**15)
        done.finish(SimpleNamespace(device=SimpleNamespace(type="cpu")), longest_row=1000)
        assert "longest row" not in capsys.readouterr().out, (
            "it is no twentieth of what was measured"
        )
        monkeypatch.setattr(check, "peak_rss_bytes", lambda: 200 * 10**9)
