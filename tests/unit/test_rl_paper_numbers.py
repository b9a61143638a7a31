"""Numbers of the RL papers that no other test has: filters of problems and cases, length bias,
settings, format and accuracy."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from posttrain.cli import eval as cli
from posttrain.cli.prep import agreed_cases
from posttrain.data.prompts import PromptConfig, prompts_from_rows
from posttrain.losses import policy
from posttrain.losses.reduce import reduce_term
from posttrain.models.sharding import mix_into
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import count_units
from posttrain.rewards import CompletionText
from posttrain.rewards.compose import Rewards, RewardsConfig
from posttrain.rl.algorithms import ALGORITHMS
from posttrain.types import Completion, PromptGroup
from tests.helpers import tiny_llama
from tests.tiny import byte_tokenizer

F64 = torch.float64


def view_of(lengths, advantages):
    """One group on the policy that sampled it."""
    completions = [
        Completion(token_ids=[5] * n, loss_mask=[1] * n, columns={"advantage": a})
        for n, a in zip(lengths, advantages, strict=True)
    ]
    groups = [PromptGroup(prompt_ids=[1], completions=completions, pairs=())]
    packed = pack(
        groups, [GroupPart(group=0, completions=tuple(range(len(lengths))))], mode="shared"
    )
    logps = (
        -torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0), dtype=F64)
    ).requires_grad_()
    return packed.with_logps(logps), count_units(groups)


def gradient(loss, view, counts, **options):
    value = sum(reduce_term(term, view, counts) for term in loss(view, **options).terms)
    return torch.autograd.grad(value, view.logps_T)[0].tolist()


# --- Shao et al. 2024; Liu et al. 2025; Zheng et al. 2025
# -------------------------------------------------------------------------
@pytest.mark.parametrize("epsilon", [0.0, 0.2, 10.0])
def test_the_first_update_does_not_depend_on_epsilon(epsilon):
    view, counts = view_of([2, 3], [1.0, -0.5])
    wanted = [-1.0 / (2 * 2)] * 2 + [0.5 / (2 * 3)] * 3
    assert gradient(
        policy.clipped, view, counts, epsilon_low=epsilon, epsilon_high=epsilon
    ) == pytest.approx(wanted, abs=1e-12)


def test_length_bias_of_grpo_and_none_of_dr_grpo():
    """A wrong answer four times as long is pushed down a quarter as much at each token by 1/|o|,
    and as much by the constant 16."""
    view, counts = view_of([2, 8], [-1.0, -1.0])
    assert gradient(policy.clipped, view, counts) == pytest.approx(
        [1 / 4] * 2 + [1 / 16] * 8, abs=1e-12
    )
    constant = gradient(policy.clipped, view, counts, aggregation="constant", constant=16.0)
    assert constant == pytest.approx([1 / 32] * 10, abs=1e-12)


def test_the_product_of_ratios_1_1_0_9_1_2_is_1_188():
    """Not normalised by the length as GSPO's is: the weight of a whole completion, and e to the
    log-ratio of k1.5."""
    view, _ = view_of([3, 1], [1.0, 1.0])
    shift = torch.log(torch.tensor([1.1, 0.9, 1.2, 1.0], dtype=F64))
    sampled = replace(view, columns_T={"sampler_logps": view.logps_T.detach() - shift})
    weights = policy.importance_weights(sampled, correction="sequence_truncate", cap=2.0)
    assert weights.tolist() == pytest.approx([1.188] * 3 + [1.0], abs=1e-12)
    later = replace(view, columns_T={"proximal_logps": view.logps_T.detach() - shift})
    ratios = policy.mirror_descent(later).metrics["logratio_nats"].exp()
    assert ratios.tolist() == pytest.approx([1.188, 1.0], abs=1e-12)
    assert math.exp(math.log(1.188) / 3) == pytest.approx(1.0591045, abs=1e-7)


def test_settings_of_the_papers():
    """beta, where and which KL, epsilons: DeepSeekMath 4.2, R1 (Nature), DAPO 4.1, RLOO 4,
    REINFORCE++ 3."""
    wanted = {
        "grpo": (0.04, "loss", "k3", 0.2, 0.2),
        "r1": (0.001, "loss", "k3", 10.0, 10.0),
        "dr_grpo": (0.0, None, None, 0.2, 0.2),
        "dapo": (0.0, None, None, 0.2, 0.28),
        "gspo": (0.0, None, None, 3e-4, 4e-4),
        "rloo": (0.03, "reward", "k1", None, None),
        "reinforce_pp": (0.001, "reward", "k1", 0.2, 0.2),
        "reinforce_pp_baseline": (0.001, "loss", "k2", 0.2, 0.2),
        "k15": (0.0, None, None, None, None),
        "cispo": (0.0, None, None, None, None),
        "gmpo": (0.0, None, None, None, None),
        "sapo": (0.0, None, None, None, None),
        "vespo": (0.0, None, None, None, None),
        "maxrl": (0.0, None, None, None, None),
        "gdpo": (0.0, None, None, 0.2, 0.2),
        "clip_cov": (0.0, None, None, 0.2, 0.2),
        "kl_cov": (0.0, None, None, None, None),
        "distill": (0.0, None, None, None, None),
    }
    found = {}
    for name, a in ALGORITHMS.items():
        options = {**(a.loss.function.__kwdefaults__ or {}), **a.loss_options}
        kl = (a.beta, "loss", a.kl_estimator) if a.beta else (0.0, None, None)
        if a.advantage_options.get("beta"):
            kl = (a.advantage_options["beta"], "reward", "k1")
        found[name] = (*kl, options.get("epsilon_low"), options.get("epsilon_high"))
    assert found == wanted
    assert {n: a.reference_every for n, a in ALGORITHMS.items() if a.reference_every} == {"r1": 400}
    assert {n for n, a in ALGORITHMS.items() if a.dynamic_sampling} == {"dapo"}
    assert {n for n, a in ALGORITHMS.items() if a.fresh_optimizer} == {"k15"}


# --- DeepSeek-R1
# ------------------------------------------------------------------------------------------------------------------
def test_the_template_of_r1_zero_word_for_word():
    (prompt,), _ = prompts_from_rows(
        [{"prompt": "2+2?"}],
        byte_tokenizer(),
        PromptConfig(template="r1-zero", max_prompt_length=999),
    )
    assert byte_tokenizer().decode(prompt.ids) == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks "
        "about the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are "
        "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
        "<answer> answer here </answer>. User: 2+2?. Assistant:"
    )


def test_rule_reward_is_accuracy_plus_format_with_equal_weights():
    """Right and well formed 2, one of the two 1, neither 0: a format-only completion scores its
    format."""
    rewards = Rewards(RewardsConfig(functions={"exact_answer": 1.0, "think_answer_format": 1.0}))
    texts = [
        "<think>a</think><answer>Paris</answer>",
        "<think>a</think><answer>Rome</answer>",
        "<answer>Paris</answer>",
        "Rome",
    ]
    try:
        (row,) = rewards.score([({"answer": "Paris"}, [CompletionText(t) for t in texts])])
    finally:
        rewards.close()
    assert [s.reward for s in row] == [2.0, 1.0, 1.0, 0.0]
    assert [s.parts["think_answer_format"] for s in row] == [1.0, 1.0, 0.0, 0.0]


# --- Kimi k1.5
# --------------------------------------------------------------------------------------------------------------------
def submissions(*agreeing: int, spoilt: int = 0) -> list[list[str | None]]:
    """Ten: of case i ``agreeing[i]`` print the same and the others something of their own; the last
    ``spoilt`` fail everywhere."""
    rows = [[f"out{i}" if s < n else f"{s}" for i, n in enumerate(agreeing)] for s in range(10)]
    return rows[: 10 - spoilt] + [[None] * len(agreeing)] * spoilt


def test_code_cases_need_7_of_10_and_problems_9_of_10():
    assert agreed_cases(submissions(6)) is None and agreed_cases(submissions(10, 6)) == {0: "out0"}
    assert agreed_cases(submissions(10, 7), passing=7) == {0: "out0", 1: "out1"}
    assert agreed_cases(submissions(10, 10, spoilt=1)) == {0: "out0", 1: "out1"}, "9 of 10 pass"
    assert agreed_cases(submissions(10, 10, spoilt=2)) is None, "8 of 10 pass"
    assert (
        agreed_cases(submissions(9, 10)) == {0: "out0", 1: "out1"}
        and agreed_cases(submissions(8, 10)) is None
    )
    crossed = submissions(10, 10)
    crossed[0][0], crossed[1][1] = "no", "no"
    assert agreed_cases(crossed) is None, "each case has 9, but only 8 submissions pass both"
    assert agreed_cases([[None]] * 10) is None and agreed_cases([[]] * 10) is None
    with pytest.raises(ValueError, match="majority"):
        agreed_cases(submissions(10), agree=5)


def test_a_problem_guessed_on_attempt_8_goes_and_on_attempt_9_stays(tmp_path, monkeypatch, capsys):
    first_right = {"a": 1, "b": 8, "c": 9, "d": 10**9}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": q}) + "\n" for q in first_right)
    )
    asked = []

    def evaluate(arguments, rows, *, suffix=""):
        guessing = suffix.endswith("Answer with the result only.")
        asked.append((guessing, arguments.samples))
        groups = [SimpleNamespace(prompt=SimpleNamespace(sample=r)) for r in rows]
        if not guessing:
            return SimpleNamespace(
                groups=groups, correct=[[t < 3 for t in range(arguments.samples)] for _ in rows]
            )
        right = [first_right[r["question"][0]] for r in rows]
        return SimpleNamespace(
            groups=groups,
            correct=[[t == n for t in range(1, arguments.samples + 1)] for n in right],
        )

    monkeypatch.setattr(cli, "evaluate", evaluate)
    parser = argparse.ArgumentParser()
    cli.declare_difficulty(parser)
    out = tmp_path / "rated.jsonl"
    common = ["model", "--task", str(tmp_path / "rows.jsonl"), "--out", str(out)]
    for tries, kept in (
        (8, ["c", "d"]),
        (9, ["d"]),
        (7, ["b", "c", "d"]),
        (0, ["a", "b", "c", "d"]),
    ):
        cli.run_difficulty(parser.parse_args([*common, "--guess-tries", str(tries)]))
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["question"] for r in rows] == kept and all(
            r["pass_rate"] == 0.3 and r["difficulty"] == 0.7 for r in rows
        )
    assert asked[:2] == [(False, 10), (True, 8)], "k1.5: a pass rate over 10 samples, 8 guesses"
    assert "2 left out (a guess was right)" in capsys.readouterr().out


def test_half_and_half_of_two_models_is_their_average_and_tied_weights_stay_tied():
    """k1.5's model merging; the project averages weights only for a moving reference."""
    a, b = (tiny_llama(seed=s, tie_word_embeddings=True) for s in (1, 2))
    before = {n: p.clone() for n, p in a.named_parameters()}
    mix_into(a, b, 0.5)
    theirs = dict(b.named_parameters())
    assert all(
        torch.equal(p, theirs[n])
        or torch.allclose(p, (before[n] + theirs[n]) / 2, atol=1e-7, rtol=0)
        for n, p in a.named_parameters()
    )
    assert not torch.equal(a.model.embed_tokens.weight, b.model.embed_tokens.weight)
    assert a.lm_head.weight is a.model.embed_tokens.weight
