"""The chunked LM head against log_softmax of all logits at once, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from posttrain.models.logprobs import LogitTransform, token_logps
from posttrain.types import Ragged

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(softcap=2.0),
    LogitTransform(scale=3.0, softcap=5.0),
    LogitTransform(temperature=0.7),
    LogitTransform(scale=3.0, softcap=5.0, temperature=1.6),
]


def dense(hidden, targets, head, transform):
    return torch.log_softmax(transform.apply(head(hidden)), -1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_value_and_gradient_in_float64(chunk, bias, transform):
    torch.manual_seed(0)
    head = nn.Linear(8, 23, bias=bias, dtype=torch.float64)
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 23, (11,))
    weight = torch.randn(11, dtype=torch.float64)
    wanted = dense(hidden, targets, head, transform)
    leaves = [hidden, *head.parameters()]
    wanted_gradient = torch.autograd.grad((wanted * weight).sum(), leaves)
    got = token_logps(hidden, targets, head, transform=transform, chunk=chunk)
    torch.testing.assert_close(got, wanted, atol=1e-13, rtol=0)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves), wanted_gradient, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_a_temperature_divides_the_logits():
    head = nn.Linear(8, 23, dtype=torch.float64)
    hidden = torch.randn(5, 8, dtype=torch.float64)
    got = token_logps(
        hidden, torch.arange(5), head, transform=LogitTransform(temperature=2.0), chunk=3
    )
    torch.testing.assert_close(
        got, torch.log_softmax(head(hidden) / 2, -1)[range(5), range(5)], atol=1e-13, rtol=0
    )


@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_kept_ids_renormalise_value_and_gradient(chunk, plain_head):
    """Seven tokens, of which the second and the last were drawn from the whole vocabulary."""
    torch.manual_seed(0)
    head = nn.Linear(8, 23, dtype=torch.float64)
    head = head if plain_head else Wrapped(head)
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    targets, weight = torch.randint(0, 23, (7,)), torch.randn(7, dtype=torch.float64)
    sets = [
        sorted({int(t), 1, 5, 22 - i}) if i not in (1, 6) else [] for i, t in enumerate(targets)
    ]
    kept = Ragged(
        values=torch.tensor([v for ids in sets for v in ids]),
        ends=torch.tensor([len(ids) for ids in sets]).cumsum(0),
    )
    transform = LogitTransform(softcap=2.0, temperature=0.8)
    logits = transform.apply(head(hidden))
    wanted = torch.stack(
        [
            logits[i, t] - torch.logsumexp(logits[i, ids or slice(None)], 0)
            for i, (t, ids) in enumerate(zip(targets, sets, strict=True))
        ]
    )
    leaves = [hidden, *head.parameters()]
    wanted_gradient = torch.autograd.grad((wanted * weight).sum(), leaves)
    got = token_logps(hidden, targets, head, transform=transform, chunk=chunk, kept=kept)
    torch.testing.assert_close(got, wanted, atol=1e-13, rtol=0)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves), wanted_gradient, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


class Wrapped(nn.Module):
    """Any head that is not a plain linear layer, as LoRA makes one."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.a = head, nn.Parameter(torch.randn(8, 2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + (x @ self.a).sum(-1, keepdim=True)


def test_other_heads_are_called_as_they_are():
    torch.manual_seed(0)
    head = Wrapped(nn.Linear(8, 23, dtype=torch.float64))
    hidden = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 23, (11,))
    leaves = [hidden, *head.parameters()]
    transform = LogitTransform(softcap=2.0)
    wanted = dense(hidden, targets, head, transform)
    got = token_logps(hidden, targets, head, transform=transform, chunk=4)
    torch.testing.assert_close(got, wanted, atol=1e-13, rtol=0)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(wanted.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=0)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do():
    head = nn.Linear(8, 23).requires_grad_(False)
    hidden = torch.randn(5, 8, requires_grad=True)
    token_logps(
        hidden, torch.zeros(5, dtype=torch.long), head, transform=LogitTransform(), chunk=2
    ).sum().backward()
    assert head.weight.grad is None and float(hidden.grad.abs().sum()) > 0


def test_uniform_logits_give_minus_ln_v():
    head = nn.Linear(8, 1000, bias=False)
    nn.init.zeros_(head.weight)
    got = token_logps(torch.randn(6, 8), torch.arange(6), head, transform=LogitTransform(), chunk=4)
    torch.testing.assert_close(got, torch.full((6,), -math.log(1000.0)))


def test_half_precision_softmax_is_float32():
    """4096 equal logits in bfloat16: a bf16 sum would stop at 256 and give -5.5 instead of -8.3."""
    head = nn.Linear(4, 4096, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    got = token_logps(
        torch.randn(3, 4, dtype=torch.bfloat16),
        torch.arange(3),
        head,
        transform=LogitTransform(),
        chunk=2,
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((3,), -math.log(4096.0)))


def test_autocast_runs_the_matmul_in_bf16_and_accumulates_the_head_gradient_in_float32():
    torch.manual_seed(0)
    head = nn.Linear(64, 512, bias=False)
    hidden = torch.randn(40, 64, requires_grad=True)
    targets = torch.randint(0, 512, (40,))
    exact = dense(hidden, targets, head, LogitTransform())
    (exact_gradient,) = torch.autograd.grad(exact.sum(), [head.weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logps(hidden, targets, head, transform=LogitTransform(), chunk=8)
    (gradient,) = torch.autograd.grad(got.sum(), [head.weight])
    assert got.dtype == torch.float32 and gradient.dtype == torch.float32
    difference = float((got - exact).detach().abs().max())
    assert 1e-4 < difference < 0.05, "bf16 rounding, neither none nor an error"
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 0.01


def test_no_trained_token_still_depends_on_the_hidden_states():
    hidden = torch.randn(0, 8, requires_grad=True)
    got = token_logps(
        hidden,
        torch.zeros(0, dtype=torch.long),
        nn.Linear(8, 9),
        transform=LogitTransform(),
        chunk=4,
    )
    assert got.shape == (0,) and got.requires_grad
