"""The optimizer with its decay groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from posttrain.precision import PrecisionPlan
from posttrain.resolve import settings

OptimizerName = Literal["adamw", "adamw_8bit", "sgd", "adafactor"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]

_DEFAULT_WSD_DECAY_RATIO, _DEFAULT_MOMENTUM = 0.1, 0.9


@settings
class OptimizerConfig:
    """The optimizer, its schedule and clipping. Every number is checked when the record is
    built."""

    name: OptimizerName = "adamw"
    """``adamw``: two moments in the weights' dtype, 8 bytes a parameter in fp32. ``adamw_8bit``:
    both in 8 bits with one fp32 scale per 256 elements, 2.03 bytes (tensors below 4096 elements:
    fp32), by bitsandbytes; slow on a CPU (3.4 s a step for 135M parameters, ``adamw`` 0.1 s).
    ``sgd``: one momentum, 4 bytes in fp32; its lr has another scale, try 1e-2. ``adafactor``: a sum
    per row and per column instead of a moment, about 0 bytes; lr means what it means for adamw."""
    offload: bool = False
    """Keep the optimizer's state in host memory and update there, one parameter at a time; an
    accelerator then holds weights and gradients only. Costs three copies of the weights over the
    bus per step. Refused on a CPU, where nothing is saved."""
    lr: float = 2e-5
    """Peak learning rate, per step."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, as torch counts it: a weight shrinks by lr * weight_decay per
    step. Norms, biases and embeddings never decay. ``sgd`` adds weight_decay * weight to the
    gradient instead, so it enters the momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Only for ``adamw`` and ``adamw_8bit``: decay rates of the first and second moment, per
    step."""
    eps: float = 1e-8
    """Only for ``adamw`` and ``adamw_8bit``: added to the root of the second moment, in units of
    the gradient."""
    momentum: float | None = None
    """Only for ``sgd``: share of the velocity that stays, per step; None means 0.9, 0 keeps no
    state."""
    schedule: Schedule = "linear"
    """Learning rate after the warmup: ``constant``, ``linear`` or ``cosine`` down to
    ``min_lr_ratio``, or ``wsd`` (constant, then linear in the last ``wsd_decay_ratio`` of the
    run)."""
    warmup_steps: int = 0
    """Optimizer steps of linear warmup; excludes ``warmup_ratio``."""
    warmup_ratio: float = 0.0
    """Warmup as a share of all optimizer steps, 0 to 1, rounded up; excludes ``warmup_steps``."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of ``lr``, 0 to 1. Not for ``constant``."""
    wsd_decay_ratio: float | None = None
    """Only for ``wsd``: share of all optimizer steps in which the rate decays, 0 to 1; None means
    0.1."""
    max_grad_norm: float = 1.0
    """Global L2 norm to which gradients are clipped, in units of the gradient; 0 turns clipping
    off."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas needs two numbers, e.g. [0.9, 0.95]; got {list(self.betas)}.")
        self._check_ranges()
        self._check_ignored()

    def _check_ranges(self) -> None:
        values = {**vars(self), "betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        for names, wanted, is_in in (
            ("lr eps", "> 0", lambda x: x > 0),
            ("weight_decay warmup_steps max_grad_norm", ">= 0", lambda x: x >= 0),
            ("betas[0] betas[1] momentum warmup_ratio", "in [0, 1)", lambda x: 0 <= x < 1),
            ("min_lr_ratio", "in [0, 1]", lambda x: 0 <= x <= 1),
            ("wsd_decay_ratio", "in (0, 1]", lambda x: 0 < x <= 1),
        ):
            for name in names.split():
                x = values[name]
                if x is not None and not (math.isfinite(x) and is_in(x)):
                    raise ValueError(
                        f"OptimizerConfig.{name} must be finite and {wanted}; got {x}."
                    )

    def _check_ignored(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                "warmup_steps and warmup_ratio are both set and one would be ignored. Set one to 0."
            )
        by_name = f"optimizer.name={self.name!r}"
        by_schedule = f"schedule={self.schedule!r}"
        is_adamw = self.name.startswith("adamw")
        for field, is_used, by, takes in (
            ("momentum", self.name == "sgd", by_name, "sgd"),
            ("betas", is_adamw, by_name, "adamw"),
            ("eps", is_adamw, by_name, "adamw"),
            ("min_lr_ratio", self.schedule != "constant", by_schedule, "linear, cosine or wsd"),
            ("wsd_decay_ratio", self.schedule == "wsd", by_schedule, "wsd"),
        ):
            value, default = getattr(self, field), getattr(OptimizerConfig, field)
            if not is_used and (tuple(value) if field == "betas" else value) != default:
                raise ValueError(
                    f"{field}={value} would be ignored by {by}. Leave it out, or take {takes}."
                )

    def num_warmup_steps(self, num_steps: int) -> int:
        """Warmup steps of a run of ``num_steps``; a ratio always leaves one step at the full
        rate."""
        if self.warmup_ratio:
            return min(math.ceil(self.warmup_ratio * num_steps), num_steps - 1)
        if self.warmup_steps >= num_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be below the number of optimizer steps; "
                f"got {num_steps} steps. Set a warmup_ratio (0.1) instead, or train longer."
            )
        return self.warmup_steps


def _undecayed_ids(model: nn.Module) -> set[int]:
    """ids of the parameters of norms and embeddings, found by the type of the module that owns
    them.

    A head tied to the embedding is the same object and so is in the set. Norm weights may be 2-D
    (per-head norms).
    """
    ids: set[int] = set()
    for module in model.modules():
        kind = type(module).__name__
        # peft wraps an embedding: the adapter's matrices lie below the wrapper, so take all that is
        # inside.
        wraps_embedding = isinstance(getattr(module, "base_layer", None), nn.Embedding)
        inside = isinstance(module, nn.Embedding) or wraps_embedding
        if inside or "Norm" in kind or "Embedding" in kind:
            ids.update(id(p) for p in module.parameters(recurse=inside))
    return ids


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: matrices decay; norms, embeddings (and a head tied to one), biases and vectors
    do not.

    Loshchilov & Hutter 2019, arXiv:1711.05101, decouples the decay; which parameters take part is
    the habit of GPT-2 and its successors. Every trainable parameter is in exactly one group, a tied
    one once; a frozen one in none; a group without parameters is left out. Raises ValueError if
    nothing is trainable.
    """
    undecayed = _undecayed_ids(model)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}  # by whether they decay
    for name, p in model.named_parameters():
        # ZeRO-3 leaves an empty vector and notes the real shape beside it
        is_vector = len(getattr(p, "ds_shape", p.shape)) < 2
        keeps = is_vector or id(p) in undecayed or name.rsplit(".", 1)[-1].endswith("bias")
        # set by state-space models on their 2-D A_log
        keeps = keeps or getattr(p, "_no_weight_decay", False)
        if p.requires_grad:
            groups[not keeps].append(p)
    if not any(groups.values()):
        raise ValueError(
            f"Nothing to train in {type(model).__name__}: no parameter has requires_grad=True. "
            "Unfreeze some, or add an adapter (--model.lora.rank 16)."
        )
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0}
        for decays, params in groups.items()
        if params
    ]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, plan: PrecisionPlan | None = None
) -> Optimizer:
    """The optimizer of ``config.name`` over ``decay_groups``.

    adamw: theta <- theta (1 - lr lambda) - lr m_hat / (sqrt(v_hat) + eps). Loshchilov & Hutter
    2019, arXiv:1711.05101, algorithm 2; torch multiplies the decay by lr (lambda_paper = lr *
    lambda). adamw_8bit: the same with m and v quantised by blocks between steps, Dettmers et al.
    2022, arXiv:2110.02861. sgd: u <- momentum u + g + lambda theta; theta <- theta - lr u.
    adafactor: v from row and column sums, the update's RMS clipped to 1, Shazeer & Stern 2018,
    arXiv:1804.04235, algorithm 4, with lr for the relative step size and no first moment.

    Fused kernels are used: on one core AdamW's updates the 135M parameters of SmolLM2 in 84 ms
    where ``foreach`` takes 528 ms, and repeats bit for bit. Not under loss scaling: torch then
    calls a fused step also on an overflow and skips inside the kernel, so accelerate cannot see the
    skip and would advance the schedule.
    """
    groups = decay_groups(model, config.weight_decay)
    optimizer = _optimizer(groups, config, fused=plan is None or not plan.uses_loss_scaling)
    if not config.offload:
        return optimizer
    if groups[0]["params"][0].device.type == "cpu":
        raise ValueError(
            "optimizer.offload moves state from an accelerator to host memory; this model is "
            "in host memory already. Leave it off; adamw_8bit and adafactor need less memory."
        )
    return OffloadedOptimizer(optimizer)


