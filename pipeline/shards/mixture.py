"""Several sources in set shares: which of them gives the n-th sample, and which of its own that is.

    mixture = Mixture([0.7, 0.3])
    mixture.at(1000)                 # (source, its number): sample 1000 is the source's so many-th

A *source* is an endless list of samples in an order of its own, addressed by number (`Source`): its epochs follow one
another, and where it is to go on is one number. So a mixture of sources is such a list again: nothing is drawn, no rank
or worker has a part in it, and whoever knows how many samples were taken knows where every source is.

**Rule.** After any n samples each source has given n · share of them, but for less than one: the quota method of
Balinski and Young (1975, 'The quota method of apportionment'). Of the sources that n + 1 samples still allow one more
(given < share · (n + 1)), the next sample comes from that with the largest share ÷ (given + 1). Shares are multiples of
1 ÷ 10,000, so all begins again after 10,000 samples at the latest, and one such round is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

PARTS = 10_000  # of which shares are whole numbers
NEAR_ONE = 0.01  # how far from 1 shares may sum up that were meant to: 0.33, 0.33, 0.33

Sample = dict[str, Any]


class Source(Protocol):
    """Samples in an endless order, epoch after epoch; the same whoever asks.

    A sample has at least 'key': str, by which a person finds it, and 'skipped': list[str], keys of broken ones that it
    stands for.
    """

    @property
    def samples(self) -> int:
        """Of an epoch."""
        ...

    def nth(self, number: int) -> Sample:
        """The sample of that number of the endless list. Raises StoreError where the data as a whole is at fault."""
        ...

    def identity(self) -> str:
        """A hash of what it holds: of other data, or the same in other order, it is another."""
        ...


class Mixture:
    """Args:
        shares: of each source, above 0, together 1 (as near as 0.33 three times is).
        names: of the sources, for people.
        together: samples that a source gives in a row, all of which then count as one above: of sources that are read
            in streams (`pipeline.shards.order.Sequential`) as many as there are, so that the n-th sample of the
            mixture is of the stream n mod `together` of its source.

    Raises ValueError: one sentence.
    """

    def __init__(self, shares: Sequence[float], names: Sequence[str] = (), together: int = 1):
        self.together = together
        self.names = list(names or [f"source {i + 1}" for i in range(len(shares))])
        for name, share in zip(self.names, shares, strict=True):
            if not 1 / PARTS <= share <= 1:
                raise ValueError(f"{name}: a share lies between {1 / PARTS} and 1, not at {share:g}")
        if not shares or abs(sum(shares) - 1) > NEAR_ONE + 1e-9:
            told = " + ".join(f"{share:g}" for share in shares)
            raise ValueError(f"the shares of a mixture are {told} = {sum(shares):g}: make them 1 together")
        parts = [round(share * PARTS) for share in shares]
        self.parts = [p // math.gcd(*parts) for p in parts]  # of a round
        self.round = sum(self.parts)
        turns = _round(self.parts)
        self._source = np.array(turns, np.int16)  # of each sample of a round
        before = np.zeros((self.round + 1, len(parts)), np.int16)
        np.cumsum(self._source[:, None] == np.arange(len(parts)), 0, out=before[1:])
        self._before = before  # [place in a round, source]: given so far

    @property
    def shares(self) -> list[float]:
        return [p / self.round for p in self.parts]

    def at(self, number: int) -> tuple[int, int]:
        """(source, number of its own) of a sample of the mixture."""
        turns, turn = divmod(number, self.together)
        rounds, place = divmod(turns, self.round)
        source = int(self._source[place])
        before = rounds * self.parts[source] + int(self._before[place, source])
        return source, before * self.together + turn

    def epoch(self, lengths: Sequence[int]) -> int:
        """Samples until every source, of so many samples each, has been gone through."""
        turns = (-(-n // self.together) * self.round / p for n, p in zip(lengths, self.parts, strict=True))
        return math.ceil(max(turns)) * self.together


def _round(parts: Sequence[int]) -> list[int]:
    """The source of each sample of a round, of which it gives so many."""
    total, given, turns = sum(parts), [0] * len(parts), []
    for n in range(1, total + 1):
        may = [i for i, part in enumerate(parts) if given[i] * total < part * n]
        turns.append(max(may, key=lambda i: (parts[i] / (given[i] + 1), -i)))
        given[turns[-1]] += 1
    return turns


class Mixed:
    """A mixture of sources, itself a source; a sample says in 'source' which it is of."""

    def __init__(self, sources: Sequence[Source], mixture: Mixture):
        self.sources, self.mixture = list(sources), mixture

    @property
    def samples(self) -> int:
        """Until every source has been gone through."""
        return self.mixture.epoch([source.samples for source in self.sources])

    def nth(self, number: int) -> Sample:
        source, own = self.mixture.at(number)
        return self.sources[source].nth(own) | {"source": source}

    def identity(self) -> str:
        each = zip(self.sources, self.mixture.parts, strict=True)
        return " ".join(f"{part}/{self.mixture.round}:{source.identity()}" for source, part in each)
