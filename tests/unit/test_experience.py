"""Iterations of an RL run with an engine that plays a script: what is drawn, what it costs, how it
is cut into updates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from posttrain.data.prompts import Prompt
from posttrain.rewards import reward
from posttrain.rewards.compose import Rewards, RewardsConfig
from posttrain.rl.algorithms import DAPO, DR_GRPO, GRPO, KIMI_K15, R1, REINFORCE_PP, RLOO
from posttrain.rl.batches import CurriculumConfig, PromptSampler, RolloutBatches, RolloutConfig
from posttrain.rl.rollouts import Collector
from posttrain.rl.trajectory import SingleTurn
from posttrain.rollout.engine import Sampled, SamplingConfig
from posttrain.rollout.handover import ReceiptError
from posttrain.rollout.vllm import ServerError
from posttrain.training.config import UserFacingError
from posttrain.training.forward import ForwardPlan
from posttrain.types import Forward
from tests.tiny import byte_tokenizer


class ScriptedEngine:
    """Two tokens for every completion; notes the prompts that it was asked."""

    is_reproducible = True

    def __init__(self, finish_reason: str = "stop") -> None:
        self.finish_reason, self.version = finish_reason, 0
        self.asked: list[int] = []

    def generate(self, requests, sampling, *, on_finished=None):
        self.asked += [r.prompt_ids[0] for r in requests]
        made = Sampled(
            token_ids=(70, 71),
            logps=(0.0, 0.0),
            finish_reason=self.finish_reason,
            policy_version=self.version,
        )
        return [[made] * len(r.seeds) for r in requests]

    def refresh(self, version):
        self.version = version


class CertainPolicy(nn.Module):
    """Every token has probability 1; counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, batch):
        self.forwards += 1
        return Forward(torch.zeros(batch.targets_T.shape[0], dtype=torch.float64))


class BoundedCollector(Collector):
    """Ends what would draw for ever."""

    rolls = 0

    def roll(self, buffer, journal):
        self.rolls += 1
        assert self.rolls < 50, "draws without end"
        super().roll(buffer, journal)


@pytest.fixture
def source_of(tmp_path):
    opened = []

    def make(algorithm, *, lively, batch_size=4, engine=None, noise=0.0, **config):
        """``lively``: of each prompt, whether its completions get different rewards; ``noise``: a
        second reward that always differs."""

        @reward(grouped=True)
        def first(completions, sample, scores):
            if sample["lively"] == "fails":
                raise OSError("no answer")
            if sample["lively"] == "mask":
                return [float(k * sum(map(len, c.kept_ids))) for k, c in enumerate(completions)]
            if sample["lively"] == "first fails":
                return [None, 2.0, 0.0, 0.0]
            return [float(sample["lively"] and k % 2) for k in range(len(completions))]

        @reward(grouped=True)
        def second(completions, sample, scores):
            return [noise * k for k in range(len(completions))]

        prompts = [
            Prompt(ids=(i, 5), sample={"lively": x, "_where": f"rows:{i}"})
            for i, x in enumerate(lively)
        ]
        rewards = Rewards(
            RewardsConfig(max_unscored=1.0), given={"reward": (first, 1.0), "second": (second, 1.0)}
        )
        opened.append(rewards)
        engine = engine or ScriptedEngine()
        policy = CertainPolicy()
        accelerator = Accelerator(cpu=True)
        source = RolloutBatches(
            config=RolloutConfig(**{"group_size": 4, "show_every": 0} | config),
            algorithm=algorithm,
            batch_size=batch_size,
            seed=0,
            prompts=prompts,
            curriculum=CurriculumConfig(),
            collector=BoundedCollector(
                accelerator=accelerator,
                engine=engine,
                rewards=rewards,
                environment=SingleTurn(byte_tokenizer()),
                sampling=SamplingConfig(max_tokens=4),
            ),
            policy=policy,
            reference=None,
            plan=ForwardPlan(accelerator=accelerator, mode="shared", max_tokens=10**6),
            folder=tmp_path / f"rollouts{len(opened)}",
        )
        return source, engine, policy

    yield make
    for rewards in opened:
        rewards.close()


def order_of(count: int) -> list[int]:
    return PromptSampler(CurriculumConfig(), [{}] * count, seed=0).next(count, iteration=0)


