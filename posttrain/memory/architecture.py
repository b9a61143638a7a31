"""What the activations of a decoder depend on, read off a transformers config and the names and
shapes of its parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain.memory.states import Parameter

_LAYER = re.compile(r"\.(?:layers|h|blocks|layer|attentions|ffns)\.(\d+)\.")
_ATTENTION_DROPOUT = (
    "attention_dropout",
    "attn_pdrop",
    "attention_probs_dropout_prob",
    "attn_dropout",
)
_HIDDEN_DROPOUT = (
    "resid_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "dropout",
    "residual_dropout",
)
_EXTRA_OF_ACTIVATION = {
    "gelu_new": 3,
    "gelu_fast": 4,
    "quick_gelu": 1,
    "relu2": 1,
    "gelu_python": 3,
}
"""Tensors that an activation written in Python saves beside its input and its output; torch's own
save none."""


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
    q_width: int = 0
    """Of the queries; 0: no attention. Keys and values may be narrower (fewer heads) or, under
    multi-head latent attention, have other widths."""
    k_width: int = 0
    v_width: int = 0
    latent_width: int = 0
    """Of low-rank queries, keys and values (MLA, arXiv:2405.04434, section 2.1)."""
    mixer_width: int = 0
    """Of what the linear layers and convolutions of a layer without attention give back."""
    mixer_scans: bool = False
    """State-space or linear attention, which keeps more: how much depends on the kernels that are
    installed."""
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
    attention_dropout: bool = False
    hidden_dropout: bool = False
    eager: bool = False
    """Attention in matrix products of transformers' own: it keeps its scores."""
    broadcasts_keys: bool = False
    """One key for all heads, which no fused kernel of a CPU takes (Falcon)."""
    sliding_window: int | None = None
    tied: bool = False

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of all layers."""
        return sum(layer.k_width + layer.v_width for layer in self.layers)

    @property
    def has_estimated_layers(self) -> bool:
        """State-space or linear attention."""
        return any(layer.mixer_scans for layer in self.layers)


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first value that there is; the largest where layers have different ones."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers: the layers have configs of their own
            values = [getattr(layer, name, None) for layer in config.per_layer_config]
            value = max((v for v in values if v is not None), default=None)
        if value is not None:
            return value
    return default


def architecture_of(config: Any, parameters: Sequence[Parameter]) -> Architecture:
    """From the config and ``states.parameters_of`` the model (on the meta device if need be).

    Raises ValueError where the config has no hidden size, heads or layers: no decoder that can be
    planned.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    text = getattr(text, "decoder_config", text)
    hidden = _first(text, "hidden_size", "n_embd", "d_model", "emb_dim")
    heads = _first(text, "num_attention_heads", "n_head", "n_heads", "num_heads", default=1)
    by_layer: dict[int, list[Parameter]] = {}
    for p in parameters:
        found = _LAYER.search(f".{p.name}")
        if found:
            by_layer.setdefault(int(found.group(1)), []).append(p)
    if not hidden or not by_layer:
        raise ValueError(
            f"{type(config).__name__} has no hidden size or layers: only decoder "
            "models can be planned."
        )
    kind = str(getattr(text, "model_type", ""))
    is_gemma = kind.startswith("gemma")
    act = str(
        _first(text, "hidden_act", "activation_function", "hidden_activation", default="silu")
    )
    kv_heads = _first(
        text, "num_key_value_heads", default=1 if getattr(text, "multi_query", False) else heads
    )
    head_dim = _first(text, "head_dim", default=hidden // heads)
    widths = (heads * head_dim, kv_heads * head_dim)
    layers = tuple(_layer(own, hidden, act, widths) for _, own in sorted(by_layer.items()))
    return Architecture(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        layers=layers,
        experts_per_token=_first(text, "num_experts_per_tok", "top_k", default=0)
        if any(x.experts for x in layers)
        else 0,
        keeps_float32_norms=is_gemma,
        softcaps_attention=getattr(text, "attn_logit_softcapping", None) is not None,
        softcaps_logits=getattr(text, "final_logit_softcapping", None) is not None,
        attention_dropout=bool(_first(text, *_ATTENTION_DROPOUT)),
        hidden_dropout=bool(_first(text, *_HIDDEN_DROPOUT)),
        eager=getattr(text, "_attn_implementation", None) == "eager",
        broadcasts_keys=kind == "falcon" and kv_heads == 1,
        scales_logits=_first(text, "logit_scale", "logits_scaling", default=1.0) != 1.0,
        sliding_window=getattr(text, "sliding_window", None) if is_gemma else None,
        tied=any(p.in_embedding and p.in_linear for p in parameters),
    )


def _layer(
    parameters: Sequence[Parameter], hidden: int, act: str, attention: tuple[int, int]
) -> Layer:
    adapters = [p for p in parameters if ".lora_A." in p.name]
    own = [p for p in parameters if ".lora_" not in p.name]
    plain = [p.name.replace(".base_layer", "") for p in own]
    stream_norms = [
        p
        for p in own
        if len(p.shape) == 1
        and p.shape[0] == hidden
        and p.name.endswith("weight")
        and _is_norm(p.name)
    ]
    after = sum("post_feedforward" in p.name for p in stream_norms)
    experts = [p for p in own if len(p.shape) == 3 and "experts" in p.name]
    mlp = [
        p
        for p in own
        if len(p.shape) == 2 and not _is_attention(p.name) and ".experts." not in p.name
    ]
    widths = {
        p.name: next((n for n in p.shape if n != hidden), hidden)
        for p in mlp
        if not _is_router(p.name)
    }
    gated = any(
        name.endswith(("gate_proj.weight", "gate_up_proj.weight", "w1.weight")) for name in plain
    )
    fused = any(name.endswith("gate_up_proj.weight") for name in plain)
    width = max(widths.values(), default=0) // (2 if fused else 1)
    wide = max((p.numel // (p.shape[0] * hidden) for p in experts), default=0)
    layer = Layer(
        norm="layer" if any(p.name.endswith("bias") and _is_norm(p.name) for p in own) else "rms",
        norms_before=max(len(stream_norms) - 2 * after, 1),
        norms_after=2 * after,
        qk_norm=any("q_norm" in name or "q_layernorm" in name for name in plain),
        **_attention_widths(dict(zip(plain, own, strict=True)), attention),
        attention_readers=2
        if any("kv_a_proj" in name for name in plain)
        else 3
        if any("q_proj" in n for n in plain)
        else 1,
        mlp_readers=2 if gated and not fused else 1,
        mlp_width=width,
        mlp_tensors=(4 if gated else 2) + _EXTRA_OF_ACTIVATION.get(act, 0),
        experts=experts[0].shape[0] if experts else 0,
        expert_width=wide // 2 if any("gate_up" in p.name for p in experts) else wide,
        largest_matrix=max((p.numel for p in own), default=0),
    )
    return replace(layer, adapter_ranks=sum(p.shape[0] for p in adapters))


def _attention_widths(own: dict[str, Parameter], widths: tuple[int, int]) -> dict[str, Any]:
    """From the projections' shapes where they have the usual names, else (fused ones) from the
    config's heads."""
    if not any(_is_attention(name) for name in own):
        mixer = [p for name, p in own.items() if _is_mixer(name) and len(p.shape) > 1]
        scans = any(
            word in name for name in own for word in ("A_log", "dt_", "beta", "temporal_block")
        )
        return {"mixer_width": sum(p.shape[0] for p in mixer), "mixer_scans": scans}

    def shape(*suffixes: str) -> tuple[int, ...] | None:
        return next(
            (
                p.shape
                for name, p in own.items()
                if name.endswith(tuple(f"{s}.weight" for s in suffixes))
            ),
            None,
        )

    q, k, v, o = shape("q_proj", "q_b_proj"), shape("k_proj"), shape("v_proj"), shape("o_proj")
    if (latent := shape("kv_a_proj_with_mqa")) is not None and q is not None and o is not None:
        low_rank = shape("q_a_proj")
        return {
            "q_width": q[0],
            "k_width": q[0],
            "v_width": o[1],
            "latent_width": latent[0] + (low_rank[0] if low_rank else 0),
        }
    return {
        "q_width": o[1] if o is not None else widths[0],
        "k_width": k[0] if k is not None else widths[1],
        "v_width": v[0] if v is not None else k[0] if k is not None else widths[1],
    }


def _is_norm(name: str) -> bool:
    return any(word in name for word in ("norm", ".ln_", "ln_f", "layernorm"))


def _is_attention(name: str) -> bool:
    return any(
        word in name for word in (".self_attn.", ".attn.", ".attention.", ".self_attention.")
    )


def _is_mixer(name: str) -> bool:
    return any(
        word in name
        for word in (
            ".mixer.",
            ".mamba.",
            ".linear_attn.",
            ".conv.",
            ".temporal_block.",
            ".short_conv.",
        )
    )


def _is_router(name: str) -> bool:
    return name.replace(".base_layer", "").endswith(
        (".gate.weight", ".router.weight", "shared_expert_gate.weight")
    )