def _optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, *, fused: bool) -> Optimizer:
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    if config.name == "sgd":  # not fused: on a CPU torch 2.13 then leaves junk in bf16 momenta
        momentum = _DEFAULT_MOMENTUM if config.momentum is None else config.momentum
        return SGD(groups, lr=config.lr, momentum=momentum)
    if config.name == "adafactor":
        # Not torch's: it keeps the sums in the gradient's dtype, where bf16 stops moving after 1024
        # steps (1 - beta2 < 2^-8), and its lr is relative to the size of the weights.
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=config.lr, scale_parameter=False, relative_step=False)
    # Not torchao's: it compiles its step (36 s for a net of two layers on a CPU, and a C++ compiler
    # must be there).
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        advice = "pip install 'posttrain[adamw-8bit]', or take adafactor."
        raise ValueError(f"adamw_8bit needs bitsandbytes ({error}). {advice}") from error
    optimizer: Optimizer = AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)
    return optimizer


def refuse_sharded(config: OptimizerConfig, kind: str) -> None:
    """Under ZeRO and FSDP2 (``sharding.kind``) only AdamW: 8-bit blocks and Adafactor's rows would
    straddle the parts."""
    if kind != "whole" and (config.name != "adamw" or config.offload):
        option = "offload" if config.offload else f"name={config.name}"
        raise ValueError(
            f"optimizer.{option} is for one process and DDP; this launch shards the optimizer "
            f"state ({kind}). Take adamw, and DeepSpeed's offload_optimizer_device: cpu to offload."
        )


