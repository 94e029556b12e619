"""Which captioners to keep: greedy set cover of clips, as Panda-70M chose 8 of 31 teachers (arXiv:2402.19479, app. B).

A captioner covers a clip where its caption is good enough. What counts is not how good a captioner is on average but
what it adds: the next one kept is that which covers most of the clips that none so far covers. Nemhauser et al. 1978:
k chosen so cover at least 1 − 1/e = 63 % of what the best k would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """The next captioner to keep."""

    model: str
    alone: int  # clips that it covers
    adds: int  # of these, clips that none before it covers
    covered: int  # clips covered so far


def greedy(patterns: Mapping[int, int], models: Sequence[str]) -> list[Step]:
    """Captioners in the order to keep them, until nobody adds a clip.

    Args:
        patterns: how many clips are covered by just which models, as bits: 0b101 → by the first and the third. So a
            million clips are some hundred numbers.
    Equals go to the earlier captioner.
    """
    alone = [sum(n for p, n in patterns.items() if p >> i & 1) for i in range(len(models))]
    left = {p: n for p, n in patterns.items() if p}
    steps: list[Step] = []
    covered = 0
    while left:
        adds = [sum(n for p, n in left.items() if p >> i & 1) for i in range(len(models))]
        best = max(range(len(models)), key=lambda i: (adds[i], -i))
        covered += adds[best]
        steps.append(Step(models[best], alone[best], adds[best], covered))
        left = {p: n for p, n in left.items() if not p >> best & 1}
    return steps
