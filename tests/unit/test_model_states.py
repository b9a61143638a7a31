"""Model states of real runs, measured between a backward and an update, are what
``plan/states.py`` predicts: to the byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from posttrain import (
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    SFTConfig,
    SFTTrainer,
    TrainConfig,
)
from posttrain.models.adapters import LoraConfig
from posttrain.plan.states import frozen_bytes, parameters_of, run_states
from posttrain.precision import PRECISIONS
from posttrain.rl.batches import RolloutConfig
from posttrain.rollout.engine import SamplingConfig
from posttrain.trainers.dpo import DPOConfig, DPOTrainer
from posttrain.trainers.reward import RewardConfig, RewardTrainer
from posttrain.trainers.rl import RLConfig, RLTrainer
from posttrain.training import sharding
from posttrain.training.loop import Loop
from posttrain.training.reference import ReferenceConfig
from tests.measured_states import measured_states
from tests.tiny import model_folder

ROWS = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(4) for b in range(4)]
PAIRS = [
    {"prompt": f"{a}+{b}", "chosen": str(a + b), "rejected": str(a * b + 1)}
    for a in range(4)
    for b in range(4)
]
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd", "adafactor")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tiny Llama with the head tied to the embedding, and one without."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tied = model_folder(tmp_path_factory.mktemp("tied"))
    untied = tmp_path_factory.mktemp("untied")
    config = LlamaConfig.from_pretrained(tied)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(untied)
    AutoTokenizer.from_pretrained(tied).save_pretrained(untied)
    return {True: tied, False: untied}


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """numel * element_size over distinct storages; each tensor must fill its own."""
    distinct = {t.untyped_storage().data_ptr(): t for t in tensors}
    assert all(
        t.numel() * t.element_size() == t.untyped_storage().nbytes() for t in distinct.values()
    )
    return sum(t.numel() * t.element_size() for t in distinct.values())


class Watch:
    """What a run holds between ``clip_and_check`` and the second update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, int] = {}
        self.again: dict[str, int] = {}
        prepare, take_step = Loop.prepare, sharding.take_step

        def prepared(loop: Loop) -> None:
            prepare(loop)
            self.loop = loop

        def measured(accelerator: Any, policy: Any, optimizer: Any) -> None:
            parameters = list(policy.parameters())
            state = [
                t
                for p in parameters
                for t in optimizer.state.get(p, {}).values()
                if isinstance(t, torch.Tensor)
            ]
            quantised = [p.quant_state for p in parameters if hasattr(p, "quant_state")]
            scales = [
                t
                for q in quantised
                for t in (q.absmax, q.code, q.offset, q.state2.absmax, q.state2.code)
            ]
            gradients = [p.grad for p in parameters if p.grad is not None]
            reference = self.loop.reference
            frozen = (
                []
                if reference is None or reference.frozen is None
                else reference.frozen.parameters()
            )
            self.held = {
                "weights": bytes_of([*parameters, *scales]),
                "gradients": bytes_of(gradients),
                "state": bytes_of(state),
                "reference": bytes_of(frozen),
            }
            self.again = measured_states(accelerator, policy, optimizer)
            take_step(accelerator, policy, optimizer)

        monkeypatch.setattr(Loop, "prepare", prepared)
        monkeypatch.setattr(sharding, "take_step", measured)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    AcceleratorState._reset_state(True)  # accelerate keeps one precision per process
    monkeypatch.setattr("posttrain.training.loop.measure_matmul_peak", lambda device, dtype: 1e12)
    yield Watch(monkeypatch)
    AcceleratorState._reset_state(True)


