"""The gradient of a reinforcement-learning step depends on the global batch alone: not on packing,
prefix sharing, micro-batches or left-out groups without a signal. float64, 1e-10, against a loop
over sequences that is written from the papers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from posttrain.algorithms import ALGORITHMS, resolve_algorithm
from posttrain.models.policy import Policy
from posttrain.models.reference import frozen_copy
from posttrain.packing.plan import PackingConfig, count_units, plan_step, row_tokens
from posttrain.training.credit import has_signal
from posttrain.training.step import step_gradient
from posttrain.types import Completion, PromptGroup
from tests.helpers import VOCAB, gradients_of, max_difference, plain_logps, tiny_gpt2

TOLERANCE = 1e-10
BETA, EPSILON, TAU, CONSTANT = 0.04, 0.2, 0.5, 12.0


def make_groups(algorithm, *, later: bool) -> list[PromptGroup]:
    """Six prompts with four completions; two groups have equal rewards; one completion is unscored,
    one has an old segment.

    With the KL in each token's reward, advantages differ along a completion; two groups have none.
    """
    rng = random.Random(3)
    rewards = [[float(rng.random() < 0.5) + 0.1 * rng.random() for _ in range(4)] for _ in range(6)]
    rewards[1], rewards[4], rewards[2][3] = [1.0] * 4, [0.0] * 4, None
    advantages = algorithm.advantages(rewards, **algorithm.advantage_options)
    groups = []
    for row in range(6):
        completions = []
        for k in range(4):
            n = rng.randint(1, 9)
            trained = advantages[row][k] is not None
            mask = [int(trained and not (row == 3 and k == 0 and i < n // 2)) for i in range(n)]
            by_token = None
            if algorithm.kl_in == "token_reward":
                by_token = [float(row not in (1, 4)) * m * rng.uniform(-2, 2) for m in mask]
            completions.append(
                Completion(
                    token_ids=[rng.randrange(1, VOCAB) for _ in range(n)],
                    loss_mask=mask,
                    advantage=0.0 if by_token else advantages[row][k] or 0.0,
                    token_advantages=by_token,
                    proximal_logps=[rng.uniform(-6, -3) for _ in range(n)] if later else None,
                )
            )
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 12))]
        groups.append(
            PromptGroup(
                prompt_ids=prompt,
                completions=completions,
                pairs=(),
                meta={"file": "made", "row": row},
            )
        )
    return groups


def clip(ratio, a, low, high):
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


ITEMS = {
    "grpo": lambda r, a, d: (-clip(r, a, EPSILON, EPSILON) + BETA * (torch.exp(d) - d - 1)).mean(),
    "r1": lambda r, a, d: (-clip(r, a, 10.0, 10.0) + BETA * (torch.exp(d) - d - 1)).mean(),
    "dapo": lambda r, a, d: -clip(r, a, EPSILON, EPSILON).sum(),
    "dr_grpo": lambda r, a, d: -clip(r, a, EPSILON, EPSILON).sum(),
    "gspo": lambda r, a, d: -clip(torch.exp(r.log().mean()), a, EPSILON, EPSILON),
    "rloo": lambda r, a, d: -(r * a).sum(),
    "reinforce_pp": lambda r, a, d: -clip(r, a, EPSILON, EPSILON).sum(),
    "reinforce_pp_baseline": lambda r, a, d: (
        -clip(r, a, EPSILON, EPSILON) + BETA * d**2 / 2
    ).sum(),
    "k15": lambda r, a, d: (a - TAU * r.log().sum()) ** 2 / (2 * TAU),
}
"""A completion's item from its tokens' ratios, advantages and d = log pi_ref - log pi."""


def value_of(name, groups, model, reference):
    """The papers' objectives, one completion at a time."""
    items, tokens, count = [], 0, 0
    for group in groups:
        for k, c in enumerate(group.completions):
            if not c.num_trained:
                continue
            logp = plain_logps(model, group, k)
            kept = [i for i, m in enumerate(c.loss_mask) if m]

            def given(values, kept=kept):
                return torch.tensor([values[i] for i in kept], dtype=torch.float64)

            old = logp.detach() if c.proximal_logps is None else given(c.proximal_logps)
            ratio, a = (
                torch.exp(logp - old),
                c.advantage if c.token_advantages is None else given(c.token_advantages),
            )
            with torch.no_grad():
                of_reference = plain_logps(reference, group, k)
            if name == "cispo":
                items.append(-(ratio.detach().clamp(max=1.5) * a * logp).sum())
            else:
                items.append(ITEMS[name](ratio, a, of_reference - logp))
            tokens, count = tokens + len(kept), count + 1
    by_token = dict.fromkeys(("dapo", "cispo", "reinforce_pp", "reinforce_pp_baseline"), tokens)
    return sum(items) / {**by_token, "dr_grpo": CONSTANT * count}.get(name, count)


