"""The real update step on fake tensors: what it would hold, without weights and without a device.

The model is built from its config under ``FakeTensorMode``: every tensor has a shape, a dtype and a
storage without bytes. The step is the one of a run (``Policy``, ``step_gradient``,
``clip_and_check``, AdamW), so what is counted is what the code does, not what a formula says of it.
A 7B model takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.losses import policy as policy_losses
from posttrain.losses.preference import dpo
from posttrain.losses.reward import bradley_terry
from posttrain.losses.sft import sft
from posttrain.models.adapters import LoraConfig
from posttrain.models.heads import Scorer
from posttrain.models.load import ModelConfig, set_dropout, untrained_model
from posttrain.models.policy import Policy
from posttrain.models.reference import adapters_off, freeze, has_adapters
from posttrain.packing.batch import PackedBatch
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.precision import PrecisionPlan, torch_dtype
from posttrain.tracing.live import LiveStorages, Peak
from posttrain.tracing.quantised import packed_4bit
from posttrain.training.optimizer import OptimizerConfig, build_optimizer
from posttrain.training.step import (
    Loss,
    Reference,
    clip_and_check,
    step_gradient,
)
from posttrain.types import SCORE_SLOT, Completion, PromptGroup, as_loss

Method = Literal["sft", "reward", "dpo", "rl"]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What one update step holds at its worst moment, in bytes of live storage. Not in it: the
    libraries, and what the allocator wastes."""

    peak_bytes: int
    by_category: dict[str, int]
    """``live.CATEGORIES`` at the peak; they add up to it."""
    by_phase: dict[str, Peak]
    """forward, backward, optimizer: each one's own peak."""


def trace_step(
    config: Any,
    *,
    method: Method,
    packing: PackingConfig,
    precision: PrecisionPlan,
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool = False,
    dropout: bool | None = None,
    groups: Sequence[PromptGroup] | None = None,
    loss: Loss | None = None,
    with_reference: bool | Literal["cached"] | None = None,
    optimizer: OptimizerConfig | None = None,
    completions: int | None = None,
) -> Traced:
    """The peak of an update step in the middle of a run (AdamW's moments exist) of the model of a
    transformers ``config``.

    ``groups``: the global batch; None takes the worst case, two rows that fill
    ``packing.max_tokens`` with trained tokens (in the second one all gradients exist already),
    ``completions`` to a prompt (None: 8 in RL). ``loss``, ``with_reference``: None takes the
    method's own (for rl the clipped surrogate without a KL term); "cached": the reference's
    log-probs are there. Everything is on one device, its kernels those of a CPU.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}.")
    chosen = (
        loss
        or {"sft": sft, "reward": bradley_terry, "dpo": dpo, "rl": policy_losses.clipped}[method]
    )
    wants_reference = method == "dpo" if with_reference is None else with_reference
    live = _FakeStorages(num_vocabulary=config.get_text_config().vocab_size)
    with torch.device("meta"):  # peft cannot build on fake tensors
        model = build_model(
            config,
            method,
            precision,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            dropout=dropout,
        )
        frozen = (
            build_model(config, method, precision)
            if wants_reference is True and not has_adapters(model)
            else None
        )
    with FakeTensorMode(), _Float32Experts():
        policy = (Scorer if method == "reward" else Policy)(_with_storage(model), packing)
        policy.train()
        accelerator = _OneDevice(precision)
        live.watch(policy)
        reference: Reference | None = _base_of(policy) if wants_reference else None
        if wants_reference == "cached":
            reference = lambda _, batch: torch.zeros(batch.predictor_T.shape[0])  # noqa: E731
        if frozen is not None:
            reference = _frozen(
                freeze(Policy(_with_storage(frozen), packing), compute=_lower(precision)), live
            )
        adamw = build_optimizer(policy, optimizer or OptimizerConfig(), plan=precision)
        with live:
            _make_moments(policy, adamw, live)
            batch = (
                list(groups)
                if groups is not None
                else worst_case(
                    method,
                    packing.max_tokens,
                    policy.forward_mode.mode,
                    group_size=completions or 8,
                )
            )
            plan = plan_step(
                batch,
                world_size=1,
                max_tokens=packing.max_tokens,
                mode=policy.forward_mode.mode,
                coupled=as_loss(chosen).couples_completions,
            )
            result = step_gradient(
                accelerator,
                policy,
                batch,
                plan,
                chosen,
                mode=policy.forward_mode.mode,
                reference=reference,
            )
            with live.phase("optimizer"):
                clip_and_check(accelerator, policy, result, batch, max_grad_norm=1.0, step=1)
                adamw.step()
                adamw.zero_grad(set_to_none=True)
    peak = live.peak
    return Traced(
        peak_bytes=peak.total_bytes, by_category=peak.by_category, by_phase=dict(live.phases)
    )


def build_model(
    config: Any,
    method: Method,
    precision: PrecisionPlan,
    *,
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool = False,
    dropout: bool | None = None,
) -> nn.Module:
    """The model of a config with random weights (none on the meta device), as ``load_model`` would
    give it."""
    settings = ModelConfig(
        lora=lora or LoraConfig(), gradient_checkpointing=gradient_checkpointing, dropout=dropout
    )
    compute = torch_dtype(precision.compute)
    model = untrained_model(
        config, settings, dtype=precision.load_dtype, compute=compute, scores=method == "reward"
    )
    set_dropout(model, settings, default=method == "sft")
    return model


def _with_storage(model: nn.Module) -> nn.Module:
    """Parameters and buffers of a meta model become tensors of the CPU (fake ones, under the mode);
    a tied one once."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if type(module).__name__ == "Linear4bit" and name == "weight":
                made[id(p)] = packed_4bit(module)
            elif p is not None and id(p) not in made:
                made[id(p)] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad
                )
            module._parameters[name] = None if p is None else made[id(p)]
        for name, b in module._buffers.items():
            module._buffers[name] = (
                None if b is None else made.setdefault(id(b), torch.empty(b.shape, dtype=b.dtype))
            )
    return model


