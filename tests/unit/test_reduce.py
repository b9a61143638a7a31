"""Aggregations against numbers computed by hand, and the split that the historical bug gets
wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from posttrain.losses.reduce import reduce_term
from posttrain.losses.sft import sft
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import count_units
from posttrain.types import Completion, Counts, Logps, LossOutput, LossTerm, Pair, PromptGroup

# two groups: completions of 1 and 3 trained tokens; one completion of 2
SIZES = [[1, 3], [2]]
ITEMS = torch.tensor([8.0, 1.0, 2.0, 3.0, 4.0, 6.0])
COUNTS = Counts(tokens=6, completions=3, groups=2, pairs=1, paired_groups=1)


def logps() -> Logps:
    groups = [
        PromptGroup(
            prompt_ids=[1],
            completions=[Completion(token_ids=[5] * n, loss_mask=[1] * n) for n in sizes],
        )
        for sizes in SIZES
    ]
    assert count_units(groups) == COUNTS
    parts = [GroupPart(group=i, completions=tuple(range(len(s)))) for i, s in enumerate(SIZES)]
    return pack(groups, parts, mode="shared").with_logps(-ITEMS)


@pytest.mark.parametrize(
    ("aggregation", "wanted"),
    [
        ("token_mean", 24 / 6),
        ("sequence_mean", (8 + 2 + 5) / 3),  # means of the completions: 8, 2, 5
        ("sequence_sum", (8 + 6 + 10) / 3),
        ("group_mean", ((8 + 2) / 2 + 5) / 2),
    ],
)
def test_token_items(aggregation, wanted):
    term = LossTerm(items=ITEMS, aggregation=aggregation, weight=0.5)
    assert float(reduce_term(term, logps(), COUNTS)) == pytest.approx(0.5 * wanted)


@pytest.mark.parametrize(
    ("aggregation", "wanted"), [("sequence_mean", 4.0), ("group_mean", ((3 + 4) / 2 + 5) / 2)]
)
def test_completion_items(aggregation, wanted):
    term = LossTerm(items=torch.tensor([3.0, 4.0, 5.0]), unit="completion", aggregation=aggregation)
    assert float(reduce_term(term, logps(), COUNTS)) == pytest.approx(wanted)


def test_constant_is_dr_grpo():
    """sum / (L * completions), Liu et al. 2025, arXiv:2503.20783."""
    term = LossTerm(items=ITEMS, aggregation="constant", constant=10.0)
    assert float(reduce_term(term, logps(), COUNTS)) == pytest.approx(24 / 30)


def test_token_mean_of_unequal_micro_batches_is_not_the_mean_of_means():
    """Ten tokens of mean 2.0 beside two of mean 5.0: 2.5, where averaging micro-batch means gives
    3.5."""
    counts = Counts(tokens=12, completions=2, groups=2)
    shares = []
    for n, mean in ((10, 2.0), (2, 5.0)):
        group = PromptGroup(
            prompt_ids=[1], completions=[Completion(token_ids=[5] * n, loss_mask=[1] * n)]
        )
        batch = pack([group], [GroupPart(group=0, completions=(0,))], mode="shared")
        (term,) = sft(batch.with_logps(torch.full((n,), -mean))).terms
        shares.append(float(reduce_term(term, batch.with_logps(torch.full((n,), -mean)), counts)))
    assert sum(shares) == pytest.approx(2.5)


def test_uniform_logits_give_ln_v():
    loss = sft(replace(logps(), logps_T=torch.full((6,), -math.log(49152.0))))
    assert float(reduce_term(loss.terms[0], logps(), COUNTS)) == pytest.approx(math.log(49152.0))


def test_completions_without_a_trained_token_count_nowhere():
    group = PromptGroup(
        prompt_ids=[1],
        completions=[
            Completion(token_ids=[5, 6], loss_mask=[0, 0]),
            Completion(token_ids=[5], loss_mask=[1]),
        ],
    )
    assert count_units([group]) == Counts(tokens=1, completions=1, groups=1, pairs=0)
    batch = pack([group], [GroupPart(group=0, completions=(0, 1))], mode="packed")
    term = LossTerm(items=torch.tensor([3.0]), aggregation="group_mean")
    assert batch.num_tokens_S.tolist() == [0, 1]
    assert float(
        reduce_term(term, batch.with_logps(torch.tensor([-3.0])), count_units([group]))
    ) == pytest.approx(3.0)


def test_a_loss_that_reduces_is_refused():
    with pytest.raises(ValueError, match="leave the mean to the step"):
        reduce_term(LossTerm(items=ITEMS.mean()), logps(), COUNTS)
    with pytest.raises(ValueError, match="either items"):
        LossOutput()
    with pytest.raises(ValueError, match="not defined for items of unit 'pair'"):
        reduce_term(
            LossTerm(items=ITEMS[:1], unit="pair", aggregation="sequence_sum"), logps(), COUNTS
        )
    with pytest.raises(ValueError, match=r"shape \(1,\); got \(6,\)"):
        reduce_term(LossTerm(items=ITEMS, unit="pair"), logps(), COUNTS)


def test_pairs_and_groups():
    """Three completions give 3 pairs, two give 1: pair_mean counts pairs alike, group_mean is
    InstructGPT's 1/C(K,2)."""
    groups = [
        PromptGroup(prompt_ids=[1], completions=[Completion(token_ids=[5], loss_mask=[1])] * k)
        for k in (3, 1, 2)
    ]
    parts = [
        GroupPart(group=i, completions=tuple(range(len(g.completions))))
        for i, g in enumerate(groups)
    ]
    batch, counts = (
        pack(groups, parts, mode="shared").with_logps(torch.zeros(6)),
        count_units(groups),
    )
    assert counts == Counts(tokens=6, completions=6, groups=3, pairs=4, paired_groups=2)
    items = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert float(reduce_term(LossTerm(items=items, unit="pair"), batch, counts)) == pytest.approx(
        4.0
    )
    by_group = LossTerm(items=items, unit="pair", aggregation="group_mean")
    assert float(reduce_term(by_group, batch, counts)) == pytest.approx((2.0 + 10.0) / 2)
    assert float(
        reduce_term(LossTerm(items=items[:3], unit="group"), batch, counts)
    ) == pytest.approx(2.0)


