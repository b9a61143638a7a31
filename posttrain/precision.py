"""Which dtype every number of a training run has: one record, read by training and by the memory
accounting.

Micikevicius et al. 2018, arXiv:1710.03740: 16-bit compute needs fp32 master weights (an update
below half a unit in the last place of the weight is rounded away: ratio 2^11 in fp16, 2^8 in bf16),
fp32 reductions, and in fp16 a scaled loss (gradients below 2^-25 become 0). torch is imported only
inside the functions that return torch objects.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

DType = Literal["float64", "float32", "bfloat16", "float16"]

_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_AUTOCAST: dict[str, str] = {"bfloat16": "bf16", "float16": "fp16"}
_FAST_BF16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def bytes_per_element(dtype: str) -> int:
    """Bytes of one element of a floating dtype named as torch names it (``"bfloat16"``: 2)."""
    if dtype not in _BYTES:
        raise ValueError(
            f"bytes_per_element knows {', '.join(_BYTES)}; got {dtype!r}. Use the "
            "torch name without 'torch.'."
        )
    return _BYTES[dtype]


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name: ``"bfloat16"`` gives ``torch.bfloat16``."""
    import torch

    bytes_per_element(dtype)
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """Dtypes of one training run. All fields but ``name`` and ``uses_loss_scaling`` are torch dtype
    names."""

    name: str
    """What the user writes: ``fp32``, ``bf16``, ``bf16-pure``, ``fp16``."""
    weight: DType
    """Dtype the parameters are loaded and stored in."""
    gradient: DType
    """Dtype of ``parameter.grad`` and of its reduction over ranks (torch keeps both in the weight's
    dtype)."""
    master: DType | None
    """Dtype of a *separate* copy of the weights that the optimizer updates; None when it updates
    the weights themselves (then float32 weights are their own master: see ``update``). Additive:
    counting ``weight`` and ``master`` counts no byte twice."""
    moment: DType
    """Dtype of AdamW's two moments (other optimizers: ``plan/states.py``)."""
    compute: DType
    """Dtype of the matmuls in forward and backward (autocast when it differs from ``weight``)."""
    reduce: DType
    """Dtype of softmax, log-probs, losses and gradient norms: never 16-bit."""
    uses_loss_scaling: bool
    """Whether the loss is multiplied by a dynamic scale before backward."""

    def __post_init__(self) -> None:
        wanted = get_args(DType)
        for field in ("weight", "gradient", "master", "moment", "compute", "reduce"):
            value = getattr(self, field)
            if value not in wanted and not (field == "master" and value is None):
                raise ValueError(
                    f"PrecisionPlan {self.name!r}: {field} must be one of "
                    f"{', '.join(wanted)}; got {value!r}."
                )
        if self.compute != self.weight and self.compute not in _AUTOCAST:
            raise ValueError(
                f"PrecisionPlan {self.name!r}: compute={self.compute} with weight={self.weight} is "
                f"not possible, autocast only lowers to {', '.join(_AUTOCAST)}. Set compute to the "
                "weight's dtype."
            )
        if bytes_per_element(self.reduce) < 4:
            raise ValueError(
                f"PrecisionPlan {self.name!r}: reduce={self.reduce} would lose sums (4096 ones add "
                "up to 256 in bfloat16, 2048 in float16). Set reduce='float32'."
            )

    @property
    def update(self) -> DType:
        """Dtype in which ``w + dw`` is rounded: the master's if there is one, else the weight's."""
        return self.master or self.weight

    @property
    def accelerate_mixed_precision(self) -> str:
        """Value for ``Accelerator(mixed_precision=...)``: ``no``, ``bf16`` or ``fp16``."""
        return "no" if self.compute == self.weight else _AUTOCAST[self.compute]

    @property
    def load_dtype(self) -> torch.dtype:
        """Value for ``from_pretrained(dtype=...)``."""
        return torch_dtype(self.weight)

    @property
    def state_bytes_per_param(self) -> int:
        """Bytes per trained parameter: weight + gradient + separate master + two moments.

        Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1 (2 + 2 + 12 = 16 for a 16-bit weight
        with an fp32 master).
        """
        master = bytes_per_element(self.master) if self.master else 0
        return (
            bytes_per_element(self.weight)
            + bytes_per_element(self.gradient)
            + master
            + 2 * bytes_per_element(self.moment)
        )


