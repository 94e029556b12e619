"""The order of an epoch: a permutation whoever asks for which part, of each composition as many as there are to be."""

import itertools
from collections import Counter

import numpy as np
import pytest

from pipeline.shards.order import Order, Permutation, Run, whole


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_a_permutation_is_one_whole_or_in_parts(n):
    whole_ = Permutation(n, 7)(np.arange(n))
    assert sorted(whole_.tolist()) == list(range(n))
    assert (
        np.concatenate([Permutation(n, 7)(np.array([i])) for i in range(min(n, 50))]).tolist()
        == whole_[:50].tolist()
    )


def test_permutations_are_as_even_as_random_ones():
    """Each of 24 orders of four, and each place of one of 37, as often as chance has it (χ², p > 1e-6)."""
    orders = Counter(tuple(Permutation(4, key)(np.arange(4)).tolist()) for key in range(6000))
    assert len(orders) == 24
    assert sum((c - 250) ** 2 / 250 for c in orders.values()) < 75  # 23 degrees of freedom
    places = np.array([Permutation(37, key)(np.array([5, 6])) for key in range(7400)])
    for column in places.T:
        assert ((np.bincount(column, minlength=37) - 200) ** 2 / 200).sum() < 95  # 36
    assert abs(np.corrcoef(places.T)[0, 1] + 1 / 36) < 0.05  # neighbours tell nothing of each other


def test_ten_billion_rows_cost_no_memory_and_no_time():
    numbers = Permutation(10**10, 3)(np.array([0, 1, 10**10 - 1]))
    assert len(set(numbers.tolist())) == 3
    assert ((numbers >= 0) & (numbers < 10**10)).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_of_every_bucket_in_batches_of_its_size(shuffle):
    rng = np.random.default_rng(0)
    bucket = rng.integers(0, 3, 101)
    counts, sizes = np.bincount(bucket).tolist(), [4, 7, 2]
    order = Order(bucket, whole(counts, sizes), 1, shuffle)
    epochs = [[order.batch(e, n) for n in range(len(order))] for e in range(2)]
    for epoch in epochs:
        for rows in epoch:
            (kind,) = set(bucket[rows].tolist())
            assert len(rows) == sizes[kind]
        seen = Counter(itertools.chain(*(rows.tolist() for rows in epoch)))
        assert set(seen) == set(range(101))
        for kind, (n, size) in enumerate(
            zip(counts, sizes, strict=True)
        ):  # what is repeated fills the last batch
            assert sum(seen[i] - 1 for i in np.flatnonzero(bucket == kind)) == -n % size
    assert (np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()) == shuffle
    if not shuffle:
        assert (
            np.concatenate(epochs[0][: -(-counts[0] // 4)])[: counts[0]].tolist()
            == np.flatnonzero(bucket == 0).tolist()
        )


def test_compositions_take_of_each_bucket_what_they_say():
    bucket = np.array([0, 1] * 30)
    runs = [Run((2, 1), 10), Run((2, 4), 5)]
    order = Order(bucket, runs, 0)
    batches = [order.batch(0, n) for n in range(len(order))]
    assert Counter(tuple(bucket[rows].tolist()) for rows in batches) == {(0, 0, 1): 10, (0, 0, 1, 1, 1, 1): 5}
    assert sorted(np.concatenate(batches).tolist()) == list(range(60))
    again = [Order(bucket, runs, seed).batch(0, 3).tolist() for seed in (0, 1)]
    assert again[0] == batches[3].tolist() != again[1]
    assert [bucket[order.example(run)].tolist() for run in range(2)] == [[0, 0, 1], [0, 0, 1, 1, 1, 1]]


def test_a_row_is_drawn_of_the_buckets_asked_for():
    bucket = np.array([2, 0, 1, 2, 2, 0])
    order, rng = Order(bucket, whole([2, 1, 3], [1, 1, 1])), np.random.default_rng(0)
    drawn = Counter(order.drawn([0, 2], rng) for _ in range(5000))
    assert set(drawn) == {0, 1, 3, 4, 5}
    assert max(abs(n - 1000) for n in drawn.values()) < 150
