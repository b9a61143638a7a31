"""8-bit AdamW, SGD, Adafactor and offload against their papers; and every optimizer's state through
a checkpoint, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from posttrain.precision import PRECISIONS
from posttrain.training.checkpoint import (
    load_training_state,
    read_state,
    save_training_state,
    write_state,
)
from posttrain.training.optimizer import (
    OffloadedOptimizer,
    OptimizerConfig,
    build_optimizer,
    build_schedule,
    refuse_sharded,
)
from posttrain.training.sharding import forget_moments
from tests.helpers import tiny_llama
from tests.unit.checkpoint_helpers import OneProcess, assert_same

NAMES = ("adamw", "adamw_8bit", "sgd", "adafactor")


@pytest.fixture(autouse=True)
def needs_bitsandbytes(request: pytest.FixtureRequest) -> None:
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if params.get("name") == "adamw_8bit" or "8_bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


def config(name: str, **settings: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{"name": name, "lr": 1e-2, "weight_decay": 0.1, "schedule": "constant", **settings}
    )


def updates(
    config: OptimizerConfig, start: torch.Tensor, gradients: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The weight after every step of a matrix or vector (only matrices decay)."""
    model = nn.Module()
    model.weight = nn.Parameter(start.clone())
    optimizer = build_optimizer(model, config)
    seen = []
    for g in gradients:
        model.weight.grad = g.clone()
        optimizer.step()
        seen.append(model.weight.detach().clone())
    return seen


# --- what the updates are
# ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
def test_sgd_by_hand(momentum: float | None) -> None:
    """u <- momentum u + g + lambda w; w <- w - lr u."""
    got = updates(
        config("sgd", momentum=momentum),
        torch.ones(1, 1, dtype=torch.float64),
        [torch.full((1, 1), g).double() for g in (0.5, -1.0, 2.0)],
    )
    w, u, kept = 1.0, 0.0, 0.9 if momentum is None else momentum
    for g, weight in zip((0.5, -1.0, 2.0), got, strict=True):
        u = kept * u + g + 0.1 * w
        w -= 1e-2 * u
        assert weight.item() == pytest.approx(w, rel=1e-14)


@pytest.mark.parametrize("shape", [(5, 7), (6,)])
def test_adafactor_against_the_paper(shape: tuple[int, ...]) -> None:
    """Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5, in numpy; lr is the relative step
    size rho."""
    rng = np.random.default_rng(0)
    w, gradients = (
        rng.normal(size=shape),
        [rng.normal(size=shape) * 10.0**k for k in (0, -3, 1, 0, 2)],
    )
    got = updates(config("adafactor"), torch.tensor(w), [torch.tensor(g) for g in gradients])
    row = col = v = 0.0
    for t, (g, weight) in enumerate(zip(gradients, got, strict=True), start=1):
        beta = 1 - t**-0.8
        square = g**2 + 1e-30
        if g.ndim == 2:
            row, col = (
                beta * row + (1 - beta) * square.sum(1),
                beta * col + (1 - beta) * square.sum(0),
            )
            v = np.outer(row, col) / row.sum()
        else:
            v = beta * v + (1 - beta) * square
        u = g / np.sqrt(v)
        u = u / max(1.0, math.sqrt((u**2).mean()))
        w = w - 1e-2 * (0.1 if g.ndim == 2 else 0.0) * w - 1e-2 * u
        np.testing.assert_allclose(weight.numpy(), w, rtol=1e-12)


