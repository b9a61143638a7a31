"""Mixed precision in real training steps (Micikevicius et al. 2018, arXiv:1710.03740): master
weights, loss scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from posttrain.packing.plan import PackingConfig
from posttrain.precision import PRECISIONS
from posttrain.training.config import TrainConfig
from posttrain.training.loop import Loop
from posttrain.training.optimizer import OptimizerConfig, build_optimizer
from posttrain.training.step import NonFiniteError
from posttrain.types import Completion, Logps, LossOutput, PromptGroup
from tests.helpers import random_groups, tiny_llama

OPTIMIZERS = ("adamw", "adamw_8bit", "sgd", "adafactor")


@pytest.fixture(autouse=True)
def fresh_accelerate(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """accelerate keeps one precision per process; a CPU takes half a minute to show its peak in
    float16."""
    monkeypatch.setattr("posttrain.training.loop.measure_matmul_peak", lambda device, dtype: 1e12)
    if request.node.name.endswith("[adamw_8bit]"):
        pytest.importorskip("bitsandbytes")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def loop_of(
    accelerator: Any,
    precision: str,
    model: nn.Module,
    groups: list[PromptGroup],
    loss: Any,
    optimizer: OptimizerConfig,
    steps: int,
) -> Loop:
    loop = Loop(
        accelerator=accelerator,
        precision=PRECISIONS[precision],
        model=model,
        tokenizer=None,
        loss=loss,
        batches=lambda _: groups,
        num_steps=steps,
        train=TrainConfig(self_check=False),
        optimizer_config=optimizer,
        packing=PackingConfig(),
    )
    loop.prepare()
    return loop


class Nll:
    """Token-mean negative log-likelihood times ``factor``; its gradient overflows float32 under a
    scaled loss at 1e36."""

    couples_completions = False
    factor = 1.0

    def __call__(self, logps: Logps) -> LossOutput:
        return LossOutput(items=-logps.logps_T * self.factor)


# --- master weights
# -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_thousand_steps_of_1e_4_from_one(name: str) -> None:
    """g = 1 and lr = 1e-4 in the optimizer of each plan: 16-bit weights stay at 1.0 for ever."""

    def seen_by_the_matmul(plan: str) -> float:
        model = nn.Linear(1, 1, bias=False, dtype=PRECISIONS[plan].load_dtype)
        nn.init.ones_(model.weight)
        settings = OptimizerConfig(
            name=name, lr=1e-4, schedule="constant", momentum=0.0 if name == "sgd" else None
        )
        optimizer = build_optimizer(model, settings, plan=PRECISIONS[plan])
        for _ in range(1000):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        return model.weight.to(torch.bfloat16).item()

    assert {plan: seen_by_the_matmul(plan) for plan in ("bf16", "bf16-pure")} == {
        "bf16": 0.8984375,
        "bf16-pure": 1.0,
    }


def test_fp32_master_weights_learn_what_bf16_weights_lose() -> None:
    """1000 steps of 1e-4 on the norm weights, which start at 1.0, of a tiny model, through the
    whole loop: in ``bf16`` they learn the batch; in ``bf16-pure`` every one of 96,000 updates is
    rounded away and the model is the one it was."""

    def trained(precision: str) -> tuple[float, float, torch.Tensor]:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(
            cpu=True, mixed_precision=PRECISIONS[precision].accelerate_mixed_precision
        )
        model = tiny_llama(num_hidden_layers=1).to(PRECISIONS[precision].load_dtype)
        for name, p in model.named_parameters():
            p.requires_grad_("norm" in name)
        group = PromptGroup(
            prompt_ids=[3, 4], completions=[Completion(token_ids=[5, 9, 17, 33], loss_mask=[1] * 4)]
        )
        loop = loop_of(
            accelerator,
            precision,
            model,
            [group],
            Nll(),
            OptimizerConfig(lr=1e-4, schedule="constant"),
            1000,
        )
        losses = [loop.step(step)["loss"] for step in range(1, 1001)]
        weights = torch.cat(
            [p.detach().float() for n, p in model.named_parameters() if "norm" in n]
        )
        return losses[0], losses[-1], weights

    first, last, weights = trained("bf16")
    assert last < first - 0.5 and float((weights - 1).abs().median()) > 0.05
    first, last, weights = trained("bf16-pure")
    assert last == first and torch.equal(weights, torch.ones_like(weights))


# --- loss scaling: a real GradScaler through the loop's own step
# ----------------------------------------------------------------
def scaled_loop(
    scale: float,
    *,
    name: str = "adamw",
    interval: int = 2000,
    fp16: bool = True,
    max_grad_norm: float = 1.0,
) -> tuple[Loop, Nll, Any]:
    """fp16 is for CUDA; here the accelerator gets what accelerate gives it there: autocast to
    float16 and a scaler."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp = fp16
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    loss = Nll()
    settings = OptimizerConfig(name=name, lr=1e-2, schedule="linear", max_grad_norm=max_grad_norm)
    groups = random_groups(4, sizes=(1, 2), seed=3)
    loop = loop_of(accelerator, "fp16", tiny_llama(hidden_size=64), groups, loss, settings, 20)
    if not fp16:  # no autocast, but still unscaled
        accelerator.native_amp, accelerator.autocast = True, nullcontext  # type: ignore[method-assign]
    return loop, loss, accelerator.scaler


