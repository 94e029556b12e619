"""Which samples share a micro-batch, where samples of different sizes fill one budget of tokens together.

Sizes are the buckets', so an epoch is planned from the number of clips in each bucket alone: a few compositions
('2 of the first bucket and 3 of the third'), each so many times. Which clips they hold is drawn afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.shards.order import Run


def pack(counts: Sequence[int], lengths: Sequence[int], budget: int) -> list[Run]:
    """All samples, `counts` of each bucket with `lengths` tokens, in micro-batches of at most `budget` tokens.

    The largest that is left begins a micro-batch. Then what fills it best joins it (`_fullest`), or the largest that
    fits, and the next (first-fit decreasing): whichever of the two needs fewer. Every sample is in one micro-batch.
    Needs 0 < length ≤ budget of each bucket that has samples.
    """
    return min((_plan(counts, lengths, budget, fill) for fill in (_fullest, _decreasing)), key=micro_batches)


Fill = Callable[[Sequence[int], Sequence[int], Sequence[int], int], list[int]]


def _plan(counts: Sequence[int], lengths: Sequence[int], budget: int, fill: Fill) -> list[Run]:
    left, runs = list(counts), []
    order = sorted(range(len(lengths)), key=lambda b: -lengths[b])
    while any(left):
        first = next(b for b in order if left[b])
        left[first] -= 1
        samples = fill(left, lengths, order, budget - lengths[first])
        samples[first] += 1
        left[first] += 1
        repeats = min(have // n for have, n in zip(left, samples, strict=True) if n)
        left = [have - repeats * n for have, n in zip(left, samples, strict=True)]
        runs.append(Run(tuple(samples), repeats))
    return runs


def _decreasing(left: Sequence[int], lengths: Sequence[int], order: Sequence[int], budget: int) -> list[int]:
    """As many as fit of each bucket, in order."""
    samples = [0] * len(lengths)
    for b in order:
        samples[b] = min(left[b], budget // lengths[b])
        budget -= samples[b] * lengths[b]
    return samples


def _fullest(left: Sequence[int], lengths: Sequence[int], order: Sequence[int], budget: int) -> list[int]:
    """What comes closest to the budget from below; of equals, more of the first in `order`."""
    most, reach = (1 << budget + 1) - 1, [1]  # bit n: the buckets so far, from the last on, can fill n tokens
    for b in reversed(order):
        sums = reach[-1]
        for _ in range(min(left[b], budget // lengths[b])):
            sums |= sums << lengths[b] & most
        reach.append(sums)
    tokens, samples = reach.pop().bit_length() - 1, [0] * len(lengths)
    for b in order:
        rest = reach.pop()
        samples[b] = next(
            n
            for n in range(min(left[b], tokens // lengths[b]), -1, -1)
            if rest >> (tokens - n * lengths[b]) & 1
        )
        tokens -= samples[b] * lengths[b]
    return samples


def micro_batches(runs: Sequence[Run]) -> int:
    return sum(run.repeats for run in runs)


def used(runs: Sequence[Run], lengths: Sequence[int]) -> list[int]:
    """Tokens of a micro-batch of each run."""
    return [sum(n * length for n, length in zip(run.samples, lengths, strict=True)) for run in runs]
