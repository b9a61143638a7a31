"""f-divergences in place of the reverse KL of DPO: f'(u) of the ratio u = pi / pi_ref instead of log u.

Wang et al. 2023, arXiv:2309.16240, table 1. With f' the implicit reward is beta * f'(u), and the gap of a pair is
f'(u_w) - f'(u_l). Constants of f' cancel in the gap and are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from posttrain.types import PairLogps

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def f_prime(logratio: Tensor, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """f'(u) up to a constant, u = exp(logratio).

    reverse_kl: log u; forward_kl: -1 / u; js_divergence: log(u / (1 + u)); alpha_divergence: (1 - u^-alpha) / alpha, which
    tends to log u as alpha -> 0. Raises ValueError for another name or alpha = 0.
    """
    if divergence == "reverse_kl":
        return logratio
    if divergence == "forward_kl":
        return -torch.exp(-logratio)
    if divergence == "js_divergence":
        return torch.nn.functional.logsigmoid(logratio)
    if divergence == "alpha_divergence" and alpha != 0:
        return -torch.expm1(-alpha * logratio) / alpha
    raise ValueError(
        "f_divergence is reverse_kl, forward_kl, js_divergence or alpha_divergence (with alpha != 0: its limit is reverse_kl); "
        f"got {divergence!r}, alpha={alpha}."
    )


def divergence_gap(logps: PairLogps, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """[B] f'(u_w) - f'(u_l); for reverse_kl the log-ratio gap h itself."""
    chosen = f_prime(logps.chosen_logratio_B, divergence, alpha=alpha)
    return chosen - f_prime(logps.rejected_logratio_B, divergence, alpha=alpha)
