"""Formulas of others, under their own names and in their own conventions: for comparison, never
added to ours.

What a run of ours takes is in ``states.run_states`` and ``activations``. Bytes, and GB = 1e9,
unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def zero_communication(num_params: int, *, zero_stage: int, accumulation: int = 1) -> int:
    """Elements that one rank sends per optimizer step: 2P in stages 0 to 2, 3P in stage 3.

    Rajbhandari et al. 2020, arXiv:1910.02054, section 7: a reduce-scatter or an all-gather counts
    P, an all-reduce 2P. With ``accumulation`` micro-steps: stages 0 and 1 reduce once; stage 2
    reduce-scatters in every micro-step; stage 3 also gathers the weights twice in each.
    """
    if zero_stage not in (0, 1, 2, 3) or accumulation < 1:
        raise ValueError(
            f"zero_stage must be 0 to 3 and accumulation >= 1; got {zero_stage} and {accumulation}."
        )
    times = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}
    return times[zero_stage] * num_params


def ring_bytes(elements: int, *, num_devices: int, bytes_each: int) -> float:
    """What a ring moves for ``elements`` counted as P per collective: (N - 1) / N of it (Patarasuk
    & Yuan 2009)."""
    return elements * bytes_each * (num_devices - 1) / num_devices


def zero_max_params(
    memory_bytes: float, *, zero_stage: int, num_devices: int, optimizer_bytes: int = 12
) -> float:
    """Largest model whose states fit: memory / (bytes per parameter). arXiv:1910.02054, table 2,
    left half (K = 12)."""
    n, k = num_devices, optimizer_bytes
    return memory_bytes / {0: 4 + k, 1: 4 + k / n, 2: 2 + (2 + k) / n, 3: (4 + k) / n}[zero_stage]


def zero_activation_elements(*, hidden: int, batch: int, seq: int, layers: int) -> int:
    """12 h b s l *elements* (twice as many bytes in 16 bit), without checkpointing.
    arXiv:1910.02054, footnote 4."""
    return 12 * hidden * batch * seq * layers


def zero_checkpoint_bytes(
    *, hidden: int, batch: int, seq: int, layers: int, model_parallel: int = 1
) -> float:
    """2 s b h L: one 16-bit checkpoint per layer; P_a divides it by the model-parallel degree.
    arXiv:1910.02054, 6.1."""
    return 2 * seq * batch * hidden * layers / model_parallel


Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class KorthikantiLayer:
    """Activations of one GPT layer in 16 bit with dropout. Korthikanti et al. 2022,
    arXiv:2205.05198, table 2."""

    seq: int
    batch: int
    hidden: int
    heads: int

    @property
    def score_term(self) -> float:
        """5 a s / h: what attention scores take, in units of s b h bytes."""
        return 5 * self.heads * self.seq / self.hidden

    def bytes_per_layer(
        self,
        *,
        tensor_parallel: int = 1,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
    ) -> float:
        """s b h (10 + 24/t + 5as/(ht)); 34/t with sequence parallelism; without the last term under
        selective recomputation; 2 s b h under full."""
        t, sbh = tensor_parallel, self.seq * self.batch * self.hidden
        if recompute == "full":
            return 2 * sbh
        linear = 34 / t if sequence_parallel else 10 + 24 / t
        return sbh * (linear + (0 if recompute == "selective" else self.score_term / t))

    @property
    def saved_by_selective(self) -> float:
        """Share of the layer's activations that selective recomputation does not keep."""
        return self.score_term / (34 + self.score_term)

    @property
    def selective_extra_flops(self) -> float:
        """About s / (6 h) of the model's FLOPs."""
        return self.seq / (6 * self.hidden)


def zero_offload(num_params: int, *, num_devices: int = 1) -> dict[str, float]:
    """Ren et al. 2021, arXiv:2101.06840: 2M on each GPU; 14M/N per rank on the CPU; 4M bytes over
    PCIe per step, N ranks together."""
    return {
        "device": 2 * num_params,
        "host": 14 * num_params / num_devices,
        "transfer": 4 * num_params,
    }


def kv_cache_bytes_per_token(
    *, layers: int, kv_heads: int, head_dim: int, bytes_each: int = 2
) -> int:
    """2 L n_kv d: keys and values of one token."""
    return 2 * layers * kv_heads * head_dim * bytes_each


def deepspeed_zero2_docs(num_params: int, *, num_devices: int) -> float:
    """GPU bytes as DeepSpeed's documentation has it, 4P + 16P/N. Its table says GB and means GiB.
    Its source disagrees."""
    return 4 * num_params + 16 * num_params / num_devices


def deepspeed_zero2(
    num_params: int,
    *,
    gpus_per_node: int = 1,
    nodes: int = 1,
    offload: bool = True,
    buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """(CPU, GPU) bytes of DeepSpeed 0.19's ``estimate_zero2_model_states_mem_needs``: GPU 2P +
    18P/N, or 2P with offload; the CPU figures are of a whole node and hold a buffer factor."""
    n = gpus_per_node * nodes
    if offload:
        return int(num_params * max(4 * n, 16) * buffer_factor), 2 * num_params
    return int(num_params * 4 * gpus_per_node * buffer_factor), 2 * num_params + int(
        18 * num_params / n
    )


def deepspeed_zero3(
    num_params: int,
    *,
    largest_layer: int,
    gpus_per_node: int = 1,
    nodes: int = 1,
    offload_optimizer: bool = True,
    offload_params: bool = True,
    zero_init: bool = True,
    buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """(CPU, GPU) bytes of DeepSpeed 0.19's ``estimate_zero3_model_states_mem_needs``; 4 bytes of
    the largest layer on the GPU."""
    n, layer = gpus_per_node * nodes, 4 * largest_layer
    if not offload_optimizer:
        cpu = 4 * gpus_per_node * (largest_layer if zero_init else num_params)
        return int(cpu * buffer_factor), layer + int(18 * num_params / n)
    per_param = 18 if offload_params else 16
    cpu_each = per_param / nodes if zero_init else max(4 * gpus_per_node, per_param / nodes)
    return int(num_params * cpu_each * buffer_factor), layer + (
        0 if offload_params else int(2 * num_params / n)
    )
