"""Columns of completions, what a forward gives, and credit as functions: what the documentation says
of them, and hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain import Algorithm, Rollout, as_loss, credit
from posttrain.models.policy import Policy
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig
from posttrain.rl.credit import covariant_tokens, decoupled, mean_normalised
from posttrain.training.reference import sequence_key
from posttrain.types import Completion, PromptGroup, Ragged
from tests.helpers import plain_states, random_groups, tiny_gpt2

F64 = torch.float64


def packed(*completions):
    groups = [PromptGroup(prompt_ids=[1, 2], completions=list(completions), pairs=())]
    return pack(
        groups, [GroupPart(group=0, completions=tuple(range(len(completions))))], mode="shared"
    )


def completion(mask, **columns):
    return Completion(token_ids=range(5, 5 + len(mask)), loss_mask=mask, columns=columns)


def view_of(batch):
    return batch.with_logps(torch.zeros(batch.targets_T.shape[0], dtype=F64))


def test_a_column_is_by_completion_or_by_token_of_the_trained_ones():
    logps = view_of(
        packed(
            completion([0, 1, 1], advantage=2.0, score=[7.0, 8.0, 9.0], mine=1.0),
            completion([1, 0], advantage=-1.0, score=[4.0, 5.0], mine=[3.0, 4.0]),
        )
    )
    assert logps["advantage"].tolist() == [2.0, -1.0] == logps.by_completion("advantage").tolist()
    assert logps.by_token("advantage").tolist() == [2.0, 2.0, -1.0]
    assert logps["score"].tolist() == [8.0, 9.0, 4.0] == logps.by_token("score").tolist()
    assert logps["mine"].tolist() == [1.0, 1.0, 3.0], "one number stands at each of its tokens"
    with pytest.raises(ValueError, match="one score for each completion; its batch has one per"):
        logps.by_completion("score")
    with pytest.raises(ValueError, match="reads 'values', .* has advantage, score, mine"):
        logps["values"]
    assert "score" in logps and "values" not in logps


def test_lists_by_token_keep_those_of_the_trained_tokens():
    kept = Ragged.of([[1], [2, 3], [], [4, 5, 6]])
    batch = packed(
        completion([1, 1, 0, 1], kept_ids=kept), completion([0], kept_ids=Ragged.of([[9]]))
    )
    assert batch.kept_ids.values.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.kept_ids.ends.tolist() == [1, 3, 6]


def test_a_trained_completion_without_a_column_of_its_batch_is_an_error():
    packed(completion([1], a=1.0), completion([0]))  # not trained: needs none
    with pytest.raises(ValueError, match="without the column 'a' is in one batch"):
        packed(completion([1], a=1.0), completion([1], b=1.0))
    with pytest.raises(ValueError, match="one number, or one per token; got 2 for 3 tokens"):
        completion([1, 1, 1], a=[1.0, 2.0])


def test_model_inputs_are_part_of_what_names_a_sequence():
    keys = {
        sequence_key(
            PromptGroup(prompt_ids=[1], completions=[completion([1])], inputs=inputs),
            completion([1]),
        )
        for inputs in ({}, {"pixel_values": np.zeros(3)}, {"pixel_values": np.ones(3)})
    }
    assert len(keys) == 3


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_entropy_and_hidden_states_are_the_models_own(chunk):
    plain = tiny_gpt2().double().eval()
    policy = Policy(tiny_gpt2().double(), PackingConfig(logits_chunk=chunk)).eval()
    groups = random_groups(3, seed=5)
    parts = [
        GroupPart(group=g, completions=tuple(range(len(x.completions))))
        for g, x in enumerate(groups)
    ]
    batch = pack(groups, parts, mode="shared")
    forward = policy(batch, ("entropy", "hidden"))
    assert set(policy(batch).outputs) == set(), "what is not asked for is not computed"
    for s, (g, k) in enumerate(batch.refs):
        if groups[g].completions[k].num_trained:
            entropy, hidden = plain_states(plain, groups[g], k)
            here = batch.sequence_T == s
            assert torch.allclose(forward.outputs["entropy"][here], entropy, atol=1e-10)
            assert torch.allclose(forward.outputs["hidden"][here], hidden, atol=1e-10)
    with pytest.raises(ValueError, match="asks the forward for 'values'; it knows entropy, hidden"):
        policy(batch, ("values",))
    with pytest.raises(ValueError, match="no router_logits"):
        policy(batch, ("router",))


def test_routing_probabilities_are_of_every_layer():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    policy = Policy(MixtralForCausalLM(config).eval(), PackingConfig())
    batch = packed(completion([1, 1, 1]), completion([0, 1]))
    forward = policy(batch, ("router",))
    assert forward.outputs["router"].shape == (4, 2, 4)
    assert torch.allclose(forward.outputs["router"].sum(-1), torch.ones(4, 2), atol=1e-6)
    forward.outputs["router"][:, :, 0].sum().backward()
    assert any("gate" in n and p.grad is not None for n, p in policy.named_parameters())


def rollouts(rewards, logps=None, **parts):
    return [
        [
            Rollout(
                reward=r,
                parts={name: rows[g][k] for name, rows in parts.items()},
                weights={name: 1.0 for name in parts},
                logps=None if logps is None else np.asarray(logps[g][k]),
            )
            for k, r in enumerate(row)
        ]
        for g, row in enumerate(rewards)
    ]


def test_maxrl_divides_by_the_success_rate():
    """One right in four: (1 - 1/4) / (1/4) = 3 and -1."""
    assert mean_normalised([[1.0, 0.0, 0.0, 0.0]]) == [[3.0, -1.0, -1.0, -1.0]]
    assert mean_normalised([[0.0, 0.0]]) == [[0.0, 0.0]] == mean_normalised([[1.0, 1.0]])
    with pytest.raises(ValueError, match="rewards are >= 0"):
        mean_normalised([[1.0, -1.0]])


def test_gdpo_tells_apart_what_sums_to_the_same():
    """Paper's example: rewards (0, 1), (1, 0) and (0, 2) have sums that GRPO maps to two values;
    normalised apart, a second reward of 2 counts more than one of 1. Compared with TRL's formula."""
    first, second = [[0.0, 1.0, 0.0, 0.0]], [[1.0, 0.0, 2.0, 0.0]]
    totals = [
        [a + b for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)
    ]
    (found,) = decoupled(rollouts(totals, format=first, accuracy=second))
    parts = torch.tensor([first[0], second[0]], dtype=F64)
    summed = ((parts - parts.mean(1, keepdim=True)) / (parts.std(1, keepdim=True) + 1e-4)).sum(0)
    wanted = (summed - summed.mean()) / (summed.std(correction=0) + 1e-4)
    assert found == pytest.approx(wanted.tolist(), abs=1e-12)
    assert len({round(a, 6) for a in found}) == 4 > len({*totals[0]})


