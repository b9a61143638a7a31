"""From scored completions to groups to train: every forward is counted, and what comes out is a
loop over single sequences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from posttrain.data.prompts import Prompt
from posttrain.losses import policy as losses
from posttrain.models.policy import Policy
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig
from posttrain.rewards import CompletionText
from posttrain.rl.algorithms import GRPO, KIMI_K15, R1, REINFORCE_PP, RLOO
from posttrain.rl.credit import CreditConfig, has_signal, trained_groups
from posttrain.rl.trajectory import Trajectory, TrajectoryGroup
from posttrain.training.forward import ForwardPlan
from tests.helpers import plain_logps, tiny_llama

VERSION = 3
REWARDS = [[1.0, 0.0, 0.25, None], [0.5, 0.5, 0.5, 0.5], [-1.0, 2.0, 0.0, 1.0]]


class Counting(nn.Module):
    """A policy that counts its forwards; in training mode it is not the policy that samples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.forwards, self.modes = Policy(model, PackingConfig()), 0, set()

    def forward(self, batch):
        self.forwards += 1
        self.modes.add(self.training)
        return self.inner(batch)


@pytest.fixture
def policy():
    return Counting(tiny_llama().double()).train()


@pytest.fixture
def reference():
    return Counting(tiny_llama(seed=9).double()).eval()


def scored_groups() -> list[TrajectoryGroup]:
    """Three prompts with four completions: one unscored, one cut by its length, two with a segment
    of an older policy."""
    generator = torch.Generator().manual_seed(2)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    made = []
    for g, row in enumerate(REWARDS):
        trajectories = []
        for k in range(4):
            n = 3 + (3 * g + k) % 5
            segments = (
                [(2, VERSION - 1), (n, VERSION)] if (g, k) in ((0, 1), (2, 0)) else [(n, VERSION)]
            )
            reason = "length" if (g, k) == (2, 1) else "stop"
            logps = (-torch.rand(n, generator=generator, dtype=torch.float64) * 4).tolist()
            trajectories.append(
                Trajectory(
                    seed=k,
                    token_ids=draw(n),
                    logps=logps,
                    segments=segments,
                    finish_reason=reason,
                    text=CompletionText("x"),
                    reward=row[k],
                )
            )
        made.append(
            TrajectoryGroup(
                index=g,
                prompt=Prompt(ids=tuple(draw(4 + g)), sample={"_where": f"rows.jsonl:{g}"}),
                trajectories=trajectories,
            )
        )
    return made


PLAN = dict(mode="shared", max_tokens=40)  # some micro-batches


def credit(algorithm, policy, reference, *, proximal=False, scored=None, **config):
    plan = ForwardPlan(accelerator=Accelerator(cpu=True), **PLAN)
    forward = None if reference is None else (lambda _, batch: reference(batch).logps_T)
    groups = trained_groups(
        scored or scored_groups(),
        algorithm=algorithm,
        config=CreditConfig(**config),
        version=VERSION,
        proximal=proximal,
        policy=policy,
        reference=forward,
        plan=plan,
    )
    return groups, len(list(plan.micro_batches(groups)))


def naive(module: Counting, groups):
    """[group][completion] log-probs of the trained tokens, one sequence at a time."""
    model = plain_model(module)
    with torch.no_grad():
        return [
            [
                plain_logps(model, g, k).tolist() if c.num_trained else []
                for k, c in enumerate(g.completions)
            ]
            for g in groups
        ]


def plain_model(module: Counting) -> nn.Module:
    """The same weights under transformers' own attention."""
    twin = tiny_llama().double().eval()
    twin.load_state_dict(module.inner.model.state_dict())
    return twin


def at_trained(values, completion):
    return [v for v, m in zip(values, completion.loss_mask, strict=True) if m]


def advantages_of(groups):
    return [[c.columns["advantage"] for c in g.completions] for g in groups]


