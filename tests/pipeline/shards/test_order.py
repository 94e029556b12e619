"""The order of an epoch: a permutation whoever asks for which part, of each composition as many as there are to be."""

import itertools
from collections import Counter

import numpy as np
import pytest

from pipeline.shards.order import Order, Permutation, Run, Sequential, Windowed, whole


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


# ------------------------------------------------------------ neighbours read together


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 100, 257, 1000])
@pytest.mark.parametrize(("together", "window"), [(1, 1), (4, 16), (16, 16), (7, 50), (16, 4)])
def test_a_windowed_permutation_is_one_whole_or_in_parts(n, together, window):
    how = Sequential(together, window)
    whole_ = Windowed(n, how, 3)(np.arange(n))
    assert sorted(whole_.tolist()) == list(range(n))
    parts = [Windowed(n, how, 3)(np.arange(a, min(a + 5, n))) for a in range(0, n, 5)]
    assert np.concatenate(parts).tolist() == whole_.tolist()
    assert n < 50 or whole_.tolist() != Windowed(n, how, 4)(np.arange(n)).tolist()


def test_a_window_of_it_holds_whole_groups_of_neighbours_well_shuffled():
    how = Sequential(together=8, window=64)
    found = Windowed(8 * 1000, how, 0)(np.arange(8000)).reshape(-1, 64)
    for window in found:
        assert len(set((window // 8).tolist())) == 8
        assert set(Counter((window // 8).tolist()).values()) == {8}
    inside = found - found.min(1, keepdims=True)
    assert abs(np.mean([np.corrcoef(np.arange(64), np.argsort(np.argsort(w)))[0, 1] for w in inside])) < 0.05
    groups = found.reshape(-1)[::64] // 8
    assert abs(np.corrcoef(groups[:-1], groups[1:])[0, 1]) < 0.3


def streamed(bucket, runs, how, seed=0):
    return Order(bucket, runs, seed, sequential=how)


@pytest.mark.parametrize("streams", [1, 3, 4, 50])
def test_read_in_streams_an_epoch_has_the_batches_it_has_otherwise(streams):
    rng = np.random.default_rng(1)
    bucket = rng.integers(0, 3, 500)
    counts, sizes = np.bincount(bucket).tolist(), [4, 7, 2]
    how = Sequential(together=4, window=16, streams=streams)
    for runs in (whole(counts, sizes), [Run((2, 1, 0), 70), Run((0, 2, 4), 40)]):
        one, plain = streamed(bucket, runs, how), Order(bucket, runs)
        batches = [[order.batch(1, n) for n in range(len(order))] for order in (one, plain)]
        taken = [Counter(tuple(bucket[rows].tolist()) for rows in each) for each in batches]
        assert taken[0] == taken[1]
        seen = [Counter(np.concatenate(each).tolist()) for each in batches]
        for b in range(3):
            of = [sorted(n for row, n in each.items() if bucket[row] == b) for each in seen]
            assert of[0] == of[1]
        assert one.batch(0, 3).tolist() != one.batch(1, 3).tolist()
        again = streamed(bucket, runs, how, seed=5)
        assert one.batch(0, 3).tolist() != again.batch(0, 3).tolist()


def test_rounds_of_each_composition_are_spread_evenly():
    runs = [Run((1, 0, 0), 700), Run((0, 1, 0), 250), Run((0, 0, 1), 50)]
    order = streamed(np.repeat([0, 1, 2], [700, 250, 50]), runs, Sequential(1, 1, streams=1))
    turns = np.array([order._round(n)[0] for n in range(1000)])
    given = np.cumsum(turns[:, None] == np.arange(3), 0)
    assert np.abs(given - np.arange(1, 1001)[:, None] * np.array([0.7, 0.25, 0.05])).max() < 1.5
    assert [order._round(n)[1] for n in np.flatnonzero(turns == 1)] == list(range(250))


def test_a_stream_reads_group_after_group_and_each_group_is_read_by_one():
    how = Sequential(together=8, window=32, streams=4)
    n, size = 8 * 400, 4
    order = streamed(np.zeros(n, np.int64), whole([n], [size]), how)
    readers = {}
    for number in range(len(order)):
        for row in order.batch(2, number).tolist():
            group = tuple(order.group(row).tolist())
            assert row in group
            readers.setdefault(group, []).append((number % 4, number // 4))
    assert len(readers) == 400
    shared = [g for g, by in readers.items() if len({stream for stream, _ in by}) > 1]
    assert len(shared) <= 3 * 4  # a window where one stream ends and the next begins
    spans = [
        max(at for _, at in by) - min(at for _, at in by) for g, by in readers.items() if g not in shared
    ]
    assert max(spans) <= 32 // size


def test_a_group_ends_with_its_bucket():
    bucket = np.array([1, 0, 1, 1, 0, 1, 1])
    order = streamed(bucket, whole([2, 5], [1, 1]), Sequential(together=2))
    assert [order.group(row).tolist() for row in range(7)] == [
        [0, 2],
        [1, 4],
        [0, 2],
        [3, 5],
        [1, 4],
        [3, 5],
        [6],
    ]
