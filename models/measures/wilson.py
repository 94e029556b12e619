"""How well a share is known from few trials (Wilson 1927)."""

from __future__ import annotations

import math

Z95 = 1.959964  # standard deviations within which 95 % of a normal distribution lies


def wilson(share: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """The shares under which one as far from them as this would be seen in 5 % of cases, lowest and highest.

    Within 0 … 1, and of some width where all trials went one way. For a mean of trials between right and wrong
    (some attributes of a video) it is too wide, if anything: none varies more than one of 0 and 1. Raises ValueError
    for no trials.
    """
    if trials < 1:
        raise ValueError(f"{trials} trials tell no share: give 1 or more")
    spread = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    middle, scale = share + z**2 / (2 * trials), 1 + z**2 / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
