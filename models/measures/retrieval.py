"""How well scores of pairs tell which belong together."""

from __future__ import annotations

import torch
from torch import Tensor


def auc(together: Tensor, apart: Tensor) -> float:
    """How often a pair that belongs together scores above one that does not; equal scores count half.

    The area under the ROC curve by ranks (Mann and Whitney 1947). Args: [n] and [m], one score at least of each.
    """
    scores = torch.cat([together, apart]).double()
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    ranks = (ends - (counts - 1) / 2)[place]  # from 1, the mean of equals
    n, m = len(together), len(apart)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def places(scores: Tensor, right: Tensor) -> Tensor:
    """Of each query the place, from 1, of its best right answer; those that score as it does precede it, and a score
    that is not a number is the worst. int64 [n].

    Args:
        scores: [n, m] of queries and what may answer them. right: bool [n, m], one at least a query.
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~right).sum(1)


def recall(scores: Tensor, right: Tensor, k: int) -> float:
    """R@k: how often one of a query's right answers is among its k best, see `places`."""
    return float((places(scores, right) <= k).float().mean())
