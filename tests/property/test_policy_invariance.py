"""The gradient of a reinforcement-learning step depends on the global batch alone: not on packing,
prefix sharing, micro-batches or left-out groups without a signal. float64, 1e-10, against a loop
over sequences that is written from the papers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from posttrain.models.policy import Policy, frozen_copy
from posttrain.packing.plan import PackingConfig, count_units, plan_step, row_tokens
from posttrain.rl.algorithms import ALGORITHMS, resolve_algorithm
from posttrain.rl.credit import group_normalised, has_signal, sampled_reverse_kl, token_returns
from posttrain.training.step import step_gradient
from posttrain.types import Completion, PromptGroup
from tests.helpers import VOCAB, gradients_of, max_difference, plain_logps, plain_states, tiny_gpt2

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
    by_token = algorithm.advantages in (token_returns, sampled_reverse_kl)
    plain = by_token or not algorithm.credit.of_rewards
    advantages = (
        group_normalised(rewards)
        if plain
        else algorithm.advantages(rewards, **algorithm.advantage_options)
    )
    groups = []
    for row in range(6):
        completions = []
        for k in range(4):
            n = rng.randint(1, 9)
            trained = advantages[row][k] is not None
            mask = [int(trained and not (row == 3 and k == 0 and i < n // 2)) for i in range(n)]
            advantage = advantages[row][k] or 0.0
            if by_token:
                advantage = [float(row not in (1, 4)) * m * rng.uniform(-2, 2) for m in mask]
            columns = {"advantage": advantage, "covariant": [rng.random() < 0.3 for _ in mask]}
            if later:
                columns["proximal_logps"] = [rng.uniform(-6, -3) for _ in mask]
            completions.append(
                Completion(
                    token_ids=[rng.randrange(1, VOCAB) for _ in range(n)],
                    loss_mask=mask,
                    columns=columns,
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


class Terms:
    """A completion's ratios r, advantages a (by token), d = log pi_ref - log pi, log-probs,
    entropies and chosen tokens."""

    def __init__(self, **values):
        vars(self).update(values)

    def clip(self, low, high):
        return torch.minimum(self.r * self.a, self.r.clamp(1 - low, 1 + high) * self.a)

    def cov_clip(self):
        return torch.where(self.chosen, 0.0, -self.clip(EPSILON, EPSILON))

    def sapo(self):
        tau = 1.0 + 0.05 * (self.a <= 0).to(self.a)
        return -4 / tau / (1 + torch.exp(-tau * (self.r - 1))) * self.a

    def vespo(self):
        k, rate = (2.0, 3.0) if self.a[0] >= 0 else (3.0, 2.0)
        w = self.r.detach().prod().clamp(min=1e-8)
        return -(w**k * torch.exp(rate * (1 - w))) * self.a * self.logp

    def gmpo(self):
        a, log_r = self.a[0], self.r.log()
        bounded = log_r.clamp(max=0.4) if a > 0 else log_r.clamp(min=-0.4)
        return -a * bounded.mean().exp()


ITEMS = {
    "grpo": lambda x: (-x.clip(EPSILON, EPSILON) + BETA * (torch.exp(x.d) - x.d - 1)).mean(),
    "r1": lambda x: (-x.clip(10.0, 10.0) + BETA * (torch.exp(x.d) - x.d - 1)).mean(),
    "dapo": lambda x: -x.clip(EPSILON, EPSILON).sum(),
    "dr_grpo": lambda x: -x.clip(EPSILON, EPSILON).sum(),
    "gspo": lambda x: -Terms(r=x.r.log().mean().exp(), a=x.a[0]).clip(EPSILON, EPSILON),
    "rloo": lambda x: -(x.r * x.a).sum(),
    "reinforce_pp": lambda x: -x.clip(EPSILON, EPSILON).sum(),
    "reinforce_pp_baseline": lambda x: (-x.clip(EPSILON, EPSILON) + BETA * x.d**2 / 2).sum(),
    "k15": lambda x: (x.a[0] - TAU * x.r.log().sum()) ** 2 / (2 * TAU),
    "cispo": lambda x: -(x.r.detach().clamp(max=1.5) * x.a * x.logp).sum(),
    "gmpo": lambda x: x.gmpo(),
    "sapo": lambda x: x.sapo().mean(),
    "vespo": lambda x: x.vespo().sum(),
    "maxrl": lambda x: -(x.r * x.a).sum(),
    "gdpo": lambda x: -x.clip(EPSILON, EPSILON).mean(),
    "clip_cov": lambda x: x.cov_clip().sum(),
    "kl_cov": lambda x: (-x.r * x.a + torch.where(x.chosen, x.r.log().abs(), 0.0)).sum(),
    "distill": lambda x: -(x.r * x.a).sum(),
    "entropy": lambda x: (-x.clip(EPSILON, EPSILON) - 0.1 * x.entropy).mean(),
}
"""A completion's item."""
BY_TOKEN = ("dapo", "cispo", "reinforce_pp", "reinforce_pp_baseline", "vespo", "clip_cov", "kl_cov")