def test_dynamic_sampling_draws_until_enough_groups_have_a_signal(source_of):
    """The last prompt that is drawn is the fourth with a signal; its place in the order over 4 is
    the cost."""
    lively = [i % 3 == 0 for i in range(12)]
    source, engine, _ = source_of(DAPO, lively=lively)
    batch = next(source)
    order = order_of(12)
    place = [n for n, i in enumerate(order, start=1) if lively[i]][3]
    assert place > 4 and engine.asked == order[:place]
    assert sorted(g.prompt_ids[0] for g in batch.groups) == [0, 3, 6, 9]
    assert batch.metrics["drawn_per_used"] == place / 4 and batch.metrics[
        "groups_without_signal"
    ] == pytest.approx(1 - 4 / place)


def test_a_failed_reward_shrinks_its_group_and_is_never_a_zero(source_of):
    """[None, 2, 0, 0]: the mean is that of three. A group without a score is left out."""
    source, _, _ = source_of(DR_GRPO, lively=["first fails", "fails", True, True], noise=0.0)
    batch = next(source)
    by_prompt = {g.prompt_ids[0]: g for g in batch.groups}
    assert sorted(by_prompt) == [0, 2, 3]
    failed, *scored = by_prompt[0].completions
    assert failed.num_trained == 0 and failed.columns["advantage"] == 0.0
    assert [c.columns["advantage"] for c in scored] == pytest.approx([4 / 3, -2 / 3, -2 / 3])
    assert batch.counts.completions == 3 + 4 + 4, "those that failed are in no denominator"
    assert batch.metrics["unscored"] == 5 / 16
    assert batch.metrics["reward"] == pytest.approx((2.0 + 2 * 2.0) / 11)


def test_dynamic_sampling_draws_another_prompt_for_one_that_failed(source_of):
    lively = ["fails", True, "fails", True, True, "first fails", True, True]
    source, engine, _ = source_of(DAPO, lively=lively)
    batch = next(source)
    order = order_of(8)
    good = [i for i in order if lively[i] != "fails"][:4]
    assert sorted(g.prompt_ids[0] for g in batch.groups) == sorted(good)
    assert engine.asked == order[: order.index(good[-1]) + 1]


def test_rewards_see_which_ids_each_token_was_drawn_from(source_of):
    class Truncating(ScriptedEngine):
        def generate(self, requests, sampling, *, on_finished=None):
            kept = ((70, 75), (71,))
            rows = super().generate(requests, sampling)
            return [[replace(s, kept_ids=kept) for s in row] for row in rows]

    source, _, _ = source_of(DR_GRPO, lively=["mask"] * 4, engine=Truncating())
    for group in next(source).groups:
        for k, c in enumerate(group.completions):
            assert c.columns["kept_ids"].values.tolist() == [70, 75, 71]
            assert c.columns["advantage"] == pytest.approx(3 * k - 4.5), "3 ids were left"


@pytest.mark.parametrize(
    "error", [ReceiptError("l.0 did not arrive"), ServerError("failed 6 times on 1 completions")]
)
def test_a_failed_hand_over_or_generation_stops_before_anything_is_trained(source_of, error):
    class Failing(ScriptedEngine):
        def refresh(self, version):
            if isinstance(error, ReceiptError):
                raise error

        def generate(self, *arguments, **options):
            raise error

    source, engine, policy = source_of(replace(GRPO, beta=0.0), lively=[True] * 4, engine=Failing())
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            next(source)
    assert engine.asked == [] and policy.forwards == 0


def test_a_named_reward_says_which_prompts_dynamic_sampling_keeps(source_of):
    lively = [i % 3 == 0 for i in range(12)]
    by_all, engine, _ = source_of(DAPO, lively=lively, noise=0.01)
    next(by_all)
    assert engine.asked == order_of(12)[:4], "the second reward differs in every group"
    named, _, _ = source_of(DAPO, lively=lively, noise=0.01, signal_reward="reward")
    assert sorted(g.prompt_ids[0] for g in next(named).groups) == [0, 3, 6, 9]
    with pytest.raises(UserFacingError, match="one of the rewards reward, second; got 'accuracy'"):
        source_of(DAPO, lively=lively, signal_reward="accuracy")


@pytest.mark.parametrize("lively", [[False] * 30, [True] + [False] * 11])
@pytest.mark.parametrize("oversample", [1.0, 1.5, 3.0])
def test_dynamic_sampling_stops_at_its_limit(source_of, lively, oversample):
    """With few groups that have a signal those are trained; with none the last ones drawn, with a
    gradient of exactly 0."""
    source, engine, _ = source_of(DAPO, lively=lively, oversample=oversample)
    batch = next(source)
    limit = int(oversample * 4)
    assert engine.asked == order_of(len(lively))[:limit]
    found = [i for i in engine.asked if lively[i]]
    used = len(found) or 4
    assert batch.metrics["drawn_per_used"] == limit / used
    assert [g.prompt_ids[0] for g in batch.groups] == found if found else len(batch.groups) == 1
    assert batch.counts.completions == 4 * used


