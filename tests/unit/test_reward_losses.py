"""Bradley-Terry, margin, centering, K-way groups, and the held-out report, against numbers and
loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from posttrain.losses.reduce import reduce_term
from posttrain.losses.reward import bradley_terry, expected_calibration_error, pair_report, pearson
from posttrain.packing.plan import count_units
from posttrain.types import Completion, Pair, PromptGroup
from tests.unit.preference_batches import batch_of


def loss_of(scores, pairs=None, **options):
    logps = batch_of([scores], pairs=pairs)
    (term,) = bradley_terry(logps, **options).terms
    completions = [Completion(token_ids=[5], loss_mask=[1])] * len(scores)
    return float(
        reduce_term(
            term,
            logps,
            count_units([PromptGroup(prompt_ids=[1], completions=completions, pairs=pairs)]),
        )
    )


def with_margin(margin):
    return [Pair(chosen=0, rejected=1, margin=margin)]


def test_numbers():
    assert loss_of([2.0, 0.5]) == pytest.approx(0.2014132780, abs=1e-10)
    assert loss_of([2.0, 0.5], with_margin(1.0), margin_scale=1.0) == pytest.approx(
        0.4740769842, abs=1e-10
    )
    assert loss_of([2.0, 0.5], with_margin(2 / 3), margin_scale=1.0) == pytest.approx(
        0.3608848159, abs=1e-10
    )
    assert loss_of([2.0, 0.5], with_margin(2.0), margin_scale=0.5) == pytest.approx(
        0.4740769842, abs=1e-10
    )
    assert loss_of([2.0, 0.5], with_margin(1.0)) == pytest.approx(
        0.2014132780, abs=1e-10
    )  # a margin is asked for
    assert loss_of([2.0, 0.5], centering=0.01) == pytest.approx(0.2639132780, abs=1e-10)
    assert loss_of([1.3, 1.3]) == pytest.approx(math.log(2), abs=1e-12)


def test_a_constant_moves_the_centering_alone():
    assert loss_of([7.0, 5.5]) == pytest.approx(loss_of([2.0, 0.5]), abs=1e-12)
    assert loss_of([7.0, 5.5], centering=0.01) > loss_of([2.0, 0.5], centering=0.01) + 1.0


def test_k_way_is_the_mean_of_the_pair_losses():
    scores = [1.0, 0.2, 0.7, -0.4]
    wanted = [
        loss_of([scores[i], scores[j]], centering=0.1)
        for i, j in itertools.combinations(range(4), 2)
    ]
    assert len(wanted) == 6
    assert loss_of(scores, centering=0.1) == pytest.approx(sum(wanted) / 6, abs=1e-12)


def test_synthetic_preferences_recover_the_reward():
    """1000 pairs sampled from BT(r*), r* linear in 3 features: the fit is within 4 standard errors
    of r*."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    features = torch.randn(1000, 2, 3, generator=generator, dtype=torch.float64)
    reward = features @ truth
    swap = torch.rand(1000, generator=generator, dtype=torch.float64) > torch.sigmoid(
        reward[:, 0] - reward[:, 1]
    )
    features[swap] = features[swap].flip(1)
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        scores = features @ weights
        loss = bradley_terry(batch_of([list(row) for row in scores])).terms[0].items.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    difference = (features[:, 0] - features[:, 1]).detach()
    p = torch.sigmoid(difference @ truth)
    information = (difference * (p * (1 - p))[:, None]).T @ difference
    error = torch.linalg.inv(information).diagonal().sqrt()
    assert ((weights.detach() - truth).abs() < 4 * error).all()
    assert (error < 0.15).all()


def test_expected_calibration_error_by_hand():
    """Gap ln 3 is confidence 0.75, gap 0.1 confidence 0.525: two right of three at 0.75, one wrong
    at 0.525."""
    gaps = torch.tensor([math.log(3), math.log(3), -math.log(3), -0.1], dtype=torch.float64)
    low = 1 / (1 + math.exp(-0.1))
    wanted = 3 / 4 * abs(2 / 3 - 0.75) + 1 / 4 * abs(0 - low)
    assert expected_calibration_error(gaps) == pytest.approx(wanted, abs=1e-12)
    logit = torch.tensor(
        [0.52, 0.58], dtype=torch.float64
    ).logit()  # two bins: their errors do not cancel
    assert expected_calibration_error(logit * torch.tensor([1, -1])) == pytest.approx(
        (0.48 + 0.58) / 2, abs=1e-12
    )
    assert expected_calibration_error(torch.tensor([])) == 0.0
    assert expected_calibration_error(torch.full((5,), 1e9)) == pytest.approx(0.0)


def test_report():
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.0])
    report = pair_report(
        chosen,
        rejected,
        torch.tensor([10.0, 4.0]),
        torch.tensor([5.0, 8.0]),
        torch.cat([chosen, rejected]),
        torch.tensor([10.0, 4.0, 5.0, 8.0]),
    )
    assert (report["accuracy"], report["margin"]) == (0.5, 0.25)
    assert (report["longer_chosen"], report["longer_preferred"]) == (0.5, 1.0)
    wanted = torch.corrcoef(torch.tensor([[10.0, 4.0, 5.0, 8.0], [2.0, 0.0, 0.5, 1.0]]))[0, 1]
    assert report["length_correlation"] == pytest.approx(float(wanted), abs=1e-6)
    assert pearson(torch.ones(4), torch.arange(4.0)) == 0.0


def test_report_of_equal_scores_and_of_scores_without_spread():
    """Equal scores are no preference: not right, and not for the longer side. Three times 0.1 has a
    rounded mean of its own."""
    one, lengths = torch.tensor([1.0]), torch.tensor([3.0, 5.0])
    report = pair_report(one, one, lengths[:1], lengths[1:], torch.cat([one, one]), lengths)
    assert (report["accuracy"], report["longer_chosen"], report["longer_preferred"]) == (
        0.0,
        0.0,
        0.0,
    )
    assert (report["ece"], report["score_std"], report["length_correlation"]) == (0.5, 0.0, 0.0)
    constant = torch.full((3,), 0.1, dtype=torch.float64)
    assert pearson(constant, torch.arange(3.0)) == pearson(torch.arange(3.0), constant) == 0.0
    empty = torch.tensor([])
    assert set(pair_report(empty, empty, empty, empty, empty, empty).values()) == {0.0}


def test_metrics_and_bad_options():
    logps = batch_of([[2.0, 0.5], [1.0, 1.0]])
    metrics = {name: values.tolist() for name, values in bradley_terry(logps).metrics.items()}
    assert metrics == {
        "accuracy": [1.0, 0.0],
        "margin": [1.5, 0.0],
        "chosen_score": [2.0, 1.0],
        "rejected_score": [0.5, 1.0],
    }
    assert not bradley_terry.reference
    for bad in ({"margin_scale": -1.0}, {"centering": -0.1}):
        with pytest.raises(ValueError, match=">= 0"):
            bradley_terry(logps, **bad)
