"""Preference losses against numbers computed from the papers' formulas, identities, and
gradients."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace

import mpmath
import pytest
import torch

from posttrain.losses import preference
from posttrain.losses.preference import f_prime, mismatched_groups, preference_metrics
from posttrain.losses.reduce import reduce_term, weighted_sum
from posttrain.packing.plan import count_units
from posttrain.types import (
    BatchStatistic,
    Completion,
    Loss,
    LossOutput,
    LossTerm,
    Pair,
    PromptGroup,
    as_loss,
)
from tests.losses_for_tests import PREFERENCE
from tests.unit.preference_batches import batch_of, one_pair

# w = +2, l = -1, beta = 0.1, epsilon = 0.1, |y_w| = 10, |y_l| = 20, log-probs -20 and -50
NUMBERS = [
    ("dpo", {}, 0.554355244),
    ("cdpo", {}, 0.584355244),
    ("robust", {}, 0.516855244),
    ("ipo", {}, 4.0),
    ("ipo_avg", {}, 22.5625),
    ("hinge", {}, 0.7),
    ("apo_zero", {}, 0.925186815),
    ("apo_down", {}, 0.975391481),
    ("nca", {}, 1.319406634),
    ("bco", {}, 1.242535529),
    ("sppo", {}, 25.0),
    ("exo", {"label_smoothing": 1e-3}, 2.258199192),
    ("dpo_norm", {"beta": 0.1}, 0.680725304),
    ("dpo_norm", {"beta": 5.0}, 0.251929081),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, math.log(2)),
    ("simpo", {"beta": 2.5, "gamma": 0.5}, 0.386871006),
    ("orpo", {"lambda_": 0.1}, 2.045193160),
    ("dpo", {"reference_free": True}, 0.048587352),
]
# from the formulas, computed apart: x = beta h = 0.3
OTHERS = [
    ("cpo", {"nll_weight": 0.5}, 0.048587352 + 0.5 * 2.0),
    ("rpo", {"nll_weight": 0.5}, 0.554355244 + 0.5 * 2.0),
    ("nll_chosen", {}, 2.0),
    ("dpop", {"lambda_": 5.0}, 0.554355244),  # w > 0: no penalty
    ("r_dpo", {"length_weight": 0.01}, math.log1p(math.exp(-(0.3 + 0.01 * (10 - 20))))),
    (
        "discopop",
        {},
        (lambda s: 0.554355244 * (1 - s) + math.exp(-0.3) * s)(1 / (1 + math.exp(-6))),
    ),
    ("bco", {"delta": 0.05}, math.log1p(math.exp(-0.15)) + math.log1p(math.exp(-0.15))),
]

REWARD = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()


def value(name, logps, **options):
    (term,) = getattr(preference, name)(logps, **options).terms
    return term.items


@pytest.mark.parametrize(("name", "options", "wanted"), NUMBERS + OTHERS)
def test_numbers(name, options, wanted):
    assert float(value(name, one_pair(2.0, -1.0), **options)) == pytest.approx(wanted, abs=1.1e-9)


def test_parts_of_orpo():
    output = preference.orpo(one_pair(2.0, -1.0), lambda_=0.1)
    assert float(output.metrics["log_odds_loss"]) == pytest.approx(0.451931604, abs=1e-9)
    gap = (-2 - math.log(1 - math.exp(-2))) - (-2.5 - math.log(1 - math.exp(-2.5)))
    assert gap == pytest.approx(0.559762974, abs=1e-9)
    assert float(output.metrics["log_odds_loss"]) == pytest.approx(
        math.log1p(math.exp(-gap)), abs=1e-12
    )


def test_dpop_pays_for_a_chosen_that_became_less_likely():
    logps = one_pair(-2.0, -6.0)  # h = 4, w = -2
    assert float(value("dpop", logps, lambda_=1.5)) == pytest.approx(
        math.log1p(math.exp(-0.1 * (4 - 1.5 * 2)))
    )


def test_at_initialisation_the_loss_is_ln_2_and_nothing_is_preferred():
    logps = one_pair(0.0, 0.0)
    for name in ("dpo", "cdpo", "dpo_norm"):
        assert float(value(name, logps)) == pytest.approx(math.log(2), abs=1e-12)
    metrics = preference_metrics(logps, beta=0.1)
    assert float(metrics["rewards_train/accuracies"]) == 0.0
    assert float(metrics["rewards_train/margins"]) == 0.0


def test_metrics_have_the_authors_names_and_subtract_the_reference():
    metrics = preference_metrics(one_pair(2.0, -1.0), beta=0.1)
    wanted = {"chosen": 0.2, "rejected": -0.1, "accuracies": 1.0, "margins": 0.3}
    assert {n: round(float(metrics[f"rewards_train/{n}"]), 12) for n in wanted} == wanted
    assert (float(metrics["logps_train/chosen"]), float(metrics["logps_train/rejected"])) == (
        -20.0,
        -50.0,
    )
    assert not any(m.requires_grad for m in metrics.values())


def test_metrics_without_a_reference_are_beta_times_the_log_probs():
    metrics = preference_metrics(batch_of([[-2.0, -5.0]]), beta=0.5)
    assert [float(metrics[f"rewards_train/{n}"]) for n in ("chosen", "rejected", "margins")] == [
        -1.0,
        -2.5,
        1.5,
    ]


def test_swapping_chosen_and_rejected_changes_the_loss_by_beta_h():
    for w, l in ((2.0, -1.0), (-3.0, 0.5)):
        difference = value("dpo", one_pair(w, l)) - value("dpo", one_pair(l, w))
        assert float(difference) == pytest.approx(-0.1 * (w - l), abs=1e-12)


def slope(name, h, **options):
    """d loss / d h through the chosen log-prob."""
    chosen = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    logps = batch_of([[chosen, 0.0]], reference=[[0.0, 0.0]])
    (gradient,) = torch.autograd.grad(value(name, logps, **options).sum(), chosen)
    return float(gradient)


def test_stationary_points_and_gradient_coefficients():
    assert slope("cdpo", math.log(9) / 0.1) == pytest.approx(0.0, abs=1e-15)
    assert abs(slope("cdpo", 21.0)) > 1e-4
    assert slope("ipo", 5.0) == 0.0
    assert slope("dpo", 0.0) == pytest.approx(-0.05)
    assert slope("dpo", 3.0) == pytest.approx(-0.042555748, abs=1e-9)


def test_gradient_is_the_papers():
    """-beta sigmoid(r_l - r_w) [grad log pi(y_w) - grad log pi(y_l)], Rafailov et al. 2023 section
    4, over several pairs."""
    torch.manual_seed(0)
    policy = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(4, 2, dtype=torch.float64)
    logps = batch_of([list(row) for row in policy], reference=reference.tolist())
    (gradient,) = torch.autograd.grad(value("dpo", logps, beta=0.3).sum(), policy)
    for b in range(4):
        reward = 0.3 * (policy[b] - reference[b]).detach()
        coefficient = 0.3 * torch.sigmoid(reward[1] - reward[0])
        assert torch.allclose(gradient[b], torch.stack([-coefficient, coefficient]), atol=1e-14)


def test_all_pairs_of_a_ranked_group_and_their_weights():
    """K = 4: the step's mean over pairs is the mean of the C(4, 2) pair losses written as a loop;
    ties are not compared."""
    sums, reference = [-3.0, -4.0, -9.0, -5.0], [-3.5, -3.0, -8.0, -7.0]
    ratio = [s - r for s, r in zip(sums, reference, strict=True)]

    def mean(pairs):
        group = PromptGroup(
            prompt_ids=[1], completions=[Completion(token_ids=[5], loss_mask=[1])] * 4, pairs=pairs
        )
        logps = batch_of([sums], reference=[reference], pairs=pairs)
        items = value("dpo", logps)
        return float(reduce_term(LossTerm(items=items, unit="pair"), logps, count_units([group])))

    def one(i, j):
        return math.log1p(math.exp(-0.1 * (ratio[i] - ratio[j])))

    every = list(itertools.combinations(range(4), 2))
    assert mean(None) == pytest.approx(sum(one(i, j) for i, j in every) / 6, abs=1e-12)
    some = [Pair(chosen=2, rejected=0, weight=3.0), Pair(chosen=1, rejected=3)]
    assert mean(some) == pytest.approx((3 * one(2, 0) + one(1, 3)) / 4, abs=1e-12)


@pytest.mark.parametrize(
    "name", ["dpo", "cdpo", "hinge", "ipo", "ipo_avg", "exo", "robust", "dpo_norm", "discopop"]
)
def test_divergences(name):
    logps = one_pair(0.7, -0.4)
    plain = value(name, logps)
    assert torch.equal(plain, value(name, logps, f_divergence="reverse_kl"))
    assert torch.allclose(
        plain, value(name, logps, f_divergence="alpha_divergence", alpha=1e-7), atol=1e-5
    )
    forward = value(name, logps, f_divergence="forward_kl")
    assert not torch.allclose(plain, forward, atol=1e-3)
    assert torch.allclose(
        forward, value(name, logps, f_divergence="alpha_divergence", alpha=1.0), atol=1e-12
    )


def test_divergences_by_hand():
    """w = 0.7, l = -0.4, lengths 10 and 20: f'(u) written with the ratios themselves."""
    u, v = math.exp(0.7), math.exp(-0.4)
    by_hand = {
        "forward_kl": (1 - 1 / u, 1 - 1 / v),
        "js_divergence": (math.log(2 * u / (1 + u)), math.log(2 * v / (1 + v))),
        "alpha_divergence": ((1 - u**-0.5) / 0.5, (1 - v**-0.5) / 0.5),
    }
    for name, (up, down) in by_hand.items():
        options = {"f_divergence": name, "beta": 0.3}
        logps = one_pair(0.7, -0.4)
        assert float(value("dpo", logps, **options)) == pytest.approx(
            math.log1p(math.exp(-0.3 * (up - down))), abs=1e-12
        )
        mean = up / 10 - down / 20
        assert float(value("dpo_norm", logps, **options)) == pytest.approx(
            math.log1p(math.exp(-0.3 * mean)), abs=1e-12
        )
        assert float(value("ipo_avg", logps, **options)) == pytest.approx(
            (mean - 1 / 0.6) ** 2, abs=1e-12
        )
        assert float(f_prime(torch.zeros(()), name)) == pytest.approx(0.0, abs=1e-7)