class OffloadedOptimizer(Optimizer):
    """``inner``'s update of parameters on an accelerator, computed on the host, where its whole
    state lives.

    The optimizer half of ZeRO-Offload (Ren et al. 2021, arXiv:2101.06840). Weight and gradient of
    one parameter at a time come down into pinned memory, ``inner`` updates them, the weight goes
    up: 12 bytes a parameter over the bus per step in fp32. Host memory: ``inner``'s state, and a
    weight and gradient of the largest parameter. Gradients stay on the accelerator until the
    update, because clipping needs all of them. (torchao's copies them down in backward, before they
    are clipped.)
    """

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; parameters without gradient keep weight and state."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                host = nn.Parameter(_on_host(p.detach()))
                host.grad = _on_host(p.grad)
                self.inner.param_groups = [{**group, "params": [host]}]
                self.inner.state.clear()
                self.inner.state[host] = self.state[p]
                self.inner.step()
                self.state[p] = self.inner.state.pop(host)
                p.copy_(host, non_blocking=True)


def _on_host(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def lr_multiplier(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """lr(step) / lr for the optimizer step with this 0-based number.

    Warmup: (step + 1) / (warmup_steps + 1). After it, with p = (step - warmup) / (num_steps -
    warmup) and r = min_lr_ratio: constant 1; linear r + (1 - r)(1 - p); cosine r + (1 - r)(1 +
    cos(pi p)) / 2 (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, one cycle); wsd 1, then
    linear to r over the last ceil(wsd_decay_ratio * num_steps) steps (warmup-stable-decay: Hu et
    al. 2024, arXiv:2404.06395; linear decay: Haegele et al. 2024, arXiv:2405.18392).

    Departure from transformers, whose warmup step / warmup_steps spends the first step at rate 0.
    From step ``warmup_steps`` on both agree. r is reached at ``num_steps``, one past the last step,
    so no step is wasted at rate 0 there either.
    """
    warmup = start = config.num_warmup_steps(num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        ratio = config.wsd_decay_ratio or _DEFAULT_WSD_DECAY_RATIO
        start = max(warmup, num_steps - math.ceil(ratio * num_steps))
    p = min(max(step - start, 0) / max(num_steps - start, 1), 1.0)
    falling = 0.5 * (1.0 + math.cos(math.pi * p)) if config.schedule == "cosine" else 1.0 - p
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * falling


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, num_steps: int) -> LambdaLR:
    """``lr_multiplier`` as a torch scheduler: call ``step()`` once after every optimizer step that
    was not skipped.

    Do not hand it to ``accelerator.prepare``: the wrapper steps it once per process.
    """
    if num_steps < 1:
        raise ValueError(f"A schedule needs num_steps >= 1; got {num_steps}. Is the dataset empty?")
    return LambdaLR(optimizer, partial(lr_multiplier, config=config, num_steps=num_steps))
