"""How the processes of a run hold a model, and what they tell each other: one interface over whole
copies (one process, DDP), FSDP2 and DeepSpeed ZeRO-1, 2 and 3.

| kind | weights | gradients | optimizer state | gradients after backward are in |
|---|---|---|---|---|
| whole | whole | whole | whole | ``p.grad`` |
| fsdp2 | part | part | part | ``p.grad``, a DTensor |
| zero1, zero2 | whole | part | part | the optimizer's ``averaged_gradients`` |
| zero3 | part | part | part | the optimizer's ``averaged_gradients`` |
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from posttrain.models.sharding import local
from posttrain.training.config import UserFacingError

Kind = Literal["whole", "fsdp2", "zero1", "zero2", "zero3"]
Offload = Literal["optimizer", "weights"]
DEEPSPEED_BUCKET = 50_000_000
"""Largest communication bucket of DeepSpeed (elements; its own 5e8 would take 2 GB)."""
DEEPSPEED_LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 keeps, and the distance to their next use below which it
does (DeepSpeed's own)."""
ZERO3_WHOLE_BELOW = 10
"""Times the hidden size: parameters of at most so many elements (norms, biases, small adapters) are
whole on each ZeRO-3 rank."""


T = TypeVar("T")


def gather_object(accelerator: Any, value: T) -> list[T]:
    """[rank] the value that each process gives, on every process: a collective where there are
    several."""
    if accelerator.num_processes == 1:
        return [value]
    from accelerate import utils

    return list(utils.gather_object([value]))


def exchange(accelerator: Any, outgoing: Sequence[T]) -> list[T]:
    """[rank] what each process addresses to this one; ``outgoing[rank]`` is what this one addresses
    to it. A collective, but each value goes to one process alone."""
    if accelerator.num_processes == 1:
        return list(outgoing)
    from torch import distributed

    def parcel(value: T) -> Tensor:
        data = bytearray(pickle.dumps(value))
        return torch.frombuffer(data, dtype=torch.uint8).to(accelerator.device)

    rank, parcels = accelerator.process_index, [parcel(value) for value in outgoing]
    sizes = gather_object(accelerator, [len(p) for p in parcels])
    arriving = [p.new_empty(sizes[r][rank]) for r, p in enumerate(parcels)]
    arriving[rank] = parcels[rank]
    operations = [
        distributed.P2POp(operation, tensors[r], r)
        for r in range(len(parcels))
        if r != rank
        for operation, tensors in ((distributed.isend, parcels), (distributed.irecv, arriving))
    ]
    for work in distributed.batch_isend_irecv(operations):
        work.wait()
    return [pickle.loads(p.cpu().numpy().data) for p in arriving]


def broadcast_object(accelerator: Any, value: T) -> T:
    """The main process's value, on every process: a collective where there are several."""
    values = [value]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(values, from_process=0)
    return values[0]


def kind(accelerator: Any) -> Kind:
    """How the launch shards the model."""
    if accelerator.distributed_type == "FSDP":
        return "fsdp2"
    if accelerator.distributed_type == "DEEPSPEED":
        kinds: tuple[Kind, ...] = ("zero1", "zero2", "zero3")
        return kinds[_zero_settings(accelerator)["stage"] - 1]
    return "whole"


def offloads(accelerator: Any) -> frozenset[Offload]:
    """What the launch file lets DeepSpeed keep in main memory (offload_optimizer_device,
    offload_param_device)."""
    zero = _zero_settings(accelerator) if is_deepspeed(accelerator) else {}
    places: dict[Offload, str] = {"optimizer": "offload_optimizer", "weights": "offload_param"}
    return frozenset(
        what for what, key in places.items() if (zero.get(key) or {}).get("device") == "cpu"
    )


def _zero_settings(accelerator: Any) -> dict[str, Any]:
    settings: dict[str, Any] = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return settings


def shards_weights(accelerator: Any) -> bool:
    """Whether a process holds only a part of the weights, so that every forward is a collective."""
    return kind(accelerator) in ("fsdp2", "zero3")


def is_deepspeed(accelerator: Any) -> bool:
    """Whether policy is an engine and optimizer a ZeRO optimizer."""
    return kind(accelerator).startswith("zero")


def unwrapped(policy: Any) -> Any:
    """The policy inside of DDP or a DeepSpeed engine (accelerate's own function imports deepspeed,
    wherever it is installed)."""
    return getattr(policy, "module", policy)