def fp16_accelerator(**_: Any) -> tuple[Any, Any]:
    """What accelerate makes of fp16 on CUDA."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=8.0)
    return accelerator, PRECISIONS["fp16"]


async def starts_with_digit(completion: str, sample: Any) -> float:
    """Awaited in this process: no worker has to start."""
    return float(completion[:1].isdigit())


def run(
    method: str,
    folder: Path,
    tmp_path: Path,
    *,
    precision: str,
    optimizer: str,
    lora: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps of a method; RL's rewards are random enough to make both steps train. A rank below
    0: around weights in 4 bit."""
    if precision == "fp16":
        monkeypatch.setattr("posttrain.trainers.base.make_accelerator", fp16_accelerator)
    common: dict[str, Any] = dict(
        model=ModelConfig(
            name=str(folder), lora=LoraConfig(rank=abs(lora), quantize_4bit=lora < 0)
        ),
        train=TrainConfig(
            run_dir=str(tmp_path),
            name="run",
            max_steps=2,
            batch_size=4,
            self_check=lora < 0,
            precision="auto" if precision == "fp16" else precision,
        ),
        optimizer=OptimizerConfig(name=optimizer, lr=1e-3),
        packing=PackingConfig(max_tokens=300),
    )
    if method == "sft":
        SFTTrainer(train_dataset=ROWS, config=SFTConfig(**common)).train()
    elif method == "reward":
        RewardTrainer(train_dataset=PAIRS, config=RewardConfig(**common)).train()
    elif method.startswith("dpo"):
        cache = ReferenceConfig(cache=method == "dpo-cached", cache_dir=str(tmp_path / "cache"))
        DPOTrainer(train_dataset=PAIRS, config=DPOConfig(**common, reference=cache)).train()
    else:
        beta = 0.01 if method == "rl-kl" else 0.0
        config = RLConfig(
            **common,
            algorithm="grpo",
            algorithm_options={"beta": beta},
            sampling=SamplingConfig(max_tokens=2),
            rollout=RolloutConfig(group_size=8),
        )
        RLTrainer(
            train_dataset=[{"prompt": f"{a}?"} for a in range(8)],
            rewards={starts_with_digit: 1.0},
            config=config,
        ).train()


CASES = [("sft", o, p, r, True) for o in OPTIMIZERS for p in PRECISIONS for r in (0, 4)]
CASES += [
    (m, "adamw", p, r, False)
    for m in ("reward", "dpo", "dpo-cached", "rl", "rl-kl")
    for p in PRECISIONS
    for r in (0, 4)
]
CASES += [
    (m, o, "bf16", r, True)
    for m in ("reward", "dpo", "rl-kl")
    for o in OPTIMIZERS[1:]
    for r in (0, 4)
]

CASES += [
    (m, "adamw", p, -4, False) for m in ("sft", "reward") for p in ("fp32", "bf16", "bf16-pure")
]
CASES += [(m, "adamw", "bf16", -4, True) for m in ("dpo", "rl-kl")]


@pytest.mark.parametrize(("method", "optimizer", "precision", "lora", "tied"), CASES)
def test_predicted_is_measured(
    method: str,
    optimizer: str,
    precision: str,
    lora: int,
    tied: bool,
    folders: dict[bool, Path],
    tmp_path: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if optimizer == "adamw_8bit" or lora < 0:
        pytest.importorskip("bitsandbytes")
    run(
        method,
        folders[tied],
        tmp_path,
        precision=precision,
        optimizer=optimizer,
        lora=lora,
        monkeypatch=monkeypatch,
    )
    parameters = parameters_of(watch.loop.model)
    states = run_states(parameters, precision=PRECISIONS[precision], optimizer=optimizer)
    has_reference = method in ("dpo", "rl-kl") and lora == 0
    assert watch.held == {
        "weights": states["weights"],
        "gradients": states["gradients"],
        "state": states["moments"] + states["counters"],
        "reference": frozen_bytes(parameters, compute=PRECISIONS[precision].compute)
        if has_reference
        else 0,
    }
    names = ("weights", "gradients", "moments", "counters", "master")
    assert {n: watch.again[n] for n in names} == {n: states[n] for n in names}
    trained = sum(p.num_bytes for p in parameters if p.trainable)
    assert watch.held["gradients"] == trained > 0 and (lora == 0) == (
        trained == watch.held["weights"]
    )
