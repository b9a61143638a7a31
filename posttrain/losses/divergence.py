"""f-divergences in place of the reverse KL of DPO: f'(u) of the ratio u = pi / pi_ref instead of
log u.

Wang et al. 2023, arXiv:2309.16240, table 1. With f' the implicit reward is beta * f'(u), and the
gap of a pair is f'(u_w) - f'(u_l). The constants of f' cancel in the gap, except where each side is
divided by its own length: all are such that f'(1) = 0, so a pair has gap 0 at pi = pi_ref in either
case.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch

from posttrain.types import Logps

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


def f_prime(logratio: Tensor, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """f'(u), u = exp(logratio), with f'(1) = 0.

    reverse_kl: log u; forward_kl: 1 - 1 / u; js_divergence: log(2u / (1 + u)); alpha_divergence: (1
    - u^-alpha) / alpha, which tends to log u as alpha -> 0 and is forward_kl at alpha = 1. Raises
    ValueError for another name or alpha = 0.

    An exponent is cut at half of the dtype's range (40 nats in float32): beyond, 1 / u and its
    square would be infinite and the gradient of a saturated loss inf * 0. There f' is constant.
    """
    if divergence == "reverse_kl":
        return logratio
    if divergence == "forward_kl":
        return _one_minus_exp(-logratio)
    if divergence == "js_divergence":
        return torch.nn.functional.logsigmoid(logratio) + math.log(2)
    if divergence == "alpha_divergence" and alpha != 0:
        return _one_minus_exp(-alpha * logratio) / alpha
    raise ValueError(
        "f_divergence is reverse_kl, forward_kl, js_divergence or alpha_divergence (with alpha != "
        f"0: its limit is reverse_kl); got {divergence!r}, alpha={alpha}."
    )


def divergence_gap(logps: Logps, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """[B] f'(u_w) - f'(u_l); for reverse_kl the log-ratio gap h itself."""
    chosen = f_prime(logps.chosen_logratio_B, divergence, alpha=alpha)
    return chosen - f_prime(logps.rejected_logratio_B, divergence, alpha=alpha)


def mean_divergence_gap(logps: Logps, divergence: Divergence, *, alpha: float = 0.5) -> Tensor:
    """[B] f'(u_w) / |y_w| - f'(u_l) / |y_l|; for reverse_kl w / |y_w| - l / |y_l|."""
    chosen = f_prime(logps.chosen_logratio_B, divergence, alpha=alpha) / logps.chosen_length_B
    return (
        chosen
        - f_prime(logps.rejected_logratio_B, divergence, alpha=alpha) / logps.rejected_length_B
    )


def _one_minus_exp(x: Tensor) -> Tensor:
    return -torch.expm1(x.clamp(max=0.45 * math.log(torch.finfo(x.dtype).max)))