def test_weight_two_is_the_pair_twice_and_weight_zero_is_leaving_it_out():
    """Denominators are sums of weights: a weighted mean, not a scaled one."""
    completions = [Completion(token_ids=[5], loss_mask=[1])] * 3
    items = {(0, 1): 2.0, (0, 2): 8.0, (1, 2): 5.0}

    def value(pairs, aggregation):
        group = PromptGroup(prompt_ids=[1], completions=completions, pairs=pairs)
        batch = pack(
            [group], [GroupPart(group=0, completions=(0, 1, 2))], mode="shared"
        ).with_logps(torch.zeros(3))
        chosen_rejected = [tuple(row) for row in batch.pairs_B2.tolist()]
        term = LossTerm(
            items=torch.tensor([items[p] for p in chosen_rejected]),
            unit="pair",
            aggregation=aggregation,
        )
        return float(reduce_term(term, batch, count_units([group])))

    for aggregation in ("pair_mean", "group_mean"):
        weighted = value(
            [
                Pair(chosen=0, rejected=1, weight=2.0),
                Pair(chosen=0, rejected=2),
                Pair(chosen=1, rejected=2, weight=0),
            ],
            aggregation,
        )
        twice = value(
            [Pair(chosen=0, rejected=1), Pair(chosen=0, rejected=1), Pair(chosen=0, rejected=2)],
            aggregation,
        )
        assert weighted == pytest.approx((2 * 2.0 + 8.0) / 3)
        assert weighted == twice


def test_a_pair_that_names_no_completion_is_refused():
    completions = [Completion(token_ids=[5], loss_mask=[1])] * 2
    for bad in (
        Pair(chosen=0, rejected=2),
        Pair(chosen=0, rejected=0),
        Pair(chosen=0, rejected=1, weight=float("nan")),
    ):
        with pytest.raises(ValueError, match="Pair"):
            PromptGroup(prompt_ids=[1], completions=completions, pairs=[bad])
