from collections import Counter

import numpy as np
import pytest

from posttrain.data import batch_indices
from posttrain.data.batches import _epoch_order


def epoch(n_steps, first=0, **options):
    return [
        pair for step in range(first, first + n_steps) for pair in batch_indices(step, **options)
    ]


def test_without_weights_an_epoch_has_every_row_exactly_once_also_when_batches_span_epochs():
    pairs = epoch(22, seed=3, batch_size=5, sizes=[7, 0, 4])  # 110 positions: 10 epochs of 11
    everything = Counter({(0, i): 1 for i in range(7)} | {(2, i): 1 for i in range(4)})
    epochs = [pairs[11 * e : 11 * (e + 1)] for e in range(10)]
    assert all(Counter(e) == everything for e in epochs)
    assert len({tuple(e) for e in epochs}) == 10


def test_a_batch_larger_than_an_epoch():
    pairs = batch_indices(0, seed=0, batch_size=9, sizes=[4])
    assert sorted(Counter(i for _, i in pairs).values()) == [2, 2, 2, 3]


def test_a_step_is_a_pure_function_of_seed_and_step():
    options = {"batch_size": 8, "sizes": [50, 30], "weights": [1.0, 3.0]}
    ahead = {s: batch_indices(s, seed=1, **options) for s in range(40)}
    _epoch_order.cache_clear()
    for s in reversed(range(40)):
        assert batch_indices(s, seed=1, **options) == ahead[s]
    assert any(batch_indices(s, seed=2, **options) != ahead[s] for s in range(40))


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([60, 40], [1, 1], [50, 50]),
        ([7, 2, 1], [0.5, 0.3, 0.2], [5, 3, 2]),
        ([5, 5], [2, 1], [7, 3]),  # quotas 6.67, 3.33
        ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([4, 3, 3], [1, 1, 1], [4, 3, 3]),  # equal remainders: the first
    ],
)
def test_each_epoch_has_the_weights_proportions(sizes, weights, counts):
    n = sum(sizes)
    pairs = epoch(5 * n, seed=0, batch_size=1, sizes=sizes, weights=weights)
    for e in range(5):
        drawn = Counter(d for d, _ in pairs[n * e : n * (e + 1)])
        assert [drawn[d] for d in range(len(sizes))] == counts


def test_a_mixed_dataset_repeats_no_row_before_all_came_once():
    sizes, weights = [3, 20, 17], [1.0, 2.0, 0.5]
    pairs = epoch(400, seed=5, batch_size=1, sizes=sizes, weights=weights)
    for d, size in enumerate(sizes):
        drawn = [i for dataset, i in pairs if dataset == d]
        full = len(drawn) // size * size
        assert full >= 2 * size
        # order inside an epoch is shuffled, so count what has come after each epoch
        for e in range(10):
            seen = Counter(i for dataset, i in pairs[: 40 * (e + 1)] if dataset == d)
            assert max(seen.values()) - min(seen.get(i, 0) for i in range(size)) <= 1


def test_a_mixed_dataset_comes_in_another_order_each_round():
    options = {
        "seed": 0,
        "batch_size": 100,
        "sizes": [50, 50],
        "weights": [1.0, 3.0],
    }  # dataset 0: 25 rows an epoch
    drawn = [{i for d, i in batch_indices(step, **options) if d == 0} for step in range(4)]
    assert drawn[0] | drawn[1] == drawn[2] | drawn[3] == set(range(50))
    assert drawn[2] not in (drawn[0], drawn[1])


def test_the_datasets_of_an_epoch_are_shuffled_together():
    pairs = epoch(1, seed=0, batch_size=1000, sizes=[500, 500], weights=[1, 1])
    halves = [np.mean([d for d, _ in pairs[:500]]), np.mean([d for d, _ in pairs[500:]])]
    assert all(0.4 < h < 0.6 for h in halves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [10, 10], "weights": [1.0]}, "one weight > 0"),
        ({"sizes": [10, 10], "weights": [1.0, 0.0]}, "one weight > 0"),
        ({"sizes": [10, 0], "weights": [1.0, 1.0]}, "at least one row per dataset"),
        ({"sizes": [10, 10], "weights": [1.0, 1e-6]}, "give dataset 1 no row of an epoch of 20"),
        ({"sizes": []}, "rows to choose from"),
        ({"sizes": [3], "batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_impossible_mixtures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(0, **({"seed": 0, "batch_size": 4} | options))