def prepare(accelerator: Any, policy: Any, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """What accelerate makes of both, sharded as the launch asks; raises UserFacingError if it
    became something else."""
    if shards_weights(accelerator) and any(
        type(p).__name__ == "Params4bit" for p in policy.parameters()
    ):
        raise UserFacingError(
            "Weights in 4 bit cannot be sharded. Use launch/ddp.yaml or launch/zero2.yaml with "
            "lora.quantize_4bit, or train adapters on unquantised weights."
        )
    if not is_deepspeed(accelerator):
        wrapped, prepared = accelerator.prepare(policy, optimizer)
        return wrapped, prepared
    _size_buckets(accelerator, policy)
    if kind(accelerator) == "zero3":
        _partition(accelerator, policy)
    wrapped, prepared = accelerator.prepare(policy, optimizer)
    _check_engine(accelerator, wrapped)
    if kind(accelerator) == "zero3":
        import deepspeed

        # the chunk loop reads the head outside of its module: the policy gathers it, in forward
        # and backward, and releases it
        head = policy.base.get_output_embeddings()
        for parameter in head.parameters() if head is not None else ():
            deepspeed.zero.register_external_parameter(policy, parameter)
    return wrapped, prepared


def _size_buckets(accelerator: Any, policy: Any) -> None:
    """What DeepSpeed's configuration says of the model, where the launch does not."""
    zero = _zero_settings(accelerator)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    for name in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        zero.setdefault(name, min(DEEPSPEED_BUCKET, trained))
    for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
        zero.setdefault(name, DEEPSPEED_LIVE)
    # norms and biases stay whole
    zero.setdefault(
        "stage3_param_persistence_threshold",
        ZERO3_WHOLE_BELOW * policy.config.get_text_config().hidden_size,
    )


def _partition(accelerator: Any, policy: nn.Module) -> None:
    """Parameter by parameter, from the CPU: ``deepspeed.initialize`` alone would first move the
    whole model to the device."""
    import deepspeed

    config = accelerator.deepspeed_plugin.deepspeed_config
    for tensor in policy.parameters():
        if tensor.is_floating_point() and config["bf16"]["enabled"]:
            tensor.data = tensor.data.to(torch.bfloat16)
    for buffer in policy.buffers():
        buffer.data = buffer.data.to(accelerator.device)
    known = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": config["zero_optimization"],
        "bf16": config["bf16"],
    }
    deepspeed.zero.Init(module=policy, config_dict_or_path=known)


def _check_engine(accelerator: Any, engine: Any) -> None:
    steps = engine.gradient_accumulation_steps()
    got = (engine.zero_optimization_stage(), engine.dp_world_size, steps)
    wanted = (int(kind(accelerator)[-1]), accelerator.num_processes, 1)
    if got != wanted:
        raise UserFacingError(
            f"DeepSpeed's (ZeRO stage, processes, accumulation steps) are {got}; wanted {wanted}. "
            "Check the launch configuration."
        )


def base_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's and DeepSpeed's wrappers: its groups hold the
    learning rates."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def local_gradients(accelerator: Any, policy: Any) -> list[Tensor]:
    """After the last backward of a step, this process's part of the reduced gradient; changing it
    changes the update."""
    if not is_deepspeed(accelerator):
        return [local(p.grad) for p in policy.parameters() if p.grad is not None]
    zero = policy.optimizer
    if hasattr(zero, "fp32_groups_gradient_flat_partition"):
        return list(zero.fp32_groups_gradient_flat_partition)
    offloaded = [m.grad for m in masters(zero) if m.grad is not None]
    return offloaded or [g for group in zero.averaged_gradients.values() for g in group or ()]


def masters(zero: Any) -> list[Tensor]:
    """This process's parts of the fp32 copy that a DeepSpeed optimizer updates."""
    # ZeRO-3; ZeRO-1 and 2; ZeRO-1 with bfloat16 weights, which is another class
    names = (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    )
    return list(next(getattr(zero, name) for name in names if hasattr(zero, name)))


def take_step(accelerator: Any, policy: Any, optimizer: Any) -> None:
    """One update, and the gradients are gone."""
    if is_deepspeed(accelerator):
        policy.step()
    else:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def forget_moments(accelerator: Any, optimizer: Any) -> None:
    """The optimizer as if it had never stepped."""
    base = base_optimizer(optimizer)
    if not is_deepspeed(accelerator):
        # not zeroed: 8-bit moments have code books and step counters that are no tensors
        base.state.clear()
        return
    for state in base.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
