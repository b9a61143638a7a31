"""What one packed forward and backward of ours holds beside the model states, in bytes of live
tensors, tensor by tensor.

The backward of a layer reads what autograd saved in its forward (Korthikanti et al. 2022,
arXiv:2205.05198, count a GPT layer the same way). Here that is what transformers' layers save: an
RMSNorm in Python keeps its input in float32 and what it normalised, autocast keeps a copy of a
linear layer's input for every layer that reads it, attention keeps q, k, v, its output and one
log-sum-exp. The worst moments are compared: the head's forward and backward, the first layer's
backward, the last's. Kernels' own scratch memory is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.memory.architecture import Architecture, Layer
from posttrain.memory.states import Parameter
from posttrain.precision import PrecisionPlan, bytes_per_element

CPU_FLOAT32_KEYS = 512
"""On a CPU shorter bfloat16 segments attend in float32 (``packing.attention``)."""
CPU_BLOCK_ELEMENTS = 2**21
"""Logits whose softmax a CPU computes at once (``models.logprobs``)."""
INDEX_BYTES = 120
"""Ids, positions and targets of one token, for the row and for the messages of the step."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The shape of one packed row."""

    segments: tuple[tuple[int, int], ...]
    """(queries, keys) of each segment; more keys than queries where it continues a prompt."""
    trained: int
    """Tokens whose log-prob is computed, or completions that are scored."""

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return sum(queries for queries, _ in self.segments)

    @property
    def prefixed(self) -> list[tuple[int, int]]:
        """Segments that continue a prompt: they attend under a mask, to copies of the prompt's keys
        and values."""
        return [(q, k) for q, k in self.segments if k > q]


