"""The gradient of a preference, KTO or reward step depends on the global batch alone. float64,
1e-10, against a loop over sequences that is written from the papers: no packing, no sharing, one
forward per sequence."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import logsigmoid

from posttrain.losses.preference import dpo, kto, rpo
from posttrain.losses.reward import bradley_terry
from posttrain.models.heads import Scorer
from posttrain.models.policy import Policy, frozen_copy
from posttrain.packing.plan import PackingConfig, count_units, plan_step, row_tokens
from posttrain.training.forward import ForwardPlan, batch_mean, evaluate
from posttrain.training.step import step_gradient
from posttrain.types import SCORE_SLOT, Completion, Pair, PromptGroup, as_loss
from tests.helpers import VOCAB, gradients_of, max_difference, plain_logps, tiny_gpt2

TOLERANCE = 1e-10
BETA = 0.3


def make_groups(size: int, *, slots: bool = False, labels: bool = False) -> list[PromptGroup]:
    """Seven prompts with ``size`` compared completions each; one group has margins, weights and a
    tie; masks have holes."""
    rng = random.Random(size)
    groups = []
    for row in range(7):
        completions = []
        for _ in range(size):
            length = rng.randint(2, 9)
            ids = [rng.randrange(1, VOCAB) for _ in range(length)]
            mask = [rng.random() < 0.7 for _ in range(length)]
            mask[rng.randrange(length)] = True
            if slots:
                ids, mask = [*ids, SCORE_SLOT], [0] * length + [1]
            completions.append(
                Completion(
                    token_ids=ids,
                    loss_mask=mask,
                    columns={"label": 1 if rng.random() < 0.5 else -1} if labels else {},
                )
            )
        pairs = None
        if labels:
            pairs = ()
        elif row == 3:
            pairs = [
                Pair(chosen=1, rejected=0, margin=0.7, weight=2.5),
                Pair(chosen=0, rejected=1, weight=0.5),
            ]
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, 12))]
        groups.append(
            PromptGroup(
                prompt_ids=prompt,
                completions=completions,
                pairs=pairs,
                meta={"file": "made", "row": row},
            )
        )
    return groups


def pair_loop(groups, value_of_pair, *, by_group: bool):
    """Weighted mean over pairs, or mean over groups of the weighted mean over their pairs."""
    totals, weights = [], []
    for g, group in enumerate(groups):
        total, weight = 0.0, 0.0
        for pair in group.trained_pairs:
            total = total + pair.weight * value_of_pair(g, pair)
            weight += pair.weight
        totals.append(total)
        weights.append(weight)
    if by_group:
        return sum(t / w for t, w in zip(totals, weights, strict=True)) / len(groups)
    return sum(totals) / sum(weights)


def reference_gradient(model, value):
    model.zero_grad()
    loss = value()
    loss.backward()
    gradient = {
        n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return float(loss.detach()), gradient


def preference_truth(groups, *, nll_weight: float):
    model, old = tiny_gpt2().double().eval(), tiny_gpt2(seed=9).double().eval()

    def value():
        now = [[plain_logps(model, g, k) for k in range(len(g.completions))] for g in groups]
        with torch.no_grad():
            before = [
                [plain_logps(old, g, k).sum() for k in range(len(g.completions))] for g in groups
            ]

        def one(g, pair):
            w = now[g][pair.chosen].sum() - before[g][pair.chosen]
            l = now[g][pair.rejected].sum() - before[g][pair.rejected]
            return -logsigmoid(BETA * (w - l)) - nll_weight * now[g][pair.chosen].mean()

        return pair_loop(groups, one, by_group=False)

    return reference_gradient(model, value)


def kto_truth(groups):
    model, old = tiny_gpt2().double().eval(), tiny_gpt2(seed=9).double().eval()

    def ratio(group, k):
        with torch.no_grad():
            before = plain_logps(old, group, k).sum()
        return plain_logps(model, group, k).sum() - before

    def value():
        with torch.no_grad():
            other = [
                PromptGroup(
                    prompt_ids=g.prompt_ids, completions=groups[(i + 1) % len(groups)].completions
                )
                for i, g in enumerate(groups)
            ]
            kl = [ratio(o, k) for o in other for k in range(len(o.completions))]
            z0 = torch.stack(kl).mean().clamp(min=0)
        items = [
            torch.sigmoid(BETA * (z0 - ratio(g, k)))
            if c.columns["label"] > 0
            else 1.5 * torch.sigmoid(BETA * (ratio(g, k) - z0))
            for g in groups
            for k, c in enumerate(g.completions)
        ]
        return torch.stack(items).mean()

    return reference_gradient(model, value)


CASES = {
    "dpo": (
        as_loss(dpo).with_options(beta=BETA),
        lambda groups: preference_truth(groups, nll_weight=0.0),
    ),
    "rpo": (
        as_loss(rpo).with_options(beta=BETA, nll_weight=0.4),
        lambda groups: preference_truth(groups, nll_weight=0.4),
    ),
    "kto": (kto.with_options(beta=BETA, undesirable_weight=1.5), kto_truth),
}
GROUPS = {
    (name, size): make_groups(size, labels=name == "kto") for name in CASES for size in (2, 4)
}


@pytest.fixture(scope="module")
def truths():
    return {key: CASES[key[0]][1](groups) for key, groups in GROUPS.items()}


def budget_of(groups, budget: str) -> int:
    """All in one row; about four rows; or so little that every group is cut between its
    completions."""
    alone = max(
        row_tokens(PromptGroup(prompt_ids=g.prompt_ids, completions=[c]), mode="shared")
        for g in groups
        for c in g.completions
    )
    return {
        "one": 10**4,
        "four": sum(row_tokens(g, mode="shared") for g in groups) // 3,
        "split": alone,
    }[budget]


@pytest.mark.parametrize(
    ("name", "size", "mode", "budget"),
    list(
        itertools.product(CASES, [2, 4], ["shared", "packed", "single"], ["one", "four", "split"])
    ),
)
def test_preference_gradient(truths, name, size, mode, budget):
    groups, loss = GROUPS[name, size], CASES[name][0]
    max_tokens = max(budget_of(groups, budget), budget_of(groups, "split"))
    model = tiny_gpt2().double().train()
    policy = Policy(model, PackingConfig(mode=mode))
    frozen = frozen_copy(Policy(tiny_gpt2(seed=9).double(), PackingConfig(mode=mode)))
    accelerator = Accelerator(cpu=True)

    def reference(_, batch):
        return frozen(batch).logps_T

    forward = ForwardPlan(accelerator=accelerator, mode=mode, max_tokens=max_tokens)
    mean = batch_mean(forward, policy, reference, loss, groups)
    plan = plan_step(
        groups, world_size=1, max_tokens=max_tokens, mode=mode, coupled=loss.couples_completions
    )
    result = step_gradient(
        accelerator, policy, groups, plan, loss, mode=mode, reference=reference, batch_mean=mean
    )
    wanted_loss, wanted_gradient = truths[name, size]
    assert abs(result.loss - wanted_loss) < TOLERANCE
    assert max_difference(gradients_of(model), wanted_gradient) < TOLERANCE
    if budget == "split" and loss.couples_completions and mode != "single":
        assert any(m.coupled_group is not None for m in plan.ranks[0])
    held_out = evaluate(
        forward, policy, groups, loss, reference=reference, counts=count_units(groups)
    )
    assert abs(held_out["eval_loss"] - wanted_loss) < TOLERANCE


def tiny_scorer():
    """GPT-2: its layers compute in float64, where Llama's norms are float32."""
    from transformers import GPT2ForSequenceClassification

    config = tiny_gpt2().config
    config.num_labels = 1
    config.pad_token_id = 0
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(config).double()


