"""An environment of two turns: what it appends is read by the model and by the rewards, and is
never trained."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from posttrain.data.prompts import Prompt
from posttrain.models.policy import Policy, plain_attention
from posttrain.packing.plan import PackingConfig
from posttrain.rewards import reward
from posttrain.rewards.compose import Rewards, RewardsConfig
from posttrain.rl.algorithms import GRPO
from posttrain.rl.credit import CreditConfig, has_signal, trained_groups
from posttrain.rl.rollouts import Collector, RolloutBuffer
from posttrain.rl.trajectory import SingleTurn, Trajectory
from posttrain.rollout.engine import SamplingConfig
from posttrain.rollout.local import LocalEngine
from posttrain.training.forward import ForwardPlan
from posttrain.types import ELSEWHERE
from tests.helpers import plain_logps, tiny_llama
from tests.tiny import byte_tokenizer

STOPS = tuple(range(0, 97, 4))


class Calculator(SingleTurn):
    """After the model's first stop it says how many tokens there were; the second stop is the
    end."""

    def step(self, trajectory, prompt):
        if not trajectory.sampled.all():
            return None
        return [40, 41 + len(trajectory.token_ids) % 7, 42]


@pytest.fixture
def rolled():
    """(finished groups with rewards, the policy): drawn by the engine of this process, over two
    iterations because of a budget."""
    torch.manual_seed(0)
    policy = Policy(tiny_llama().double(), PackingConfig(max_tokens=400))
    engine = LocalEngine(policy, compute=torch.float64, stop_ids=STOPS)

    @reward(grouped=True)
    def order(completions, sample, scores):
        return [float(k) for k in range(len(completions))]

    rewards = Rewards(RewardsConfig(), given={"order": (order, 1.0)})
    collector = Collector(
        accelerator=Accelerator(cpu=True),
        engine=engine,
        environment=Calculator(byte_tokenizer(), STOPS),
        rewards=rewards,
        sampling=SamplingConfig(max_tokens=16, budget_tokens=6),
    )
    prompts = [Prompt(ids=(5, 6, 7), sample={}), Prompt(ids=(9,), sample={})]
    buffer, finished = RolloutBuffer(prompts), []
    buffer.begin([0, 1], iteration=0, group_size=4, seed=1)
    while buffer.groups:
        collector.roll(buffer, None)
        buffer.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
        finished += buffer.take_finished()
    yield collector.score(finished, None, iteration=0), policy
    rewards.close()


def test_observations_are_in_the_completion_and_outside_of_the_loss(rolled):
    scored, policy = rolled
    groups = trained_groups(
        scored,
        algorithm=GRPO,
        config=CreditConfig(),
        version=0,
        proximal=True,
        policy=policy,
        reference=None,
        plan=ForwardPlan(accelerator=Accelerator(cpu=True), mode="shared", max_tokens=400),
    )
    answered = 0
    for s, group in zip(scored, groups, strict=True):
        for k, (t, c) in enumerate(zip(s.trajectories, group.completions, strict=True)):
            seen = np.flatnonzero(~t.sampled)
            assert list(c.loss_mask) == list(t.sampled) and len(t.token_ids) <= 16
            if len(seen):
                answered += 1
                first = seen[0]
                assert list(seen) == [first, first + 1, first + 2]
                assert t.token_ids[first - 1] in STOPS, "asked when the model stopped"
                assert list(t.token_ids[seen]) == [40, 41 + first % 7, 42]
                assert len(t.token_ids) > first + 3, "the model goes on"
            drawn = c.columns["sampler_logps"][c.trained]
            assert drawn == pytest.approx(c.columns["proximal_logps"][c.trained], abs=1e-9)
            with plain_attention(policy.model):
                wanted = plain_logps(policy.model, group, k).tolist()
            assert drawn == pytest.approx(wanted, abs=1e-9)
    assert answered >= 4


def test_another_rank_plans_the_same_step_without_the_tokens(rolled):
    scored, policy = rolled
    plan = ForwardPlan(accelerator=Accelerator(cpu=True), mode="shared", max_tokens=400)

    def groups_of(scored):
        return trained_groups(
            scored,
            algorithm=replace(GRPO, beta=0.0),
            config=CreditConfig(),
            version=0,
            proximal=False,
            policy=policy,
            reference=None,
            plan=plan,
        )

    def follower(t):
        other = Trajectory(seed=t.seed, reward=t.reward)
        other.follow(*t.progress())
        return other

    elsewhere = groups_of(
        [replace(s, trajectories=[follower(t) for t in s.trajectories]) for s in scored]
    )
    here = groups_of(scored)
    assert any(not c.loss_mask.all() for g in here for c in g.completions)
    assert plan.split(elsewhere) == plan.split(here)
    for a, b in zip(here, elsewhere, strict=True):
        assert has_signal(a) == has_signal(b)
        for one, other in zip(a.completions, b.completions, strict=True):
            assert list(one.loss_mask) == list(other.loss_mask)
            assert one.is_here and not other.is_here and set(other.token_ids) == {ELSEWHERE}
    with pytest.raises(AssertionError, match="another rank has the tokens"):
        next(plan.micro_batches(elsewhere))


def test_an_answer_that_does_not_fit_ends_the_completion(rolled):
    scored, _ = rolled
    for s in scored:
        for t in s.trajectories:
            stopped_once = t.sampled.all() and t.token_ids[-1] in STOPS
            assert not stopped_once or (t.finish_reason == "length" and len(t.token_ids) + 3 >= 16)
