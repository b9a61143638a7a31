"""Model states: the ZeRO paper's numbers, and what torch really allocates."""

from __future__ import annotations

import pytest
import torch

from posttrain.plan.states import (
    Parameter,
    frozen_bytes,
    host_items,
    model_states,
    moment_bytes,
    parameters_of,
    ring_bytes,
    run_states,
    zero_communication,
)
from posttrain.precision import DEEPSPEED_BF16, PRECISIONS

GB = 1e9
TABLE_1 = {  # arXiv:1910.02054 table 1: devices -> GB of P_os, P_os+g, P_os+g+p for 7.5B, 128B and 1T parameters
    1: (120, 120, 120, 2048, 2048, 2048, 16000, 16000, 16000),
    4: (52.5, 41.3, 30, 896, 704, 512, 7000, 5500, 4000),
    16: (35.6, 21.6, 7.5, 608, 368, 128, 4750, 2875, 1000),
    64: (31.4, 16.6, 1.88, 536, 284, 32, 4187, 2218, 250),
    256: (30.4, 15.4, 0.47, 518, 263, 8, 4046, 2054, 62.5),
    1024: (30.1, 15.1, 0.12, 513, 257, 2, 4011, 2013, 15.6),
}


def total(num_params, **setting) -> int:
    return sum(model_states(num_params, **setting).values())


@pytest.mark.parametrize("devices", TABLE_1)
def test_zero_table_1(devices):
    """All 54 cells; the paper rounds the columns of 7.5B and truncates those of 128B and 1T."""
    printed = iter(TABLE_1[devices])
    for params in (7_500_000_000, 128_000_000_000, 1_000_000_000_000):
        for stage in (1, 2, 3):
            ours, theirs = (
                total(params, zero_stage=stage, num_devices=devices) / GB,
                next(printed),
            )
            assert abs(ours - theirs) < 1 and (
                abs(ours - theirs) < 0.003 * theirs or abs(ours - theirs) < 0.06
            )


def test_zero_figure_1_and_the_112_gb_of_a_7b_model():
    stages = [total(7_500_000_000, zero_stage=s, num_devices=64) / GB for s in range(4)]
    assert stages == pytest.approx([120, 31.40625, 16.640625, 1.875], abs=1e-8)
    seven = model_states(7_000_000_000)
    assert (seven["weights"], seven["gradients"], seven["master"] + seven["moments"]) == (
        14e9,
        14e9,
        84e9,
    )
    eight = [total(7_000_000_000, zero_stage=s, num_devices=8) / GB for s in (1, 2, 3)]
    assert eight == [38.5, 26.25, 14.0]
    assert total(6_738_415_616) == 107_814_649_856


def test_bytes_per_parameter_of_other_recipes():
    per_param = {name: total(10**9, precision=plan) / 1e9 for name, plan in PRECISIONS.items()}
    assert per_param == {"fp32": 16, "bf16": 16, "bf16-pure": 8, "fp16": 16}
    assert total(10**9, optimizer="adamw_8bit") == 10 * 10**9
    assert total(10**9, optimizer="adamw_8bit", precision=PRECISIONS["bf16-pure"]) == 6 * 10**9
    sgd = model_states(10**9, optimizer="sgd")
    assert sgd["master"] + sgd["moments"] == 8 * 10**9
    assert total(10**9 + 10**6, trainable_params=10**6) == 2 * 10**9 + 16 * 10**6


def test_zero_offload_leaves_the_16_bit_weights_on_the_device():
    """arXiv:2101.06840: 2M on the GPU, 14M on the CPU, a saving of 8 times; each rank holds
    14M/N."""

    def on_host(num_params, offload, **setting):
        states = model_states(num_params, **setting)
        moved = host_items(offload, setting["zero_stage"])
        return sum(states[n] for n in states if n in moved), sum(states.values())

    assert on_host(13 * 10**9, {"optimizer"}, zero_stage=2) == (182 * 10**9, (182 + 26) * 10**9)
    assert on_host(8000, {"optimizer"}, zero_stage=2, num_devices=4)[0] == 14 * 8000 // 4
    everything = on_host(8000, {"optimizer", "weights"}, zero_stage=3, num_devices=4)
    assert everything == (16 * 2000, 16 * 2000)
    with pytest.raises(ValueError, match="zero_stage=3"):
        host_items({"weights"}, 2)
    with pytest.raises(ValueError, match="offload takes"):
        host_items({"gradients"}, 2)


