"""Averages of the weights against weighted sums of a recorded trajectory and integrals done by hand."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from models.ema import LONGEST, PowerEMA, Profile, beta, combination, error, exponent, overlap

STEPS = 4096


def profile(length: float, step: int, steps: int = STEPS) -> np.ndarray:
    """How much each step 1…steps weighs: the share of ∫ τ^γ dτ that lies in (k − 1, k]; float64 [steps]."""
    edges = (np.minimum(np.arange(steps + 1), step) / step) ** (exponent(length) + 1)
    return np.diff(edges)


@pytest.fixture(scope="module")
def trajectory() -> np.ndarray:
    """Weights that wander: a random walk that settles, float64 [STEPS, 3]."""
    steps = np.random.default_rng(0).normal(size=(STEPS, 3)) / np.sqrt(np.arange(1, STEPS + 1))[:, None]
    return np.cumsum(steps, axis=0)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 0.28, LONGEST])
def test_the_length_is_the_standard_deviation_of_the_profile(length):
    gamma = exponent(length)
    mean, square = (quad(lambda u, k=k: (gamma + 1) * u**gamma * u**k, 0, 1)[0] for k in (1, 2))
    assert np.sqrt(square - mean**2) == pytest.approx(length, rel=1e-6)


def test_published_exponents():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)  # Karras et al. 2024, sec. 3.1
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)
    assert exponent(LONGEST) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("length", [0, -0.1, 0.3])
def test_a_length_that_no_profile_has_is_refused(length):
    with pytest.raises(ValueError, match=r"σ_rel = .*at most 0\.289"):
        exponent(length)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_the_running_average_is_the_weighted_sum_of_the_trajectory(trajectory, length):
    average = np.full(3, 7.0)  # forgotten at step 1
    for step, weights in enumerate(trajectory[:500], start=1):
        average = beta(step, length) * average + (1 - beta(step, length)) * weights
    np.testing.assert_allclose(average, profile(length, 500, 500) @ trajectory[:500], rtol=1e-9, atol=1e-12)


def test_update_follows_every_trained_parameter_and_no_frozen_one(trajectory):
    module = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False))
    module[1].requires_grad_(False)
    ema = PowerEMA(module, (0.1,))
    for step, weights in enumerate(trajectory[:200], start=1):
        with torch.no_grad():
            module[0].weight.copy_(torch.from_numpy(weights)[None])
        ema.update(step)
    exact = profile(0.1, 200, 200) @ trajectory[:200]
    assert list(ema.averages[0.1]) == ["0.weight"]
    np.testing.assert_allclose(ema.averages[0.1]["0.weight"][0].numpy(), exact, atol=2e-5)  # float32


def test_overlaps_are_the_integrals_of_the_products():
    for a in (Profile(100, 0.05), Profile(70, 0.2)):
        for b in (Profile(100, 0.05), Profile(100, 0.1), Profile(40, 0.25)):
            p, q = exponent(a.length), exponent(b.length)

            def product(t, a=a, b=b, p=p, q=q):
                return (p + 1) * t**p / a.step ** (p + 1) * (q + 1) * t**q / b.step ** (q + 1)

            exact = quad(product, 0, min(a.step, b.step), epsabs=1e-14)[0]
            assert overlap(a, b) == pytest.approx(exact, rel=1e-7)
            assert overlap(b, a) == overlap(a, b)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.2])
def test_any_length_is_rebuilt_from_snapshots_of_two_others(trajectory, length):
    """Against the average of that length computed from all recorded weights; nearer with more snapshots."""
    exact = profile(length, STEPS) @ trajectory
    spread = np.linalg.norm(trajectory[-1] - exact)
    off, said = [], []
    for count in (4, 16, 64):
        stored = [Profile(STEPS * (i + 1) // count, s) for i in range(count) for s in (0.05, 0.1)]
        x = combination(stored, Profile(STEPS, length))
        rebuilt = sum(w * (profile(s.length, s.step) @ trajectory) for w, s in zip(x, stored, strict=True))
        off.append(float(np.linalg.norm(rebuilt - exact) / spread))
        said.append(error(stored, Profile(STEPS, length)))
    assert said[0] > said[1] > said[2]
    assert said[2] < 0.02
    assert off[2] < 0.02
    assert x.sum() == pytest.approx(1, abs=0.01)  # an average of equal weights is those weights


def test_no_other_combination_is_nearer(trajectory):
    stored = [Profile(STEPS * (i + 1) // 8, s) for i in range(8) for s in (0.05, 0.1)]
    wanted = profile(0.15, STEPS)
    kept = np.stack([profile(s.length, s.step) for s in stored])

    def distance(x):
        return np.linalg.norm(x @ kept - wanted) / np.linalg.norm(wanted)

    x = combination(stored, Profile(STEPS, 0.15))
    exact = np.linalg.lstsq(kept.T, wanted, rcond=None)[0]  # brute force, over the steps
    assert distance(x) == pytest.approx(distance(exact), rel=1e-2)
    assert error(stored, Profile(STEPS, 0.15)) == pytest.approx(distance(exact), rel=1e-2)


def test_a_stored_profile_is_given_back_as_it_is():
    stored = [Profile(t, s) for t in (50, 100) for s in (0.05, 0.1)]
    assert combination(stored, Profile(100, 0.1)).tolist() == [0, 0, 0, 1]
    assert combination(stored, Profile(50, 0.05)).tolist() == [1, 0, 0, 0]


def test_snapshots_from_the_future_are_left_out():
    stored = [Profile(50, 0.05), Profile(50, 0.1), Profile(100, 0.05)]
    assert combination(stored, Profile(60, 0.07))[2] == 0
    with pytest.raises(ValueError, match="no average is stored up to step 40"):
        combination(stored, Profile(40, 0.07))


def test_applied_weights_are_the_average_inside_and_the_own_ones_after():
    layer = nn.Linear(2, 2)
    ema = PowerEMA(layer, (0.1,))
    before = layer.weight.detach().clone()
    ema.update(1)
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(2)
    average = ema.averages[0.1]["weight"].clone()
    with ema.applied(0.1):
        assert torch.equal(layer.weight, average)
        assert not torch.equal(layer.weight, before + 1)
    assert torch.equal(layer.weight, before + 1)
    assert torch.equal(ema.averages[0.1]["weight"], average)
