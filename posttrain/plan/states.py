"""Model states and what ranks exchange, in bytes of one rank, the largest. Exact arithmetic.

``model_states`` is the ZeRO paper's formula: bytes per parameter, divided evenly over the ranks.
``run_states`` is what our run allocates, tensor by tensor: tied weights once, step counters, blocks
of 8-bit moments, shards padded as FSDP2 and DeepSpeed pad them.

Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Ren et al. 2021, arXiv:2101.06840 (ZeRO-Offload).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from posttrain.models.dropout import base_model
from posttrain.precision import PrecisionPlan, bytes_per_element
from posttrain.training.optimizer import OptimizerName
from posttrain.training.sharding import DEEPSPEED_BUCKET, DEEPSPEED_LIVE, Kind, Offload

ZERO_STAGE: dict[Kind, int] = {"whole": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}
ZERO_PAPER = PrecisionPlan(
    name="zero-paper",
    weight="float16",
    gradient="float16",
    master="float32",
    moment="float32",
    compute="float16",
    reduce="float32",
    uses_loss_scaling=True,
)
"""Mixed-precision Adam as the ZeRO paper counts it, section 3.1: 2 + 2 + K bytes per parameter with
K = 12."""
BLOCK_8BIT = 256
"""Elements that share one float32 scale in bitsandbytes' 8-bit moments."""
SMALLEST_8BIT = 4096
"""Smaller tensors keep float32 moments."""
NF4 = "nf4"
"""The dtype of a weight in bitsandbytes' 4 bit."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter tensor; a tied one is listed once."""

    shape: tuple[int, ...]
    name: str = ""
    """As the model names it."""
    dtype: str = "float32"
    """torch's name, or ``nf4``."""
    trainable: bool = True
    in_linear: bool = False
    """The weight of a plain linear layer: what autocast casts."""
    in_embedding: bool = False
    """Also, or only, read by an embedding (autocast leaves it alone there)."""
    layer: int | None = None
    """The decoder layer that it belongs to."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return tensor_bytes(self.numel, self.dtype)


def tensor_bytes(numel: int, dtype: str) -> int:
    """Bytes of a tensor. ``nf4`` with doubly quantised scales (Dettmers et al. 2023,
    arXiv:2305.14314, section 3): half a byte per element; of each 64 elements a scale of one byte;
    of each 256 scales a float32; three small tables per tensor."""
    if dtype != NF4:
        return numel * bytes_per_element(dtype)
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """(name, the longest list of the decoder's layers); None where transformers knows none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    inside = {id(m) for m in (base_model(model).get_decoder() or model).modules()}
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList)
        and id(m) in inside
        and len(m)
        and all(isinstance(x, GradientCheckpointingLayer) for x in m)
    ]
    return max(lists, key=lambda found: len(found[1]), default=None)


def parameters_of(model: nn.Module) -> list[Parameter]:
    """The parameter tensors of a module, on any device (``meta`` too), a tied one once."""
    by_class: dict[str, dict[int, Any]] = {"Linear": {}, "Linear4bit": {}}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for m in model.modules():
        by_class.get(type(m).__name__, {})[id(getattr(m, "weight", None))] = m
    packed = by_class["Linear4bit"]
    stack = decoder_layers(model)
    layer_of = {
        id(p): i
        for i, layer in enumerate(stack[1] if stack is not None else ())
        for p in layer.parameters()
    }
    return [
        Parameter(
            shape=(packed[id(p)].out_features, packed[id(p)].in_features)
            if id(p) in packed
            else tuple(p.shape),
            name=name,
            dtype=NF4 if id(p) in packed else str(p.dtype).removeprefix("torch."),
            trainable=p.requires_grad,
            in_linear=id(p) in by_class["Linear"],
            in_embedding=id(p) in tables,
            layer=layer_of.get(id(p)),
        )
        for name, p in model.named_parameters()
    ]


def host_items(offload: Collection[Offload], zero_stage: int) -> frozenset[str]:
    """The states that offloading moves to the host: of the optimizer master, moments and (where
    they are partitioned) gradients."""
    if set(offload) - set(get_args(Offload)):
        raise ValueError(f"offload takes {', '.join(get_args(Offload))}; got {sorted(offload)}.")
    if "weights" in offload and zero_stage != 3:
        raise ValueError(
            "Weights can be offloaded only where they are partitioned "
            f"(zero_stage=3); got zero_stage={zero_stage}."
        )
    names = {"weights"} if "weights" in offload else set()
    if "optimizer" in offload:
        names |= {"master", "moments", "counters"} | ({"gradients"} if zero_stage >= 2 else set())
    return frozenset(names)


