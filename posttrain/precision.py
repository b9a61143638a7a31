"""Which dtype every number of a training run has: one record, read by training and by the memory
accounting.

Micikevicius et al. 2018, arXiv:1710.03740: 16-bit compute needs fp32 master weights (an update
below half a unit in the last place of the weight is rounded away: ratio 2^11 in fp16, 2^8 in bf16),
fp32 reductions, and in fp16 a scaled loss (gradients below 2^-25 become 0). torch is imported only
inside the functions that return torch objects.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.resolve import did_you_mean

if TYPE_CHECKING:
    import torch

DType = Literal["float64", "float32", "bfloat16", "float16"]

_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_AUTOCAST: dict[str, str] = {"bfloat16": "bf16", "float16": "fp16"}


def bytes_per_element(dtype: str) -> int:
    """Bytes of one element of a floating dtype named as torch names it (``"bfloat16"``: 2)."""
    if dtype not in _BYTES:
        raise ValueError(
            f"A dtype is one of {', '.join(_BYTES)}; got {dtype!r}. Use the torch name."
        )
    return _BYTES[dtype]


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name: ``"bfloat16"`` gives ``torch.bfloat16``."""
    import torch

    bytes_per_element(dtype)
    return getattr(torch, dtype)


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """Dtypes of one training run. All fields but ``name`` and ``uses_loss_scaling`` are torch dtype
    names."""

    name: str
    """What the user writes: ``fp32``, ``bf16``, ``bf16-pure``, ``fp16``."""
    weight: DType = "float32"
    """Dtype the parameters are loaded and stored in."""
    gradient: DType = "float32"
    """Dtype of ``parameter.grad`` and of its reduction over ranks (torch keeps both in the weight's
    dtype)."""
    master: DType | None = None
    """Dtype of a *separate* copy of the weights that the optimizer updates; None when it updates
    the weights themselves (then float32 weights are their own master: see ``update``). Additive:
    counting ``weight`` and ``master`` counts no byte twice."""
    moment: DType = "float32"
    """Dtype of AdamW's two moments (other optimizers: ``plan/states.py``)."""
    compute: DType = "float32"
    """Dtype of the matmuls in forward and backward (autocast when it differs from ``weight``)."""
    reduce: DType = "float32"
    """Dtype of softmax, log-probs, losses and gradient norms: never 16-bit."""
    uses_loss_scaling: bool = False
    """Whether the loss is multiplied by a dynamic scale before backward."""

    def __post_init__(self) -> None:
        if self.compute != self.weight and self.compute not in _AUTOCAST:
            raise ValueError(
                f"compute={self.compute} with weight={self.weight} is not possible: autocast only "
                f"lowers to {', '.join(_AUTOCAST)}."
            )
        if bytes_per_element(self.reduce) < 4:
            raise ValueError(
                f"reduce={self.reduce} would lose sums: 4096 ones add up to 256 in bfloat16."
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
        held = [self.weight, self.gradient, self.moment, self.moment, self.master]
        return sum(bytes_per_element(dtype) for dtype in held if dtype is not None)


_FP32 = PrecisionPlan(name="fp32")
_BF16 = PrecisionPlan(name="bf16", compute="bfloat16")
PRECISIONS: dict[str, PrecisionPlan] = {
    "fp32": _FP32,
    # accelerate keeps the weights in fp32 and casts inside autocast: they are the master, gradients
    # come back in fp32.
    "bf16": _BF16,
    # Half the memory of the others; loses every update smaller than 2^-8 of the weight.
    "bf16-pure": replace(
        _BF16, name="bf16-pure", weight="bfloat16", gradient="bfloat16", moment="bfloat16"
    ),
    "fp16": PrecisionPlan(name="fp16", compute="float16", uses_loss_scaling=True),
}

# DeepSpeed computes with bf16 weights and updates an fp32 copy of them; gradients are reduced and
# accumulated in fp32.
DEEPSPEED_BF16 = replace(_BF16, weight="bfloat16", master="float32")
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
        raise ValueError(
            f"Unknown precision {name!r}; it must be one of {', '.join(PRECISIONS)}."
            f"{did_you_mean(name, PRECISIONS, cutoff=0.4)}"
        )
    if deepspeed:
        if name not in ("fp32", "bf16"):
            raise ValueError(
                f"Precision {name!r} does not exist under DeepSpeed, which always updates an fp32 "
                "copy of the weights. Use bf16 or fp32, or FSDP2 (launch/fsdp.yaml)."
            )
        return DEEPSPEED_FP32 if name == "fp32" else DEEPSPEED_BF16
    plan = PRECISIONS[name]
    if plan.uses_loss_scaling and device_type != "cuda":
        raise ValueError(
            f"Precision {name!r} needs a CUDA device; got device type {device_type!r} (a CPU runs "
            "float16 matmuls at 0.4 GFLOP/s, float32 at 149). "
            f"Use {default_precision(device_type).name!r} here."
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
    is_good = False
    if device_type == "cuda":
        import torch

        is_good = torch.cuda.is_available() and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    elif device_type == "cpu" and cpuinfo.exists():  # not on macOS and Windows
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if flags and {"avx512_bf16", "amx_bf16"} & set(flags[1].split()):
            import torch

            is_good = "512" in (kernels or torch.backends.cpu.get_cpu_capability())
    return PRECISIONS["bf16" if is_good else "fp32"]
