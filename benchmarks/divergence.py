"""A divergence of distillation whose gradient is written by hand, against autograd's.

    OMP_NUM_THREADS=1 python benchmarks/divergence.py [--tokens 512] [--vocabulary 49152]

A chunk of logits under recomputation, forward and backward, the two interleaved: median and range
of the ratio of their times over ``--rounds``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.losses.distillation import divergence


def by_autograd(student_CV: Tensor, teacher_CV: Tensor, kind: str) -> Tensor:
    log_s, log_t = torch.log_softmax(student_CV, -1), torch.log_softmax(teacher_CV, -1)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    if kind != "jensen_shannon":
        return kl(log_s, log_t) if kind == "reverse_kl" else kl(log_t, log_s)
    log_m = torch.logaddexp(log_t, log_s) - math.log(2)
    return (kl(log_t, log_m) + kl(log_s, log_m)) / 2


def seconds(function: Callable[[Tensor], Tensor], student_CV: Tensor) -> float:
    student_CV.grad = None
    began = time.perf_counter()
    checkpoint(function, student_CV, use_reentrant=False).sum().backward()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    student_CV = torch.randn(asked.tokens, asked.vocabulary, requires_grad=True)
    teacher_CV = torch.randn(asked.tokens, asked.vocabulary)
    for kind in ("reverse_kl", "forward_kl", "jensen_shannon"):
        ratios = []
        for _ in range(asked.rounds):
            autograd = seconds(lambda x, k=kind: by_autograd(x, teacher_CV, k), student_CV)
            own = seconds(lambda x, k=kind: divergence(x, teacher_CV, kind=k), student_CV)
            ratios.append(own / autograd)
        print(f"{kind}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