@pytest.fixture(scope="module")
def reward_truths():
    truths = {}
    for size in (2, 4):
        groups, model = make_groups(size, slots=True), tiny_scorer().eval()

        def score(g, k, groups=groups, model=model):
            ids = torch.tensor([[*groups[g].prompt_ids, *groups[g].completions[k].token_ids[:-1]]])
            return model(input_ids=ids, use_cache=False).logits[0, 0]

        def one(g, pair, score=score):
            chosen, rejected = score(g, pair.chosen), score(g, pair.rejected)
            return (
                -logsigmoid(chosen - rejected - 0.8 * pair.margin) + 0.02 * (chosen + rejected) ** 2
            )

        truths[size] = reference_gradient(
            model, lambda groups=groups, one=one: pair_loop(groups, one, by_group=True)
        )
    return truths


@pytest.mark.parametrize(
    ("size", "mode", "budget"),
    list(itertools.product([2, 4], ["shared", "packed", "single"], ["one", "four", "split"])),
)
def test_reward_gradient(reward_truths, size, mode, budget):
    groups = make_groups(size, slots=True)
    max_tokens = max(budget_of(groups, budget), budget_of(groups, "split"))
    model = tiny_scorer().train()
    policy = Scorer(model, PackingConfig(mode=mode))

    def loss(logps):
        return bradley_terry(logps, margin_scale=0.8, centering=0.02)

    plan = plan_step(groups, world_size=1, max_tokens=max_tokens, mode=mode, coupled=True)
    result = step_gradient(Accelerator(cpu=True), policy, groups, plan, loss, mode=mode)
    wanted_loss, wanted_gradient = reward_truths[size]
    assert abs(result.loss - wanted_loss) < TOLERANCE
    assert max_difference(gradients_of(model), wanted_gradient) < TOLERANCE