def worst_case(
    method: Method, max_tokens: int, mode: str = "shared", *, rows: int = 2, group_size: int = 8
) -> list[PromptGroup]:
    """Groups that fill ``rows`` rows of ``max_tokens`` tokens, all trained but a prompt of one
    token.

    One completion (sft), two (reward, dpo) or ``group_size`` (rl) to a prompt; a row that cannot
    hold so many has fewer.
    """
    wanted = {"sft": 1, "reward": 2, "dpo": 2, "rl": group_size}[method]
    prompts = 1 if mode == "shared" else wanted
    room = max_tokens - prompts
    count = max(1, min(wanted, room))
    groups = []
    for row in range(rows):
        completions = []
        for k in range(count):
            length = room * (k + 1) // count - room * k // count + 1
            mask = [0] * (length - 1) + [1] if method == "reward" else [1] * length
            rl: dict[str, Any] = (
                {"advantage": 1.0, "sampler_logps": [-1.0] * length} if method == "rl" else {}
            )
            completions.append(
                Completion(token_ids=[SCORE_SLOT] * length, loss_mask=mask, columns=rl)
            )
        groups.append(
            PromptGroup(
                prompt_ids=[1], completions=completions, meta={"file": "worst case", "row": row}
            )
        )
    return groups


def _make_moments(policy: nn.Module, adamw: torch.optim.Optimizer, live: LiveStorages) -> None:
    """AdamW's state as after its first step."""
    for p in policy.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    for state in adamw.state.values():
        for value in state.values():
            live.own(value, "moments")
    live.phases.clear()


def _frozen(policy: Policy, live: LiveStorages) -> Reference:
    """A reference with weights of its own."""
    for tensor in (*policy.parameters(), *policy.buffers()):
        live.own(tensor, "reference")
    return lambda _, batch: policy(batch).logps_T


def _base_of(policy: Policy) -> Reference:
    """The reference under adapters."""

    def base(_: Sequence[PromptGroup], batch: PackedBatch) -> Tensor:
        with adapters_off(policy.model):
            return policy(batch).logps_T

    return base


def _lower(precision: PrecisionPlan) -> torch.dtype | None:
    """The dtype of autocast, or None where there is none."""
    return None if precision.compute == precision.weight else torch_dtype(precision.compute)


class _FakeStorages(LiveStorages):
    """Numbers that Python asks for (a norm, a loss) are 1: fake tensors have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Float32Experts(TorchDispatchMode):
    """Grouped products in float32, which a CPU computes, have no fake kernel."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            return _grouped_mm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_mm(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """[T, H] x [E, H, F] -> [T, F]; [H, T] x [T, F] -> [E, H, F], of shape alone."""
    shape = (left.shape[0], right.shape[-1])
    if left.dim() == right.dim() == 2:
        assert offs is not None
        shape = (offs.shape[0], *shape)
    return left.new_empty(shape)


class _OneDevice:
    """What ``step_gradient`` needs of an Accelerator."""

    process_index, num_processes, scaler, distributed_type = 0, 1, None, "NO"
    device = torch.device("cpu")

    def __init__(self, precision: PrecisionPlan) -> None:
        self._compute = _lower(precision)

    def autocast(self) -> Any:
        return (
            nullcontext() if self._compute is None else torch.autocast("cpu", dtype=self._compute)
        )

    def backward(self, loss: Tensor) -> None:
        (loss / 1).backward()  # accelerate divides by its accumulation steps

    def unscale_gradients(self) -> None:
        """Nothing is scaled."""

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor
