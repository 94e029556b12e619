"""How far two sets of feature vectors are apart: the Fréchet and the kernel distance.

Fréchet distance (Fréchet 1957; Dowson and Landau 1982; Heusel et al. 2017 for images, Unterthiner et al. 2018
for videos): squared 2-Wasserstein distance of two Gaussians with the sets' means and covariances,

    d² = |μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a^½ Σ_b Σ_a^½)^½

The last trace is the sum of the singular values of R_a R_bᵀ for any R with Rᵀ R = Σ. Such an R is carried along
from the data itself: nothing is squared, no root of a matrix is taken, and it is exact where the covariances
lack full rank (fewer samples than dimensions). A general matrix square root of Σ_a Σ_b ends there in NaN or an
imaginary part, and one by eigenvalues of Σ turns rounding errors of 1e-16 into 1e-8.

**Few samples.** The distance is biased upwards: two sets of n ≫ D from one N(0, I_D) are, to first order in 1/n,
2 D/n + D (D + 1)/(2 n) apart. So only numbers of the same n compare, and none means much without the distance
of real from real beside it. The kernel distance (Bińkowski et al. 2018) has no such bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ENOUGH = 10  # samples a dimension


class Moments:
    """Count, mean and a root of the covariance of features, in float64: of any number of batches, in any order.

    Those of several processes are brought together by `merge` (they pickle). Memory is [min(n, 2 D), D].
    """

    def __init__(self, size: int):
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)  # [D]
        self.root = torch.zeros(0, size, dtype=torch.float64)  # [r, D], rootᵀ root = Σ (x − mean)(x − mean)ᵀ

    def add(self, features: Tensor) -> None:
        """Features [n, D]. Raises ValueError for another D, and where one is not finite."""
        x = features.detach().cpu().double()
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"features of shape {list(x.shape)}: give [n, {len(self.mean)}]")
        if not x.isfinite().all():
            raise ValueError("features hold NaN or infinity: look at the videos or the feature network")
        if len(x):
            self._join(len(x), x.mean(0), x - x.mean(0))

    def merge(self, other: Moments) -> None:
        """As if everything the other was given had been added here."""
        if other.count:
            self._join(other.count, other.mean, other.root)

    def _join(self, count: int, mean: Tensor, root: Tensor) -> None:
        """Two sets' scatter, and that of their means around the common mean (Chan, Golub and LeVeque 1979)."""
        total = self.count + count
        step = mean - self.mean
        between = step * math.sqrt(self.count * count / total)
        self.root = torch.cat([self.root, root, between[None]])
        if len(self.root) > 2 * len(mean):
            self.root = torch.linalg.qr(self.root, mode="r").R  # of D rows, and the same rootᵀ root
        self.mean = self.mean + step * (count / total)
        self.count = total

    def deviations(self) -> Tensor:
        """R [r ≤ D, D] with Rᵀ R = Σ, the covariance (divided by n − 1). Raises ValueError below two samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no covariance: give 2 or more")
        if len(self.root) > len(self.mean):
            self.root = torch.linalg.qr(self.root, mode="r").R
        return self.root / math.sqrt(self.count - 1)

    def covariance(self) -> Tensor:
        """Σ [D, D]. Raises ValueError below two samples."""
        return self.deviations().T @ self.deviations()


def moments(features: Tensor) -> Moments:
    """Of all features [n, D] at once."""
    found = Moments(features.shape[1])
    found.add(features)
    return found


def frechet_distance(a: Moments, b: Moments) -> float:
    """d² of the docstring above, ≥ 0. Raises ValueError for different dimensions and below two samples."""
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} numbers: use one network for both")
    r_a, r_b = a.deviations(), b.deviations()
    overlap = torch.linalg.svdvals(r_a @ r_b.T).sum()
    traces = r_a.square().sum() + r_b.square().sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + traces - 2 * overlap))


def kernel_distance(a: Tensor, b: Tensor, rows: int = 1024) -> float:
    """Unbiased squared maximum mean discrepancy under k(x, y) = (xᵀy/D + 1)³ (Bińkowski et al. 2018, eq. 4).

    Its expectation is 0 for two sets of one distribution, whatever their sizes; so it can be negative. Over
    all pairs, which has less variance than the usual mean over subsets, and the same expectation.

    Args:
        a, b: features [n, D] and [m, D].
        rows: of the kernel matrix that are in memory at a time.
    Raises ValueError for different dimensions and below two samples.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and {b.shape[1]} numbers: use one network for both")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} samples: give 2 or more of each")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()

    def kernel_sum(x: Tensor, y: Tensor) -> float:
        return sum(float(((part @ y.T) / x.shape[1] + 1).pow(3).sum()) for part in x.split(rows))

    def mean_of_others(x: Tensor) -> float:
        own = float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())
        return (kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))

    return mean_of_others(a) + mean_of_others(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))


def too_few(samples: int, size: int) -> str | None:
    """A sentence to print beside a Fréchet distance of too few samples; None where they are enough."""
    if samples >= ENOUGH * size:
        return None
    return (
        f"{samples:,} samples are few for {size:,} dimensions (below {ENOUGH} × {size:,}): the Fréchet distance "
        f"is biased upwards; compare it only with one of as many samples, or use the kernel distance."
    )
