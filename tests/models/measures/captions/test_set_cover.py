from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np

from models.measures.captions.set_cover import Step, greedy


def covered(patterns, some):
    return sum(n for p, n in patterns.items() if any(p >> i & 1 for i in some))


def test_the_next_is_the_one_that_adds_most_not_the_one_that_covers_most():
    patterns = {0b011: 60, 0b001: 10, 0b010: 5, 0b100: 20, 0b000: 5}
    assert greedy(patterns, ["a", "b", "c"]) == [
        Step("a", 70, 70, 70),
        Step("c", 20, 20, 90),
        Step("b", 65, 5, 95),
    ]


def test_each_step_is_the_best_one_step_and_k_steps_are_within_63_percent_of_the_best_k():
    rng = np.random.default_rng(0)
    for _ in range(20):
        patterns = Counter(int(p) for p in rng.integers(0, 64, 200) & rng.integers(0, 64, 200))
        steps = greedy(patterns, list("abcdef"))
        chosen = ["abcdef".index(s.model) for s in steps]
        for k in range(1, len(steps) + 1):
            assert steps[k - 1].covered == covered(patterns, chosen[:k])
            assert steps[k - 1].covered == max(covered(patterns, [*chosen[: k - 1], i]) for i in range(6))
            best = max(covered(patterns, some) for some in combinations(range(6), k))
            assert steps[k - 1].covered >= (1 - 1 / np.e) * best
        assert steps[-1].covered == sum(n for p, n in patterns.items() if p)


def test_nobody_who_adds_nothing_is_kept():
    assert [s.model for s in greedy({0b11: 4}, ["a", "b"])] == ["a"]
    assert greedy({0: 9}, ["a"]) == []