def test_covariant_tokens_are_those_whose_log_prob_and_advantage_move_together():
    """Advantages 1 and -1; log-probs -4, 0 | 0, -8: means 0 and -3. Covariances -1, 3, -3, 5."""
    given = rollouts([[1.0, 0.0]], logps=[[[-4.0, 0.0], [0.0, -8.0]]])
    ((a, b),) = covariant_tokens(given, share=0.25, pick="largest")
    assert (a["advantage"], b["advantage"]) == (1.0, -1.0)
    assert a["covariant"].tolist() == [0.0, 0.0] and b["covariant"].tolist() == [0.0, 1.0]
    ((a, b),) = covariant_tokens(given, share=1.0, low=1.0, high=4.0)
    assert a["covariant"].tolist() == [0.0, 1.0] and b["covariant"].tolist() == [0.0, 0.0]


def test_a_plain_function_is_taken_to_need_everything_and_credit_to_read_rewards():
    made = as_loss(lambda logps: None)
    assert made.reference and made.couples_completions and not made.outputs
    mine = Algorithm(
        name="mine", advantages=lambda rewards: [[2 * r for r in g] for g in rewards], loss=made
    )
    assert mine.credit.columns(rollouts([[1.0, 3.0]])) == [[{"advantage": 2.0}, {"advantage": 6.0}]]
    assert not mine.needs_reference

    @credit(policy="beta")
    def other(rollouts, *, beta=0.0):
        return []

    assert not other.reads("policy") and other.with_options(beta=0.1).reads("policy")
    assert not other.reads("reference")
