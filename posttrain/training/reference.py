"""Reference log-probs in a run: live (frozen copy, adapters off), moving (TR-DPO), or computed once
and kept on disk.

All three are called the same way, ``reference(groups, batch) -> [T]``, on the policy's own packed
rows.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.data.tokenise import sequence_key
from posttrain.files import cache_root, whole_file
from posttrain.models.policy import (
    Policy,
    adapters_off,
    freeze,
    frozen_copy,
    has_adapters,
    in_eval_mode,
    weights_digest,
)
from posttrain.models.sharding import local, mix_into, reshard, shard_frozen
from posttrain.packing.batch import PackedBatch
from posttrain.precision import PrecisionPlan
from posttrain.resolve import settings
from posttrain.training.forward import GROUPS_PER_PLAN, ForwardPlan, forward_values
from posttrain.training.sharding import (
    broadcast_object,
    gather_object,
    is_deepspeed,
    shards_weights,
    unwrapped,
)
from posttrain.training.step import Reference
from posttrain.types import Forward, PromptGroup


@settings
class ReferenceConfig:
    """Which model the policy is compared with, and when its log-probs are computed."""

    model: str | None = None
    """Embedded model, local folder or hub id; None: the policy as it is at the start of the run
    (the base under LoRA)."""
    cache: bool = False
    """Compute all reference log-probs once before training and keep them on disk. Keyed by tokens
    and reference weights (and the compute dtype), so other runs on the same data reuse them; the
    reference then takes no memory in training."""
    cache_dir: str | None = None
    """Where; None: $POSTTRAIN_CACHE, else posttrain in the user's cache folder."""
    sync_every: int = 0
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656): move the reference towards the policy
    every so many steps; 0: never."""
    sync_mix: float = 0.6
    """Share alpha of the policy in reference <- alpha * policy + (1 - alpha) * reference."""

    def __post_init__(self) -> None:
        if self.sync_every < 0 or not 0.0 < self.sync_mix <= 1.0:
            raise ValueError(
                "reference.sync_every is a number of steps >= 0 and reference.sync_mix a share in "
                f"(0, 1]; got {self.sync_every} and {self.sync_mix}."
            )
        if self.cache and self.sync_every:
            raise ValueError(
                "reference.cache keeps a fixed reference, reference.sync_every moves "
                "it. Choose one."
            )


class RunReference:
    """The reference of one run. ``load_other()`` gives the model that ``config.model`` names;
    ``groups`` are all groups whose log-probs a cache must hold."""

    def __init__(
        self,
        config: ReferenceConfig,
        *,
        precision: PrecisionPlan,
        load_other: Callable[[], nn.Module] | None = None,
        groups: Sequence[Sequence[PromptGroup]] = (),
        show_progress: bool = False,
    ) -> None:
        self._config = config
        self._load_other = load_other
        self._groups = groups
        self._show_progress = show_progress
        self.frozen: Policy | None = None
        """The frozen policy; None where adapters are switched off, or a cache is read."""
        self._cache: ReferenceCache | None = None
        self._policy: Policy | None = None
        self._compute = getattr(torch, precision.compute)
        self._precision = precision

    def build(self, policy: Policy, accelerator: Any) -> None:
        """Before accelerate wraps, and maybe shards, the policy: the weights are those the run
        starts from."""
        self._device = accelerator.device
        self._base_is_reference = has_adapters(policy.model) and self._load_other is None
        if self._config.sync_every and has_adapters(policy.model):
            raise ValueError(
                "reference.sync_every averages weights, and a product of adapters is not the "
                "average's product. Train the whole model (--model.lora.rank 0), or leave "
                "reference.sync_every at 0."
            )
        if self._load_other is not None:
            model = self._load_other()
            if not shards_weights(accelerator):
                model.to(self._device)
            self.frozen = freeze(
                policy.around(model, device_type=self._device.type), compute=self._held_in
            )
        elif not self._base_is_reference and not self._config.cache:
            self.frozen = frozen_copy(policy, compute=self._held_in)
        if self.frozen is not None and is_deepspeed(accelerator):
            if self._config.sync_every and self._precision.load_dtype != torch.float32:
                raise ValueError(
                    "reference.sync_every would average in bfloat16, the dtype of DeepSpeed's "
                    "weights, and lose small moves. Use --train.precision fp32, FSDP2 "
                    "(launch/fsdp.yaml) or DDP."
                )
            for p in (
                self.frozen.parameters()
            ):  # as the engine does with the policy; buffers (rotary frequencies) stay
                p.data = p.data.to(self._precision.load_dtype)
        if self._config.cache:
            self._digest = weights_digest((self.frozen or policy).model)

    def start(self, policy: nn.Module, plan: ForwardPlan) -> None:
        """After ``build`` and accelerate, before the first step and before a checkpoint is read."""
        self._policy = unwrapped(policy)
        if self.frozen is not None:
            self.frozen.follow(self._policy)
        self._is_sharded = self.frozen is not None and shards_weights(plan.accelerator)
        if self.frozen is not None and self._is_sharded:
            compute = None if is_deepspeed(plan.accelerator) else self._compute
            shard_frozen(
                self.frozen,
                self._device,
                layer_names=self.frozen._no_split_modules or (),
                compute=compute,
            )
        if self._config.cache:
            # before the first step the policy is its own reference: the cache needs no copy
            live = (
                self._live
                if self.frozen is not None or self._base_is_reference
                else self._policy_itself
            )
            weights = f"{self._digest} {self._compute}"
            self._cache = ReferenceCache.of(
                self._config,
                plan,
                live,
                self._groups,
                weights=weights,
                show_progress=self._show_progress,
            )
            self.frozen = None

    @property
    def _held_in(self) -> torch.dtype | None:
        """A moving reference accumulates small changes: it is kept as precise as the policy."""
        return None if self._config.sync_every or self._compute == torch.float32 else self._compute

    @property
    def num_bytes(self) -> int:
        """Memory of the reference's own weights; 0 where the base under adapters or a cache is
        read."""
        if self.frozen is None:
            return 0
        reshard(self.frozen)
        return sum(local(p).numel() * p.element_size() for p in self.frozen.parameters())

    @torch.no_grad()
    def __call__(self, groups: Sequence[PromptGroup], batch: PackedBatch) -> Tensor:
        """[T] log-probs of the batch's trained tokens."""
        if self._cache is not None:
            return self._cache(groups, batch)
        return self._live(groups, batch)

    def _live(self, _: Sequence[PromptGroup], batch: PackedBatch) -> Tensor:
        if self.frozen is not None:
            return self.frozen(batch).logps_T
        assert self._policy is not None
        with adapters_off(self._policy.model):
            return self._policy(batch).logps_T

    def _policy_itself(self, _: Sequence[PromptGroup], batch: PackedBatch) -> Tensor:
        assert self._policy is not None
        with in_eval_mode(self._policy):
            return self._policy(batch).logps_T

    @torch.no_grad()
    def after_step(self, step: int, policy: nn.Module) -> None:
        """TR-DPO's soft update, equation 4 of the paper, after every ``sync_every``-th optimizer
        step."""
        if not self._config.sync_every or step % self._config.sync_every or self.frozen is None:
            return
        assert self._policy is not None
        mix_into(self.frozen, self._policy, self._config.sync_mix)

    def _parts(self) -> dict[str, Tensor]:
        """A moving reference's own weights, or this process's part of them."""
        if not self._config.sync_every or self.frozen is None:
            return {}
        reshard(self.frozen)
        return {n: local(p).detach() for n, p in self.frozen.named_parameters()}

    @property
    def _file(self) -> str:
        return (
            f"reference_{torch.distributed.get_rank()}.safetensors"
            if self._is_sharded
            else "reference.safetensors"
        )

    def write(self, folder: Path, *, is_main: bool) -> None:
        """A moving reference into a checkpoint; a fixed one is made again from the same weights."""
        if (parts := self._parts()) and (is_main or self._is_sharded):
            save_file({n: p.contiguous() for n, p in parts.items()}, folder / self._file)

    def read(self, folder: Path) -> None:
        """Load the state saved by ``write``."""
        if parts := self._parts():
            saved = load_file(folder / self._file)
            for name, part in parts.items():
                part.copy_(saved[name])


