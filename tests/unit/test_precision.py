"""Dtypes of a run, and the facts of mixed precision (Micikevicius et al. 2018, arXiv:1710.03740)
that the plans rest on."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from posttrain.precision import (
    PRECISIONS,
    bytes_per_element,
    default_precision,
    resolve_precision,
    torch_dtype,
)
from posttrain.training.optimizer import OptimizerConfig, build_optimizer, build_schedule


# --- what the dtypes can hold
# -------------------------------------------------------------------------------------------
def fp16(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).to(torch.float16).double().item()


def test_fp16_underflow_and_overflow() -> None:
    assert fp16(2.0**-24) == 2.0**-24
    assert fp16(2.0**-25) == 0.0
    assert fp16(1e-8) == 0.0
    assert fp16(1e-8 * 65536) / 65536 == pytest.approx(9.997e-9, rel=1e-4)
    assert fp16(65519) == 65504
    assert fp16(65520) == math.inf


@pytest.mark.parametrize(
    ("dtype", "lost", "kept", "value"),
    [
        (torch.float16, 2.0**-11, 2.0**-10, 1 + 2.0**-10),
        (torch.bfloat16, 2.0**-8, 2.0**-7, 1.0078125),
    ],
)
def test_an_update_below_half_a_unit_in_the_last_place_is_lost(
    dtype: torch.dtype, lost: float, kept: float, value: float
) -> None:
    one = torch.ones((), dtype=dtype)
    assert (one + torch.tensor(lost, dtype=dtype)).item() == 1.0
    assert (one + torch.tensor(kept, dtype=dtype)).item() == value


def after_a_thousand_updates(dtype: torch.dtype) -> torch.Tensor:
    """w after 1000 x (w -= 1e-4) from 1.0."""
    w = torch.ones((), dtype=dtype)
    for _ in range(1000):
        w -= torch.tensor(1e-4, dtype=dtype)
    return w


def test_a_thousand_small_updates_need_a_master_weight() -> None:
    def seen_by_the_matmul(name: str) -> float:
        plan = PRECISIONS[name]
        return (
            after_a_thousand_updates(torch_dtype(plan.update)).to(torch_dtype(plan.compute)).item()
        )

    assert seen_by_the_matmul("bf16-pure") == 1.0
    assert seen_by_the_matmul("bf16") == 0.8984375
    assert seen_by_the_matmul("fp32") == pytest.approx(0.9, abs=6e-5)
    assert seen_by_the_matmul("fp16") == pytest.approx(
        0.9, abs=5e-4
    )  # the resolution of fp16 at 0.9
    assert after_a_thousand_updates(torch.float16).item() == 1.0  # so no plan updates in fp16
    assert "float16" not in {plan.update for plan in PRECISIONS.values()}


@pytest.mark.parametrize(
    ("dtype", "total"), [("float16", 2048), ("bfloat16", 256), ("float32", 4096)]
)
def test_an_accumulator_of_16_bits_stops_growing(dtype: str, total: float) -> None:
    total_so_far = torch.zeros((), dtype=torch_dtype(dtype))
    for _ in range(4096):
        total_so_far = total_so_far + torch.ones((), dtype=torch_dtype(dtype))
    assert total_so_far.item() == total
    assert (dtype == "float32") == (dtype in {plan.reduce for plan in PRECISIONS.values()})


def test_log_probs_of_bf16_logits_are_upcast_before_the_softmax() -> None:
    logits = torch.linspace(-8, 8, 512).to(torch.bfloat16)
    exact = torch.log_softmax(logits.double(), -1)
    reduce = torch_dtype(PRECISIONS["bf16"].reduce)
    assert (torch.log_softmax(logits.to(reduce), -1) - exact).abs().max() < 1e-5
    assert (torch.log_softmax(logits, -1).double() - exact).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-pure"])
def test_the_importance_ratio_is_exactly_one_on_the_first_inner_step(name: str) -> None:
    plan = PRECISIONS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64)).to(plan.load_dtype)
    tokens = torch.arange(48)

    def logps() -> torch.Tensor:
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=plan.accelerate_mixed_precision == "bf16"
        ):
            logits = model(tokens)
        return torch.log_softmax(logits.to(torch_dtype(plan.reduce)), -1)[tokens, (tokens + 1) % 64]

    with torch.no_grad():
        sampler = logps()
    assert torch.equal(torch.exp(logps() - sampler), torch.ones(48))


# --- loss scaling through accelerate's optimizer, our AdamW and our schedule
# ----------------------------------------------
def scaled_run(
    scale: float, *, interval: int = 2000
) -> tuple[nn.Linear, AcceleratedOptimizer, torch.amp.GradScaler]:
    Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    config = OptimizerConfig(lr=0.1, weight_decay=0.1, schedule="linear")
    optimizer = build_optimizer(model, config, plan=PRECISIONS["fp16"])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
    return model, AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler), scaler


def backward(model: nn.Linear, scaler: torch.amp.GradScaler, factor: float = 1.0) -> None:
    torch.manual_seed(1)
    scaler.scale(factor * model(torch.randn(16, 8)).pow(2).sum()).backward()


@pytest.mark.parametrize("scale", [8.0, 2.0**16])
def test_norm_and_clipped_update_do_not_depend_on_the_loss_scale(scale: float) -> None:
    results = []
    for s in (1.0, scale):
        model, optimizer, scaler = scaled_run(s)
        backward(model, scaler)
        scaler.unscale_(optimizer.optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        results.append((norm.item(), model.weight.detach().clone()))
    assert results[0][0] > 1.0  # clipping took part
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_an_overflow_changes_nothing_but_the_scale() -> None:
    model, optimizer, scaler = scaled_run(2.0**16, interval=2)
    schedule = build_schedule(optimizer, OptimizerConfig(lr=0.1), 10)

    def step(factor: float = 1.0) -> None:
        optimizer.zero_grad()
        backward(model, scaler, factor)
        optimizer.step()
        if not optimizer.step_was_skipped:
            schedule.step()

    def everything() -> list[torch.Tensor]:
        moments = [v.clone() for p in model.parameters() for v in optimizer.state[p].values()]
        return [*(p.detach().clone() for p in model.parameters()), *moments]

    step()
    before, lr = everything(), schedule.get_last_lr()
    step(float("inf"))
    assert optimizer.step_was_skipped
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert schedule.get_last_lr() == lr
    assert scaler.get_scale() == 2.0**15
    step()
    assert scaler.get_scale() == 2.0**15
    step()
    assert scaler.get_scale() == 2.0**16  # doubled after ``interval`` good steps
    assert schedule.last_epoch == 3


def test_a_fused_optimizer_would_hide_the_overflow_from_accelerate() -> None:
    """Why ``build_optimizer`` is not fused under loss scaling; if this fails, torch or accelerate
    changed and it may be."""
    model = nn.Linear(8, 4)
    assert build_optimizer(model, OptimizerConfig()).defaults["fused"]
    assert not build_optimizer(model, OptimizerConfig(), plan=PRECISIONS["fp16"]).defaults["fused"]
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(
        build_optimizer(model, OptimizerConfig()), device_placement=False, scaler=scaler
    )
    backward(model, scaler, float("inf"))
    optimizer.step()
    assert not optimizer.step_was_skipped


# --- plans
# ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "accelerate", "weight", "update", "bytes_per_param"),
    [
        ("fp32", "no", torch.float32, "float32", 16),
        ("bf16", "bf16", torch.float32, "float32", 16),
        ("bf16-pure", "no", torch.bfloat16, "bfloat16", 8),
        ("fp16", "fp16", torch.float32, "float32", 16),
    ],
)
def test_what_a_plan_tells_accelerate_and_the_loader(
    name: str, accelerate: str, weight: torch.dtype, update: str, bytes_per_param: int
) -> None:
    plan = PRECISIONS[name]
    assert plan.name == name
    assert plan.accelerate_mixed_precision == accelerate
    assert plan.load_dtype == weight
    assert plan.update == update
    assert plan.state_bytes_per_param == bytes_per_param


def test_a_separate_master_is_counted_once() -> None:
    """ZeRO's mixed precision Adam: 2 + 2 + K = 12 (Rajbhandari et al. 2020, arXiv:1910.02054,
    section 3.1)."""
    zero = replace(
        PRECISIONS["bf16-pure"],
        name="zero",
        master="float32",
        moment="float32",
        gradient="bfloat16",
        weight="bfloat16",
    )
    assert zero.state_bytes_per_param == 16
    assert zero.update == "float32"


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-pure"])
def test_the_plan_states_the_bytes_that_a_real_step_allocates(name: str) -> None:
    plan = PRECISIONS[name]
    model = nn.Linear(16, 16, bias=False, dtype=plan.load_dtype)
    optimizer = build_optimizer(model, OptimizerConfig(), plan=plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.accelerate_mixed_precision == "bf16"):
        out = model(torch.randn(4, 16, dtype=plan.load_dtype))
    assert out.dtype == torch_dtype(plan.compute)
    out.sum().backward()
    optimizer.step()
    p = model.weight
    held = [p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]
    assert [t.dtype for t in held] == [
        torch_dtype(d) for d in (plan.weight, plan.gradient, plan.moment, plan.moment)
    ]
    assert sum(t.numel() * t.element_size() for t in held) == plan.state_bytes_per_param * p.numel()


def test_fp16_is_refused_where_it_cannot_work() -> None:
    with pytest.raises(
        ValueError,
        match=r"needs a CUDA device; got device type 'cpu'.*0\.4 GFLOP/s.*Use '(bf16|fp32)'",
    ):
        resolve_precision("fp16", "cpu")
    with pytest.raises(ValueError, match="got device type 'mps'"):
        resolve_precision("fp16", "mps")
    assert resolve_precision("fp16", "cuda") is PRECISIONS["fp16"]


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(
        ValueError, match="Unknown precision 'bfloat16-pure'.*Did you mean bf16-pure"
    ):
        resolve_precision("bfloat16-pure", "cpu")
    with pytest.raises(ValueError, match="Use the torch name"):
        bytes_per_element("int8")


def test_16_bit_reductions_are_refused() -> None:
    with pytest.raises(ValueError, match="would lose sums"):
        replace(PRECISIONS["bf16-pure"], reduce="bfloat16")
    with pytest.raises(ValueError, match="autocast only lowers"):
        replace(PRECISIONS["bf16-pure"], compute="float32")


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", "bf16"),
        ("flags : fpu amx_bf16 amx_tile\n", "bf16"),
        ("flags : fpu avx2 avx512f avx512_bf16x\n", "fp32"),
        ("model name : avx512_bf16\n", "fp32"),
        (None, "fp32"),
    ],
)
def test_the_default_follows_the_flags_of_the_cpu(tmp_path, cpuinfo: str | None, name: str) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert default_precision("cpu", cpuinfo=path, kernels="AVX512").name == name
    assert default_precision("cpu", cpuinfo=path, kernels="AVX2").name == "fp32"
    assert default_precision("mps", cpuinfo=path).name == "fp32"


def test_the_default_on_cuda_needs_native_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert resolve_precision(None, "cuda").name == name


def test_importing_the_plans_does_not_import_torch() -> None:
    code = "import sys, posttrain.precision as p; p.PRECISIONS['bf16'].state_bytes_per_param; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_deepspeed_updates_a_separate_fp32_copy_of_any_weights():
    """bf16: 2 + 4 + 4 + 8 bytes per parameter before sharding; fp32: 4 + 4 + 4 + 8."""
    bf16, fp32 = (resolve_precision(name, "cpu", deepspeed=True) for name in ("bf16", "fp32"))
    assert (bf16.state_bytes_per_param, fp32.state_bytes_per_param) == (18, 20)
    assert (bf16.load_dtype, bf16.update, fp32.update) == (torch.bfloat16, "float32", "float32")
    for name in ("bf16-pure", "fp16"):
        with pytest.raises(ValueError, match="does not exist under DeepSpeed"):
            resolve_precision(name, "cuda", deepspeed=True)
    with pytest.raises(ValueError, match="Did you mean bf16"):
        resolve_precision("bf17", "cpu", deepspeed=True)
