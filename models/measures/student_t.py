"""Student's t distribution, for intervals from few values."""

from __future__ import annotations

import math
from statistics import NormalDist

MANY = 1000  # degrees of freedom from which its expansion around the normal distribution is right to eight digits


def quantile(p: float, n: int) -> float:
    """The value below which t of n degrees of freedom falls with probability p, 0 < p < 1.

    Abramowitz and Stegun, 26.7.3 and 26.7.4 (the integral for whole n), 26.7.5 (the expansion).
    """
    if p < 0.5:
        return -quantile(1 - p, n)
    if n > MANY:
        z = NormalDist().inv_cdf(p)
        return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    low, high = 0.0, math.pi / 2  # of θ = atan(t / √n)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, n) < 2 * p - 1 else (low, middle)
    return math.sqrt(n) * math.tan(low)


def _within(theta: float, n: int) -> float:
    """P(|t| < √n tan θ)."""
    cos, term, total = math.cos(theta), 1.0, 0.0
    if n % 2:
        term = cos
        for k in range(3, n + 1, 2):
            total += term
            term *= cos * cos * (k - 1) / k
        return 2 / math.pi * (theta + math.sin(theta) * total)
    for k in range(2, n + 1, 2):
        total += term
        term *= cos * cos * (k - 1) / k
    return math.sin(theta) * total