def test_adafactor_keeps_its_sums_in_float32_under_bf16_weights() -> None:
    """With 1 - beta2 = t^-0.8 < 2^-8 after 1024 steps, bf16 sums would never move again."""
    model = nn.Linear(8, 4, dtype=torch.bfloat16)
    optimizer = build_optimizer(model, config("adafactor"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [
        v
        for entry in optimizer.state.values()
        for v in entry.values()
        if isinstance(v, torch.Tensor)
    ]
    assert kept and {v.dtype for v in kept} == {torch.float32}


def test_8_bit_adamw_equals_adamw_where_a_block_has_one_value() -> None:
    """A block of 256 elements with one gradient is its own absolute maximum: quantised without
    error (the signed code book holds 1 and not -1, so the first moment stays positive here)."""
    g = (
        torch.rand(64, 1, generator=torch.Generator().manual_seed(0)).expand(64, 256).contiguous()
        + 0.1
    )
    start = torch.ones(64, 256)
    exact = updates(config("adamw", weight_decay=0.3), start, [g, -g / 2, 2 * g])
    eight = updates(config("adamw_8bit", weight_decay=0.3), start, [g, -g / 2, 2 * g])
    for a, b in zip(exact, eight, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-7)


def test_8_bit_adamw_is_near_adamw_elsewhere_and_exact_for_small_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, tolerance in (((64, 256), 0.25), ((16, 16), 1e-4)):
        gradients = [torch.randn(shape, generator=generator) for _ in range(5)]
        start = torch.zeros(shape)
        exact = updates(config("adamw"), start, gradients)[-1]
        eight = updates(config("adamw_8bit"), start, gradients)[-1]
        error = float((exact - eight).norm() / exact.norm())
        assert error < tolerance and (error > 1e-4) == (shape == (64, 256))


def test_8_bit_moments_take_two_bytes_and_a_quarter_thousandth_of_scales() -> None:
    model = nn.Linear(256, 64, bias=False)
    optimizer = build_optimizer(model, config("adamw_8bit"))
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    state = optimizer.state[model.weight]
    assert {k: (v.dtype, v.numel()) for k, v in state.items() if isinstance(v, torch.Tensor)} == {
        "state1": (torch.uint8, 64 * 256),
        "state2": (torch.uint8, 64 * 256),
        "absmax1": (torch.float32, 64),
        "absmax2": (torch.float32, 64),
        "qmap1": (torch.float32, 256),
        "qmap2": (torch.float32, 256),
    }


# --- settings
# ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "adam"},
            "OptimizerConfig.name is one of adamw, adamw_8bit, sgd, adafactor; got 'adam'",
        ),
        ({"momentum": 0.9}, "momentum=0.9 would be ignored by optimizer.name='adamw'"),
        ({"name": "sgd", "momentum": 1.0}, r"momentum must be finite and in \[0, 1\)"),
        (
            {"name": "sgd", "betas": (0.9, 0.95)},
            r"betas=\(0.9, 0.95\) would be ignored by optimizer.name='sgd'",
        ),
        (
            {"name": "adafactor", "eps": 1e-6},
            "eps=1e-06 would be ignored by optimizer.name='adafactor'",
        ),
    ],
)
def test_settings_that_an_optimizer_would_ignore_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**settings)


def test_offload_is_refused_where_there_is_nothing_to_offload_to() -> None:
    with pytest.raises(ValueError, match="optimizer.offload.*in host memory already.*adamw_8bit"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(offload=True))


@pytest.mark.parametrize(
    "settings", [{"name": "adamw_8bit"}, {"name": "adafactor"}, {"name": "sgd"}, {"offload": True}]
)
def test_sharded_launches_take_adamw_only(settings: dict[str, Any]) -> None:
    for kind in ("fsdp2", "zero1", "zero2", "zero3"):
        with pytest.raises(
            ValueError, match=f"this launch shards the optimizer state \\({kind}\\)"
        ):
            refuse_sharded(OptimizerConfig(**settings), kind)
        refuse_sharded(OptimizerConfig(), kind)
    refuse_sharded(OptimizerConfig(**settings), "whole")


# --- a training run of every optimizer
# ----------------------------------------------------------------------------------------
def build(
    name: str, *, offload: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Any, Any]:
    model = tiny_llama(hidden_size=64, tie_word_embeddings=True).to(
        dtype
    )  # an embedding of 6208 elements: in 8 bits
    settings = config(name, schedule="cosine", warmup_steps=2)
    optimizer = build_optimizer(model, settings)
    if offload:
        optimizer = OffloadedOptimizer(optimizer)
    return model, optimizer, build_schedule(optimizer, settings, 10)


