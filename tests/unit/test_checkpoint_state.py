"""A training state comes back bit for bit, random states and all; what does not fit is refused.

Run as a script it is one rank of the distributed test: ``torchrun ... test_checkpoint_state.py
ddp|fsdp FOLDER``.
"""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from posttrain.training.checkpoint import (
    CheckpointError,
    capture_rng,
    damage,
    find_resumable,
    load_training_state,
    read_state,
    restore_rng,
    save_training_state,
    write_state,
)
from posttrain.training.optimizer import OptimizerConfig, build_optimizer, build_schedule
from tests.unit.checkpoint_helpers import OneProcess, assert_same, names, save


# --- random state
# ---------------------------------------------------------------------------------------------------------
def draw() -> tuple[Any, ...]:
    return (
        random.random(),
        random.gauss(),
        np.random.standard_normal(3).tolist(),
        np.random.rand(2).tolist(),
        torch.randn(5).tolist(),
        torch.nn.functional.dropout(torch.ones(50)).tolist(),
    )


def test_random_states_survive_json() -> None:
    draw()  # leaves a cached gaussian in python's and numpy's generators
    state = json.loads(json.dumps(capture_rng()))
    expected = [draw(), draw()]
    restore_rng(state)
    assert [draw(), draw()] == expected


def test_the_random_state_of_a_missing_device_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match="CUDA device"):
        restore_rng({**capture_rng(), "cuda": "00"})


# --- training state
# -------------------------------------------------------------------------------------------------------
TINY = dict(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.1, schedule="cosine", warmup_steps=2)


def llama(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **overrides}))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.1
    )
    return transformers.GPT2LMHeadModel(config)


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    base = llama()
    return peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
    )


class WithViews(nn.Module):
    """A buffer that views a parameter, one of another dtype, a matrix stored transposed, a
    parameter without gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(31, 8).t())
        self.scale = nn.Parameter(torch.rand(8, 1))
        self.idle = nn.Parameter(torch.randn(3))
        self.register_buffer("view", self.weight.data[:2])
        self.register_buffer("first", self.scale.data[:1])
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        self.count += 1
        logits = self.weight.t()[input_ids] @ (self.weight * self.scale)
        return transformers.utils.ModelOutput(
            loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-bf16": lambda: llama().bfloat16(),
    "llama-float64": lambda: llama().double(),
    "gpt2-dropout": gpt2,
    "lora-dropout": lora,
    "views": WithViews,
}


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.AdamW, Any]:
    model = make().train()
    optimizer = build_optimizer(model, CONFIG)
    return model, optimizer, build_schedule(optimizer, CONFIG, 10)


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights, buffers and moments by name, without the code under test."""
    tensors = {f"weight {n}": t.detach().clone() for n, t in model.state_dict().items()}
    for n, p in model.named_parameters():
        tensors |= {f"{kind} {n}": v.clone() for kind, v in optimizer.state.get(p, {}).items()}
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_equal_five_and_five_after_a_resume_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    run = build(MODELS[name])
    torch.manual_seed(7)
    train(*run, range(5))
    save(tmp_path, 5, lambda folder: write_state(OneProcess, *run, folder))
    at_five = everything(*run[:2])
    train(*run, range(5, 10))

    fresh = build(MODELS[name])
    torch.manual_seed(99)
    read_state(OneProcess, *fresh, find_resumable(tmp_path)[0])
    assert_same(everything(*fresh[:2]), at_five)
    train(*fresh, range(5, 10))
    assert_same(everything(*fresh[:2]), everything(*run[:2]))
    assert fresh[2].get_last_lr() == run[2].get_last_lr()
    assert any(not torch.equal(at_five[k], v) for k, v in everything(*run[:2]).items())


def test_a_resume_without_the_moments_would_differ(tmp_path: Path) -> None:
    """The test above can fail: weights alone are not enough."""
    run, fresh = build(llama), build(llama)
    train(*run, range(5))
    fresh[0].load_state_dict(run[0].state_dict())
    for other in (run, fresh):
        train(*other, range(5, 10))
    assert not torch.equal(run[0].lm_head.weight, fresh[0].lm_head.weight)


