"""Model states: weights, gradients, master copy, moments, of one rank, in bytes. Two answers, never
mixed.

    model_states   the paper's formula: so many bytes per parameter, divided evenly over the ranks
                   by the ZeRO stage
    run_states   what our run allocates, tensor by tensor: tied weights once, step counters, blocks
                 of 8-bit moments,
                   shards padded as FSDP2 and DeepSpeed pad them

Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Ren et al. 2021, arXiv:2101.06840 (ZeRO-Offload).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from posttrain.precision import PrecisionPlan, bytes_per_element

OptimizerName = Literal["adamw", "adamw_8bit", "sgd", "adafactor"]
Engine = Literal["plain", "fsdp2", "deepspeed"]
"""plain: one process or DDP, every rank holds everything."""
Offload = Literal["optimizer", "weights"]

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
    in_matmul: bool = False
    """Of another layer that is a matrix product (GPT-2's Conv1D): autocast casts it, a frozen copy
    keeps it."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return tensor_bytes(self.numel, self.dtype)


def tensor_bytes(numel: int, dtype: str) -> int:
    """Of a tensor. ``nf4`` with doubly quantised scales (Dettmers et al. 2023, arXiv:2305.14314,
    section 3): half a byte per element; of each 64 elements a scale of one byte; of each 256 scales
    a float32; three small tables per tensor."""
    if dtype != NF4:
        return numel * bytes_per_element(dtype)
    scales = -(-numel // 64)
    return -(-numel // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes of one rank by item (``weights``, ``gradients``, ``master``, ``moments``,
    ``counters``), by place."""

    device: Mapping[str, int]
    """Where the model computes."""
    host: Mapping[str, int] = field(default_factory=dict)
    """Offloaded to the memory of the host."""

    def __getitem__(self, item: str) -> int:
        """Bytes of an item, wherever it is; 0 for one that there is not."""
        return self.device.get(item, 0) + self.host.get(item, 0)

    @property
    def device_total(self) -> int:
        """Bytes on the device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes on the host."""
        return sum(self.host.values())

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.device_total + self.host_total


def _check(zero_stage: int, num_devices: int, optimizer: str, offload: Collection[str]) -> None:
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage must be 0, 1, 2 or 3; got {zero_stage}.")
    if num_devices < 1:
        raise ValueError(
            f"num_devices counts data-parallel ranks and must be >= 1; got {num_devices}."
        )
    if optimizer not in get_args(OptimizerName):
        raise ValueError(
            f"optimizer must be one of {', '.join(get_args(OptimizerName))}; got {optimizer!r}."
        )
    unknown = set(offload) - set(get_args(Offload))
    if unknown:
        raise ValueError(f"offload takes {', '.join(get_args(Offload))}; got {sorted(unknown)}.")
    if "weights" in offload and zero_stage != 3:
        raise ValueError(
            "Weights can be offloaded only where they are partitioned "
            f"(zero_stage=3); got zero_stage={zero_stage}."
        )


def _placed(
    items: Mapping[str, int], offload: Collection[str], *, with_gradients: bool
) -> ModelStates:
    """``optimizer``: master, moments and (where they are partitioned) gradients live on the
    host."""
    away = (
        {"master", "moments", "counters", *(("gradients",) if with_gradients else ())}
        if "optimizer" in offload
        else set()
    )
    away |= {"weights"} if "weights" in offload else set()
    kept = {name: value for name, value in items.items() if value}
    return ModelStates(
        device={n: v for n, v in kept.items() if n not in away},
        host={n: v for n, v in kept.items() if n in away},
    )


def model_states(
    num_params: int,
    *,
    plan: PrecisionPlan = ZERO_PAPER,
    zero_stage: int = 0,
    num_devices: int = 1,
    trainable_params: int | None = None,
    optimizer: OptimizerName = "adamw",
    offload: Collection[Offload] = (),
) -> ModelStates:
    """The paper's bytes per rank: stage 0 (w+g+K)P; 1 (w+g)P + KP/N; 2 wP + (g+K)P/N; 3 (w+g+K)P/N.

    Rajbhandari et al. 2020, arXiv:1910.02054, sections 3.1 and 5. w, g, K: bytes per parameter of
    weight, gradient and optimizer state (master and moments) under ``plan``; frozen parameters
    (LoRA) have weights only, partitioned in stage 3. ``adamw_8bit`` has 2 bytes of moments, ``sgd``
    one moment. ``offload={"optimizer"}`` from stage 2 is ZeRO-Offload (arXiv:2101.06840):
    gradients, master and moments on the host. Divisions round up: the largest rank. Raises
    ValueError for ``adafactor``, whose state depends on shapes (``run_states``).
    """
    _check(zero_stage, num_devices, optimizer, offload)
    if optimizer == "adafactor":
        raise ValueError(
            "adafactor keeps rows and columns of each matrix, so its state depends "
            "on shapes. Use run_states."
        )
    trained = num_params if trainable_params is None else trainable_params
    if not 0 <= trained <= num_params:
        raise ValueError(
            f"trainable_params must be between 0 and num_params={num_params}; got {trained}."
        )
    moment = {
        "adamw": 2 * bytes_per_element(plan.moment),
        "adamw_8bit": 2,
        "sgd": bytes_per_element(plan.moment),
    }[optimizer]
    whole = {
        "weights": (num_params * bytes_per_element(plan.weight), 3),
        "gradients": (trained * bytes_per_element(plan.gradient), 2),
        "master": (trained * (bytes_per_element(plan.master) if plan.master else 0), 1),
        "moments": (trained * moment, 1),
    }
    items = {
        name: -(-value // num_devices) if zero_stage >= first else value
        for name, (value, first) in whole.items()
    }
    return _placed(items, offload, with_gradients=zero_stage >= 2)


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
    plan: PrecisionPlan,
    optimizer: OptimizerName = "adamw",
    engine: Engine = "plain",
    zero_stage: int = 0,
    num_devices: int = 1,
    offload: Collection[Offload] = (),
    whole_below: int = 0,
) -> ModelStates:
    """What the largest rank of our run holds between backward and optimizer step, tensor by tensor.

    plain: the weights are their own master under autocast, gradients and moments have their dtype.
    fsdp2: the same of each tensor's shard (``zero_stage`` 3). deepspeed: weights in the compute
    dtype; gradients, a master copy and moments in float32, partitioned; in stage 3 parameters of at
    most ``whole_below`` elements are kept whole beside their part.
    """
    _check(zero_stage, num_devices, optimizer, offload)
    if (engine == "plain") != (zero_stage == 0) or (engine == "fsdp2" and zero_stage != 3):
        raise ValueError(
            f"engine {engine!r} has no ZeRO stage {zero_stage}: plain is 0, fsdp2 3, "
            "deepspeed 1 to 3."
        )
    listed = list(parameters)
    if engine == "deepspeed":
        items = _deepspeed_items(listed, plan, optimizer, zero_stage, num_devices, whole_below)
    else:
        items = _tensor_items(listed, optimizer, num_devices if engine == "fsdp2" else 1)
    return _placed(items, offload, with_gradients=zero_stage >= 2)


def _tensor_items(
    parameters: Sequence[Parameter], optimizer: OptimizerName, num_devices: int
) -> dict[str, int]:
    items = {"weights": 0, "gradients": 0, "moments": 0, "counters": 0}
    for p in parameters:
        shape = _shard(p.shape, num_devices) if num_devices > 1 else p.shape
        held = tensor_bytes(math.prod(shape), p.dtype)
        items["weights"] += held
        if p.trainable:
            moments, counters = moment_bytes(shape, dtype=p.dtype, optimizer=optimizer)
            items["gradients"] += held
            items["moments"] += moments
            items["counters"] += counters
    if optimizer == "adamw_8bit" and any(
        p.trainable and p.numel >= SMALLEST_8BIT for p in parameters
    ):
        items["counters"] += 2 * 256 * 4  # the two code books, shared by all tensors
    return items


def _deepspeed_items(
    parameters: Sequence[Parameter],
    plan: PrecisionPlan,
    optimizer: OptimizerName,
    zero_stage: int,
    num_devices: int,
    whole_below: int,
) -> dict[str, int]:
    """Stages 1 and 2: one flat buffer of what decays and one of the rest, up to padding, and to the
    parameter that a rank's cut falls into. Stage 3: parameter by parameter. Gradients are
    accumulated in float32; stage 1 keeps them whole beside 16-bit weights. Weights in 4 bit stay
    what they are."""
    size = bytes_per_element(plan.compute)
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


def parameters_of(model: Any) -> list[Parameter]:
    """The parameter tensors of a torch module, on any device (``meta`` too), a tied one once."""

    def weights_of(kind: str) -> set[int]:
        return {
            id(m.weight)
            for m in model.modules()
            if type(m).__name__ == kind and hasattr(m, "weight")
        }

    tables = [
        m for m in model.modules() if any(base.__name__ == "Embedding" for base in type(m).__mro__)
    ]
    linear, matmul, embedding = (
        weights_of("Linear"),
        weights_of("Conv1D"),
        {id(m.weight) for m in tables},
    )
    in_4bit = {
        id(m.weight): (m.out_features, m.in_features)
        for m in model.modules()
        if type(m).__name__ == "Linear4bit"
    }
    return [
        Parameter(
            shape=in_4bit.get(id(p), tuple(p.shape)),
            name=name,
            dtype=NF4 if id(p) in in_4bit else str(p.dtype).removeprefix("torch."),
            trainable=bool(p.requires_grad),
            in_linear=id(p) in linear,
            in_embedding=id(p) in embedding,
            in_matmul=id(p) in matmul,
        )
        for name, p in model.named_parameters()
    ]