def train(model: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights and the whole optimizer state by name, numbers as tensors."""
    tensors = {f"weight {n}": p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        tensors |= {
            f"{kind} {n}": torch.as_tensor(v).clone() for kind, v in state.items() if v is not None
        }
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16-pure"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = build(name, dtype=dtype)
    train(*run, range(5))
    write_state(OneProcess, *run, tmp_path)
    at_five = everything(*run[:2])
    train(*run, range(5, 10))

    fresh = build(name, dtype=dtype)
    read_state(OneProcess, *fresh, tmp_path)
    assert_same(everything(*fresh[:2]), at_five)
    for p, own in zip(
        fresh[0].parameters(), run[0].parameters(), strict=True
    ):  # numbers stay numbers
        kinds = {k: type(v) for k, v in fresh[1].state[p].items()}
        assert kinds == {k: type(v) for k, v in run[1].state[own].items()}
    train(*fresh, range(5, 10))
    assert_same(everything(*fresh[:2]), everything(*run[:2]))


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_without_the_optimizers_state_would_differ(name: str) -> None:
    """The test above can fail."""
    run, fresh = build(name), build(name)
    train(*run, range(5))
    fresh[0].load_state_dict(run[0].state_dict())
    for other in (run, fresh):
        train(*other, range(5, 10))
    assert not torch.equal(run[0].model.norm.weight, fresh[0].model.norm.weight)


def test_8_bit_code_books_are_saved_once_and_stay_shared(tmp_path: Path) -> None:
    def wide() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        return model, build_optimizer(model, config("adamw_8bit"))

    model, optimizer = wide()
    model(torch.randn(3, 64)).pow(2).sum().backward()
    optimizer.step()
    save_training_state(tmp_path, model, optimizer)
    saved = safetensors.torch.load_file(tmp_path / "optimizer.safetensors")
    assert [k for k in saved if "qmap" in k] == ["qmap1/0.weight", "qmap2/0.weight"]
    assert json.loads((tmp_path / "optimizer.json").read_text())["numbers"] == {
        f"step/{i}.{n}": 1 for i in (0, 1) for n in ("weight", "bias")
    }
    other, fresh = wide()
    load_training_state(tmp_path, other, fresh)
    assert fresh.state[other[0].weight]["qmap1"] is fresh.state[other[1].weight]["qmap1"]


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer, schedule = build("sgd")
    train(model, optimizer, schedule, range(1))
    save_training_state(tmp_path, model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer has \[SGD\], this run has \[Adafactor\]"):
        load_training_state(tmp_path, *build("adafactor")[:2])
    with pytest.raises(ValueError, match=r"optimizer has \[SGD\], this run has \[offloaded SGD\]"):
        load_training_state(tmp_path, *build("sgd", offload=True)[:2])


@pytest.mark.parametrize("name", NAMES)
def test_a_cleared_state_is_a_new_optimizer(name: str) -> None:
    """Kimi k1.5 starts every iteration with a fresh optimizer: moments, step counters and all,
    through accelerate's wrapper."""
    model, optimizer, schedule = build(name)
    train(model, optimizer, schedule, range(3))
    other = tiny_llama(hidden_size=64, tie_word_embeddings=True)
    other.load_state_dict(model.state_dict())
    fresh = build_optimizer(other, config(name, lr=schedule.get_last_lr()[0]))
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(optimizer)
    forget_moments(accelerator, wrapped)
    for m, o in ((model, wrapped), (other, fresh)):
        train(
            m, o, schedule=type("NoSchedule", (), {"step": lambda self: None})(), steps=range(3, 4)
        )
    assert_same(everything(model, wrapped), everything(other, fresh))


# --- offload: the device is handed in, here another place on the same one
# -------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_offloaded_updates_are_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Rates of the schedule arrive, a parameter without gradient is left alone, a checkpoint goes
    on, through accelerate."""
    accelerator = Accelerator(cpu=True)
    plain, away = build(name), build(name, offload=True)
    runs = [(m, accelerator.prepare(o), s) for m, o, s in (plain, away)]
    for model, optimizer, schedule in runs:
        train(model, optimizer, schedule, range(3))
        model.model.norm.weight.requires_grad_(False)
        train(model, optimizer, schedule, range(3, 5))
        model.model.norm.weight.requires_grad_(True)
    assert_same(everything(*runs[0][:2]), everything(*runs[1][:2]))
    write_state(OneProcess, *runs[1], tmp_path)
    resumed = build(name, offload=True)
    read_state(OneProcess, *resumed, tmp_path)
    train(*resumed, range(5, 7))
    train(*runs[0], range(5, 7))
    assert_same(everything(*resumed[:2]), everything(*runs[0][:2]))


def test_an_offloaded_update_touches_one_parameter_at_a_time_and_keeps_no_copy_of_the_weights() -> (
    None
):
    model, optimizer, schedule = build("adamw", offload=True)
    seen: list[int] = []
    step = optimizer.inner.step
    optimizer.inner.step = lambda: (
        seen.append(len(optimizer.inner.param_groups[0]["params"])),
        step(),
    )
    train(model, optimizer, schedule, range(1))
    assert seen == [1] * len(list(model.parameters()))
    assert not optimizer.inner.state and {p for p in optimizer.state} == set(model.parameters())


def test_offload_sees_the_overflow_of_a_scaled_loss() -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model = nn.Linear(8, 4)
    inner = build_optimizer(model, OptimizerConfig(), plan=PRECISIONS["fp16"])
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(
        OffloadedOptimizer(inner), device_placement=False, scaler=scaler
    )
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, 8)).sum() * float("inf")).backward()
    optimizer.step()
    assert (
        optimizer.step_was_skipped
        and torch.equal(model.weight, before)
        and scaler.get_scale() == 2.0**15
    )