def test_no_pickle_and_a_tied_tensor_once(tmp_path: Path) -> None:
    model, optimizer, schedule = build(MODELS["llama-tied"])
    train(model, optimizer, schedule, range(1))
    write_state(OneProcess, model, optimizer, schedule, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert weights.keys() == {n for n, _ in model.named_parameters()}
    moments = safetensors.torch.load_file(tmp_path / "optimizer.safetensors")
    assert moments.keys() == {
        f"{kind}/{n}" for n in weights for kind in ("step", "exp_avg", "exp_avg_sq")
    }


def test_adapters_are_saved_without_the_base(tmp_path: Path) -> None:
    model, optimizer, _ = build(lora)
    save_training_state(tmp_path, model, optimizer)
    assert all("lora_" in n for n in safetensors.torch.load_file(tmp_path / "model.safetensors"))
    other, other_optimizer, _ = build(lora)
    with torch.no_grad():
        other.base_model.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="frozen weights has"):
        load_training_state(tmp_path, other, other_optimizer)


def test_the_order_of_parameters_does_not_matter(tmp_path: Path) -> None:
    model, optimizer, schedule = build(llama)
    train(model, optimizer, schedule, range(3))
    save_training_state(tmp_path, model, optimizer)
    other, shuffled, _ = build(llama)
    for group in shuffled.param_groups:
        group["params"].reverse()
    load_training_state(tmp_path, other, shuffled)
    assert_same(everything(other, shuffled), everything(model, optimizer))


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model, optimizer, schedule = build(llama)
    train(model, optimizer, schedule, range(2))
    save_training_state(tmp_path, model, optimizer)

    def refuse(make: Callable[[], nn.Module], message: str, **changes: Any) -> None:
        other = make()
        fresh = build_optimizer(
            other, OptimizerConfig(**{"lr": 1e-2, "weight_decay": 0.1, **changes})
        )
        before = everything(other, fresh)
        with pytest.raises(ValueError, match=message):
            load_training_state(tmp_path, other, fresh)
        assert_same(everything(other, fresh), before)

    refuse(
        lambda: llama(attention_bias=True), "8 names are missing.*layers.0.self_attn.k_proj.bias"
    )
    refuse(lambda: llama(tie_word_embeddings=True), "1 are unexpected.*lm_head.weight")
    refuse(
        lambda: llama(intermediate_size=32),
        r"mlp.gate_proj.weight has \[\(24, 16\) torch.float32\], this run has \[\(32",
    )
    refuse(lambda: llama().bfloat16(), r"torch.float32\], this run has .* torch.bfloat16\]")
    refuse(llama, r"betas=\(0.9, 0.999\).*this run has.*betas=\(0.9, 0.95\)", betas=(0.9, 0.95))
    refuse(llama, r"lr=0.01.*this run has.*lr=0.02", lr=0.02)
    refuse(llama, r"weight_decay=0.1\].*this run has.*weight_decay=0.2\]", weight_decay=0.2)
    load_training_state(tmp_path, *build(llama)[:2])


def test_moments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, optimizer, schedule = build(llama)
    train(model, optimizer, schedule, range(1))
    save_training_state(tmp_path, model, optimizer)
    path = tmp_path / "optimizer.safetensors"
    whole = safetensors.torch.load_file(path)
    key = "exp_avg/lm_head.weight"
    for broken, message in (
        (
            {k: v for k, v in whole.items() if k != key},
            "1 names are missing.*exp_avg/lm_head.weight",
        ),
        ({**whole, key: whole[key][:5].clone()}, r"exp_avg/lm_head.weight has \[\(5, 16\)"),
        (
            {**whole, key: whole[key].double()},
            r"exp_avg/lm_head.weight has \[\(31, 16\) torch.float64",
        ),
    ):
        safetensors.torch.save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            load_training_state(tmp_path, *build(llama)[:2])


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    run = build(llama)
    write_state(OneProcess, *run, tmp_path)
    two = type("TwoProcesses", (OneProcess,), {"num_processes": 2})
    with pytest.raises(ValueError, match="written by 1 processes.*this run has 2 processes"):
        read_state(two, *run, tmp_path)