_FP32 = PrecisionPlan(
    name="fp32",
    weight="float32",
    gradient="float32",
    master=None,
    moment="float32",
    compute="float32",
    reduce="float32",
    uses_loss_scaling=False,
)
PRECISIONS: dict[str, PrecisionPlan] = {
    "fp32": _FP32,
    # accelerate keeps the weights in fp32 and casts inside autocast: they are the master, gradients
    # come back in fp32.
    "bf16": replace(_FP32, name="bf16", compute="bfloat16"),
    # Half the memory of the others; loses every update smaller than 2^-8 of the weight.
    "bf16-pure": replace(
        _FP32,
        name="bf16-pure",
        weight="bfloat16",
        gradient="bfloat16",
        moment="bfloat16",
        compute="bfloat16",
    ),
    "fp16": replace(_FP32, name="fp16", compute="float16", uses_loss_scaling=True),
}

# DeepSpeed computes with bf16 weights and updates an fp32 copy of them; gradients are reduced and
# accumulated in fp32.
DEEPSPEED_BF16 = replace(PRECISIONS["bf16"], weight="bfloat16", master="float32")
# It updates an fp32 copy even of fp32 weights.
DEEPSPEED_FP32 = replace(_FP32, master="float32")


def resolve_precision(
    name: str | None, device_type: str, *, deepspeed: bool = False
) -> PrecisionPlan:
    """The plan of a name on a device type (``"cpu"``, ``"cuda"``, ...); None takes
    ``default_precision``.

    Raises ValueError for an unknown name, for fp16 anywhere but on CUDA, and under DeepSpeed for
    fp16 and bf16-pure.
    """
    name = default_precision(device_type).name if name is None else name
    if name not in PRECISIONS:
        near = difflib.get_close_matches(name, PRECISIONS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"Unknown precision {name!r}; it must be one of {', '.join(PRECISIONS)}.{hint}"
        )
    if deepspeed:
        if name not in ("fp32", "bf16"):
            raise ValueError(
                f"Precision {name!r} does not exist under DeepSpeed: it always updates an fp32 "
                "copy of the weights, and its fp16 loss scale is its own. Use --train.precision "
                "bf16 or fp32, or FSDP2 (launch/fsdp.yaml)."
            )
        return DEEPSPEED_FP32 if name == "fp32" else DEEPSPEED_BF16
    plan = PRECISIONS[name]
    if plan.uses_loss_scaling and device_type != "cuda":
        reason = (
            "a CPU runs float16 matmuls at 0.4 GFLOP/s (float32: 149)"
            if device_type == "cpu"
            else "its dynamic loss scaling is only exercised there"
        )
        raise ValueError(
            f"Precision {name!r} needs a CUDA device; got device type {device_type!r}, and "
            f"{reason}. Use {default_precision(device_type).name!r} here."
        )
    return plan


def default_precision(
    device_type: str, *, cpuinfo: Path = Path("/proc/cpuinfo"), kernels: str | None = None
) -> PrecisionPlan:
    """``bf16`` where the device is good at it, else ``fp32``.

    Good at it: CUDA with native bf16 (compute capability 8.0), a CPU with avx512_bf16 or amx_bf16
    among its flags for which torch runs its AVX-512 kernels (``kernels``, by default what torch
    says; ATEN_CPU_CAPABILITY can hold it to less).
    """
    if device_type == "cuda":
        import torch

        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return PRECISIONS["bf16" if native else "fp32"]
    if device_type == "cpu" and _cpu_flags(cpuinfo) & _FAST_BF16_CPU_FLAGS:
        import torch

        return PRECISIONS[
            "bf16" if "512" in (kernels or torch.backends.cpu.get_cpu_capability()) else "fp32"
        ]
    return PRECISIONS["fp32"]


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """Feature flags of the first core; empty where the file does not exist (macOS, Windows)."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
