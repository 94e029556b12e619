"""The Fréchet and kernel distances against closed forms, scipy's matrix square root and brute force."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from models.measures.frechet import Moments, frechet_distance, kernel_distance, moments, too_few


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def independent(mean: Tensor, deviation: Tensor) -> Moments:
    """Moments of independent numbers, exactly these: of 2 D points, a pair ± along every axis."""
    points = torch.diag(deviation) * ((2 * len(mean) - 1) / 2) ** 0.5
    return moments(torch.cat([points, -points]) + mean)


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed))[0]


def by_scipy(a: Tensor, b: Tensor) -> float:
    """Of features, in numpy, with scipy's square root of a general matrix."""
    x, y = a.numpy(), b.numpy()
    one, two = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(one @ two)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one + two - 2 * np.real(root)))


@pytest.mark.parametrize("batches", [[1] * 7 + [30], [37], [5, 0, 31, 1]])
def test_moments_of_batches_are_those_of_the_whole(batches: list[int]):
    x = (
        normal(37, 5) * torch.tensor([1, 10, 0.1, 3, 1]) + 1e6
    )  # a mean that would cost a plain sum its digits
    found = Moments(5)
    for part in x.split(batches):
        found.add(part.double())
    assert found.count == 37
    assert len(found.root) <= 2 * 5  # memory does not grow with the samples
    np.testing.assert_allclose(found.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance(), np.cov(x.numpy(), rowvar=False), atol=1e-8)


def test_moments_of_ranks_merge_to_those_of_one_process():
    x = normal(50, 4, 1) + 3
    ranks = [moments(part) for part in x.split([20, 29, 1])]
    ranks.insert(1, Moments(4))  # a rank that had nothing
    for other in ranks[1:]:
        ranks[0].merge(other)
    assert ranks[0].count == 50
    np.testing.assert_allclose(ranks[0].mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(ranks[0].covariance(), torch.cov(x.T), rtol=1e-12, atol=1e-14)


def test_an_empty_process_takes_over_what_it_merges():
    found = Moments(3)
    found.merge(moments(normal(9, 3)))
    torch.testing.assert_close(found.covariance(), moments(normal(9, 3)).covariance())


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 8), (100, 90, 20)])
def test_distance_is_that_of_scipys_square_root(n: int, m: int, d: int):
    a, b = normal(n, d) @ normal(d, d, 1), normal(m, d, 2) @ normal(d, d, 3) + 0.5
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(by_scipy(a, b), rel=1e-10)


def test_diagonal_covariances_have_a_closed_form():
    mean, other = normal(6, 1, 1)[:, 0], normal(6, 1, 2)[:, 0]
    s, t = normal(6, 1, 3)[:, 0].abs(), torch.tensor([0.0, 1e-9, 1.0, 2.0, 0.5, 1e3]).double()
    wanted = float(((mean - other) ** 2).sum() + ((s - t) ** 2).sum())
    found = frechet_distance(independent(mean, s), independent(other, t))
    assert found == pytest.approx(wanted, rel=1e-12)


def test_distance_to_a_scaled_and_shifted_self_has_a_closed_form():
    """c x + m has the covariance c² Σ: d² = |shift|² + (c − 1)² tr Σ."""
    x = normal(50, 12) @ normal(12, 12, 1)
    x = x - x.mean(0)
    wanted = 12 * 2.0**2 + 0.25 * float(torch.cov(x.T).trace())
    assert frechet_distance(moments(x), moments(1.5 * x + 2)) == pytest.approx(wanted, rel=1e-11)


def test_equal_sets_are_zero_apart_and_order_does_not_matter():
    x, y = normal(30, 10) * 100, normal(40, 10, 1)
    a, b = moments(x), moments(y)
    assert frechet_distance(a, moments(x.flip(0))) == pytest.approx(0, abs=1e-8)  # of a trace of 1e5
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_a_rotation_of_both_changes_nothing():
    a, b, turn = normal(60, 9) @ normal(9, 9, 1), normal(60, 9, 2), rotation(9, 3)
    wanted = frechet_distance(moments(a), moments(b))
    assert frechet_distance(moments(a @ turn), moments(b @ turn)) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (2, 2), (5, 100)])