def test_zero_table_2_by_inversion():
    """32 GB, 64 devices: 2, 7.6, 14.4 and 128 billion parameters; model parallelism m multiplies
    all."""
    many = 10**12
    ours = [32 * many / total(many, zero_stage=s, num_devices=64) for s in range(4)]
    assert ours == pytest.approx([2, 7.642, 14.42, 128], rel=1e-3)
    printed = {1: (2, 7.6, 14.4, 128), 2: (4, 15.3, 28.8, 256), 4: (8, 30.6, 57.7, 512)}
    for m, row in printed.items():
        for ours_1, theirs in zip(ours, row, strict=True):
            assert m * ours_1 == pytest.approx(theirs, abs=0.06)


def test_zero_communication():
    assert [zero_communication(7, zero_stage=s) for s in range(4)] == [14, 14, 14, 21]
    assert [zero_communication(7, zero_stage=s, accumulation=4) for s in range(4)] == [
        14,
        14,
        35,
        84,
    ]
    seven = 7 * 10**9
    assert (
        2 * zero_communication(seven, zero_stage=2) == 28e9
        and 2 * zero_communication(seven, zero_stage=3) == 42e9
    )
    ring = [
        ring_bytes(zero_communication(seven, zero_stage=s), num_devices=8, bytes_each=2) / GB
        for s in (2, 3)
    ]
    assert ring == [24.5, 36.75]
    with pytest.raises(ValueError, match="0 to 3"):
        zero_communication(7, zero_stage=4)


@pytest.mark.parametrize("plan", PRECISIONS.values(), ids=lambda p: p.name)
def test_more_sharding_never_takes_more(plan):
    for devices in (1, 2, 7, 64):
        totals = [total(1001, precision=plan, zero_stage=s, num_devices=devices) for s in range(4)]
        assert totals == sorted(totals, reverse=True)
        assert len(set(totals)) == (1 if devices == 1 else 4)


def _tiny():
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def _storages(tensors) -> int:
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_run_states_are_what_torch_allocates(frozen):
    import torch

    from posttrain.training.optimizer import OptimizerConfig, build_optimizer

    model = _tiny()
    if frozen:
        for name, p in model.named_parameters():
            p.requires_grad_("mlp" in name)
    optimizer = build_optimizer(model, OptimizerConfig())
    model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = run_states(parameters_of(model), precision=PRECISIONS["fp32"])
    held = [s for entry in optimizer.state.values() for n, s in entry.items() if n != "step"]
    assert states["weights"] == _storages(model.parameters())
    assert states["gradients"] == _storages(
        p.grad for p in model.parameters() if p.grad is not None
    )
    assert states["moments"] == _storages(held)
    assert states["counters"] == _storages(entry["step"] for entry in optimizer.state.values())


def test_fsdp2_shards_add_up():
    parameters = [
        Parameter(shape=(10, 3)),
        Parameter(shape=(5,)),
        Parameter(shape=(8, 2), trainable=False),
    ]
    whole = run_states(parameters, precision=PRECISIONS["fp32"])
    half = run_states(parameters, precision=PRECISIONS["fp32"], sharding="fsdp2", num_devices=2)
    assert whole["weights"] == 4 * (30 + 5 + 16) and half["weights"] == 4 * (15 + 3 + 8)
    assert half["gradients"] == 4 * (15 + 3) and half["moments"] == 8 * (15 + 3)
    assert frozen_bytes(parameters, compute="float32", num_devices=2) == 4 * (15 + 3 + 8)


