"""How often the right one is among the first k that a search finds."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def ranks(scores: np.ndarray, relevant: Sequence[Collection[int]]) -> np.ndarray:
    """Of each query the place, from 1, of the first right one; int64 [N].

    Equal scores count against it: those of others that are as high stand before it.

    Args:
        scores: [N, M], of N queries with M things, higher is nearer.
        relevant: of each query which of the M are right, at least one.
    """
    found = []
    for row, right in zip(np.asarray(scores, np.float64), relevant, strict=True):
        own = sorted(right)
        best = row[own].max()
        found.append(1 + int((row >= best).sum()) - int((row[own] >= best).sum()))
    return np.array(found, np.int64)


def recall(places: np.ndarray, k: int) -> float:
    """R@k: the share of queries whose first right one is among the first k, see `ranks`."""
    return float((places <= k).mean())
