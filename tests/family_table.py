"""Every causal family of transformers, built tiny, and the mode in which it trains exactly.

``python -m tests.family_table`` writes the table into docs/families.md.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

VOCAB = 97
MOST_PARAMETERS = 2_000_000
NUMBERS: dict[tuple[str, ...], Any] = {
    ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size"): VOCAB,
    ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim", "dim"): 32,
    ("hidden_dim", "lru_width", "dim_model", "emb_dim", "input_embedding_size"): 32,
    ("intermediate_size", "n_inner", "ffn_dim", "dim_ff", "intermediate_size_mlp"): 48,
    ("moe_intermediate_size", "shared_expert_intermediate_size", "feed_forward_size"): 48,
    ("encoder_ffn_dim", "decoder_ffn_dim", "expert_ffn_hidden_size", "ffn_hidden_size"): 48,
    ("shared_intermediate_size", "dense_intermediate_size", "dff"): 48,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"): 2,
    ("encoder_layers", "num_decoder_layers", "num_encoder_layers"): 2,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"): 4,
    ("encoder_attention_heads", "num_decoder_attention_heads"): 4,
    ("num_encoder_attention_heads", "swa_num_attention_heads"): 4,
    ("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"): 2,
    ("head_dim", "global_head_dim", "swa_head_dim", "attention_head_dim", "dim_head"): 8,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_length"): 128,
    ("max_seq_length", "max_sequence_length", "max_target_positions"): 128,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token", "num_experts_per_token"): 2,
    ("n_group", "topk_group", "n_shared_experts", "num_shared_experts"): 1,
    ("sliding_window", "attention_window_size", "attention_chunk_size", "local_attention"): 8,
    ("sliding_window_size", "window_size", "swa_window_size"): 8,
    ("q_lora_rank", "kv_lora_rank"): 16,
    ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"): 8,
    ("initializer_range", "init_std", "initializer_factor"): 0.2,
    ("mamba_n_heads", "mamba_num_heads"): 4,
    ("mamba_d_head", "mamba_head_dim"): 16,
    ("mamba_d_state", "state_size", "mamba_chunk_size", "chunk_size", "ssm_state_size"): 8,
    ("mamba_n_groups", "n_groups", "mamba_ngroups"): 1,
    ("mamba_d_ssm",): 64,
    ("linear_num_value_heads", "linear_num_key_heads", "mamba_dt_rank"): 4,
    ("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"): 8,
    ("index_head_dim", "index_n_heads", "index_topk"): 8,
    ("image_size",): 8,
    ("patch_size",): 4,
    ("pad_token_id",): 0,
    ("bos_token_id",): 1,
    ("eos_token_id",): 2,
    ("is_decoder",): True,
    ("use_cache",): False,
}
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")
SMALL = {name: value for names, value in NUMBERS.items() for name in names}

INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SLIDING_MLA = {
    "shared_experts_intermediate_size": 48,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
BLT = {"hidden_size_global": 32}

MORE: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": BLT,
        "decoder_config": BLT,
        "global_config": BLT,
        "patcher_config": BLT,
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {
            "adapter_out_dim": 32,
            "adapter_input_size": 32,
            "downsample_hidden_size": 16,
        },
        "text_config": SLIDING_MLA,
    },
    "dots3_note_text": SLIDING_MLA,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "got_ocr2": {
        "vision_config": {"output_channels": 8, "mlp_dim": 48, "global_attn_indexes": [1]}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": 8},
    "moshi": {"audio_vocab_size": 97},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 48},
    "phi4_multimodal": {
        "audio_config": {"ext_pw_out_channel": 8, "nemo_conv_channels": 8, "num_blocks": 1}
    },
    "phimoe": {"sliding_window": 8},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "hash_seed": 0},
    "rembert": {"output_embedding_size": 24, "input_embedding_size": 24},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "starcoder2": {"sliding_window": 8},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "a draft model, which reads the keys and values of another model",
    "gemma4_unified_assistant": "a draft model, which reads the keys and values of another model",
    "musicgen": "its config is that of three models, of which the class builds none",
    "musicgen_melody": "its config is that of three models, of which the class builds none",
}

MODES: dict[str, str] = {
    "afmoe": "shared",
    "apertus": "shared",
    "arcee": "shared",
    "aria_text": "shared",
    "axk1": "shared",
    "axk2": "single",
    "bailing_hybrid": "single",
    "bamba": "single",
    "bart": "single",
    "beam": "shared",
    "bert": "own",
    "bert-generation": "shared",
    "big_bird": "own",
    "bigbird_pegasus": "single",
    "biogpt": "single",
    "bitnet": "shared",
    "blenderbot": "single",
    "blenderbot-small": "single",
    "bloom": "single",
    "blt": "single",
    "camembert": "own",
    "codegen": "single",
    "cohere": "shared",
    "cohere2": "shared",
    "cohere2_moe": "shared",
    "cohere_compass_text": "shared",
    "cpmant": "not causal",
    "ctrl": "shared",
    "cwm": "shared",
    "data2vec-text": "own",
    "dbrx": "shared",
    "deepseek_v2": "shared",
    "deepseek_v3": "shared",
    "deepseek_v32": "single",
    "deepseek_v4": "single",
    "diffllama": "shared",
    "doge": "single",
    "dots1": "shared",
    "dots3_note": "single",
    "dots3_note_text": "single",
    "electra": "own",
    "emu3": "shared",
    "ernie": "own",
    "ernie4_5": "shared",
    "ernie4_5_moe": "shared",
    "exaone4": "shared",
    "exaone_moe": "shared",
    "falcon": "single",
    "falcon_h1": "single",
    "falcon_mamba": "single",
    "flex_olmo": "shared",
    "flint": "single",
    "fuyu": "shared",
    "gemma": "shared",
    "gemma2": "shared",
    "gemma3": "shared",
    "gemma3_text": "shared",
    "gemma3n_text": "shared",
    "gemma4": "shared",
    "gemma4_text": "shared",
    "gemma4_unified": "shared",
    "gemma4_unified_text": "shared",
    "git": "single",
    "glm": "shared",
    "glm4": "shared",
    "glm4_moe": "shared",
    "glm4_moe_lite": "shared",
    "glm_moe_dsa": "single",
    "got_ocr2": "shared",
    "gpt-sw3": "shared",
    "gpt2": "shared",
    "gpt_bigcode": "shared",
    "gpt_neo": "single",
    "gpt_neox": "shared",
    "gpt_neox_japanese": "single",
    "gpt_oss": "single",
    "gptj": "single",
    "granite": "shared",
    "granite_swa": "single",
    "granitemoe": "shared",
    "granitemoe_swa": "single",
    "granitemoehybrid": "single",
    "granitemoeshared": "shared",
    "helium": "shared",
    "hrm_text": "shared",
    "hunyuan_v1_dense": "shared",
    "hunyuan_v1_moe": "shared",
    "hy_v3": "shared",
    "hy_v4": "single",
    "hyperclovax": "shared",
    "inkling2_text": "single",
    "inkling_text": "own",
    "internlm3": "shared",
    "iquestcoder": "shared",
    "jais2": "shared",
    "jamba": "single",
    "jetmoe": "shared",
    "kimi_linear": "single",
    "kolibri1": "shared",
    "laguna": "shared",
    "lfm2": "shared",
    "lfm2_moe": "single",
    "lfm3": "single",
    "llama": "shared",
    "llama4": "single",
    "llama4_text": "single",
    "longcat_flash": "shared",
    "mamba": "single",
    "mamba2": "single",
    "marian": "single",
    "mbart": "single",
    "megatron-bert": "own",
    "mellum": "shared",
    "mimo_v2_flash": "single",
    "minicpm3": "shared",
    "minimax": "single",
    "minimax_m2": "shared",
    "minimax_m3_vl_text": "shared",
    "ministral": "shared",
    "ministral3": "shared",
    "mistral": "shared",
    "mixtral": "shared",
    "mllama": "shared",
    "modernbert-decoder": "own",
    "moshi": "single",
    "moss_transcribe_diarize": "shared",
    "mpt": "single",
    "mvp": "single",
    "nanochat": "shared",
    "nemotron": "single",
    "nemotron_h": "single",
    "olmo": "shared",
    "olmo2": "shared",
    "olmo3": "shared",
    "olmo_hybrid": "single",
    "olmoe": "shared",
    "openai-gpt": "single",
    "opt": "shared",
    "pegasus": "single",
    "persimmon": "shared",
    "phi": "shared",
    "phi3": "shared",
    "phi4_multimodal": "shared",
    "phimoe": "single",
    "plbart": "single",
    "prophetnet": "own",
    "qwen2": "shared",
    "qwen2_moe": "shared",
    "qwen3": "shared",
    "qwen3_5": "single",
    "qwen3_5_moe": "single",
    "qwen3_5_moe_text": "single",
    "qwen3_5_text": "single",
    "qwen3_moe": "shared",
    "qwen3_next": "single",
    "qwen4_exp": "single",
    "qwen4_exp_text": "single",
    "recurrent_gemma": "single",
    "reformer": "single",
    "rembert": "own",
    "roberta": "own",
    "roberta-prelayernorm": "own",
    "roc_bert": "own",
    "roformer": "own",
    "rwkv": "single",
    "seed_oss": "shared",
    "smollm3": "shared",
    "solar_open": "shared",
    "stablelm": "single",
    "starcoder2": "shared",
    "trocr": "single",
    "vaultgemma": "shared",
    "whisper": "single",
    "xglm": "single",
    "xlm": "single",
    "xlm-roberta": "own",
    "xlm-roberta-xl": "own",
    "xlnet": "single",
    "xlstm": "single",
    "xmod": "own",
    "youtu": "shared",
    "zamba": "single",
    "zamba2": "single",
    "zaya": "single",
}


def families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_settings(config_class: type) -> dict[str, Any]:
    """Keyword arguments that make a config of any family small, as far as its names tell."""
    default = config_class()
    values = default.to_dict()
    known = {*values, *inspect.signature(config_class.__init__).parameters}
    renamed = getattr(config_class, "attribute_map", {})
    settings: dict[str, Any] = {}
    for name, value in SMALL.items():
        given = values.get(renamed.get(name, name), value)
        if name in known | {*renamed} and (given is not None or name == "head_dim"):
            settings.setdefault(renamed.get(name, name), value)
    if values.get("num_key_value_heads") == values.get("num_attention_heads") is not None:
        settings["num_key_value_heads"] = 4
    settings |= {n: 0.0 for n, v in values.items() if "drop" in n and isinstance(v, float)}
    settings |= layers_of_every_kind(settings, values)
    for name in getattr(config_class, "sub_configs", {}):
        if (sub_config := vars(default).get(name)) is not None:
            settings[name] = small_settings(type(sub_config))
            settings[name]["model_type"] = sub_config.model_type
    return settings


def layers_of_every_kind(settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """At least two layers, and at least one of each kind of the family's default config."""
    kinds = {n: list(dict.fromkeys(values[n])) for n in LAYER_LISTS if is_texts(values.get(n))}
    count = max([2, *map(len, kinds.values())])
    lists = {n: [kind[i % len(kind)] for i in range(count)] for n, kind in kinds.items()}
    return lists | {n: count for n in settings if "layer" in n and SMALL.get(n) == 2}


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``more`` over ``settings``, nested; a value of ``...`` takes the setting away."""
    result = dict(settings)
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        elif value is ...:
            result.pop(name, None)
        else:
            result[name] = value
    return result


def build(family: str) -> Any:
    """The family's causal language model with random weights of float32, in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config_class = type(AutoConfig.for_model(family))
    settings = merged(small_settings(config_class), MORE.get(family, {}))
    config = config_class(**settings)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < MOST_PARAMETERS, f"{family} is not tiny: {size:,} parameters"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**settings)).float().eval()


