from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from models.measures.captions.agreement import alpha_interval, cohen_kappa, krippendorff_alpha

# Krippendorff, 'Computing Krippendorff's Alpha-Reliability' (2011), example C: four observers, twelve units.
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def test_alpha_is_that_of_its_inventors_worked_example():
    units = list(zip(*OBSERVERS, strict=True))
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, "interval") == pytest.approx(0.849, abs=5e-4)


def test_kappa_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for n in (5, 50):
        a = rng.integers(0, 3, n).tolist()
        b = [x if rng.random() < 0.6 else int(rng.integers(0, 3)) for x in a]
        assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_full_agreement_is_one_chance_is_none_and_nothing_said_is_no_number():
    assert krippendorff_alpha([["x", "x"], ["y", "y"]]) == 1
    assert krippendorff_alpha([["x", "y"], ["y", "x"]]) < 0
    assert krippendorff_alpha([["x"], [None, "y"]]) is None
    assert krippendorff_alpha([["x", "x"], ["x", "x"]]) is None
    assert cohen_kappa(["x", "x"], ["x", "x"]) is None
    assert cohen_kappa([], []) is None
    rng = np.random.default_rng(0)
    assert abs(krippendorff_alpha(rng.integers(0, 4, (5000, 3)).tolist())) < 0.03


def test_the_interval_narrows_with_units_and_holds_the_estimate():
    units = list(zip(*OBSERVERS, strict=True))
    low, high = alpha_interval(units)
    assert low < 0.743 < high
    narrow = alpha_interval(units * 20, resamples=100)
    assert narrow[1] - narrow[0] < (high - low) / 2
    assert alpha_interval([["x"]]) is None
