"""Draws follow the exact distribution, do not depend on the batch, and say the probability they
were drawn with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from posttrain.rollout.engine import SamplingConfig, StopRule, draw, kept_by_truncation, repeats


def many(logits: torch.Tensor, sampling: SamplingConfig, count: int, *, start: int = 0):
    rows = logits.expand(count, -1)
    return draw(rows, sampling, seeds=range(start, start + count), positions=[0] * count)


@pytest.mark.parametrize("vocabulary", [3, 256, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chi_square_against_the_softmax(vocabulary, temperature):
    logits = (
        torch.randn(vocabulary, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        * 1.5
    )
    drawn = many(logits, SamplingConfig(temperature=temperature), 40_000)
    p = torch.softmax(logits / temperature, 0).numpy()
    seen = np.bincount(drawn.token_ids_B.numpy(), minlength=vocabulary)
    big = p * 40_000 >= 5
    observed, expected = (
        np.append(seen[big], seen[~big].sum()),
        np.append(p[big], p[~big].sum()) * 40_000,
    )
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3
    assert torch.allclose(
        drawn.logps_B, torch.log_softmax(logits / temperature, 0)[drawn.token_ids_B], atol=1e-12
    )


def test_positions_and_seeds_are_independent():
    """Neighbouring keys, as consecutive positions are, show no correlation."""
    logits = torch.zeros(2, dtype=torch.float64)
    at = [
        draw(logits[None], SamplingConfig(), seeds=[s], positions=[t]).token_ids_B.item()
        for s in range(40)
        for t in range(50)
    ]
    table = np.array(at).reshape(40, 50)
    assert abs(table.mean() - 0.5) < 0.05
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.08
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.08


def test_a_draw_does_not_depend_on_its_neighbours():
    logits = torch.randn(9, 1000, dtype=torch.float64)
    together = draw(logits, SamplingConfig(), seeds=range(9), positions=range(9))
    for i in range(9):
        alone = draw(logits[i : i + 1], SamplingConfig(), seeds=[i], positions=[i])
        assert alone.token_ids_B[0] == together.token_ids_B[i]


def test_rounding_seldom_changes_a_draw():
    logits = (
        torch.randn(4000, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    )
    exact = draw(logits, SamplingConfig(), seeds=range(4000), positions=[0] * 4000).token_ids_B
    rounded = draw(
        logits.bfloat16(), SamplingConfig(), seeds=range(4000), positions=[0] * 4000
    ).token_ids_B
    assert float((exact != rounded).float().mean()) < 0.02


def test_greedy_and_its_log_prob():
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    drawn = draw(logits, SamplingConfig(temperature=0), seeds=[0], positions=[0])
    assert drawn.token_ids_B.tolist() == [1]
    assert drawn.logps_B.item() == pytest.approx(torch.log_softmax(logits, -1)[0, 1].item())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 3, "top_p": 0.83}, {0, 1}),
    ],
)
def test_truncation_keeps_the_right_set_and_renormalises(options, kept):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    sampling = SamplingConfig(**options)
    assert set(kept_by_truncation(p.log()[None], sampling)[0].nonzero()[:, 0].tolist()) == kept
    drawn = many(p.log(), sampling, 2000)
    assert set(drawn.token_ids_B.tolist()) == kept
    total = sum(float(p[i]) for i in kept)
    assert torch.allclose(drawn.logps_B, (p[drawn.token_ids_B] / total).log(), atol=1e-12)
    assert drawn.kept_BV[0].nonzero()[:, 0].tolist() == sorted(kept)


def test_stop_rules_in_their_order():
    def decode(ids):
        return "".join(map(chr, ids))

    rule = StopRule(
        SamplingConfig(
            max_tokens=6, stop_strings=["ab"], budget_tokens=3, repeat_ngram=2, repeat_times=2
        ),
        [0],
        decode,
    )
    assert rule.reason([], [65]) is None
    assert rule.reason([], [65, 0]) == "stop"
    assert rule.reason([], [97, 98]) == "stop" and rule.reason([97], [98]) == "stop"
    assert rule.reason([97, 98], [65]) is None  # an earlier one in the prefix did not stop it
    assert rule.reason([1, 2], [1, 2]) == "repeat"
    assert rule.reason([1, 2, 3], [4, 5, 6]) == "length"
    assert rule.reason([], [4, 5, 6]) == "budget"
    with pytest.raises(ValueError, match="need a tokenizer"):
        StopRule(SamplingConfig(stop_strings=["x"]), [], None)


def test_repeats_sees_shorter_periods_too():
    assert repeats([9, 1, 1, 1, 1, 1, 1], ngram=2, times=3)
    assert repeats([1, 2, 1, 2, 1, 2], ngram=2, times=3)
    assert not repeats([1, 2, 1, 2, 2, 1], ngram=2, times=3)
    assert not repeats([1, 2, 1, 2], ngram=2, times=3)