def test_a_limit_that_is_no_whole_number_of_prompts_ends_as_well(source_of):
    source, engine, _ = source_of(DAPO, lively=[False] * 30, oversample=1.4)
    next(source)
    assert len(engine.asked) == 5


def test_without_dynamic_sampling_prompts_are_drawn_once_and_groups_without_a_signal_count(
    source_of,
):
    lively = [i % 2 == 0 for i in range(8)]
    source, engine, _ = source_of(replace(GRPO, beta=0.0), lively=lively)
    batch = next(source)
    assert engine.asked == order_of(8)[:4] and batch.metrics["drawn_per_used"] == 1.0
    kept = [i for i in engine.asked if lively[i]]
    assert sorted(g.prompt_ids[0] for g in batch.groups) == sorted(kept) and 0 < len(kept) < 4
    assert batch.counts.completions == 16, "left out of the forward, not of the denominator"


def test_r1s_rollout_8192_completions_in_16_updates_of_512(source_of):
    """32 questions x 16 completions per update, 16 updates on one rollout; a group's advantages are
    made before the split."""
    source, engine, _ = source_of(
        replace(R1, beta=0.0), lively=[True] * 600, batch_size=32, group_size=16, updates=16
    )
    batches = [next(source) for step in range(16)]
    assert len(engine.asked) == len(set(engine.asked)) == 8192 // 16
    assert [sum(len(g.completions) for g in b.groups) for b in batches] == [512] * 16
    assert [b.counts.completions for b in batches] == [512] * 16
    assert set(Counter(g.prompt_ids[0] for b in batches for g in b.groups).values()) == {1}
    assert sorted(g.prompt_ids[0] for b in batches for g in b.groups) == sorted(engine.asked)
    assert all(
        [c.columns["advantage"] for c in g.completions] == [-1.0, 1.0] * 8
        for b in batches
        for g in b.groups
    )
    assert (
        batches[0].groups[0].prompt_ids[0] != engine.asked[0]
        or batches[0].groups[1].prompt_ids[0] != engine.asked[1]
    )
    next(source)
    assert len(engine.asked) == 2 * 512 and engine.version == 16, (
        "the next rollout is drawn by the policy after 16 updates"
    )


def test_epochs_train_the_same_groups_again_and_old_log_probs_are_computed_once(source_of):
    source, engine, policy = source_of(
        KIMI_K15, lively=[True] * 8, updates=2, epochs=2, batch_size=2
    )
    batches = [next(source) for step in range(4)]
    assert policy.forwards == 1 and len(engine.asked) == 4
    assert set(Counter(g.prompt_ids[0] for b in batches for g in b.groups).values()) == {2}
    assert [b.fresh_optimizer for b in batches] == [True, False, False, False], (
        "k1.5 forgets its moments once an iteration"
    )
    assert all(
        list(c.columns["proximal_logps"]) == [0.0, 0.0]
        for b in batches
        for g in b.groups
        for c in g.completions
    )
    next(source)
    assert policy.forwards == 2


def test_a_single_update_computes_no_old_log_probs(source_of):
    source, _, policy = source_of(replace(GRPO, beta=0.0), lively=[True] * 8)
    batch = next(source)
    assert policy.forwards == 0 and not batch.fresh_optimizer
    assert all("proximal_logps" not in c.columns for g in batch.groups for c in g.completions)


@pytest.mark.parametrize("algorithm", [KIMI_K15, replace(GRPO, beta=0.0)])
def test_an_iteration_of_truncated_completions_says_so(source_of, algorithm):
    source, _, _ = source_of(
        algorithm,
        lively=[True] * 8,
        engine=ScriptedEngine("length"),
        mask_truncated=True,
        updates=2,
    )
    with pytest.raises(
        UserFacingError, match="no completion can be trained .*turn rollout.mask_truncated off"
    ):
        next(source)


def test_the_step_asks_for_a_reference_only_where_the_loss_reads_it():
    wanted = [
        (GRPO, True),
        (replace(GRPO, beta=0.0), False),
        (RLOO, False),
        (REINFORCE_PP, False),
        (KIMI_K15, False),
        (DAPO, False),
    ]
    for algorithm, reads in wanted:
        assert algorithm.objective.reference == reads, algorithm.name
