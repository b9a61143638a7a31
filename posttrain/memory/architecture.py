"""What the activations of a decoder depend on, read off a transformers config and the names and shapes of its parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain.memory.states import Parameter

_LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")
_EXTRA_OF_ACTIVATION = {"gelu_new": 3, "gelu_fast": 4, "quick_gelu": 1, "relu2": 1, "gelu_python": 3}
"""Tensors that an activation written in Python saves beside its input and its output; torch's own save none."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: widths in elements per token."""

    norm: Literal["rms", "layer"] = "rms"
    """rms: in Python, in float32; layer: torch's LayerNorm."""
    norms_before: int = 2
    """Norms whose input is the residual stream."""
    norms_after: int = 0
    """Norms of what a sublayer adds to it (Gemma 2 and 3)."""
    qk_norm: bool = False
    attention_readers: int = 3
    """Linear layers that read the normed stream: q, k and v, or one for all."""
    mlp_readers: int = 2
    mlp_width: int = 0
    """Of the dense feed-forward (and shared experts); 0: none."""
    mlp_tensors: int = 4
    """Tensors of that width which the backward reads."""
    experts: int = 0
    """Experts in total; 0: a dense layer."""
    expert_width: int = 0
    largest_matrix: int = 0
    """Elements of the largest weight, all experts of a layer together."""
    adapter_ranks: int = 0
    """Sum of the ranks of its adapters."""
    adapted_inputs: int = 0
    """Widths of all inputs of adapted linear layers, added up."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only language model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: tuple[Layer, ...]
    experts_per_token: int = 0
    keeps_float32_norms: bool = False
    """Gemma multiplies by the norm's weight in float32."""
    softcaps_attention: bool = False
    softcaps_logits: bool = False
    scales_logits: bool = False
    sliding_window: int | None = None
    max_positions: int | None = None
    tied: bool = False

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim


def _first(config: Any, *names: str, default: Any = None) -> Any:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), default)


def architecture_of(config: Any, parameters: Sequence[Parameter]) -> Architecture:
    """From the config and ``states.parameters_of`` the model (on the meta device if need be).

    Raises ValueError where the config has no hidden size, heads or layers: no decoder that can be planned.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, heads = _first(text, "hidden_size", "n_embd", "d_model"), _first(text, "num_attention_heads", "n_head", "n_heads")
    by_layer: dict[int, list[Parameter]] = {}
    for p in parameters:
        found = _LAYER.search(f".{p.name}")
        if found:
            by_layer.setdefault(int(found.group(1)), []).append(p)
    if not hidden or not heads or not by_layer:
        raise ValueError(f"{type(config).__name__} has no hidden size, heads or layers: only decoder models can be planned.")
    kind = str(getattr(text, "model_type", ""))
    is_gemma = kind.startswith("gemma")
    act = str(_first(text, "hidden_act", "activation_function", "hidden_activation", default="silu"))
    layers = tuple(_layer(own, hidden, act) for _, own in sorted(by_layer.items()))
    return Architecture(
        hidden=hidden,
        heads=heads,
        kv_heads=_first(text, "num_key_value_heads", default=heads),
        head_dim=_first(text, "head_dim", default=hidden // heads),
        vocab=text.vocab_size,
        layers=layers,
        experts_per_token=_first(text, "num_experts_per_tok", "top_k", default=0) if any(x.experts for x in layers) else 0,
        keeps_float32_norms=is_gemma,
        softcaps_attention=getattr(text, "attn_logit_softcapping", None) is not None,
        softcaps_logits=getattr(text, "final_logit_softcapping", None) is not None,
        scales_logits=_first(text, "logit_scale", "logits_scaling", default=1.0) != 1.0,
        sliding_window=getattr(text, "sliding_window", None) if is_gemma else None,
        max_positions=_first(text, "max_position_embeddings", "n_positions"),
        tied=any(p.in_embedding and p.in_linear for p in parameters),
    )


def _layer(parameters: Sequence[Parameter], hidden: int, act: str) -> Layer:
    adapters = [p for p in parameters if ".lora_A." in p.name]
    own = [p for p in parameters if ".lora_" not in p.name]
    plain = [p.name.replace(".base_layer", "") for p in own]
    stream_norms = [
        p for p in own if len(p.shape) == 1 and p.shape[0] == hidden and p.name.endswith("weight") and _is_norm(p.name)
    ]
    after = sum("post_feedforward" in p.name for p in stream_norms)
    experts = [p for p in own if len(p.shape) == 3 and "experts" in p.name]
    mlp = [p for p in own if len(p.shape) == 2 and not _is_attention(p.name) and ".experts." not in p.name]
    widths = {p.name: next((n for n in p.shape if n != hidden), hidden) for p in mlp if not _is_router(p.name)}
    gated = any(name.endswith(("gate_proj.weight", "gate_up_proj.weight", "w1.weight")) for name in plain)
    fused = any(name.endswith("gate_up_proj.weight") for name in plain)
    width = max(widths.values(), default=0) // (2 if fused else 1)
    wide = max((p.numel // (p.shape[0] * hidden) for p in experts), default=0)
    layer = Layer(
        norm="layer" if any(p.name.endswith("bias") and _is_norm(p.name) for p in own) else "rms",
        norms_before=max(len(stream_norms) - 2 * after, 1),
        norms_after=2 * after,
        qk_norm=any("q_norm" in name or "q_layernorm" in name for name in plain),
        attention_readers=3 if any("q_proj" in name for name in plain) else 1,
        mlp_readers=2 if gated and not fused else 1,
        mlp_width=width,
        mlp_tensors=(4 if gated else 2) + _EXTRA_OF_ACTIVATION.get(act, 0),
        experts=experts[0].shape[0] if experts else 0,
        expert_width=wide // 2 if any("gate_up" in p.name for p in experts) else wide,
        largest_matrix=max((p.numel for p in own), default=0),
    )
    return replace(layer, adapter_ranks=sum(p.shape[0] for p in adapters), adapted_inputs=sum(p.shape[1] for p in adapters))


def _is_norm(name: str) -> bool:
    return any(word in name for word in ("norm", ".ln_", "ln_f", "layernorm"))


def _is_attention(name: str) -> bool:
    return ".self_attn." in name or ".attn." in name or ".attention." in name


def _is_router(name: str) -> bool:
    return name.replace(".base_layer", "").endswith((".gate.weight", ".router.weight", "shared_expert_gate.weight"))
