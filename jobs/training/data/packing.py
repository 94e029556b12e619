"""Which samples share a micro-batch, where samples of different sizes fill one budget of tokens together.

There are two ways, since sizes are known at two times. Clips have their bucket's, so an epoch is planned (`pack`) from
the number of clips in each bucket alone: a few compositions ('2 of the first bucket and 3 of the third'), each so many
times; which clips they hold is drawn afterwards, and any micro-batch is found by its number. How long a text is, is
known when it has been tokenised, one sample after the other: these are packed as they come (`Packer`), and where that
stands is a part of the loader's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


class Packer:
    """Samples of any length, one after the other, into sequences of at most `budget` tokens.

    Best fit with a bounded pool (BBF, Csirik & Johnson 2001, 'Bounded space on-line bin packing: best is better than
    first'): a sample joins the open sequence that it leaves the least room in. Where it fits none and `pool` are open,
    the fullest is closed, and it begins a new one. However long samples are and in whatever order they come, that needs
    at most 1.7 times as many sequences as the best packing of all of them (and a constant), for every pool of two or
    more; in practice a larger pool wastes less.

    closed, tokens: sequences handed out so far, and what they hold.
    """

    def __init__(self, budget: int, pool: int = 32):
        if pool < 2:
            raise ValueError(f"the pool of a packer is {pool} sequences: give 2 or more")
        self.budget, self.pool = budget, pool
        self.open: list[list[tuple[int, int]]] = []  # sequences of (number of a sample, its length)
        self.room: list[int] = []  # tokens that are left in each
        self.closed = self.tokens = 0

    @property
    def waste(self) -> float:
        """Share of the sequences handed out that is empty."""
        return 1 - self.tokens / (self.closed * self.budget) if self.closed else 0.0

    def add(self, number: int, length: int) -> list[int] | None:
        """Take a sample; the numbers of the sequence that it closes, in the order they came, if it closes one.

        Raises ValueError for a length that fits no sequence.
        """
        if not 0 < length <= self.budget:
            raise ValueError(f"a sample of {length} tokens fits no sequence of {self.budget}")
        at = min(
            (i for i, room in enumerate(self.room) if room >= length), key=self.room.__getitem__, default=-1
        )
        done = None
        if at < 0:
            if length < self.budget and len(self.open) == self.pool:
                done = self._close(min(range(self.pool), key=self.room.__getitem__))
            self.open.append([])
            self.room.append(self.budget)
        self.open[at].append((number, length))
        self.room[at] -= length
        return done if self.room[at] else self._close(at)

    def _close(self, at: int) -> list[int]:
        self.closed, self.tokens = self.closed + 1, self.tokens + self.budget - self.room.pop(at)
        return [number for number, _ in self.open.pop(at)]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; the samples themselves are for others to find again by theirs."""
        samples = [[list(sample) for sample in sequence] for sequence in self.open]
        return {"open": samples, "closed": self.closed, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.open = [[(number, length) for number, length in sequence] for sequence in state["open"]]
        self.room = [self.budget - sum(length for _, length in sequence) for sequence in self.open]
        self.closed, self.tokens = state["closed"], state["tokens"]