OPTIONS = {
    "grpo": {"beta": BETA},
    "dapo": {"epsilon_high": EPSILON},
    "dr_grpo": {"constant": CONSTANT},
    "rloo": {"beta": 0.0},
    "k15": {"tau": TAU},
    "gspo": {"epsilon_low": EPSILON, "epsilon_high": EPSILON},
    "cispo": {"cap": 1.5},
    "r1": {"beta": BETA},
    "reinforce_pp": {},
    "reinforce_pp_baseline": {"beta": BETA},
}
MODELS = {"policy": tiny_gpt2().double(), "reference": tiny_gpt2(seed=9).double().eval()}


@pytest.fixture(scope="module")
def truth():
    cache = {}

    def of(name, later):
        if (name, later) not in cache:
            model = tiny_gpt2().double().eval()
            groups = make_groups(resolve_algorithm(name, OPTIONS[name]), later=later)
            loss = value_of(name, groups, model, MODELS["reference"])
            loss.backward()
            cache[name, later] = (
                groups,
                float(loss.detach()),
                {n: p.grad.clone() for n, p in model.named_parameters()},
            )
        return cache[name, later]

    return of


def test_no_algorithm_is_left_out():
    assert set(OPTIONS) == set(ALGORITHMS)


@pytest.mark.parametrize(
    ("name", "later", "mode", "budget"),
    list(
        itertools.product(
            OPTIONS, [False, True], ["shared", "packed", "single"], ["one", "four", "split"]
        )
    ),
)
def test_gradient(truth, name, later, mode, budget):
    groups, wanted_loss, wanted = truth(name, later)
    algorithm = resolve_algorithm(name, OPTIONS[name])
    alone = max(
        row_tokens(replace(g, completions=[c]), mode="shared")
        for g in groups
        for c in g.completions
        if c.num_trained
    )
    max_tokens = {
        "one": 10**4,
        "four": max(alone, sum(row_tokens(g, mode="shared") for g in groups) // 3),
        "split": alone,
    }[budget]
    model = tiny_gpt2().double().train()
    policy = Policy(model, PackingConfig(mode=mode))
    frozen = frozen_copy(Policy(tiny_gpt2(seed=9).double(), PackingConfig(mode=mode)))
    kl = {"kl_weight": algorithm.beta, "kl_estimator": algorithm.kl_estimator}
    kl = kl if algorithm.beta and algorithm.kl_in == "loss" else {}

    def loss(logps):
        return algorithm.loss(logps, **algorithm.loss_options, **kl)

    loss.couples_completions = algorithm.loss.couples_completions
    skips = algorithm.skips(first_update=not later)
    used = [g for g in groups if has_signal(g)] if skips else groups
    assert (len(used) < len(groups)) == skips
    plan = plan_step(used, world_size=1, max_tokens=max_tokens, mode=mode, coupled=False)
    plan = replace(plan, counts=count_units(groups))
    reference = (lambda _, batch: frozen(batch)) if kl else None
    result = step_gradient(
        Accelerator(cpu=True), policy, used, plan, loss, mode=mode, reference=reference
    )
    gradient = gradients_of(model)
    assert max_difference(gradient, {n: g for n, g in wanted.items() if n in gradient}) < TOLERANCE
    if not skips:  # a group without a signal may have a value, never a gradient
        assert abs(result.loss - wanted_loss) < TOLERANCE
