"""Prompts, curriculum, buffer, journal, credit and pass@k."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from posttrain.data.prompts import R1_ZERO_TEMPLATE, Prompt, PromptConfig, prompts_from_rows
from posttrain.rewards import CompletionText, reward
from posttrain.rewards.compose import Rewards, RewardsConfig
from posttrain.rl.algorithms import resolve_algorithm
from posttrain.rl.batches import (
    CurriculumConfig,
    PromptSampler,
    RolloutBatches,
    RolloutConfig,
    priorities,
)
from posttrain.rl.evaluate import Evaluation, half_width, pass_at_k
from posttrain.rl.rollouts import Collector, Journal, RolloutBuffer, journalled, request_of
from posttrain.rl.trajectory import SingleTurn, Trajectory, TrajectoryGroup, to_row
from posttrain.rollout.engine import Request, Sampled, SamplingConfig
from posttrain.rollout.handover import Receipt
from posttrain.training.forward import ForwardPlan
from tests.tiny import byte_tokenizer


def test_prompts_of_every_writing():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [
        {"prompt": "2+2?"},
        {"question": "2+2?"},
        {"messages": messages, "answer": "4"},
        {"prompt": messages[:1]},
    ]
    prompts, counts = prompts_from_rows(rows, tokenizer, PromptConfig())
    assert len({p.ids for p in prompts}) == 1 and (
        counts["read"],
        counts["kept"],
        counts["too long"],
    ) == (4, 4, 0)
    assert counts["columns"] == {
        "for the rewards": {"answer": 1},
        "used": {"messages": 1, "prompt": 2, "question": 1},
    }
    assert (
        tokenizer.decode(prompts[0].ids).endswith("<|im_start|>assistant\n")
        and prompts[2].sample["answer"] == "4"
    )
    system = prompts_from_rows(
        rows[:1], tokenizer, PromptConfig(system="Be brief.", opening="<think>")
    )[0][0]
    assert "Be brief." in tokenizer.decode(system.ids) and tokenizer.decode(system.ids).endswith(
        "<think>"
    )
    zero = prompts_from_rows(rows[:1], tokenizer, PromptConfig(template="r1-zero"))[0][0]
    assert tokenizer.decode(zero.ids) == R1_ZERO_TEMPLATE.replace("{prompt}", "2+2?")
    with pytest.raises(ValueError, match="row 1: unknown format.*fit no layout"):
        prompts_from_rows([{"text": "x"}], tokenizer, PromptConfig())
    with pytest.raises(ValueError, match="2 longer"):
        prompts_from_rows(rows[:2], tokenizer, PromptConfig(max_prompt_length=3))


def test_priorities_of_k15():
    assert priorities([0.9, 0.5, 0.1, 1.0]) == pytest.approx([0.1 / 1.5, 0.5 / 1.5, 0.9 / 1.5, 0.0])
    assert priorities([1.0, 1.0]) == pytest.approx([0.5, 0.5])
    assert priorities([1.0, 0.0], floor=0.1)[0] > 0


def test_prioritized_draws_follow_the_success_rates():
    sampler = PromptSampler(CurriculumConfig(order="prioritized", floor=0.0), [{}] * 4, seed=0)
    for i, s in enumerate([0.9, 0.5, 0.1, 1.0]):
        sampler.update(i, tries=10, successes=10 * s)
    drawn = [sampler.next(1, iteration=0)[0] for _ in range(6000)]
    assert np.bincount(drawn, minlength=4) / 6000 == pytest.approx(
        [0.0667, 0.3333, 0.6, 0], abs=0.025
    )
    assert len(set(sampler.next(3, iteration=0))) == 3


@pytest.mark.parametrize("order", ["uniform", "curriculum", "prioritized"])
def test_a_sampler_continues_where_it_was_saved(order):
    samples = [{"difficulty": d} for d in (0.5, 0.1, 0.9, 0.3)]
    one = PromptSampler(CurriculumConfig(order=order), samples, seed=1)
    one.next(3, iteration=0)
    one.update(2, tries=8, successes=3)
    two = PromptSampler(CurriculumConfig(order=order), samples, seed=1)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.next(2, iteration=i) for i in range(5)] == [
        two.next(2, iteration=i) for i in range(5)
    ]


def test_curriculum_goes_from_easy_to_hard_or_from_uniform_to_hard():
    samples = [{"difficulty": d} for d in (0.5, 0.1, 0.9, 0.3)]
    easy_first = PromptSampler(CurriculumConfig(order="curriculum"), samples, seed=0)
    assert easy_first.next(4, iteration=0) == [1, 3, 0, 2]
    ablation = PromptSampler(CurriculumConfig(order="curriculum", hard_from=24), samples, seed=0)
    assert set(ablation.next(4, iteration=23)) == {0, 1, 2, 3} and set(
        ablation.next(8, iteration=24)
    ) == {0, 2}
    uniform = PromptSampler(CurriculumConfig(), samples, seed=0)
    assert sorted(uniform.next(4, iteration=0)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no column 'difficulty'"):
        PromptSampler(CurriculumConfig(order="curriculum"), [{}], seed=0)


class FakeEngine:
    """Counts its calls; the test is about the journal, not about sampling."""

    def __init__(self, *, fail_after=10**9, is_reproducible=True):
        self.drawn, self.fail_after, self.is_reproducible = 0, fail_after, is_reproducible

    def generate(self, requests, sampling, *, on_finished=None):
        results = []
        for i, r in enumerate(requests):
            results.append([])
            for k, seed in enumerate(r.seeds):
                if self.drawn >= self.fail_after:
                    raise ConnectionError("killed")
                self.drawn += 1
                results[i].append(
                    Sampled(
                        token_ids=(seed % 7, 2),
                        logps=(-0.1, -1 / 3),
                        finish_reason="stop",
                        policy_version=4,
                    )
                )
                if on_finished is not None:
                    on_finished(i, k, results[i][k])
        return results

    def refresh(self, version):
        return Receipt(version=version)


class OneOfTwo(Accelerator):
    """The first of two processes; nothing is sent."""

    num_processes = 2


@pytest.mark.parametrize("is_reproducible", [True, False])
def test_a_journal_gives_back_what_was_drawn_before_the_kill(tmp_path, is_reproducible):
    requests = [
        Request(prompt_ids=(1, 2), seeds=(10, 11)),
        Request(prompt_ids=(3,), seeds=(12, 13)),
    ]
    path = tmp_path / "journal.jsonl"

    def draw(run, **options):
        engine = FakeEngine(is_reproducible=is_reproducible, **options)
        drawn = journalled(engine, Journal(path, run=run), requests, SamplingConfig())
        return to_row(drawn), engine.drawn

    with pytest.raises(ConnectionError):
        draw("a", fail_after=3)
    with path.open("ab") as torn:
        torn.write(b'{"key": "torn')
    wanted = to_row(FakeEngine().generate(requests, SamplingConfig()))
    assert draw("a") == (wanted, 4 if is_reproducible else 1)
    assert draw("a") == (wanted, 0)
    assert draw("b")[1] == 4


def test_a_journal_is_only_for_the_same_settings_ranks_and_weights(tmp_path):
    """Another learning rate gives other weights: what the killed run drew must not be trained under
    them."""

    def identity(*, change=None, accelerator=Accelerator, sampling=None, weight=1.0):
        model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30)).requires_grad_(
            False
        )
        for p in model.parameters():
            p.copy_(torch.arange(p.numel()).reshape(p.shape) / 7)
        if change is not None:
            optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=change)
            model(torch.ones(1, 40)).square().sum().backward()
            optimizer.step()
        return RolloutBatches(
            config=RolloutConfig(),
            algorithm=resolve_algorithm("grpo", {}),
            batch_size=1,
            seed=0,
            prompts=[],
            curriculum=CurriculumConfig(),
            collector=Collector(
                accelerator=accelerator(cpu=True),
                engine=FakeEngine(),
                environment=SingleTurn(None),
                rewards=Rewards(RewardsConfig(functions={"exact_answer": weight})),
                sampling=sampling or SamplingConfig(),
            ),
            policy=model,
            reference=None,
            plan=None,
            folder=tmp_path,
        ).identity()

    assert identity() == identity()
    assert identity(change=1e-5) == identity(change=1e-5)
    others = [
        identity(change=1e-5),
        identity(change=2e-5),
        identity(accelerator=OneOfTwo),
        identity(weight=0.5),
    ]
    others.append(identity(sampling=SamplingConfig(temperature=0.5)))
    assert len({identity(), *others}) == 6


def test_rewards_are_given_back_for_the_same_completions_only(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", run="a")
    calls = []

    @reward(batched=True)
    def length(completions, samples):
        calls.append(len(completions))
        return [float(len(text)) for text in completions]

    collector = Collector(
        accelerator=Accelerator(cpu=True),
        engine=FakeEngine(),
        environment=SingleTurn(byte_tokenizer()),
        rewards=Rewards(RewardsConfig(), given={"length": (length, 1.0)}),
        sampling=SamplingConfig(),
    )
    (prompt,), _ = prompts_from_rows(
        [{"prompt": "a"}], byte_tokenizer(), PromptConfig(template="plain")
    )

    def total(text):
        trajectory = Trajectory(
            seed=1, token_ids=list(text.encode()), logps=[0.0] * len(text), finish_reason="stop"
        )
        group = TrajectoryGroup(index=0, prompt=prompt, trajectories=[trajectory])
        (scored,) = collector.score([group], journal, iteration=0)
        return [t.reward for t in scored.trajectories]

    assert total("ab") == total("ab") == [2.0] and len(calls) == 1
    assert total("abc") == [3.0] and len(calls) == 2


def test_journals_stay_until_the_next_checkpoint_is_in_place(tmp_path):
    """A kill while a checkpoint is written goes back to the one before it, and needs what was drawn
    since."""
    batches = RolloutBatches(
        config=RolloutConfig(group_size=2, show_every=0, max_mismatch_nats=0.0),
        algorithm=resolve_algorithm("grpo", {"beta": 0.0}),
        batch_size=1,
        seed=0,
        prompts=[Prompt(ids=(1,), sample={})],
        curriculum=CurriculumConfig(),
        collector=Collector(
            accelerator=Accelerator(cpu=True),
            engine=FakeEngine(),
            environment=SingleTurn(byte_tokenizer()),
            rewards=Rewards(RewardsConfig(), given={"length": (lambda c, s: len(c), 1.0)}),
            sampling=SamplingConfig(),
        ),
        policy=torch.nn.Identity(),
        reference=None,
        plan=ForwardPlan(accelerator=Accelerator(cpu=True), mode="shared", max_tokens=100),
        folder=tmp_path,
    )

    def journals():
        return sorted(int(p.name[10:16]) for p in tmp_path.glob("iteration_*.jsonl"))

    for iteration in range(0, 4, 2):
        next(batches), next(batches)
        saved = json.loads(json.dumps(batches.state_dict()))
        assert journals() == [iteration, iteration + 1], "the checkpoint may still be torn"
        batches.saved()
        assert journals() == []
    batches.load_state_dict(saved)
    assert batches.state_dict() == saved and saved["step"] == saved["iteration"] == 4


def test_a_buffer_keeps_segments_and_their_versions():
    prompts = [Prompt(ids=(9,), sample={})] * 4
    buffer = RolloutBuffer(prompts)
    buffer.begin([3], iteration=0, group_size=2, seed=0)
    first = Sampled(token_ids=(5, 6), logps=(-1.0, -2.0), finish_reason="budget", policy_version=1)
    done = Sampled(token_ids=(7,), logps=(-3.0,), finish_reason="stop", policy_version=1)
    (group,) = buffer.of_rank(0)
    open_ones, request = group.trajectories, request_of(group, group.trajectories)
    assert (
        request.prompt_ids == (9,) and request.prefixes == ((), ()) and len(set(request.seeds)) == 2
    )
    open_ones[0].extend(first)
    open_ones[1].extend(done)
    assert buffer.take_finished() == []
    restored = RolloutBuffer(prompts)
    restored.load_state_dict(json.loads(json.dumps(buffer.state_dict())))
    (group,) = restored.of_rank(0)
    open_ones = [t for t in group.trajectories if t.finish_reason is None]
    request = request_of(group, open_ones)
    assert request.prefixes == ((5, 6),)
    open_ones[0].extend(
        Sampled(token_ids=(8,), logps=(-4.0,), finish_reason="stop", policy_version=2)
    )
    (group,) = restored.take_finished()
    assert (
        group.trajectories[0].segments == [(2, 1), (3, 2)]
        and group.trajectories[0].tokens_before(2) == 2
    )
    assert group.trajectories[0].token_ids.tolist() == [5, 6, 8] and restored.groups == []


@pytest.mark.parametrize(
    ("n", "c", "k", "wanted"), [(10, 3, 1, 0.3), (10, 3, 5, 0.9166667), (4, 0, 2, 0), (4, 3, 2, 1)]
)
def test_pass_at_k(n, c, k, wanted):
    assert pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-7)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer_and_unbiased():
    for n in range(1, 8):
        for k, c in itertools.product(range(1, n + 1), range(n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-12
            )
        for k, p in itertools.product(range(1, n + 1), (0.1, 0.5)):
            expectation = sum(
                math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k)
                for c in range(n + 1)
            )
            assert expectation == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def made_group(*texts):
    trajectories = [
        Trajectory(seed=0, token_ids=[1], logps=[0.0], finish_reason="stop", text=text, reward=1.0)
        for text in map(CompletionText, texts)
    ]
    prompt = prompts_from_rows([{"prompt": "x"}], byte_tokenizer(), PromptConfig())[0][0]
    return TrajectoryGroup(index=0, prompt=prompt, trajectories=trajectories)


def evaluation(groups, correct):
    """``correct``: [problem][answer] True, False or None."""
    for group, row in zip(groups, correct, strict=True):
        for trajectory, ok in zip(group.trajectories, row, strict=True):
            trajectory.verdict = None if ok is None else float(ok)
    return Evaluation(groups=groups)


@pytest.mark.parametrize(("n", "powers"), [(1, []), (2, [2]), (4, [2, 4]), (6, [2, 4, 6])])
def test_an_evaluation_reports_pass_at_powers_of_two(n, powers):
    right = [[i == 0 for i in range(n)], [i % 2 == 1 for i in range(n)], [False] * n]
    made = evaluation(groups=[made_group(*map(str, range(n))) for _ in right], correct=right)
    metrics = made.metrics(powers=True)
    assert [
        int(name.removeprefix("eval_pass@"))
        for name in metrics
        if name.startswith("eval_pass@") and "ci" not in name
    ] == [
        1,
        *powers,
    ]
    for k in [1, *powers]:
        shares = [
            [any(row[i] for i in subset) for subset in itertools.combinations(range(n), k)]
            for row in right
        ]
        wanted = sum(sum(s) / len(s) for s in shares) / len(right)
        assert metrics[f"eval_pass@{k}"] == pytest.approx(wanted, abs=1e-12)
    assert set(made.metrics()) == set(metrics) - {f"eval_pass@{k}" for k in powers if k < n}


def test_evaluation_figures():
    made = evaluation(
        groups=[
            made_group("<answer>4</answer>", "<answer>5</answer>", "so <answer> 4 </answer>"),
            made_group("1", "2", "2"),
            made_group(r"I get \boxed{5}", r"so \boxed{4}", r"thus \boxed{\frac{8}{2}}"),
            made_group("7 is right", "so it is 8.0", "I say 8"),
            made_group("a cat", "a  dog", "a dog"),
        ],
        correct=[
            [True, False, True],
            [True, False, False],
            [False, True, True],
            [True, False, False],
            [False, True, True],
        ],
    )
    metrics = made.metrics()
    assert metrics["eval_pass@1"] == pytest.approx(8 / 15) and metrics["eval_pass@3"] == 1.0
    assert metrics["eval_cons@3"] == pytest.approx(3 / 5)
    assert half_width([1.0] * 50 + [0.0] * 50) == pytest.approx(0.0961, abs=1e-3)
    assert half_width([0.5] * 100, samples=4) == pytest.approx(0.0488, abs=1e-3), (
        "equal shares do not make a mean exact"
    )


def test_what_cannot_be_judged_is_in_no_figure_of_right_answers():
    groups = [made_group("4", "5", "6"), made_group("4", "4", "7"), made_group("?", "?", "?")]
    made = evaluation(
        groups=groups, correct=[[True, None, False], [True, True, False], [None, None, None]]
    )
    metrics = made.metrics()
    assert metrics["eval_pass@1"] == pytest.approx((1 / 2 + 2 / 3) / 2) and metrics[
        "eval_unscored"
    ] == pytest.approx(4 / 9)
    assert metrics["eval_pass@3"] == 1.0 and metrics["eval_cons@3"] == pytest.approx(
        (1 / 2 + 1) / 2
    ), "a tie counts half"
    with pytest.raises(ValueError, match="No answer could be judged"):
        evaluation(groups=groups[2:], correct=[[None] * 3]).metrics()


def test_prompts_for_rl_lose_nothing_that_belongs_to_them():
    from posttrain.data import read_prompt

    user, four = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    system = {"role": "system", "content": "S"}
    assert read_prompt({"prompt": "2+2?", "messages": [system, user, four]}).prompt == [
        system,
        user,
    ]
    assert (
        read_prompt(
            {
                "messages": [
                    user,
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"name": "f", "arguments": {}}],
                    },
                ]
            }
        )
        .answers[0]
        .text.startswith('[{"type"')
    )
    truth = {"ground_truth": "4"}
    for given in (truth, json.dumps(truth), {"ground_truth": ["4"]}):
        assert (
            read_prompt(
                {**{"messages": [user, {**four, "content": "long 4"}]}, "reward_model": given}
            )
            .answers[0]
            .text
            == "4"
        )
    assert (
        read_prompt({"context": "Q", "answer": "4"}, column="context").prompt[0]["content"] == "Q"
    )
    for row, lost in (
        ({"prompt": [user], "context": "C"}, "context"),
        ({"prompt": "Q", "image": {"path": "a"}}, "image"),
        ({"prompt": "Q", "System": "S"}, "System"),
        ({"prompt": "Q", "history": "before"}, "history"),
    ):
        with pytest.raises(
            ValueError, match=f"nothing reads {lost}, which would belong to the prompt"
        ):
            read_prompt(row)
        assert read_prompt(row, carry=[lost])
    with pytest.raises(ValueError, match="is not in messages. Which is the prompt"):
        read_prompt({"prompt": "another", "messages": [user, four]})
