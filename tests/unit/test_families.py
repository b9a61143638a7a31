"""Packed log-probs and gradients of every supported family against the model's own forward, one
sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator

from posttrain.losses.sft import sft
from posttrain.models.policy import Policy, plain_attention
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.training.step import step_gradient
from tests.helpers import (
    VOCAB,
    gradients_of,
    max_difference,
    plain_logps,
    random_groups,
    reference_gradient,
    token_mean,
)

SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2_sliding": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "gemma2": (
        "Gemma2",
        dict(
            head_dim=16,
            sliding_window=6,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=16,
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(head_dim=16, sliding_window=6, sliding_window_pattern=2, query_pre_attn_scalar=16),
    ),
    "mistral": ("Mistral", dict(sliding_window=6, head_dim=16)),
    "gpt2": (
        "GPT2",
        dict(
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        ),
    ),
    "phi3": ("Phi3", {}),
    "granite": (
        "Granite",
        dict(
            logits_scaling=3.0,
            residual_multiplier=0.7,
            embedding_multiplier=2.0,
            attention_multiplier=0.2,
        ),
    ),
    "cohere": ("Cohere", dict(logit_scale=0.3)),
    "smollm3": ("SmolLM3", {}),
    "olmo2": ("Olmo2", {}),
}
CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
}
GROUPS = random_groups(5, sizes=(1, 3), seed=11)


def build(family: str) -> torch.nn.Module:
    name, overrides = FAMILIES[family]
    config_name, model_name = CLASSES.get(name, (f"{name}Config", f"{name}ForCausalLM"))
    torch.manual_seed(0)
    return getattr(transformers, model_name)(
        getattr(transformers, config_name)(**{**SMALL, **overrides})
    )


@pytest.mark.parametrize("mode", ["shared", "packed", "single"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_one_sequence_at_a_time(family, mode):
    reference = build(family)
    wanted_loss, wanted = reference_gradient(reference, GROUPS, token_mean)
    model = build(family)
    policy = Policy(model, PackingConfig(mode=mode, logits_chunk=5))
    plan = plan_step(GROUPS, world_size=1, max_tokens=60, mode=mode)
    result = step_gradient(Accelerator(cpu=True), policy, GROUPS, plan, sft, mode=mode)
    got = gradients_of(model)
    scale = max(float(g.abs().max()) for g in wanted.values())
    assert result.loss == pytest.approx(wanted_loss, abs=1e-6)
    assert max_difference(got, wanted) < 2e-6 * max(scale, 1.0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen2_sliding", "mistral"])
def test_checkpointing_recomputes_windows_and_softcaps_of_packed_rows(family):
    """The layout must reach the attention again when a layer is recomputed in the backward."""
    wanted_loss, wanted = reference_gradient(build(family), GROUPS, token_mean)
    model = build(family).train()
    model.activation_checkpointing_enable()
    policy = Policy(model, PackingConfig())
    plan = plan_step(GROUPS, world_size=1, max_tokens=60, mode="shared")
    result = step_gradient(Accelerator(cpu=True), policy, GROUPS, plan, sft, mode="shared")
    assert result.loss == pytest.approx(wanted_loss, abs=1e-6)
    assert max_difference(gradients_of(model), wanted) < 2e-6 * max(
        float(g.abs().max()) for g in wanted.values()
    )


@pytest.mark.parametrize("mode", ["shared", "single"])
def test_lora_on_every_layer_and_the_head(mode):
    from peft import LoraConfig, get_peft_model

    def adapted() -> torch.nn.Module:
        model = build("llama")
        torch.manual_seed(3)
        targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
        return get_peft_model(
            model,
            LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"),
        )

    wanted_loss, wanted = reference_gradient(adapted(), GROUPS, token_mean)
    model = adapted()
    policy = Policy(model, PackingConfig(mode=mode, logits_chunk=5))
    plan = plan_step(GROUPS, world_size=1, max_tokens=60, mode=mode)
    result = step_gradient(Accelerator(cpu=True), policy, GROUPS, plan, sft, mode=mode)
    assert result.loss == pytest.approx(wanted_loss, abs=1e-6)
    assert wanted and all("lora" in name for name in wanted)
    assert max_difference(gradients_of(model), wanted) < 2e-6 * max(
        float(g.abs().max()) for g in wanted.values()
    )


def phi3_longrope() -> torch.nn.Module:
    """Phi-3 with long RoPE: other frequencies for rows with a position past 20."""
    torch.manual_seed(0)
    rope = dict(
        rope_type="longrope",
        rope_theta=10000.0,
        short_factor=[1.0] * 4,
        long_factor=[3.0] * 4,
        original_max_position_embeddings=20,
    )
    config = transformers.Phi3Config(
        **{**SMALL, "rope_parameters": rope, "original_max_position_embeddings": 20}
    )
    return transformers.Phi3ForCausalLM(config)


@pytest.mark.parametrize("mode", ["shared", "packed"])
def test_long_rope_rows_never_mix_lengths_on_both_sides_of_the_threshold(mode):
    groups = random_groups(8, sizes=(3,), seed=2, max_prompt=15, max_completion=14)
    lengths = [len(g.prompt_ids) + len(c.token_ids) for g in groups for c in g.completions]
    assert min(lengths) < 15 and max(lengths) > 24
    model = phi3_longrope()
    policy = Policy(model, PackingConfig(mode=mode))
    assert policy.forward_mode.length_limit == 20
    plan = plan_step(groups, world_size=1, max_tokens=80, mode=mode, length_limit=20)
    for micro_batch in plan.ranks[0]:
        batch = pack(groups, micro_batch.parts, mode=mode)
        logps_T = policy(batch).logps_T
        for s, (g, k) in enumerate(batch.refs):
            trained = [i for i, m in enumerate(groups[g].completions[k].loss_mask) if m]
            cut = type(groups[g].completions[k])(
                token_ids=groups[g].completions[k].token_ids[: trained[-1] + 1],
                loss_mask=groups[g].completions[k].loss_mask[: trained[-1] + 1],
            )
            if len(groups[g].prompt_ids) + trained[-1] == 20:
                continue  # one token fewer than the model's own forward, just at the threshold
            alone = type(groups[g])(prompt_ids=groups[g].prompt_ids, completions=[cut])
            with plain_attention(model):
                wanted = plain_logps(model, alone, 0)
            torch.testing.assert_close(logps_T[batch.sequence_T == s], wanted, atol=2e-5, rtol=0)


def test_the_self_check_keeps_long_rope_lengths_apart():
    from posttrain.training.selfcheck import self_check

    groups = random_groups(8, sizes=(3,), seed=2, max_prompt=15, max_completion=14)
    policy = Policy(phi3_longrope(), PackingConfig())
    assert self_check(policy, groups, max_tokens=500) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_self_check_sees_a_wrong_mask_and_a_missing_logit_transform(family, monkeypatch):
    from posttrain.models.logprobs import LogitTransform
    from posttrain.packing import attention
    from posttrain.training.selfcheck import SelfCheckError, self_check

    policies = [Policy(build(family), PackingConfig(mode=mode)) for mode in ("shared", "auto")]
    assert self_check(policies[0], GROUPS, max_tokens=500) < 1e-5
    if family == "gemma2":
        for policy in policies:
            policy.transform = LogitTransform()
    else:
        monkeypatch.setattr(attention, "_segment_mask", lambda layout, i, window, q: None)
    with pytest.raises(SelfCheckError, match="differ from the model's own"):
        self_check(policies[0], GROUPS, max_tokens=500)
    assert policies[1].forward_mode.mode == "shared"
    assert self_check(policies[1], GROUPS, max_tokens=500) < 1e-5, "the next mode down is exact"
    found = policies[1].forward_mode
    assert found.mode == "single" and found.own_logits == (family == "gemma2")


def test_the_self_check_is_bounded(monkeypatch):
    """Of a long prompt and long completions only the ends that meet are computed; an untrained head
    counts as prompt."""
    from posttrain.training import selfcheck
    from posttrain.types import Completion, Pair, PromptGroup

    monkeypatch.setattr(selfcheck, "SELF_CHECK_TOKENS", 6)
    monkeypatch.setattr(selfcheck, "SELF_CHECK_PROMPT_TOKENS", 20)
    policy, seen = Policy(build("llama"), PackingConfig()), []
    policy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    completions = [
        Completion(token_ids=[3] * 30, loss_mask=[0] * 25 + [1] * 5),
        Completion(token_ids=[4] * 9, loss_mask=[1] * 9),
    ]
    pairs = (Pair(chosen=0, rejected=1),)
    groups = [
        PromptGroup(prompt_ids=list(range(5, 65)), completions=completions, pairs=pairs),
        PromptGroup(prompt_ids=list(range(5, 65)), completions=completions[:1]),
    ]
    assert selfcheck.self_check(policy, groups, max_tokens=500) < 1e-5
    plain = [s.group for s in seen if hasattr(s, "group")]
    assert [len(g.prompt_ids) for g in plain] == [20, 20]
    assert [[len(c.token_ids) for c in g.completions] for g in plain] == [[6], [5]]
    assert plain[0].prompt_ids[-1] == 64 and list(plain[1].prompt_ids) == [3] * 20
    assert max(s.input_ids_L.shape[0] for s in seen if hasattr(s, "layout")) <= 2 * (20 + 6)


def test_the_self_check_of_4_bit_layers_is_in_float32(tmp_path, monkeypatch):
    """Products in bfloat16 would round by more than the limit of float32 weights in a model of some
    depth; they are in bfloat16 again afterwards."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from posttrain.models.adapters import LoraConfig
    from posttrain.models.load import ModelConfig, load_model
    from posttrain.training.selfcheck import self_check

    build("llama").save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), lora=LoraConfig(rank=2, quantize_4bit=True))
    policy = Policy(
        load_model(config, dtype=torch.float32, compute=torch.bfloat16), PackingConfig()
    )
    multiply, multiplied = bitsandbytes.matmul_4bit, set()

    def watched(x, *args, **kwargs):
        multiplied.add(x.dtype)
        return multiply(x, *args, **kwargs)

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", watched)
    assert self_check(policy, GROUPS, max_tokens=500) < 1e-5 and multiplied == {torch.float32}
    layers = [m for m in policy.modules() if hasattr(m, "compute_dtype")]
    assert len(layers) == 2 * 7 and {m.compute_dtype for m in layers} == {torch.bfloat16}