def worst_row(
    max_tokens: int, *, completions: int, shares_prompt: bool = True, scored: bool = False
) -> Row:
    """The row that takes most: prompts of one token, completions of equal length that fill it,
    every token trained (``scored``: a reward model trains one position of each)."""
    prompts = 1 if shares_prompt else completions
    count = max(1, min(completions, max_tokens - prompts))
    room = max(max_tokens - prompts, 1)
    lengths = [room * (i + 1) // count - room * i // count for i in range(count)]
    trained = count if scored else room + count
    if count == 1 or not shares_prompt:
        return Row(segments=tuple((n + 1, n + 1) for n in lengths), trained=trained)
    return Row(segments=((1, 1), *((n, n + 1) for n in lengths)), trained=trained)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a row is computed."""

    plan: PrecisionPlan
    device: Literal["cpu", "cuda"] = "cpu"
    checkpointing: bool = False
    logits_chunk: int = 512
    flex: bool = False
    """FlexAttention: no masks, no copies of the prompt's keys, no scores."""
    own_attention: bool = False
    """One sequence per forward, attention as transformers ships it."""
    trains_all: bool = True
    """False under adapters: frozen weights are cast in every forward and read by the backward,
    their inputs are not."""
    in_4bit: bool = False
    """Frozen linear layers in 4 bit: what they give back is float32, as the residual stream then
    is."""
    divides_logits: bool = False
    """By a sampling temperature other than 1."""
    has_head: bool = True
    """False for reward models."""

    @property
    def stored(self) -> int:
        """Bytes of a weight and of the residual stream."""
        return bytes_per_element(self.plan.weight)

    @property
    def compute(self) -> int:
        """Bytes of a matmul's input."""
        return bytes_per_element(self.plan.compute)

    @property
    def output(self) -> int:
        """Bytes of what a linear layer gives back."""
        return 4 if self.in_4bit else self.compute

    @property
    def casts(self) -> bool:
        """Autocast is on."""
        return self.plan.compute != self.plan.weight

    def attention(self, row: Row) -> int:
        """Bytes of q, k and v."""
        longest = max(keys for _, keys in row.segments)
        short = (
            self.device == "cpu" and self.plan.compute == "bfloat16" and longest < CPU_FLOAT32_KEYS
        )
        return 4 if short and not self.own_attention else self.compute


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The worst moment of a micro-batch that is not the first of its step (gradients exist
    already)."""

    moment: str
    items: Mapping[str, int]
    """``activations`` saved for the backward, ``recomputed`` under checkpointing, ``casts`` of
    weights, ``logits``, ``attention masks``, ``temporaries``."""

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.items.values())


def _norm_bytes(
    width: int, s: Setting, arch: Architecture, *, input_bytes: int, trained: bool
) -> int:
    """An RMSNorm in Python: its input in float32, what it normalised (read by the gradient of its
    weight), 1 / rms."""
    kept = 4 if input_bytes == 4 or arch.keeps_float32_norms else input_bytes
    return 4 * width + (kept * width if trained else 0) + 4


def _input_bytes(width: int, s: Setting, *, readers: int) -> int:
    """What linear layers keep of the value that ``readers`` of them read: one copy each where it
    must be cast."""
    if not s.trains_all and s.stored == 2:
        return readers * 4 * width  # adapters compute in float32
    return (readers if s.casts else 1) * s.compute * width


def _attention_bytes(layer: Layer, arch: Architecture, row: Row, s: Setting) -> float:
    """Per row."""
    if (
        layer.mixer_width
    ):  # where it scans a rough figure: in, out and a float32 copy of each of its linear layers
        return (
            (2 * s.compute + 4 if layer.mixer_scans else s.compute) * layer.mixer_width * row.tokens
        )
    a, kept, keys = s.attention(row), _score_bytes(arch, s), sum(keys for _, keys in row.segments)
    q, k, v = layer.q_width, layer.k_width, layer.v_width
    output = q if layer.k_width != layer.q_width or not layer.latent_width else v
    per_token: float = a * (q + k + v)
    if layer.qk_norm:
        normed = 4 + (4 if s.compute == 4 or arch.keeps_float32_norms else s.compute) * s.trains_all
        per_token += normed * (q + k) + 4 * (arch.heads + arch.kv_heads)
    if layer.latent_width:
        per_token += _norm_bytes(
            layer.latent_width, s, arch, input_bytes=s.compute, trained=s.trains_all
        )
        per_token += _input_bytes(layer.latent_width, s, readers=1)
    per_token += (
        _input_bytes(output, s, readers=1) if s.stored == 2 else s.compute * output
    )  # what the output projection reads
    if kept:
        scores = sum(queries * keys for queries, keys in row.segments) * arch.heads
        if not (
            arch.softcaps_attention or arch.eager
        ):  # torch's product in float32, keys and values of all heads
            return (
                (per_token - a * (q + k + v) + 4 * q) * row.tokens
                + 4 * (q + output) * keys
                + kept * scores
            )
        repeated = 2 * q * a * keys if q != k else 0
        return (per_token - (k + v) * a * (q != k)) * row.tokens + repeated + kept * scores
    copies = 0 if s.flex else (k + v) * a * sum(keys for _, keys in row.prefixed)
    return (per_token + a * output + 4 * arch.heads) * row.tokens + copies


def _score_bytes(arch: Architecture, s: Setting) -> int:
    """What attention that is no fused kernel keeps of each score: softcapped in Python;
    transformers' own (the softmax and its cast); on a CPU torch's with dropout (softmax, mask,
    product), or with values of another width than keys (softmax)."""
    if s.flex:
        return 0
    if arch.softcaps_attention:
        return 8
    if s.own_attention and arch.eager:
        return 4 + s.compute * (s.compute < 4)
    if s.device == "cpu" and arch.attention_dropout:
        return 12
    latent = any(layer.latent_width for layer in arch.layers)
    return 4 if s.device == "cpu" and (latent or (s.own_attention and arch.broadcasts_keys)) else 0


def _mlp_bytes(layer: Layer, arch: Architecture, s: Setting) -> float:
    """Per token."""
    total: float = 0
    if layer.mlp_width:
        last = (
            _input_bytes(layer.mlp_width, s, readers=1)
            if not s.trains_all
            else s.compute * layer.mlp_width
        )
        total += (layer.mlp_tensors - 1) * s.output * layer.mlp_width + last
    if layer.experts:  # grouped_mm, which autocast leaves in the weights' dtype
        each = s.stored * (2 * arch.hidden + 4 * layer.expert_width) + 4 * 8
        total += (
            arch.experts_per_token * each + 4 * layer.experts + s.compute * arch.hidden * s.casts
        )
    return total


def layer_bytes(layer: Layer, arch: Architecture, row: Row, s: Setting) -> int:
    """What the backward of a layer reads, its input included."""
    h = arch.hidden
    readers = layer.attention_readers + (layer.mlp_readers if layer.mlp_width else 0)
    if layer.norm == "layer":
        norms = layer.norms_before * (s.stored * h + 8)
    else:
        norms = layer.norms_before * _norm_bytes(
            h, s, arch, input_bytes=s.stored, trained=s.trains_all
        )
        norms += layer.norms_after * _norm_bytes(
            h, s, arch, input_bytes=s.compute, trained=s.trains_all
        )
    copied = s.casts or (not s.trains_all and s.stored == 2)
    inputs = _input_bytes(h, s, readers=readers) if copied else s.compute * h * layer.norms_before
    if copied and layer.experts:
        inputs += s.stored * h  # the experts read the uncast value
    if arch.hidden_dropout:  # a mask after each sublayer, on a CPU in the dtype of what it masks
        inputs += 2 * (s.compute if s.device == "cpu" else 1) * h
    per_token = (
        norms
        + inputs
        + _mlp_bytes(layer, arch, s)
        + (4 if s.stored == 2 else s.compute) * layer.adapter_ranks
    )
    return int(per_token * row.tokens + _attention_bytes(layer, arch, row, s))


def _mask_bytes(arch: Architecture, row: Row, s: Setting) -> int:
    """One mask for each shape of a segment with a prefix, kept for all layers; longer ones than a
    window need a second."""
    if s.flex or s.own_attention:
        return 0
    total = 0
    for queries, keys in set(row.segments):
        total += queries * keys * (queries != keys)
        total += queries * keys * (arch.sliding_window is not None and keys > arch.sliding_window)
    return total * s.attention(row)


def _cast_bytes(parameters: Sequence[Parameter], arch: Architecture, s: Setting) -> int:
    """Weights in the compute dtype: kept by autocast for the micro-batch, or (frozen) by the
    graph."""
    if not s.casts:
        return 0
    matrices = [
        p
        for p in parameters
        if (p.in_linear and not p.in_embedding and p.shape[0] != arch.vocab) or p.in_matmul
    ]
    if s.checkpointing:  # frozen weights are cast again for each layer
        frozen = sum(p.numel for p in matrices if not p.trainable) // len(arch.layers)
        return s.compute * (sum(p.numel for p in matrices if p.trainable) + frozen)
    return s.compute * sum(p.numel for p in matrices)


def _head_moments(arch: Architecture, row: Row, s: Setting) -> dict[str, dict[str, int]]:
    """Logits, the cast weight and its gradient in ``models.logprobs``, chunk by chunk."""
    if not s.has_head:
        return {}
    chunks = -(-row.trained // s.logits_chunk)
    chunk = -(-row.trained // chunks) * arch.vocab
    block = min(chunk, max(arch.vocab, CPU_BLOCK_ELEMENTS)) if s.device == "cpu" else chunk
    again, split = chunks > 1, block < chunk
    weight, c, wide = arch.vocab * arch.hidden, s.compute, s.compute < 4
    transformed = 3 * arch.softcaps_logits + arch.scales_logits + s.divides_logits
    made = (
        (1 + again) * c * chunk + wide * 4 * block * again
    )  # a chunk is made while the last one and its block are alive
    capped = c * chunk + 4 * block * (
        transformed + wide + ((again or split) and wide or transformed > 0)
    )
    cast = c * weight * s.casts
    gradient = s.stored * weight * s.trains_all
    matmul = c * weight * (s.trains_all and s.casts and again)
    in_backward = {
        "new logits": (1 + again) * c * chunk,
        "softmax": c * chunk + 4 * block * (transformed + wide * (1 + split)),
    }
    predictors = arch.hidden * s.stored * row.trained
    moments = {"forward of the head": {"logits": max(made, capped), "casts": cast}}
    for name, logits in {**in_backward, "weight gradient": c * chunk}.items():
        temporaries = gradient + predictors + (matmul if name == "weight gradient" else 0)
        moments[f"backward of the head: {name}"] = {
            "logits": logits,
            "casts": cast,
            "temporaries": temporaries,
        }
    return moments


def step_activations(
    arch: Architecture, parameters: Sequence[Parameter], row: Row, s: Setting
) -> Activations:
    """The worst moment of a row's forward and backward."""
    moments = _moments(arch, parameters, row, s)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Activations(
        moment=moment, items={name: int(n) for name, n in moments[moment].items() if n}
    )


@dataclass(frozen=True, kw_only=True)
class HeapBlocks:
    """Bytes of a micro-batch in tensors under a limit: where a heap gets holes."""

    saved: int
    """Kept from the forward to the backward."""
    in_layer: int
    """Of one layer, the largest: made and freed again and again."""
    eager: int
    """The short-lived copies of the scores of attention that is no fused kernel, in a layer:
    product and masked; softcapped ones scaled and capped too."""


def heap_blocks(arch: Architecture, row: Row, s: Setting, *, below: int) -> HeapBlocks:
    """Of tensors under ``below`` bytes."""
    stream = arch.hidden * s.stored * row.tokens
    matrix = arch.heads * sum(q * k for q, k in row.segments)
    scores = _score_bytes(arch, s) * matrix
    each = 4 * arch.heads * max(q * k for q, k in row.segments)
    by_layer = []
    for layer in arch.layers:
        mlp = int(_mlp_bytes(layer, arch, s)) * row.tokens
        width = layer.mlp_width or layer.expert_width * arch.experts_per_token
        parts = [
            (each, scores),
            (s.output * width * row.tokens, mlp),
            (4 * arch.hidden * row.tokens, 0),
        ]
        parts[2] = (parts[2][0], layer_bytes(layer, arch, row, s) - scores - mlp)
        by_layer.append(sum(total for size, total in parts if size < below))
    saved = len(arch.layers) * stream * (stream < below) if s.checkpointing else sum(by_layer)
    casts = _adapter_temporaries(arch, row, s) if not s.trains_all and s.compute < 4 else 0
    short = 4 * matrix * (4 if arch.softcaps_attention else 2) * (scores > 0)
    return HeapBlocks(saved=saved, in_layer=max(by_layer) + casts, eager=short * (each < below))


def _moments(
    arch: Architecture, parameters: Sequence[Parameter], row: Row, s: Setting
) -> dict[str, dict[str, int]]:
    tokens, h = row.tokens, arch.hidden
    by_layer = [layer_bytes(layer, arch, row, s) for layer in arch.layers]
    stream, predictors = h * s.stored * tokens, h * s.stored * row.trained
    always = (2 * arch.head_dim * s.stored + INDEX_BYTES) * tokens  # the rotary table
    saved = always + (len(arch.layers) * stream if s.checkpointing else sum(by_layer))
    masks, casts = _mask_bytes(arch, row, s), _cast_bytes(parameters, arch, s)
    table = arch.vocab * h * s.stored * any(p.in_embedding and p.trainable for p in parameters)
    held = (
        table if arch.tied and s.has_head else 0
    )  # the head's gradient of a tied weight waits for the embedding's
    last_norm = _norm_bytes(h, s, arch, input_bytes=s.stored, trained=s.trains_all) * tokens
    moments = {
        name: {
            "activations": saved + last_norm + predictors,
            "attention masks": masks,
            **items,
            "casts": casts + items["casts"],
        }
        for name, items in _head_moments(arch, row, s).items()
    }
    recomputed = max(by_layer) - stream if s.checkpointing else 0
    top = {"activations": saved, "attention masks": masks, "casts": casts, "recomputed": recomputed}
    bottom = top | {"activations": always + (stream if s.checkpointing else by_layer[0])}
    moments |= {
        "backward of the last layer": top
        | {"temporaries": held + _layer_temporaries(arch.layers[-1], arch, row, s)},
        "backward of the first layer": bottom
        | {"temporaries": held + _layer_temporaries(arch.layers[0], arch, row, s)},
        "end of the backward": top
        | {"activations": always, "recomputed": 0, "temporaries": 2 * held + table},
    }
    if s.checkpointing and not s.trains_all and s.compute < 4:
        moments["recomputation of the last layer"] = top | {
            "temporaries": held + _adapter_temporaries(arch, row, s)
        }
    if _score_bytes(
        arch, s
    ):  # scores and their gradients, before the feed-forward or after it is done
        scores = (8 if s.compute == 4 else 6) * arch.heads * max(q * k for q, k in row.segments)
        mlp = int(max(_mlp_bytes(layer, arch, s) for layer in arch.layers)) * tokens
        name = "recomputed" if s.checkpointing else "activations"
        moments["attention of the last layer"] = top | {
            name: top[name] - mlp,
            "temporaries": held + scores,
        }
        moments["attention of the first layer"] = bottom | {
            name: bottom[name] - mlp,
            "temporaries": held + scores,
        }
    return moments


def _layer_temporaries(layer: Layer, arch: Architecture, row: Row, s: Setting) -> int:
    """Gradients that are alive at once in the backward of a feed-forward: of its activations, or of
    a weight."""
    stream = (1 + s.casts) * arch.hidden * s.stored * row.tokens
    wide = (
        2
        * max(layer.mlp_width * s.output, layer.expert_width * arch.experts_per_token * s.stored)
        * row.tokens
    )
    if (
        s.in_4bit and s.casts
    ):  # of the layer, of its adapter and their sum, when the cast input is gone
        wide += layer.mlp_width * (s.output - s.compute) * row.tokens
    weight = (
        layer.largest_matrix * (s.stored + (s.compute if s.casts else 0)) if s.trains_all else 0
    )
    # not cast; when the gradient of their first weight is made, two of four activations are gone
    if layer.experts:
        gone = 2 * layer.expert_width * arch.experts_per_token * s.stored * row.tokens
        weight = max(layer.largest_matrix * s.stored * s.trains_all - gone, 0)
    return stream + max(wide, weight)


def _adapter_temporaries(arch: Architecture, row: Row, s: Setting) -> int:
    """While a layer is recomputed under adapters, whose inputs become float32: the widest linear
    layer's input beside its float32 copy, a norm's output, a layer's output, and what came back
    from the layer above."""
    width = max(
        max(layer.mlp_width, layer.expert_width * arch.experts_per_token) for layer in arch.layers
    )
    beside = 0 if s.in_4bit else s.compute * width + 4 * arch.hidden * s.casts
    return (
        4 * width + beside + (2 * s.compute + 4) * arch.hidden + s.compute * arch.hidden * s.casts
    ) * row.tokens
