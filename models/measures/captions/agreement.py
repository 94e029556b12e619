"""How far people, or models, agree beyond what chance alone would give.

Cohen 1960: κ = (p_o − p_e) / (1 − p_e) of two raters who both rated every item, p_e from each rater's own shares.
Krippendorff (Content Analysis, ch. 12): α = 1 − D_o / D_e of any number of raters, with gaps. 1: full agreement,
0: as chance, below: they disagree on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> float | None:
    """κ of two raters' labels of the same items; None where both gave one and the same label throughout, or none."""
    if len(a) != len(b):
        raise ValueError(f"two raters of the same items: {len(a)} labels and {len(b)}")
    if not a:
        return None
    n = len(a)
    left, right = Counter(a), Counter(b)
    expected = sum(left[x] * right[x] for x in left) / n**2
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / n
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(
    units: Sequence[Sequence[Any]], metric: Literal["nominal", "interval"] = "nominal"
) -> float | None:
    """α of what raters said of each unit.

    Args:
        units: of each unit the labels it got (nominal: anything hashable; interval: numbers), None where a rater said
            nothing. Units with fewer than two labels say nothing about agreement.

    None where there is no such unit, or all labels are equal.
    """
    rated = [[x for x in unit if x is not None] for unit in units]
    rated = [unit for unit in rated if len(unit) > 1]
    every = [x for unit in rated for x in unit]
    n = len(every)
    if not n:
        return None
    if metric == "interval":
        # Σ over pairs (x − y)² = 2 (m Σx² − (Σx)²)
        def apart(values: list[Any]) -> float:
            x = np.asarray(values, np.float64)
            x = x - x.mean()
            return float(2 * (len(x) * (x**2).sum() - x.sum() ** 2))
    else:

        def apart(values: list[Any]) -> float:
            return float(len(values) ** 2 - sum(c * c for c in Counter(values).values()))

    observed = sum(apart(unit) / (len(unit) - 1) for unit in rated) / n
    expected = apart(every) / (n * (n - 1))
    return None if expected == 0 else 1 - observed / expected


def alpha_interval(
    units: Sequence[Sequence[Any]],
    metric: Literal["nominal", "interval"] = "nominal",
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """An interval for α, drawing units with replacement; None where α is not defined."""
    if krippendorff_alpha(units, metric) is None:
        return None
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(units), len(units)) for _ in range(resamples))
    found = [krippendorff_alpha([units[i] for i in some], metric) for some in drawn]
    # a draw with one label only says nothing
    edges = np.quantile([x for x in found if x is not None] or [1.0], [0.5 - level / 2, 0.5 + level / 2])
    return float(edges[0]), float(edges[1])