def snapshot(loop: Loop) -> dict[str, torch.Tensor]:
    """Weights, the whole optimizer state with its step counts, the schedule."""
    held = {f"weight {n}": p.detach().clone() for n, p in loop.policy.named_parameters()}
    for n, p in loop.policy.named_parameters():
        held |= {
            f"{k} {n}": torch.as_tensor(v).clone()
            for k, v in loop.optimizer.state[p].items()
            if v is not None
        }
    return held | {
        "schedule": torch.tensor([loop.schedule.last_epoch, loop.schedule.get_last_lr()[0]])
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflowing_step_changes_nothing_and_halves_the_scale(name: str) -> None:
    loop, loss, scaler = scaled_loop(2.0**16, name=name, interval=2)
    assert loop.step(1).keys().isdisjoint({"skipped_step"})
    before = snapshot(loop)
    loss.factor = 1e36
    metrics = loop.step(2)
    after = snapshot(loop)
    assert metrics["skipped_step"] == 1 and not math.isfinite(metrics["grad_norm"])
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert scaler.get_scale() == 2.0**15
    loss.factor = 1.0
    scales = []
    for step in range(3, 7):
        assert "skipped_step" not in loop.step(step)
        scales.append(scaler.get_scale())
    assert scales == [2.0**15, 2.0**16, 2.0**16, 2.0**17]  # doubled after every second good step
    assert loop.schedule.last_epoch == 5 and not torch.equal(
        snapshot(loop)["weight model.lm_head.weight"], before["weight model.lm_head.weight"]
    )


def test_a_gradient_that_overflows_at_every_scale_stops_the_run() -> None:
    loop, loss, scaler = scaled_loop(1.0)
    loss.factor = 1e36
    with pytest.raises(
        NonFiniteError, match="Step 1: the gradient overflows at every loss scale down to 1"
    ):
        loop.step(1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norm_and_clipped_update_are_the_same_under_every_loss_scale(name: str) -> None:
    """Scales are powers of two, so in float32 they must be equal to the bit, and equal to a run
    without a scaler."""
    seen = []
    for scale in (1.0, 8.0, 2.0**16):
        loop, _, _ = scaled_loop(scale, name=name, fp16=False, max_grad_norm=0.5)
        norms = [loop.step(step)["grad_norm"] for step in (1, 2)]
        seen.append((norms, snapshot(loop)))
        AcceleratorState._reset_state(True)
    plain = loop_of(
        Accelerator(cpu=True),
        "fp16",
        tiny_llama(hidden_size=64),
        random_groups(4, sizes=(1, 2), seed=3),
        Nll(),
        OptimizerConfig(name=name, lr=1e-2, schedule="linear", max_grad_norm=0.5),
        20,
    )
    seen.append(([plain.step(step)["grad_norm"] for step in (1, 2)], snapshot(plain)))
    assert min(seen[0][0]) > 0.5  # clipping took part
    for norms, held in seen[1:]:
        assert norms == seen[0][0]
        assert all(torch.equal(held[k], seen[0][1][k]) for k in held)


def test_under_fp16_the_scale_saves_small_gradients() -> None:
    """A loss times 1e-6 has gradients below 2^-24: lost at scale 1, kept at 2^16 and then equal to
    float32's."""

    def norm(scale: float, *, fp16: bool = True) -> float:
        AcceleratorState._reset_state(True)
        loop, loss, _ = scaled_loop(scale, fp16=fp16, max_grad_norm=0.0)
        loss.factor = 1e-6
        return float(loop.step(1)["grad_norm"])

    exact = norm(1.0, fp16=False)
    assert norm(2.0**16) == pytest.approx(exact, rel=0.02)
    assert norm(1.0) < 0.3 * exact
