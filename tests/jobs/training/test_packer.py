"""Packing as samples come: nothing lost or doubled, capacity kept, waste bounded, resumed as if uninterrupted."""

import functools
import json
from collections import Counter

import numpy as np
import pytest

from jobs.training.data.packing import Packer


def lengths_of(seed, budget=100, count=200):
    rng = np.random.default_rng(seed)
    kinds = [
        lambda: rng.integers(1, budget + 1, count),
        lambda: rng.choice([34, 35, 51, 17], count),
        lambda: np.minimum(rng.geometric(0.05, count), budget),
        lambda: np.full(count, budget // 2 + 1),
    ]
    return kinds[seed % len(kinds)]().tolist()


def packed(lengths, budget, pool, packer=None, start=0):
    """Sequences in the order they are closed, those still open last."""
    packer = packer or Packer(budget, pool)
    found = [packer.add(n, length) for n, length in enumerate(lengths[start:], start)]
    return [x for x in found if x] + [[n for n, _ in sequence] for sequence in packer.open]


def fewest(lengths, budget):
    """Sequences of the best packing, by search over all: bins filled one after the other, bit i for sample i."""
    sums = [sum(x for i, x in enumerate(lengths) if m >> i & 1) for m in range(1 << len(lengths))]

    @functools.cache
    def best(left):
        if not left:
            return 0
        first, rest, least = left & -left, left & (left - 1), len(lengths)
        m = rest
        while True:  # what goes with the first that is left
            if sums[m | first] <= budget:
                least = min(least, 1 + best(rest & ~m))
            if not m:
                return least
            m = (m - 1) & rest

    return best((1 << len(lengths)) - 1)


@pytest.mark.parametrize("pool", [2, 3, 32])
@pytest.mark.parametrize("seed", range(8))
def test_every_sample_is_in_one_sequence_and_none_is_above_the_budget(seed, pool):
    lengths = lengths_of(seed)
    packer = Packer(100, pool)
    for n, length in enumerate(lengths):
        packer.add(n, length)
        assert len(packer.open) <= pool
    sequences = packed(lengths, 100, pool)
    assert Counter(n for s in sequences for n in s) == Counter(range(len(lengths)))
    assert max(sum(lengths[n] for n in s) for s in sequences) <= 100
    closed = sequences[: packer.closed]
    assert packer.waste == pytest.approx(1 - sum(lengths[n] for s in closed for n in s) / (100 * len(closed)))


@pytest.mark.parametrize("seed", range(40))
def test_waste_is_bounded_by_the_best_packing_of_all(seed):
    """Best fit needs at most ⌊1.7 · OPT⌋ (Dósa & Sgall 2014), with a bounded pool as many and a constant (here 1)."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([rng.integers(1, 31, 10), rng.choice([4, 5, 10, 11, 16], 10)][seed % 2], 10).tolist()
    best = fewest(tuple(lengths), 30)
    assert best >= sum(lengths) / 30
    assert len(packed(lengths, 30, 32)) <= int(1.7 * best)
    assert len(packed(lengths, 30, 2)) <= 1.7 * best + 1


def test_a_larger_pool_wastes_less_and_ordinary_lengths_are_packed_almost_whole():
    rng = np.random.default_rng(0)
    lengths = (
        np.clip(rng.lognormal(6.5, 0.8, 20_000), 20, 8192).astype(int).tolist()
    )  # words and a few frames
    waste = []
    for pool in (2, 8, 64):
        packer = Packer(8192, pool)
        for n, length in enumerate(lengths):
            packer.add(n, length)
        waste.append(packer.waste)
    assert waste == sorted(waste, reverse=True)
    assert waste[-1] < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_resumed_after_any_sample_it_closes_the_sequences_of_the_undisturbed_run(seed):
    lengths = lengths_of(seed, count=60)
    whole = packed(lengths, 100, 4)
    for k in range(len(lengths) + 1):
        before = Packer(100, 4)
        taken = [x for n in range(k) if (x := before.add(n, lengths[n]))]
        after = Packer(100, 4)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert taken + packed(lengths, 100, 4, after, k) == whole


def test_what_fits_nowhere_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="a sample of 101 tokens fits no sequence of 100"):
        Packer(100).add(0, 101)
    with pytest.raises(ValueError, match="give 2 or more"):
        Packer(100, 1)
