"""What ranks exchange: buffers on the device, and bytes on the wire."""

from __future__ import annotations

from posttrain.memory.job import Job
from posttrain.memory.published import ring_bytes
from posttrain.precision import bytes_per_element

DEEPSPEED_BUCKET = 50_000_000
"""Largest communication bucket that ``training/sharding.py`` lets DeepSpeed have (elements; its own
5e8 would take 2 GB)."""


DEEPSPEED_LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 keeps, and the distance to their next use below which it
does (DeepSpeed's own)."""
ZERO3_WHOLE_BELOW = 10
"""Times the hidden size: parameters of at most so many elements (norms, biases, small adapters) are
whole on each ZeRO-3 rank."""


def communication_bytes(job: Job) -> int:
    """Buffers for collectives: none of DDP's (gradients are views of its buckets); FSDP2 the root's
    weights and two layers, with a layer's gradient; ZeRO one reduce bucket, stage 3, which
    overlaps, two and the gathered weights that it keeps."""
    if job.num_devices == 1 or job.engine == "plain":
        return 0
    size = bytes_per_element(job.precision.compute)
    in_layers = [p for p in job.parameters if ".layers." in f".{p.name}" or ".h." in f".{p.name}"]
    layer = sum(p.numel for p in in_layers) // max(len(job.arch.layers), 1)
    root = job.num_params - sum(p.numel for p in in_layers)
    if job.engine == "fsdp2":
        return size * (root + 2 * layer) + bytes_per_element(job.precision.gradient) * (
            layer + root
        )
    bucket = min(DEEPSPEED_BUCKET, job.trainable_params)
    gathered = max(root + 2 * layer, min(job.num_params, DEEPSPEED_LIVE))
    return size * (2 * bucket + gathered if job.zero_stage == 3 else bucket)


def sent_bytes(job: Job, *, micro_batches: int = 1) -> float:
    """What a rank sends per optimizer step over a ring: gradients in the dtype they are reduced in,
    weights in the compute dtype.

    In elements it is arXiv:1910.02054 section 7 (``published.zero_communication``). Frozen weights
    travel only in stage 3.
    """
    if job.num_devices == 1:
        return 0.0
    reduced = 4 if job.engine == "deepspeed" else bytes_per_element(job.precision.gradient)
    gathered = bytes_per_element(job.precision.compute)
    trained, times = job.trainable_params, micro_batches if job.zero_stage >= 2 else 1
    sent = {
        0: 2 * trained * reduced,
        3: times * (trained * reduced + 2 * job.num_params * gathered),
    }.get(job.zero_stage, trained * (times * reduced + gathered))
    return ring_bytes(sent, num_devices=job.num_devices, bytes_each=1)
