"""A few layers stand for all: on architectures that differ, the replayed trace is the trace of every
layer."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from posttrain.models.adapters import LoraConfig
from posttrain.models.load import ModelConfig, untrained_model
from posttrain.packing.plan import PackingConfig
from posttrain.plan.job import Job
from posttrain.plan.price import memory_plan
from posttrain.plan.states import parameters_of
from posttrain.plan.trace import cached_elements, worst_case
from posttrain.precision import PRECISIONS

TOKENS = 640


def job_for(
    config: Any, precision: str, *, tokens: int = TOKENS, rank: int = 0, **more: Any
) -> Job:
    """SFT on one CPU; a rank below 0: of adapters around weights in 4 bit."""
    plan = PRECISIONS[precision]
    settings = ModelConfig(lora=LoraConfig(rank=abs(rank), quantize_4bit=rank < 0))
    with torch.device("meta"):
        model = untrained_model(config, settings, dtype=plan.load_dtype, compute=torch.bfloat16)
    return Job(
        method="sft",
        model=model,
        parameters=tuple(parameters_of(model)),
        precision=plan,
        packing=PackingConfig(max_tokens=tokens, logits_chunk=128),
        **more,
    )


def beside(job: Job, **setting: Any) -> int:
    """Bytes beside weights and gradients."""
    return sum(job.trace(**setting).items.values())


def test_every_decoder_that_transformers_can_build_has_states_and_layers(caplog):
    """benchmarks/memory_families.py traces them."""
    caplog.set_level(logging.CRITICAL)
    planned = 0
    for kind in {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}.values():
        with (
            contextlib.suppress(Exception),
            torch.device("meta"),
        ):  # some have no defaults that make a model
            config = kind()
            model = AutoModelForCausalLM.from_config(config)
        if not isinstance(config, kind) or type(model.config) is not kind:
            continue
        parameters = parameters_of(model)
        assert sum(p.numel for p in parameters) == sum(p.numel() for p in model.parameters())
        layers = {p.layer for p in parameters} - {None}
        planned += len(layers) > 1
    assert planned > 130


SIZES = dict(
    vocab_size=3000,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=7,
    num_attention_heads=6,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    max_position_embeddings=4096,
)
GPT = dict(vocab_size=3000, bos_token_id=1, eos_token_id=2, pad_token_id=0)
MLA = dict(q_lora_rank=96, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32)
EXPERTS = dict(
    n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=96
)
FAMILIES = {
    "deepseek_v3": SIZES | MLA | EXPERTS | {"num_key_value_heads": 6, "first_k_dense_replace": 2},
    "minicpm3": SIZES | MLA | {"num_key_value_heads": 6},
    "gpt2": GPT
    | {
        "n_embd": 192,
        "n_layer": 7,
        "n_head": 6,
        "n_positions": 4096,
    },  # dropout, as its checkpoints have it
    "bloom": GPT
    | {
        "hidden_size": 192,
        "n_layer": 7,
        "n_head": 6,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },  # eager
    "gptj": GPT | {"n_embd": 192, "n_layer": 7, "n_head": 6, "rotary_dim": 16, "n_positions": 4096},
    "gemma4_text": SIZES
    | {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "layer_types": [*["sliding_attention", "full_attention"] * 3, "full_attention"],
        "sliding_window": 64,
    },  # layers of different widths
    "mixtral": SIZES | {"num_key_value_heads": 2, "num_local_experts": 8},
    "phi3": SIZES | {"num_key_value_heads": 2},
    "gpt_neox": SIZES,
    "lfm2": SIZES
    | {
        "num_key_value_heads": 2,
        "layer_types": [*["conv", "full_attention"] * 3, "full_attention"],
    },
    "llama": SIZES,
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 32},
    "gemma2": SIZES | {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 200},
    "gemma3_text": SIZES
    | {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 200,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 9,
    },
    "olmoe": SIZES | {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": SIZES
    | {"num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "moe_intermediate_size": 96},
    "falcon": GPT | {"hidden_size": 192, "num_hidden_layers": 7, "num_attention_heads": 6},
    "mamba2": GPT
    | {"hidden_size": 64, "num_hidden_layers": 7, "head_dim": 16, "num_heads": 8, "chunk_size": 64},
}


@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("fp32", False), ("bf16", False), ("bf16", True)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layers_stand_for_all(family, precision, checkpointing):
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    tokens = 128 if family == "mamba2" else TOKENS
    job = job_for(config, precision, tokens=tokens, checkpointing=checkpointing)
    assert beside(job) == pytest.approx(beside(job, every_layer=True), rel=0.01)


@pytest.mark.parametrize("rank", [8, -8])
def test_the_first_layers_stand_for_all_under_adapters(rank):
    if rank < 0:
        pytest.importorskip("bitsandbytes")
    job = job_for(CONFIG_MAPPING["llama"](**SIZES), "bf16", rank=rank)
    assert beside(job) == pytest.approx(beside(job, every_layer=True), rel=0.01)
    assert beside(job) < beside(job_for(CONFIG_MAPPING["llama"](**SIZES), "bf16")) * 1.1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_models_of_any_size_are_traced_by_their_first_layers(device):
    """70B of one kind of layer, 671B of two: seconds, and bytes that grow with the layers."""
    sizes = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    llama = CONFIG_MAPPING["llama"](num_hidden_layers=80, num_key_value_heads=8, **sizes)
    less = CONFIG_MAPPING["llama"](num_hidden_layers=79, num_key_value_heads=8, **sizes)
    large, small = (job_for(c, "bf16", tokens=2048, device=device) for c in (llama, less))
    weights = 2 * sum(p.numel for p in large.parameters if p.layer == 79)
    assert beside(large) - beside(small) > weights, "its cast weights, and what its backward reads"
    experts = job_for(
        CONFIG_MAPPING["deepseek_v3"](), "bf16", tokens=2048, device=device, checkpointing=True
    )
    assert experts.num_params > 670e9 and 0 < beside(experts) < 200e9


def test_what_no_kernel_fuses_grows_with_the_square():
    """Dropout keeps three float32 matrices of every head on a CPU; a GPU's fused kernel keeps
    none."""
    plain = CONFIG_MAPPING["gpt2"](**FAMILIES["gpt2"], attn_pdrop=0.0)
    dropped = CONFIG_MAPPING["gpt2"](**FAMILIES["gpt2"])

    def more(device: Any, tokens: int) -> int:
        jobs = (job_for(c, "fp32", tokens=tokens, device=device) for c in (dropped, plain))
        return beside(next(jobs)) - beside(next(jobs))

    assert more("cpu", 1024) > 7 * 6 * 12 * 1024**2 and more("cpu", 2048) > 3.5 * more("cpu", 1024)
    assert abs(more("cuda", 2048)) < 0.01 * more("cpu", 2048)


def test_experts_that_rest_make_no_activations():
    """Twice the experts: the same activations but for the router's numbers; twice the experts per
    token: about twice theirs."""

    def activations(experts: int, active: int) -> int:
        sizes = FAMILIES["mixtral"] | {"num_experts_per_tok": active, "num_local_experts": experts}
        job = job_for(CONFIG_MAPPING["mixtral"](**sizes), "fp32", tokens=2048)
        return job.trace().items["activations"]

    eight, sixteen, more = activations(8, 2), activations(16, 2), activations(8, 4)
    assert 0 <= sixteen - eight < 0.03 * eight
    assert more - eight == pytest.approx(7 * 2048 * 2 * 4 * (2 * 192 + 4 * 512), rel=0.05)


def test_more_of_anything_never_takes_less():
    config = CONFIG_MAPPING["llama"](**SIZES)
    for precision in PRECISIONS:
        jobs = [job_for(config, precision, tokens=n, device="cuda") for n in range(64, 4096, 800)]
        totals = [beside(job) for job in jobs]
        assert totals == sorted(totals)
        checkpointed = job_for(config, precision, tokens=3264, device="cuda", checkpointing=True)
        assert beside(checkpointed) < totals[-1]


def test_keys_and_values_of_a_token_are_those_that_the_layers_make():
    def of(family: str) -> int:
        return cached_elements(job_for(CONFIG_MAPPING[family](**FAMILIES[family]), "fp32").model)

    assert of("llama") == 7 * 2 * 192 and of("mixtral") == 7 * 2 * 2 * 32
    assert of("deepseek_v3") == 7 * (64 + 16), "MLA: the latent and the rotated key, for all heads"


def test_a_scan_is_traced_for_few_tokens_and_extended():
    config = CONFIG_MAPPING["mamba"](hidden_size=64, num_hidden_layers=1, vocab_size=500)
    jobs = [job_for(config, "fp32", tokens=n) for n in (64, 128, 1000, 2000)]
    few, many, more, most = map(beside, jobs)
    assert [memory_plan(job).is_estimate for job in jobs] == [False, False, True, True]
    assert most - more == pytest.approx((many - few) * 1000 / 64, rel=1e-3)


def test_the_worst_row_fills_the_budget():
    (group,) = worst_case("sft", 100)
    assert [len(c.token_ids) for c in group.completions] == [100]
    (group,) = worst_case("dpo", 101, completions=4)
    assert [len(c.token_ids) for c in group.completions] == [26] * 4
    assert all(all(c.loss_mask) for c in group.completions)
    (group,) = worst_case("reward", 101, completions=4)
    assert [sum(c.loss_mask) for c in group.completions] == [1] * 4
    (group,) = worst_case("dpo", 100, completions=4, shares=False)
    assert sum(len(c.token_ids) for c in group.completions) == 100
    assert len(worst_case("rl", 100, completions=8, rows=2)) == 2