def value_of(name, groups, model, reference):
    """The papers' objectives, one completion at a time."""
    items, tokens, count = [], 0, 0
    for group in groups:
        for k, c in enumerate(group.completions):
            if not c.num_trained:
                continue
            logp = plain_logps(model, group, k)

            def given(column, c=c):
                values = np.broadcast_to(c.columns[column], len(c.token_ids))[c.loss_mask]
                return torch.tensor(values.astype(float), dtype=torch.float64)

            old = given("proximal_logps") if "proximal_logps" in c.columns else logp.detach()
            with torch.no_grad():
                of_reference = plain_logps(reference, group, k)
            entropy, _ = plain_states(model, group, k)
            terms = Terms(
                r=torch.exp(logp - old),
                a=given("advantage"),
                d=of_reference - logp,
                logp=logp,
                entropy=entropy,
                chosen=given("covariant") > 0,
            )
            items.append(ITEMS[name](terms))
            tokens, count = tokens + c.num_trained, count + 1
    by_token = dict.fromkeys(BY_TOKEN, tokens)
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
    **{n: {} for n in ("gmpo", "sapo", "vespo", "maxrl", "gdpo", "clip_cov", "kl_cov", "distill")},
    "entropy": {"beta": 0.0, "entropy_weight": 0.1},
}


def algorithm_of(name):
    return resolve_algorithm("grpo" if name == "entropy" else name, OPTIONS[name])


MODELS = {"policy": tiny_gpt2().double(), "reference": tiny_gpt2(seed=9).double().eval()}


@pytest.fixture(scope="module")
def truth():
    cache = {}

    def of(name, later):
        if (name, later) not in cache:
            model = tiny_gpt2().double().eval()
            groups = make_groups(algorithm_of(name), later=later)
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
    assert set(OPTIONS) == set(ITEMS) == {*ALGORITHMS, "entropy"}


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
    algorithm = algorithm_of(name)
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
    loss = algorithm.objective
    skips = algorithm.skips(first_update=not later)
    used = [g for g in groups if has_signal(g)] if skips else groups
    assert (len(used) < len(groups)) == skips
    plan = plan_step(used, world_size=1, max_tokens=max_tokens, mode=mode, coupled=False)
    plan = replace(plan, counts=count_units(groups))
    reference = (lambda _, batch: frozen(batch).logps_T) if loss.reference else None
    result = step_gradient(
        Accelerator(cpu=True), policy, used, plan, loss, mode=mode, reference=reference
    )
    gradient = gradients_of(model)
    assert max_difference(gradient, {n: g for n, g in wanted.items() if n in gradient}) < TOLERANCE
    if not skips:  # a group without a signal may have a value, never a gradient
        assert abs(result.loss - wanted_loss) < TOLERANCE
