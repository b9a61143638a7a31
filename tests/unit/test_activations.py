"""The closed form of a step's memory against the trace of the real step, and its monotonies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from posttrain.memory.activations import Row, Setting, step_activations, worst_row
from posttrain.memory.architecture import architecture_of
from posttrain.memory.states import frozen_bytes, parameters_of, run_states
from posttrain.models.adapters import LoraConfig
from posttrain.packing.plan import PackingConfig
from posttrain.precision import PRECISIONS

COMPLETIONS = {"sft": 1, "reward": 2, "dpo": 2, "rl": 8}


def config_of(family: str):
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

    sizes = dict(
        vocab_size=4000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if family == "gpt2":
        no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2Config(
            vocab_size=4000,
            n_embd=256,
            n_layer=4,
            n_head=8,
            bos_token_id=1,
            eos_token_id=2,
            **no_dropout,
        )
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **sizes, head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128
        )
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma2": Gemma2Config}[family]
    extra = {} if family == "llama" else {"head_dim": 64}
    return kind(**sizes, **extra, tie_word_embeddings=family != "llama")


def predicted(config, method, precision, *, tokens, checkpointing, lora=None) -> int:
    import torch

    from posttrain.tracing.trace import build_model

    with torch.device("meta"):
        model = build_model(
            config, method, precision, gradient_checkpointing=checkpointing, lora=lora
        )
    parameters = parameters_of(model)
    row = worst_row(tokens, completions=COMPLETIONS[method], scored=method == "reward")
    in_4bit = lora is not None and lora.quantize_4bit
    held = PRECISIONS["fp32"] if in_4bit and precision.weight == precision.compute else precision
    setting = Setting(
        plan=held,
        checkpointing=checkpointing,
        logits_chunk=128,
        trains_all=lora is None,
        has_head=method != "reward",
        in_4bit=in_4bit,
    )
    reference = (
        frozen_bytes(parameters, compute=precision.compute)
        if method == "dpo" and lora is None
        else 0
    )
    act = step_activations(architecture_of(config, parameters), parameters, row, setting)
    return run_states(parameters, plan=precision).total + reference + act.total


@pytest.mark.parametrize(
    ("family", "method", "precision", "tokens", "checkpointing", "rank"),
    [
        ("llama", "sft", "fp32", 512, False, 0),
        ("llama", "dpo", "bf16", 1200, True, 0),
        ("llama", "rl", "bf16-pure", 512, False, 0),
        ("llama", "sft", "bf16", 512, False, 8),
        ("llama", "dpo", "bf16", 2048, True, 8),
        ("llama", "sft", "bf16-pure", 2048, True, 8),
        ("llama", "sft", "bf16", 2048, False, -8),
        ("qwen3", "dpo", "bf16", 2048, True, -8),
        ("gpt2", "sft", "bf16-pure", 512, False, -8),
        ("qwen3", "reward", "bf16", 512, False, 0),
        ("gemma2", "dpo", "fp32", 512, True, 0),
        ("gemma2", "rl", "bf16", 512, False, 0),
        ("gpt2", "sft", "bf16", 512, False, 0),
        ("qwen3_moe", "sft", "bf16-pure", 512, False, 0),
        ("qwen3_moe", "dpo", "bf16-pure", 512, True, 0),
    ],
)
def test_within_ten_percent_of_the_trace(family, method, precision, tokens, checkpointing, rank):
    """A rank below 0: of adapters around weights in 4 bit."""
    from posttrain.tracing.trace import trace_step

    config, lora = (
        config_of(family),
        LoraConfig(rank=abs(rank), quantize_4bit=rank < 0) if rank else None,
    )
    plan = PRECISIONS[precision]
    traced = trace_step(
        config,
        method=method,
        packing=PackingConfig(max_tokens=tokens, logits_chunk=128),
        precision=plan,
        gradient_checkpointing=checkpointing,
        lora=lora,
    )
    closed = predicted(config, method, plan, tokens=tokens, checkpointing=checkpointing, lora=lora)
    assert closed == pytest.approx(traced.peak_bytes, rel=0.10)


def test_an_experts_activations_are_those_of_the_active_ones():
    """Twice the experts: the same activations but for the router; twice the experts per token:
    about twice theirs."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    def layer_total(experts: int, active: int) -> int:
        config = MixtralConfig(
            vocab_size=500,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=experts,
            num_experts_per_tok=active,
        )
        with torch.device("meta"):
            parameters = parameters_of(AutoModelForCausalLM.from_config(config))
        arch = architecture_of(config, parameters)
        assert (
            arch.layers[0].experts == experts
            and arch.layers[0].expert_width == 512
            and arch.experts_per_token == active
        )
        from posttrain.memory.activations import layer_bytes

        return layer_bytes(
            arch.layers[0], arch, worst_row(256, completions=1), Setting(plan=PRECISIONS["fp32"])
        )

    eight, sixteen, more = layer_total(8, 2), layer_total(16, 2), layer_total(8, 4)
    assert sixteen - eight == 4 * 8 * 256, "the router's softmax"
    each = 4 * (2 * 128 + 4 * 512) + 32
    assert more - eight == 2 * each * 256


def test_more_of_anything_never_takes_less():
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of("llama")
    with torch.device("meta"):
        parameters = parameters_of(AutoModelForCausalLM.from_config(config))
    arch = architecture_of(config, parameters)
    for plan in PRECISIONS.values():
        setting = Setting(plan=plan, device="cuda")
        totals = [
            step_activations(arch, parameters, worst_row(n, completions=2), setting).total
            for n in range(64, 4096, 400)
        ]
        assert totals == sorted(totals)
        row = worst_row(4096, completions=2)
        kept = step_activations(arch, parameters, row, setting).total
        assert (
            step_activations(arch, parameters, row, replace(setting, checkpointing=True)).total
            < kept
        )
        assert step_activations(arch, parameters, row, replace(setting, flex=True)).total < kept
        assert (
            step_activations(arch, parameters, row, replace(setting, logits_chunk=4096)).total
            > kept
        )


def test_the_worst_row_fills_the_budget():
    assert worst_row(100, completions=1) == Row(segments=((100, 100),), trained=100)
    row = worst_row(101, completions=4)
    assert row.tokens == 101 and row.segments[1:] == ((25, 26),) * 4 and row.trained == 104
    assert worst_row(101, completions=4, scored=True).trained == 4
    assert worst_row(100, completions=4, shares_prompt=False).tokens == 100