def test_fewer_samples_than_dimensions_give_the_distance_within_their_span(n: int, m: int):
    """Samples in a subspace of few dimensions, turned into many, where they lack full rank."""
    small_a, small_b = normal(n, 4), normal(m, 4, 1) * 2 + 1
    into = rotation(50, 2)[:4]  # orthonormal rows: 4 dimensions in 50
    found = frechet_distance(moments(small_a @ into), moments(small_b @ into))
    if min(n, m) > 4:
        assert found == pytest.approx(by_scipy(small_a, small_b), rel=1e-9)
    assert found == pytest.approx(frechet_distance(moments(small_a), moments(small_b)), rel=1e-9)


def test_sets_in_orthogonal_subspaces_do_not_overlap():
    """tr (Σ_a Σ_b)^½ = 0: the traces add up, to digits that a square root of rounding errors would cost."""
    a = torch.cat([normal(20, 30), torch.zeros(20, 30, dtype=torch.float64)], 1)
    b = torch.cat([torch.zeros(20, 30, dtype=torch.float64), normal(20, 30, 1)], 1)
    turn = rotation(60, 2)
    one, two = moments(a @ turn), moments(b @ turn)
    wanted = float((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace())
    assert frechet_distance(one, two) == pytest.approx(wanted, rel=1e-12)


def test_the_bias_of_few_samples_is_what_the_docstring_says():
    d, n, repeats = 10, 400, 40
    found = [
        frechet_distance(moments(normal(n, d, 2 * s)), moments(normal(n, d, 2 * s + 1)))
        for s in range(repeats)
    ]
    wanted = 2 * d / n + d * (d + 1) / (2 * n)
    error = np.std(found) / np.sqrt(repeats)
    assert abs(np.mean(found) - wanted) < 4 * error + 0.03 * wanted  # first order in d/n


def test_kernel_distance_is_the_sum_over_pairs():
    a, b = normal(7, 3).float(), normal(5, 3, 1).float()

    def k(x: Tensor, y: Tensor) -> float:
        return (float(x.double() @ y.double()) / 3 + 1) ** 3

    within = [
        np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (a, b)
    ]
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b, rows=3) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kernel_distance_has_no_bias_where_the_frechet_distance_has():
    pairs = [(normal(16, 8, 2 * s), normal(12, 8, 2 * s + 1)) for s in range(400)]
    kernel = np.array([kernel_distance(a, b) for a, b in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(len(kernel))
    assert kernel.min() < 0
    assert np.mean([frechet_distance(moments(a), moments(b)) for a, b in pairs[:40]]) > 2
    apart = np.array([kernel_distance(a, b + 0.5) for a, b in pairs])
    assert apart.mean() > 10 * kernel.std() / np.sqrt(len(kernel))


def test_bad_features_are_one_sentence():
    with pytest.raises(ValueError, match=r"shape \[3, 4\]: give \[n, 5\]"):
        Moments(5).add(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        frechet_distance(moments(normal(1, 2)), moments(normal(9, 2)))
    with pytest.raises(ValueError, match="use one network for both"):
        frechet_distance(moments(normal(9, 2)), moments(normal(9, 3)))
    with pytest.raises(ValueError, match="use one network for both"):
        kernel_distance(normal(9, 2), normal(9, 3))
    with pytest.raises(ValueError, match="give 2 or more"):
        kernel_distance(normal(1, 2), normal(9, 2))


def test_too_few_samples_are_told():
    assert too_few(100, 10) is None
    said = too_few(99, 10)
    assert said is not None
    assert "99 samples are few for 10 dimensions" in said