def test_the_state_of_the_loss_scaler_comes_back(tmp_path: Path) -> None:
    def scaled() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        return type("Scaled", (OneProcess,), {"scaler": scaler})

    first, second, run = scaled(), scaled(), build(llama)
    first.scaler.scale(torch.ones(()))
    first.scaler.update(32.0)
    write_state(first, *run, tmp_path)
    read_state(second, *run, tmp_path)
    assert second.scaler.state_dict() == first.scaler.state_dict()
    assert second.scaler.get_scale() == 32.0


# --- real processes
# -------------------------------------------------------------------------------------------------------
def accelerator_for(kind: str) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=True)
    if kind == "ddp":
        return Accelerator(cpu=True)
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_offload=False,
    )
    return Accelerator(fsdp_plugin=plugin)


def distributed_rank(kind: str, root: Path) -> None:
    """Trains 4 steps, or 2 and a resume; rank 1 fails once on the way. Every rank writes ``ok`` at
    its end."""
    torch.manual_seed(0)
    accelerator = accelerator_for(kind)
    assert accelerator.num_processes == 2
    assert accelerator.distributed_type == ("FSDP" if kind == "fsdp" else "MULTI_CPU")

    def prepared() -> tuple[Any, Any, Any]:
        accelerator.free_memory()
        model = llama().train()
        model, optimizer = accelerator.prepare(model, build_optimizer(model, CONFIG))
        return model, optimizer, build_schedule(optimizer, CONFIG, 4)

    def local(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        tensors = everything(model, optimizer)
        return {k: v.to_local() if hasattr(v, "to_local") else v for k, v in tensors.items()}

    def steps(model: Any, optimizer: Any, schedule: Any, which: range) -> None:
        for step in which:
            train(
                model,
                optimizer,
                schedule,
                range(
                    step * 2 + accelerator.process_index, step * 2 + accelerator.process_index + 1
                ),
            )

    def fail_on_rank_1(folder: Path) -> None:
        if accelerator.process_index == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    together: dict[str, Any] = {"accelerator": accelerator, "keep": 1}
    run = prepared()
    steps(*run, range(2))
    save(root, 2, lambda folder: write_state(accelerator, *run, folder), **together)
    draws = torch.randn(3)
    steps(*run, range(2, 4))
    final = local(*run[:2])
    try:
        save(root, 4, fail_on_rank_1, **together)
    except CheckpointError as error:
        assert (
            "the disk is full" if accelerator.process_index == 1 else "another process failed"
        ) in str(error)
    else:
        raise AssertionError("a failing rank was not noticed")
    fresh = prepared()
    torch.manual_seed(99)
    path, _ = find_resumable(root)  # type: ignore[misc]
    assert path.name == "step_2"
    read_state(accelerator, *fresh, path)
    assert torch.equal(torch.randn(3), draws)
    steps(*fresh, range(2, 4))
    assert_same(local(*fresh[:2]), final)
    assert fresh[2].last_epoch == run[2].last_epoch == 4
    (root.parent / f"ok_{accelerator.process_index}").write_text(
        json.dumps(sorted(p.name for p in path.rglob("*")))
    )
    accelerator.end_training()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_save_fail_and_resume_bit_for_bit(kind: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    env |= {"ACCELERATE_USE_CPU": "true"} if kind == "ddp" else {"ACCELERATE_USE_FSDP": "true"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        __file__,
        kind,
        str(tmp_path / "checkpoints"),
    ]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    files = json.loads((tmp_path / "ok_0").read_text())
    assert (tmp_path / "ok_1").exists()
    assert {"rng_0.json", "rng_1.json", "schedule.json", "manifest.json"} <= set(files)
    assert ("model.safetensors" in files) == (kind == "ddp")
    if kind == "ddp":
        assert not [name for name in files if name.endswith((".pkl", ".bin", ".pt"))]
    assert names(tmp_path / "checkpoints") == ["step_2"]
    assert damage(tmp_path / "checkpoints" / "step_2") is None


if __name__ == "__main__":
    distributed_rank(sys.argv[1], Path(sys.argv[2]))
