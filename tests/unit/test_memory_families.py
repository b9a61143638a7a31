"""The planner on architectures that differ: every decoder of transformers is planned, and the
closed form follows the trace."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from posttrain.memory.architecture import architecture_of
from posttrain.memory.job import Job
from posttrain.memory.plan import memory_plan
from posttrain.memory.states import parameters_of
from posttrain.models.policy import choose_mode
from posttrain.packing.plan import PackingConfig
from posttrain.precision import PRECISIONS
from posttrain.tracing.trace import trace_step

TOKENS = 640


def job_for(config: Any, precision: str, *, tokens: int = TOKENS) -> Job:
    """SFT on one CPU."""
    plan = PRECISIONS[precision]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=plan.load_dtype)
    parameters = tuple(parameters_of(model))
    mode = choose_mode(model, PackingConfig(max_tokens=tokens), device_type="cpu").mode
    return Job(
        method="sft",
        arch=architecture_of(model.config, parameters),
        parameters=parameters,
        precision=plan,
        max_tokens=tokens,
        completions=1,
        shares_prompt=mode == "shared",
        own_attention=mode == "single",
    )


def test_every_decoder_that_transformers_can_build_is_planned(caplog):
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
        parameters = tuple(parameters_of(model))
        arch = architecture_of(config, parameters)
        job = Job(
            method="sft",
            arch=arch,
            parameters=parameters,
            precision=PRECISIONS["bf16"],
            max_tokens=1024,
            completions=1,
        )
        plan = memory_plan(job)
        assert plan.phases["update"]["activations"] > 0 and plan.live_bytes > 16 * job.num_params, (
            kind.model_type
        )
        planned += 1
    assert planned > 100


SIZES = dict(
    vocab_size=3000,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
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
        "n_layer": 4,
        "n_head": 6,
        "n_positions": 4096,
    },  # dropout, as its checkpoints have it
    "bloom": GPT
    | {
        "hidden_size": 192,
        "n_layer": 4,
        "n_head": 6,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },  # eager
    "gptj": GPT | {"n_embd": 192, "n_layer": 4, "n_head": 6, "rotary_dim": 16, "n_positions": 4096},
    "gemma4_text": SIZES
    | {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 64,
    },  # layers of different widths
    "mixtral": SIZES | {"num_key_value_heads": 2, "num_local_experts": 8},
    "phi3": SIZES | {"num_key_value_heads": 2},
    "gpt_neox": SIZES,
    "lfm2": SIZES | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_form_follows_the_trace(family, precision):
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    traced = trace_step(
        config,
        method="sft",
        packing=PackingConfig(max_tokens=TOKENS),
        precision=PRECISIONS[precision],
    )
    assert memory_plan(job_for(config, precision)).live_bytes == pytest.approx(
        traced.peak_bytes, rel=0.05
    )


def test_what_no_kernel_fuses_grows_with_the_square():
    """Dropout keeps three float32 matrices of every head on a CPU; a GPU's fused kernel keeps
    none."""
    plain = CONFIG_MAPPING["gpt2"](**FAMILIES["gpt2"], attn_pdrop=0.0)
    dropped = CONFIG_MAPPING["gpt2"](**FAMILIES["gpt2"])

    def live(config: Any, device: str, tokens: int) -> int:
        from dataclasses import replace

        return memory_plan(
            replace(job_for(config, "fp32", tokens=tokens), device=device)
        ).live_bytes

    more = [live(dropped, "cpu", n) - live(plain, "cpu", n) for n in (1024, 2048)]
    assert more[0] > 4 * 6 * 12 * 1024**2 and more[1] > 3.5 * more[0]
    assert live(dropped, "cuda", 2048) == live(plain, "cuda", 2048)


def test_layers_without_attention_are_marked_as_estimates():
    mamba = job_for(
        CONFIG_MAPPING["mamba"](hidden_size=64, num_hidden_layers=2, vocab_size=500), "fp32"
    )
    assert mamba.arch.has_estimated_layers and mamba.arch.kv_elements_per_token == 0
    assert not job_for(CONFIG_MAPPING["llama"](**SIZES), "fp32").arch.has_estimated_layers