@pytest.mark.parametrize("algorithm", [replace(GRPO, beta=0.0), KIMI_K15, GRPO, R1])
def test_a_single_update_without_a_kl_in_the_reward_needs_no_forward(policy, algorithm):
    """The policy is its own old policy; a KL in the loss is computed with the update."""
    groups, _ = credit(algorithm, policy, None)
    assert policy.forwards == 0 and all(
        "proximal_logps" not in c.columns for g in groups for c in g.completions
    )
    wanted = algorithm.advantages(REWARDS, **algorithm.advantage_options)
    assert advantages_of(groups) == [[a or 0.0 for a in row] for row in wanted]
    assert [has_signal(g) for g in groups] == [True, False, True]


def test_several_updates_keep_the_log_probs_from_before_the_first_and_read_no_reference_at_beta_0(
    policy,
):
    def never(batch):
        raise AssertionError("a reference forward at beta = 0")

    groups, micro_batches = credit(KIMI_K15, policy, never, proximal=True)
    assert micro_batches > 1 and policy.forwards == micro_batches
    assert policy.modes == {False} and policy.training, "computed in eval mode, which is left again"
    for group, row in zip(groups, naive(policy, groups), strict=True):
        for c, wanted in zip(group.completions, row, strict=True):
            if not c.num_trained:
                continue
            assert at_trained(c.columns["proximal_logps"], c) == pytest.approx(wanted, abs=1e-10)
            assert all(
                p == 0.0
                for p, m in zip(c.columns["proximal_logps"], c.loss_mask, strict=True)
                if not m
            )


@pytest.mark.parametrize("proximal", [False, True])
def test_kl_off_the_completions_reward(policy, reference, proximal):
    """RLOO: R = r - beta sum_t (log pi - log pi_ref), then the leave-one-out baseline of R."""
    groups, micro_batches = credit(
        replace(RLOO, advantage_options={"beta": 0.3}), policy, reference, proximal=proximal
    )
    assert policy.forwards == reference.forwards == micro_batches
    assert all(
        ("proximal_logps" in c.columns) == proximal
        for g in groups
        for c in g.completions
        if c.num_trained
    )
    mine, theirs = naive(policy, groups), naive(reference, groups)
    for g, (group, rewards) in enumerate(zip(groups, REWARDS, strict=True)):
        shaped = [
            None if r is None else r - 0.3 * (sum(mine[g][k]) - sum(theirs[g][k]))
            for k, r in enumerate(rewards)
        ]
        for k, c in enumerate(group.completions):
            others = [s for j, s in enumerate(shaped) if j != k and s is not None]
            wanted = 0.0 if shaped[k] is None else shaped[k] - sum(others) / len(others)
            assert c.columns["advantage"] == pytest.approx(wanted, abs=1e-10) and c.num_trained == (
                0 if shaped[k] is None else c.num_trained
            )
    assert has_signal(groups[1]), "equal rewards, different KL"


@pytest.mark.parametrize("proximal", [False, True])
def test_kl_off_each_tokens_reward(policy, reference, proximal):
    """REINFORCE++: A_t = r - beta sum_{i >= t} (log pi - log pi_ref)_i, minus mean, over deviation,
    of all trained tokens."""
    beta = 0.3
    groups, micro_batches = credit(
        replace(REINFORCE_PP, advantage_options={"beta": beta}),
        policy,
        reference,
        proximal=proximal,
        mask_truncated=True,
    )
    assert policy.forwards == reference.forwards == micro_batches
    mine, theirs = naive(policy, groups), naive(reference, groups)
    returns = {}
    for g, group in enumerate(groups):
        for k, c in enumerate(group.completions):
            kl = [p - q for p, q in zip(mine[g][k], theirs[g][k], strict=True)]
            for t in range(c.num_trained):
                returns[g, k, t] = REWARDS[g][k] - beta * sum(kl[t:])
    mean = sum(returns.values()) / len(returns)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in returns.values()) / len(returns))
    assert (
        groups[0].completions[3].num_trained == groups[2].completions[1].num_trained == 0
    )  # unscored, truncated
    for g, group in enumerate(groups):
        for k, c in enumerate(group.completions):
            if not c.num_trained:
                assert c.columns["advantage"] == 0.0
                continue
            assert ("proximal_logps" in c.columns) == proximal
            wanted = [(returns[g, k, t] - mean) / deviation for t in range(c.num_trained)]
            assert at_trained(c.columns["advantage"], c) == pytest.approx(wanted, abs=1e-7)
            assert all(
                a == 0.0 for a, m in zip(c.columns["advantage"], c.loss_mask, strict=True) if not m
            )
    assert (
        len(
            {
                round(a, 6)
                for a in at_trained(
                    groups[1].completions[0].columns["advantage"], groups[1].completions[0]
                )
            }
        )
        > 1
    )