class ReferenceCache:
    """Log-probs of every trained token, by sequence. One safetensors file per (data, reference
    weights, compute dtype)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        stored = load_file(path)
        self._logps = stored["logps"]
        ends = stored["ends"].tolist()
        keys = [row.tobytes() for row in stored["keys"].numpy()]
        self._where = {key: (ends[i - 1] if i else 0, ends[i]) for i, key in enumerate(keys)}

    @classmethod
    def of(
        cls,
        config: ReferenceConfig,
        plan: ForwardPlan,
        live: Reference,
        datasets: Sequence[Sequence[PromptGroup]],
        *,
        weights: str,
        show_progress: bool,
    ) -> ReferenceCache:
        """From disk if the file is there, else computed by all ranks, written aside and renamed."""
        digest = hashlib.blake2b(weights.encode(), digest_size=16)
        for groups in datasets:
            for group in groups:
                for completion in group.completions:
                    digest.update(sequence_key(group, completion))
        path = cache_root(config.cache_dir) / "reference" / f"{digest.hexdigest()}.safetensors"
        accelerator = plan.accelerator
        if not broadcast_object(accelerator, path.exists()):
            values = _compute(plan, live, datasets, show_progress=show_progress)
            if accelerator.is_main_process:
                _write(path, values)
            accelerator.wait_for_everyone()
        elif show_progress:
            print(f"reference log-probs: read from {path}")
        return cls(path)

    def __call__(self, groups: Sequence[PromptGroup], batch: PackedBatch) -> Tensor:
        """[T] log-probs. Raises KeyError with the row for a sequence that the cache does not
        hold."""
        pieces = []
        for (g, k), n in zip(batch.refs, batch.num_tokens_S.tolist(), strict=True):
            if n:
                key = sequence_key(groups[g], groups[g].completions[k])
                if key not in self._where:
                    raise KeyError(
                        f"{groups[g].where}: no reference log-probs of completion {k} "
                        f"in {self._path}."
                    )
                start, end = self._where[key]
                pieces.append(self._logps[start:end])
        return (
            torch.cat(pieces).to(batch.targets_T.device)
            if pieces
            else self._logps[:0].to(batch.targets_T.device)
        )


def _compute(
    plan: ForwardPlan,
    live: Reference,
    datasets: Sequence[Sequence[PromptGroup]],
    *,
    show_progress: bool,
) -> dict[bytes, Tensor]:
    """{sequence: [t] log-probs} of every completion, on every rank."""
    from rich.progress import track

    values: dict[bytes, Tensor] = {}
    starts = [(groups, at) for groups in datasets for at in range(0, len(groups), GROUPS_PER_PLAN)]
    for groups, at in track(
        starts, description="reference log-probs", disable=not show_progress, transient=True
    ):
        part = groups[at : at + GROUPS_PER_PLAN]
        (found,) = forward_values(plan, part, [lambda g, batch: Forward(live(g, batch))])
        values |= {
            sequence_key(part[g], part[g].completions[k]): v.logps_T.cpu()
            for (g, k), v in found.items()
        }
    return dict(ChainMap(*gather_object(plan.accelerator, values)))


def _write(path: Path, values: dict[bytes, Tensor]) -> None:
    lengths = torch.tensor([v.shape[0] for v in values.values()])
    keys = torch.from_numpy(np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16).copy())
    tensors = {"logps": torch.cat(list(values.values())), "ends": lengths.cumsum(0), "keys": keys}
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