@pytest.mark.parametrize("num_devices", [2, 3, 5, 8])
def test_a_simulated_partition_adds_up(num_devices):
    """torch's own chunks, rank by rank: their sum is the whole, the largest is what is predicted,
    the rest is padding."""
    shapes = [(31, 8), (7,), (64, 3), (8, 8), (1, 5)]
    parameters = [Parameter(shape=shape) for shape in shapes]
    ranks = [0] * num_devices
    for shape in shapes:
        for rank, chunk in enumerate(torch.chunk(torch.empty(shape), num_devices)):
            ranks[rank] += 4 * chunk.numel()
    whole = run_states(parameters, precision=PRECISIONS["fp32"])["weights"]
    largest = run_states(
        parameters, precision=PRECISIONS["fp32"], sharding="fsdp2", num_devices=num_devices
    )["weights"]
    rows = sum(4 * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert (
        sum(ranks) == whole
        and max(ranks) == largest == ranks[0]
        and largest - whole / num_devices <= rows
    )
    for stage in (1, 2, 3):
        states = run_states(
            parameters,
            precision=DEEPSPEED_BF16,
            sharding=f"zero{stage}",
            num_devices=num_devices,
        )
        padding = 4 * (len(shapes) if stage == 3 else 1) * num_devices
        assert 0 <= num_devices * states["master"] - whole <= padding


def test_roles_of_ppo_and_grpo():
    """7e9 parameters (papers: arXiv:2402.03300, 2501.12948): actor and critic 16 bytes, reference
    and reward model 2; no critic."""
    trained, frozen = (
        total(7 * 10**9),
        total(7 * 10**9, trainable_params=0),
    )
    assert (trained, frozen) == (112 * 10**9, 14 * 10**9)
    assert 2 * trained + 2 * frozen == 252 * 10**9 and trained + frozen == 126 * 10**9


def test_deepspeed_partitions():
    """As measured in two-process runs (tests/e2e/test_sharded.py): stage 3 parameter by parameter,
    1 and 2 one flat buffer."""
    parameters = [
        Parameter(shape=(5, 3)),
        Parameter(shape=(7,)),
        Parameter(shape=(4, 4), trainable=False),
    ]
    states = {
        (name, stage): run_states(
            parameters, precision=PRECISIONS[name], sharding=f"zero{stage}", num_devices=2
        )
        for name in ("fp32", "bf16")
        for stage in (1, 2, 3)
    }
    assert states["fp32", 2] == {
        "weights": 4 * 38,
        "gradients": 4 * 11,
        "master": 4 * 11,
        "moments": 8 * 11,
        "counters": 2 * 4,  # one step count for what decays, one for the rest
    }
    assert states["bf16", 1]["gradients"] == 4 * 22 and states["bf16", 1]["weights"] == 2 * 38
    assert states["bf16", 3]["weights"] == 2 * (8 + 4 + 8) and states["bf16", 3]["master"] == 4 * (
        8 + 4
    )
    whole = run_states(
        parameters,
        precision=PRECISIONS["bf16"],
        sharding="zero3",
        num_devices=2,
        whole_below=7,
    )
    assert whole["weights"] == 2 * (8 + 4 + 7 + 8), "the vector is whole beside its part"


def test_moments_by_shape():
    assert moment_bytes((100, 30), dtype="float32", optimizer="adafactor") == (4 * 130, 4)
    assert moment_bytes((30,), dtype="float32", optimizer="adafactor") == (4 * 30, 4)
    assert moment_bytes((100, 30), dtype="bfloat16", optimizer="adafactor") == (
        4 * 130,
        4,
    )  # its sums stay in float32
    assert moment_bytes((64, 64), dtype="float32", optimizer="adamw_8bit") == (2 * 4096 + 8 * 16, 0)
    assert moment_bytes((64, 63), dtype="bfloat16", optimizer="adamw_8bit") == (8 * 64 * 63, 0)
    with pytest.raises(ValueError, match="run_states"):
        model_states(100, optimizer="adafactor")