def test_a_masked_completions_kl_is_in_the_baseline_of_the_others(policy, reference):
    """Ahmadian et al. 2024: the mean over the others of r - beta KL, also of one that is scored but
    not trained."""
    every, _ = credit(replace(RLOO, advantage_options={"beta": 0.3}), policy, reference)
    masked, _ = credit(
        replace(RLOO, advantage_options={"beta": 0.3}), policy, reference, mask_truncated=True
    )
    assert masked[2].completions[1].num_trained == 0 < every[2].completions[1].num_trained
    for k in (0, 2, 3):
        assert masked[2].completions[k].columns["advantage"] == pytest.approx(
            every[2].completions[k].columns["advantage"], abs=1e-12
        )


def test_truncated_completions_are_scored_but_not_trained(policy):
    algorithm = replace(GRPO, beta=0.0)
    plain, _ = credit(algorithm, policy, None)
    masked, _ = credit(algorithm, policy, None, mask_truncated=True)
    assert advantages_of(masked) == advantages_of(plain), (
        "they stay in their group's mean and deviation"
    )
    gone = [
        (g, k)
        for g in range(3)
        for k in range(4)
        if list(masked[g].completions[k].loss_mask) != list(plain[g].completions[k].loss_mask)
    ]
    assert (
        gone == [(2, 1)]
        and masked[2].completions[1].num_trained == 0 < plain[2].completions[1].num_trained
    )


@pytest.mark.parametrize("algorithm", [KIMI_K15, RLOO, REINFORCE_PP])
def test_nothing_to_train_needs_no_forward(policy, reference, algorithm):
    """The iteration then says that all were truncated; the planner would speak of loss masks in the
    data."""
    scored = scored_groups()
    for s in scored:
        for trajectory in s.trajectories:
            trajectory.finish_reason = "length"
    groups = trained_groups(
        scored,
        algorithm=algorithm,
        config=CreditConfig(mask_truncated=True),
        version=VERSION,
        proximal=True,
        policy=policy,
        reference=lambda _, batch: reference(batch).logps_T,
        plan=ForwardPlan(accelerator=Accelerator(cpu=True), **PLAN),
    )
    assert policy.forwards == reference.forwards == 0 and not any(g.num_trained for g in groups)


@pytest.mark.parametrize("keep", [False, True])
def test_old_segments_are_out_of_the_loss_or_rescored_by_the_iterations_first_policy(policy, keep):
    groups, _ = credit(KIMI_K15, policy, None, proximal=True, keep_old_segments=keep)
    trajectory = scored_groups()[0].trajectories[1]
    c = groups[0].completions[1]
    n, old = len(trajectory.token_ids), 2
    assert list(c.loss_mask) == [int(keep or t >= old) for t in range(n)]
    whole = replace(
        groups[0],
        completions=[replace(x, loss_mask=[1] * len(x.token_ids)) for x in groups[0].completions],
    )
    rescored = naive(policy, [whole])[0][1]
    first = 0 if keep else old
    assert list(c.columns["proximal_logps"][first:]) == pytest.approx(rescored[first:], abs=1e-10)
    assert min(abs(a - b) for a, b in zip(rescored, trajectory.logps, strict=True)) > 1e-3, (
        "what the sampler said is another"
    )
    assert list(c.columns["sampler_logps"]) == list(trajectory.logps)
    # after an update the log-ratio of k1.5's loss sums over exactly the trained tokens
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(
                0.05
                * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
            )
        after = naive(policy, [whole])[0][1]
        batch = pack(groups, [GroupPart(group=0, completions=(0, 1, 2))], mode="shared")
        output = losses.mirror_descent(batch.with_logps(policy.inner(batch)))
    wanted = sum(after[first:]) - sum(rescored[first:])
    assert float(output.metrics["logratio_nats"][1]) == pytest.approx(wanted, abs=1e-9)