def test_dropout_that_is_no_module_is_found():
    """OPT calls F.dropout; two identical completions would get the same mask on a shared prompt."""
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        dropout=0.1,
        word_embed_proj_dim=32,
    )
    assert (
        Policy(transformers.OPTForCausalLM(config), PackingConfig()).forward_mode.mode != "shared"
    )


def test_layers_that_drop_the_layout_step_down_to_single():
    config = transformers.NemotronConfig(**{**SMALL, "head_dim": 8})
    policy = Policy(transformers.NemotronForCausalLM(config), PackingConfig())
    assert policy.forward_mode.mode == "single"
    with pytest.raises(ValueError, match="not exact for this model"):
        Policy(transformers.NemotronForCausalLM(config), PackingConfig(mode="shared"))


def test_attention_sinks_and_state_space_layers_run_one_sequence_per_forward():
    config = transformers.GptOssConfig(
        **{**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    )
    policy = Policy(transformers.GptOssForCausalLM(config), PackingConfig())
    assert policy.forward_mode.mode == "single" and "sinks" in policy.forward_mode.reason
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    policy = Policy(transformers.MambaForCausalLM(config), PackingConfig())
    assert (
        policy.forward_mode.mode == "single" and "AttentionInterface" in policy.forward_mode.reason
    )
    with pytest.raises(ValueError, match="not exact for this model"):
        Policy(transformers.MambaForCausalLM(config), PackingConfig(mode="shared"))


def test_dropout_falls_back_to_one_segment_per_completion():
    name, overrides = FAMILIES["llama"]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, **overrides, "attention_dropout": 0.1})
    )
    assert Policy(model, PackingConfig()).forward_mode.mode == "packed"
    with pytest.raises(ValueError, match="dropout"):
        Policy(model, PackingConfig(mode="shared"))


def test_a_packed_row_is_blind_to_other_groups_and_siblings():
    """Other tokens in a sibling or in another group leave a completion's log-probs
    bit-identical."""
    model = build("llama")
    policy = Policy(model, PackingConfig())
    parts = [
        GroupPart(group=i, completions=tuple(range(len(g.completions))))
        for i, g in enumerate(GROUPS)
    ]
    before_batch = pack(GROUPS, parts, mode="shared")
    before = policy(before_batch).logps_T
    g = GROUPS[1]
    changed = type(g.completions[0])(
        token_ids=[(t + 1) % VOCAB for t in g.completions[0].token_ids],
        loss_mask=g.completions[0].loss_mask,
    )
    other = [
        *GROUPS[:1],
        type(g)(prompt_ids=g.prompt_ids, completions=[changed, *g.completions[1:]]),
        *GROUPS[2:],
    ]
    after = policy(pack(other, parts, mode="shared")).logps_T
    index = before_batch.refs.index((1, 0))
    same = before_batch.sequence_T != index
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])