def test_f_prime_is_the_derivative_of_f():
    """f(u) by Wang et al. 2023 table 1, differentiated by autograd; equal up to a constant that is
    the same for every u."""
    u = torch.tensor([0.2, 0.9, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    a = 0.3
    functions = {
        "reverse_kl": u * u.log(),
        "forward_kl": -u.log(),
        "js_divergence": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha_divergence": (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
    }
    for name, f in functions.items():
        (derivative,) = torch.autograd.grad(f.sum(), u, retain_graph=True)
        constant = derivative - f_prime(u.log(), name, alpha=a)
        assert torch.allclose(constant, constant[0].expand(4), atol=1e-12), name
    with pytest.raises(ValueError, match="alpha=0"):
        f_prime(u, "alpha_divergence", alpha=0)


def test_kto_numbers_and_labels():
    """z0 = 0.5: desirable with w = 2 and undesirable with l = -1 both cost .462570155; an unrated
    answer nothing."""
    logps = batch_of(
        [[2.0], [-1.0], [9.0]], reference=[[0.0]] * 3, labels=[[True], [False], [None]], mean=0.5
    )
    output = preference.kto(logps)
    assert output.terms[0].unit == "completion"
    assert output.terms[0].items.tolist() == pytest.approx(
        [0.462570155, 0.462570155, 0.0], abs=1e-9
    )
    weighted = preference.kto(logps, desirable_weight=2.0, undesirable_weight=3.0).terms[0].items
    assert weighted.tolist() == pytest.approx([2 * 0.462570155, 3 * 0.462570155, 0.0], abs=1e-8)
    below = batch_of([[2.0]], reference=[[0.0]], labels=[[True]], mean=-3.0)  # z0 is never negative
    assert float(preference.kto(below).terms[0].items) == pytest.approx(1 / (1 + math.exp(0.2)))


def test_kto_mismatches_every_prompt_with_another_prompts_answer():
    def group(prompt, token):
        return PromptGroup(
            prompt_ids=[prompt],
            completions=[Completion(token_ids=[token], loss_mask=[1], columns={"label": 1})],
        )

    made = mismatched_groups([group(1, 10), group(1, 11), group(2, 12)])
    assert [(g.prompt_ids, g.completions[0].token_ids) for g in made] == [
        ([1], [12]),
        ([1], [12]),
        ([2], [10]),
    ]
    assert mismatched_groups([group(1, 10), group(1, 11)]) == [], (
        "no answer in it belongs to another prompt"
    )


OWN_REWARDS = {
    "simpo": lambda b, o: (
        o["beta"] * b.chosen_logps_B / b.chosen_length_B,
        o["beta"] * b.rejected_logps_B / b.rejected_length_B,
    ),
    "dpo_norm": lambda b, o: (
        o["beta"] * b.chosen_logratio_B / b.chosen_length_B,
        o["beta"] * b.rejected_logratio_B / b.rejected_length_B,
    ),
    "ipo_avg": lambda b, o: (
        o["beta"] * b.chosen_logratio_B / b.chosen_length_B,
        o["beta"] * b.rejected_logratio_B / b.rejected_length_B,
    ),
    "r_dpo": lambda b, o: (
        o["beta"] * b.chosen_logratio_B + o["length_weight"] * b.chosen_length_B.double(),
        o["beta"] * b.rejected_logratio_B + o["length_weight"] * b.rejected_length_B.double(),
    ),
    "orpo": lambda b, o: tuple(
        torch.log(torch.exp(m) / (1 - torch.exp(m)))
        for m in (b.chosen_logps_B / b.chosen_length_B, b.rejected_logps_B / b.rejected_length_B)
    ),
}


@pytest.mark.parametrize("name", [*OWN_REWARDS, "dpo", "hinge", "cpo"])
def test_the_accuracy_that_is_shown_is_that_of_what_the_loss_compares(name):
    """A long answer with a good sum and a bad mean: the loss prefers what its own reward
    prefers."""
    from posttrain.trainers.dpo import with_preference_metrics

    loss = getattr(preference, name)
    options = {
        n: p.default
        for n, p in inspect.signature(loss).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    sums, lengths = [[-33.0, -3.0], [-4.0, -6.0], [-9.0, -4.0]], [[30, 2], [5, 5], [4, 16]]
    reference_free = not as_loss(loss).reference
    reference = None if reference_free else [[-36.0, -3.5], [-4.5, -4.0], [-8.0, -6.0]]
    batch = batch_of(sums, reference=reference, lengths=lengths)
    metrics = with_preference_metrics(as_loss(loss))(batch).metrics
    summed = (
        (batch.chosen_logps_B, batch.rejected_logps_B)
        if reference_free
        else (batch.chosen_logratio_B, batch.rejected_logratio_B)
    )
    wanted = (
        OWN_REWARDS[name](batch, options)
        if name in OWN_REWARDS
        else tuple(options["beta"] * v for v in summed)
    )
    for side, value in zip(("chosen", "rejected"), wanted, strict=True):
        assert torch.allclose(metrics[f"rewards_train/{side}"], value, rtol=1e-12)
    assert torch.equal(
        metrics["rewards_train/accuracies"], (wanted[0] > wanted[1]).to(torch.float64)
    )


def test_the_betas_of_losses_are_their_own():
    from posttrain.training.config import resolve_loss

    home = "posttrain.losses.preference"
    found = {
        path: resolve_loss(path, options, home=home).beta
        for path, options in {
            "dpo": {},
            "simpo": {},
            "dpo_norm": {},
            "orpo": {},
            "ipo": {"beta": 0.7},
            "0.5*nll_chosen + dpo_norm": {},
            "kto": {},
        }.items()
    }
    assert found == {
        "dpo": 0.1,
        "simpo": 2.0,
        "dpo_norm": 5.0,
        "orpo": 0.1,
        "ipo": 0.7,
        "0.5*nll_chosen + dpo_norm": 5.0,
        "kto": 0.1,
    }


def test_extreme_log_probs_stay_finite_and_exact():
    mpmath.mp.dps = 60
    for mean in (-1e-12, -1e-5, -0.5, -30.0, -400.0):
        got = preference._log_odds(torch.tensor(mean, dtype=torch.float64))
        wanted = mpmath.mpf(mean) - mpmath.log(1 - mpmath.exp(mpmath.mpf(mean)))
        assert float(got) == pytest.approx(float(wanted), rel=1e-12)
    certain = batch_of([[0.0, -1.0]])  # p = 1: log odds would be infinite
    assert torch.isfinite(value("orpo", certain)).all()


@pytest.mark.parametrize("name", [n for n in PREFERENCE if n != "kto"])
@pytest.mark.parametrize(
    ("w", "l"), [(600.0, -600.0), (-600.0, 600.0), (0.0, -150.0), (-150.0, 0.0), (1e-6, 0.0)]
)
def test_extreme_ratios_have_finite_losses_and_gradients_in_float32(name, w, l):
    accepted = inspect.signature(getattr(preference, name)).parameters
    every = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    for options in [{"f_divergence": d} for d in every] if "f_divergence" in accepted else [{}]:
        sums = torch.tensor([-700.0, -701.0], requires_grad=True)
        logps = batch_of([list(sums)], reference=[[-700.0 - w, -701.0 - l]])
        logps = replace(logps, logps_T=logps.logps_T.float(), reference_T=logps.reference_T.float())
        items = value(name, logps, **options)
        (gradient,) = torch.autograd.grad(items.sum(), sums)
        assert items.dtype == torch.float32
        assert torch.isfinite(items).all() and torch.isfinite(gradient).all(), options


def population_optimum(name, lengths, **options):
    """Log-probs of the policy over three actions that minimises the population loss of BT(r), r =
    (1, 0, -1), beta = 0.5."""
    logits = REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        lr=1.0,
        max_iter=500,
        tolerance_grad=1e-14,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )
    pairs = list(itertools.permutations(range(3), 2))

    def population_loss():
        optimizer.zero_grad()
        policy = torch.log_softmax(logits, 0)
        logps = batch_of(
            [[policy[i], policy[j]] for i, j in pairs],
            reference=[[float(REF[i]), float(REF[j])] for i, j in pairs],
            lengths=[[lengths[i], lengths[j]] for i, j in pairs],
        )
        probability = torch.stack([torch.sigmoid(REWARD[i] - REWARD[j]) for i, j in pairs])
        loss = (probability * value(name, logps, beta=0.5, **options)).sum()
        loss.backward()
        return loss

    optimizer.step(population_loss)
    return torch.log_softmax(logits.detach(), 0)


def test_tabular_optimum():
    """Theorem 1: minimising the population DPO loss gives pi_ref exp(r / beta) / Z and the reward's
    differences."""
    policy = population_optimum("dpo", [1, 1, 1])
    assert policy.exp().tolist() == pytest.approx([0.9187, 0.0746, 0.0067], abs=5e-5)
    assert torch.allclose(policy.exp(), torch.softmax(REF + REWARD / 0.5, 0), atol=1e-7)
    implicit = 0.5 * (policy - REF)
    assert [float(implicit[0] - implicit[1]), float(implicit[1] - implicit[2])] == pytest.approx(
        [1.0, 1.0], abs=1e-6
    )


def test_tabular_optimum_of_r_dpo_is_that_of_a_reward_less_its_length():
    """max E[r - 0.3 |y|] - beta KL: an answer of length 4 loses 1.2 of its reward, one of length 1
    only 0.3."""
    policy = population_optimum("r_dpo", [4, 1, 2], length_weight=0.3)
    wanted = torch.softmax(REF + (REWARD - 0.3 * torch.tensor([4.0, 1.0, 2.0])) / 0.5, 0)
    assert torch.allclose(policy.exp(), wanted, atol=1e-6)


def test_weighted_sum_keeps_terms_and_declarations():
    both = weighted_sum([(1.0, preference.dpo), (0.2, preference.nll_chosen)])
    logps = one_pair(2.0, -1.0)
    assert sum(t.weight * float(t.items) for t in both(logps).terms) == pytest.approx(
        0.554355244 + 0.4, abs=1e-9
    )
    assert both.reference and both.couples_completions
    nested = weighted_sum([(0.5, both), (2.0, preference.nll_chosen)])(logps).terms
    assert [t.weight for t in nested] == pytest.approx([0.5, 0.1, 2.0])
    free = weighted_sum([(1.0, preference.simpo), (0.2, preference.nll_chosen)])
    assert not free.reference
    labelled = weighted_sum([(1.0, preference.kto), (0.1, preference.nll_chosen)])
    assert labelled.statistic is preference.kto.statistic
    assert (
        labelled.couples_completions
        and not weighted_sum([(0.5, preference.kto)]).couples_completions
    )


def test_weighted_sum_tells_metrics_apart_and_knows_one_statistic():
    def measured(logps):
        return LossOutput(
            items=logps.logratio_gap_B,
            unit="pair",
            metrics={"gap": logps.logratio_gap_B, "own": torch.ones(1)},
        )

    def other(logps):
        return LossOutput(
            items=logps.logratio_gap_B, unit="pair", metrics={"gap": -logps.logratio_gap_B}
        )

    metrics = weighted_sum([(1.0, measured), (2.0, other)])(one_pair(2.0, -1.0)).metrics
    wanted = {"measured/gap": 3.0, "own": 1.0, "other/gap": -3.0}
    assert {name: round(float(v), 12) for name, v in metrics.items()} == wanted
    twice = weighted_sum([(1.0, other), (2.0, other)])(one_pair(2.0, -1.0)).metrics
    assert sorted(twice) == ["other#0/gap", "other#1/gap"]
    statistic = BatchStatistic(groups=lambda groups: groups, items=lambda logps: logps.logps_S)
    with pytest.raises(ValueError, match="declare 2"):
        weighted_sum([(1.0, preference.kto), (1.0, Loss(function=other, statistic=statistic))])
    with pytest.raises(ValueError, match="got none"):
        weighted_sum([])


def test_bad_options_are_refused():
    logps = one_pair(2.0, -1.0)
    with pytest.raises(ValueError, match="reference_free"):
        value("dpo", logps, reference_free=True, f_divergence="forward_kl")
    with pytest.raises(ValueError, match="tau"):
        value("discopop", logps, tau=0.0)
    with pytest.raises(ValueError, match="undesirable_weight"):
        value(
            "kto",
            batch_of([[2.0]], reference=[[0.0]], labels=[[True]], mean=0.0),
            undesirable_weight=-1.0,
        )
    for name, loss in PREFERENCE.items():
        if "beta" in inspect.signature(loss).parameters:
            with pytest.raises(ValueError, match="beta"):
                value(name, logps, beta=0.0)
    for name in ("cdpo", "robust", "exo"):
        with pytest.raises(ValueError, match="label_smoothing"):
            value(name, logps, label_smoothing=0.5)
    with pytest.raises(ValueError, match="has no reference"):
        value("dpo", batch_of([[-1.0, -2.0]]))