DOCUMENTATION = """# Families

Every causal family of transformers trains exactly, in the first of these modes that the \
self-check at the start of a run finds exact (`packing.mode: auto`; with `train.self_check: false` \
nothing steps down). `tests/unit/test_family_sweep.py` builds each one tiny and compares log-probs \
and gradient with a plain loop over the model's own forward. `python -m tests.family_table` writes \
this page.

| mode | how sequences reach the model | families |
|---|---|---|
{modes}

Not built in the test:

| family | why |
|---|---|
{not_built}
"""
MODE_WORDS = {
    "shared": "many sequences in a row, each prompt computed once",
    "packed": "many sequences in a row, without a shared prompt: any of the above with dropout",
    "single": "one sequence at a time through the model's own attention, logits of trained tokens",
    "own": "one sequence at a time through the model's own forward, with all its logits",
    "not causal": "refused: predictions depend on the tokens that follow",
}


def document() -> tuple[Path, str]:
    """(path, text) of the page of the documentation."""
    modes = []
    for mode, words in MODE_WORDS.items():
        names = ", ".join(f"`{name}`" for name, found in sorted(MODES.items()) if found == mode)
        modes.append(f"| {mode} | {words} | {names} |")
    not_built = [f"| `{name}` | {why} |" for name, why in NOT_BUILT.items()]
    text = DOCUMENTATION.format(modes="\n".join(modes), not_built="\n".join(not_built))
    return Path(__file__).parents[1] / "docs" / "families.md", text


if __name__ == "__main__":
    path, text = document()
    path.write_text(text)