def model_states(
    num_params: int,
    *,
    precision: PrecisionPlan = ZERO_PAPER,
    zero_stage: int = 0,
    num_devices: int = 1,
    trainable_params: int | None = None,
    optimizer: OptimizerName = "adamw",
) -> dict[str, int]:
    """The paper's bytes per rank: stage 0 (w+g+K)P; 1 (w+g)P + KP/N; 2 wP + (g+K)P/N; 3 (w+g+K)P/N.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 3.1 and 5. w, g, K: bytes per parameter of
    weight, gradient and optimizer state (master and moments) under ``precision``; frozen parameters
    (LoRA) have weights only, partitioned in stage 3. ``adamw_8bit`` has 2 bytes of moments, ``sgd``
    one moment. Divisions round up: the largest rank. Raises ValueError for ``adafactor``, whose
    state depends on shapes (``run_states``).
    """
    trained = num_params if trainable_params is None else trainable_params
    if zero_stage not in (0, 1, 2, 3) or num_devices < 1 or not 0 <= trained <= num_params:
        raise ValueError(
            "model_states needs zero_stage 0 to 3, num_devices >= 1 and trainable_params between 0 "
            f"and num_params; got {zero_stage}, {num_devices}, {trained} of {num_params}."
        )
    if optimizer == "adafactor":
        raise ValueError(
            "adafactor keeps rows and columns of each matrix, so its state depends on shapes. Use "
            "run_states."
        )
    size = bytes_per_element(precision.moment)
    whole = {
        "weights": (num_params * bytes_per_element(precision.weight), 3),
        "gradients": (trained * bytes_per_element(precision.gradient), 2),
        "master": (trained * (bytes_per_element(precision.master) if precision.master else 0), 1),
        "moments": (trained * {"adamw": 2 * size, "adamw_8bit": 2, "sgd": size}[optimizer], 1),
    }
    return {
        name: -(-value // num_devices) if zero_stage >= first else value
        for name, (value, first) in whole.items()
    }


def moment_bytes(shape: Sequence[int], *, dtype: str, optimizer: OptimizerName) -> tuple[int, int]:
    """(moments, counters) that an optimizer keeps for one tensor.

    adamw: two of the tensor's dtype and a float32 step; sgd: one (with momentum); adafactor
    (Shazeer & Stern 2018, arXiv:1804.04235): in float32 one row and one column per matrix, the
    whole second moment of a vector, the weights' RMS; adamw_8bit (Dettmers et al. 2022,
    arXiv:2110.02861): two bytes per element and two float32 scales per block of 256, float32
    moments below 4096 elements.
    """
    numel, size = math.prod(shape), bytes_per_element(dtype)
    if optimizer == "adamw":
        return 2 * numel * size, 4
    if optimizer == "sgd":
        return numel * size, 0
    if optimizer == "adafactor":
        factored = numel // shape[-1] + numel // shape[-2] if len(shape) > 1 else numel
        return factored * max(size, 4), 4
    if numel < SMALLEST_8BIT:
        return 2 * numel * 4, 0
    return 2 * numel + 2 * 4 * -(-numel // BLOCK_8BIT), 0


def _shard(shape: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """FSDP2 cuts the first dimension into equal parts, rounded up; rank 0 has the largest."""
    return (-(-shape[0] // num_devices), *shape[1:]) if shape else (1,)


def run_states(
    parameters: Iterable[Parameter],
    *,
    precision: PrecisionPlan,
    optimizer: OptimizerName = "adamw",
    sharding: Kind = "whole",
    num_devices: int = 1,
    whole_below: int = 0,
) -> Counter[str]:
    """What the largest rank of our run holds between backward and optimizer step, by item; 0 for
    one that there is not.

    whole: the weights are their own master under autocast, gradients and moments have their dtype.
    fsdp2: the same of each tensor's shard. zero1 to zero3 (DeepSpeed): weights in the compute
    dtype; gradients, a master copy and moments in float32, partitioned; in stage 3 parameters of at
    most ``whole_below`` elements are kept whole beside their part.
    """
    listed = list(parameters)
    items: dict[str, int]
    if sharding in ("whole", "fsdp2"):
        items = _tensor_items(listed, optimizer, num_devices if sharding == "fsdp2" else 1)
    else:
        stage = ZERO_STAGE[sharding]
        items = _deepspeed_items(listed, precision, optimizer, stage, num_devices, whole_below)
    return Counter({name: value for name, value in items.items() if value})


def _tensor_items(
    parameters: Sequence[Parameter], optimizer: OptimizerName, num_devices: int
) -> dict[str, int]:
    items: Counter[str] = Counter()
    for p in parameters:
        shape = _shard(p.shape, num_devices) if num_devices > 1 else p.shape
        held = tensor_bytes(math.prod(shape), p.dtype)
        items["weights"] += held
        if p.trainable:
            moments, counters = moment_bytes(shape, dtype=p.dtype, optimizer=optimizer)
            items.update(gradients=held, moments=moments, counters=counters)
    if optimizer == "adamw_8bit" and any(
        p.trainable and p.numel >= SMALLEST_8BIT for p in parameters
    ):
        items["counters"] += 2 * 256 * 4  # the two code books, shared by all tensors
    return items


def _deepspeed_items(
    parameters: Sequence[Parameter],
    precision: PrecisionPlan,
    optimizer: OptimizerName,
    zero_stage: int,
    num_devices: int,
    whole_below: int,
) -> dict[str, int]:
    """Stages 1 and 2: one flat buffer of what decays and one of the rest, up to padding, and to the
    parameter that a rank's cut falls into. Stage 3: parameter by parameter. Gradients are
    accumulated in float32; stage 1 keeps them whole beside 16-bit weights. Weights in 4 bit stay
    what they are."""
    size = bytes_per_element(precision.compute)
    trained = [p.numel for p in parameters if p.trainable]
    every = [p.numel for p in parameters if p.dtype != NF4]
    in_4bit = sum(p.num_bytes for p in parameters if p.dtype == NF4)
    share = (
        sum(-(-n // num_devices) for n in trained)
        if zero_stage == 3
        else -(-sum(trained) // num_devices)
    )
    moments, counters = moment_bytes((share,), dtype="float32", optimizer=optimizer)
    weights = every
    if zero_stage == 3:
        weights = [-(-n // num_devices) + (n if n <= whole_below else 0) for n in every]
    groups = {len(p.shape) > 1 and not p.in_embedding for p in parameters if p.trainable}
    return {
        "weights": size * sum(weights) + in_4bit,
        "gradients": 4 * (sum(trained) if zero_stage == 1 and size < 4 else share),
        "master": 4 * share,
        "moments": moments,
        "counters": counters * len(groups),
    }


def frozen_bytes(parameters: Iterable[Parameter], *, compute: str, num_devices: int = 1) -> int:
    """A frozen copy for inference (reference, reward model): float32 weights of linear layers in
    the compute dtype, where an embedding does not read them too; FSDP2 and ZeRO-3 shard it like
    weights (``num_devices``)."""
    total = 0
    for p in parameters:
        casts = p.in_linear and not p.in_embedding and p.dtype == "float32"
        total += tensor_bytes(
            math.prod(_shard(p.shape, num_devices)), compute if casts else p.dtype
        )
    return total


def communication_bytes(
    parameters: Sequence[Parameter], *, precision: PrecisionPlan, sharding: Kind, num_devices: int
) -> int:
    """Buffers for collectives: none of DDP's (gradients are views of its buckets); FSDP2 what lies
    outside of layers and two layers, with a layer's gradient; ZeRO one reduce bucket, stage 3,
    which overlaps, two and the gathered weights that it keeps."""
    if num_devices == 1 or sharding == "whole":
        return 0
    size, every = bytes_per_element(precision.compute), sum(p.numel for p in parameters)
    by_layer: Counter[int | None] = Counter()
    for p in parameters:
        by_layer[p.layer] += p.numel
    root, layer = by_layer.pop(None, 0), max(by_layer.values(), default=0)
    if sharding == "fsdp2":
        reduced = bytes_per_element(precision.gradient)
        return size * (root + 2 * layer) + reduced * (layer + root)
    bucket = min(DEEPSPEED_BUCKET, sum(p.numel for p in parameters if p.trainable))
    gathered = max(root + 2 * layer, min(every, DEEPSPEED_LIVE))
    return size * (2 * bucket + gathered if sharding == "zero3" else bucket)


def sent_bytes(
    parameters: Sequence[Parameter],
    *,
    precision: PrecisionPlan,
    sharding: Kind,
    num_devices: int,
    micro_batches: int = 1,
) -> float:
    """What a rank sends per optimizer step over a ring: gradients in the dtype they are reduced in,
    weights in the compute dtype; in elements ``zero_communication``. Frozen weights travel only in
    stage 3."""
    stage, gathered = ZERO_STAGE[sharding], bytes_per_element(precision.compute)
    reduced = 4 if sharding.startswith("zero") else bytes_per_element(precision.gradient)
    trained, every = (
        sum(p.numel for p in parameters if p.trainable),
        sum(p.numel for p in parameters),
    )
    times = micro_batches if stage >= 2 else 1
    sent = trained * (times * reduced + gathered)
    if stage == 0:
        sent = 2 * trained * reduced
    if stage == 3:
        sent = times * (trained * reduced + 2 * every * gathered)
    return ring_bytes(sent, num_devices=num_devices, bytes_each=1)


def zero_communication(num_params: int, *, zero_stage: int, accumulation: int = 1) -> int:
    """Elements that one rank sends per optimizer step: 2P in stages 0 to 2, 3P in stage 3.

    Rajbhandari et al. 2020, arXiv:1910.02054, section 7: a reduce-scatter or an all-gather counts
    P, an all-reduce 2P. With ``accumulation`` micro-steps: stages 0 and 1 reduce once; stage 2
    reduce-scatters in every micro-step; stage 3 also gathers the weights twice in each.
    """
    times = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}
    if zero_stage not in times or accumulation < 1:
        raise ValueError(
            f"zero_stage must be 0 to 3 and accumulation >= 1; got {zero_stage} and {accumulation}."
        )
    return times[zero_stage] * num_params


def ring_bytes(elements: int, *, num_devices: int, bytes_each: int) -> float:
    """What a ring moves for ``elements`` counted as P per collective: (N - 1) / N of it (Patarasuk
    & Yuan 2009)."""
    return elements * bytes_each * (num_devices - 1) / num_devices
