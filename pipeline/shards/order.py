"""The order in which clips are trained on, of every reader: batches by number, none of them kept.

An epoch is a list of batches. A batch is a composition ('4 of the first bucket', or, packed, '2 of the first and 3 of
the third'), filled from a shuffled list of each bucket's clips; the batches are shuffled, too. Each shuffle is a
permutation that is computed where it is asked for (`Permutation`), so an epoch of a billion clips costs no memory, a
worker finds any batch by its number alone, and a run goes on from any place at once.

**Sequential reads.** On an object store a request costs as much as a megabyte. With `Sequential`, clips that lie
together are used together: those of each bucket are taken in groups of neighbours, the groups are shuffled, and the
clips of some groups that follow one another (a window) among themselves. The list of each bucket is cut into as many
stretches as there are streams, and batch m of an epoch is the next of stream m mod streams. Since a worker has every
(processes × workers)-th batch, it has whole streams where that divides their number, and reads a group once. The order
depends on the streams, not on who reads them. Batches of a composition come in rows of `streams`, evenly mixed with
those of the others; the few that fill no such row come last.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

ROUNDS = 6  # of the Feistel network; 4 are indistinguishable from a random permutation (Luby & Rackoff 1988)


@dataclass(frozen=True)
class Run:
    """So many batches of one composition: `samples` of each bucket."""

    samples: tuple[int, ...]
    repeats: int


@dataclass(frozen=True)
class Sequential:
    """How clips that lie together are read together.

    together: clips of a group. window: clips that are shuffled with one another, rounded down to whole groups.
    streams: parts that are read side by side.
    """

    together: int = 16
    window: int = 256
    streams: int = 16


def batches_of(samples: int, size: int, last: Literal["wrap", "drop"] = "wrap") -> int:
    """Batches that so many samples make; what does not fill the last is repeated from the beginning, or left out."""
    return -(-samples // size) if last == "wrap" else samples // size


def whole(counts: Sequence[int], sizes: Sequence[int], last: Literal["wrap", "drop"] = "wrap") -> list[Run]:
    """Batches of one bucket each, `sizes` of them large."""
    return [
        Run(tuple(size if i == b else 0 for i in range(len(counts))), batches_of(n, size, last))
        for b, (n, size) in enumerate(zip(counts, sizes, strict=True))
        if n
    ]


class Permutation:
    """Of 0 … n − 1 by a key, a number at a time: a Feistel network over the next even power of two, walked along its
    cycle until it lands below n (Black & Rogaway 2002, 'Ciphers with arbitrary finite domains')."""

    def __init__(self, n: int, *key: int):
        self.n, self.half = n, max((max(n - 1, 1).bit_length() + 1) // 2, 1)
        digest = hashlib.blake2b(np.array([n, *key], np.int64).tobytes(), digest_size=8 * ROUNDS).digest()
        self.keys = np.frombuffer(digest, np.uint64)

    def __call__(self, i: np.ndarray) -> np.ndarray:
        """int64 [k] in 0 … n − 1 → int64 [k], their places."""
        found = self._once(np.asarray(i, np.uint64))
        while (outside := found >= self.n).any():
            found[outside] = self._once(found[outside])
        return found.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        left, right = x >> half, x & mask
        with np.errstate(over="ignore"):
            for key in self.keys:
                left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << half) | right


class Windowed:
    """Of 0 … n − 1 by a key, as `Permutation`, but neighbours stay near one another, see `Sequential`."""

    def __init__(self, n: int, how: Sequential, *key: int):
        self.n, self.key, self.together = n, key, how.together
        self.window = max(how.window // how.together, 1) * how.together
        self.groups = Permutation(-(-n // how.together), *key)

    def __call__(self, i: np.ndarray) -> np.ndarray:
        """int64 [k] in 0 … n − 1 → int64 [k], their places. The last group lacks some, which are walked past."""
        found = self._once(np.asarray(i, np.int64))
        while (outside := found >= self.n).any():
            found[outside] = self._once(found[outside])
        return found

    def _once(self, i: np.ndarray) -> np.ndarray:
        places = self.groups.n * self.together
        found = np.empty_like(i)
        windows = i // self.window
        for w in np.unique(windows).tolist():
            mine, start = windows == w, w * self.window
            size = min(self.window, places - start)
            found[mine] = start + Permutation(size, *self.key, w)(i[mine] - start)
        group, inside = found // self.together, found % self.together
        return self.groups(group) * self.together + inside


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Order:
    """The batches of every epoch.

    Args:
        bucket: int [n], which bucket each row is in, or one where all are in the first.
        runs: what an epoch is made of; a bucket of which they take more than it has begins again.
        shuffle: False leaves rows and batches in their order.
        sequential: neighbours are read together.
        beside: another order of the same rows in the same buckets, to share its lists of them.
    """

    def __init__(
        self,
        bucket: np.ndarray,
        runs: Sequence[Run],
        seed: int = 0,
        shuffle: bool = True,
        sequential: Sequential | None = None,
        beside: Order | None = None,
    ):
        self.seed, self.shuffle, self.runs = seed, shuffle, list(runs)
        self.bucket, self.sequential = bucket, sequential
        streams = sequential.streams if sequential else 1
        self.rounds = [run.repeats // streams for run in self.runs]  # batches that every stream has of each
        buckets = max((len(run.samples) for run in runs), default=0)
        self.counts = np.bincount(bucket, minlength=buckets)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.rows: np.ndarray | None = None  # of the buckets, one after the other; none: as they are
        if beside is not None:
            self.rows = beside.rows
        elif np.count_nonzero(self.counts) > 1 and (np.diff(bucket) < 0).any():
            kind = np.int32 if len(bucket) < 1 << 31 else np.int64
            self.rows = np.argsort(bucket, kind="stable").astype(kind)
        repeats = np.array([run.repeats for run in self.runs], np.int64)
        self.ends = np.cumsum(repeats)  # of the runs, in batches
        samples = np.array([run.samples for run in self.runs], np.int64).reshape(len(self.runs), buckets)
        taken = np.cumsum(samples * repeats[:, None], 0)
        self.taken = np.concatenate([np.zeros((1, buckets), np.int64), taken])[
            :-1
        ]  # of a bucket, before a run

    def __len__(self) -> int:
        """Batches of an epoch."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def batch(self, epoch: int, number: int) -> np.ndarray:
        """Rows of a batch of an epoch, int64, those of one bucket together."""
        if self.sequential is not None:
            return self._rows(epoch, *self._of_streams(epoch, number, self.sequential.streams))
        place = int(self._shuffled(len(self), np.array([number]), epoch, -1)[0])
        run = int(np.searchsorted(self.ends, place, "right"))
        return self._rows(epoch, run, place - (int(self.ends[run - 1]) if run else 0))

    def group(self, row: int) -> np.ndarray:
        """Rows of the group that a row is in, where groups are read together."""
        assert self.sequential is not None
        bucket, size = int(self.bucket[row]), self.sequential.together
        start, end = int(self.starts[bucket]), int(self.starts[bucket + 1])
        place = row - start if self.rows is None else int(np.searchsorted(self.rows[start:end], row))
        first = start + place // size * size
        last = min(first + size, end)
        return np.arange(first, last) if self.rows is None else self.rows[first:last].astype(np.int64)

    def example(self, run: int) -> np.ndarray:
        """Rows of some batch of that composition."""
        return self._rows(0, run, 0)

    def drawn(self, buckets: Sequence[int], rng: np.random.Generator) -> int:
        """A row of any of these buckets."""
        i = int(rng.integers(self.counts[buckets].sum()))
        for b in buckets:
            if i < self.counts[b]:
                break
            i -= int(self.counts[b])
        return int(self.starts[b] + i if self.rows is None else self.rows[self.starts[b] + i])

    def _of_streams(self, epoch: int, number: int, streams: int) -> tuple[int, int]:
        """(run, its k-th) of a batch of an epoch, where streams take turns."""
        round_, stream = divmod(number, streams)
        if round_ < sum(self.rounds):
            run, k = self._round(round_)
            return run, stream * self.rounds[run] + k
        rests = np.cumsum([run.repeats % streams for run in self.runs])
        behind = np.array([number - sum(self.rounds) * streams])
        place = int(self._shuffled(int(rests[-1]), behind, epoch, -1)[0])
        run = int(np.searchsorted(rests, place, "right"))
        return run, self.rounds[run] * streams + place - (int(rests[run - 1]) if run else 0)

    def _round(self, number: int) -> tuple[int, int]:
        """(run, the k-th of each stream) of a round, in which every stream gives a batch of one composition.

        The k-th of a run's n rounds is due at (k + ½) ÷ n of the epoch; those of all runs are merged by that.
        """

        def before(run: int, k: int) -> int:
            """Rounds due before it: of a run with m, those with (2 j + 1) ÷ m < (2 k + 1) ÷ n; of equals, the first."""
            n = self.rounds[run]
            each = enumerate(self.rounds)
            return sum(((2 * k + 1) * m + n - (other >= run)) // (2 * n) for other, m in each)

        for run, n in enumerate(self.rounds):
            k = bisect_left(range(n), number, key=partial(before, run))
            if k < n and before(run, k) == number:
                return run, k
        raise AssertionError(number)

    def _rows(self, epoch: int, run: int, k: int) -> np.ndarray:
        """Of the k-th batch of a run."""
        found = [np.zeros(0, np.int64)]
        for b, size in enumerate(self.runs[run].samples):
            if size:
                i = (self.taken[run, b] + k * size + np.arange(size)) % self.counts[b]
                found.append(self.starts[b] + self._placed(int(self.counts[b]), i, epoch, b))
        rows = np.concatenate(found)
        return rows if self.rows is None else self.rows[rows].astype(np.int64)

    def _placed(self, n: int, i: np.ndarray, *key: int) -> np.ndarray:
        if self.sequential is None:
            return self._shuffled(n, i, *key)
        return Windowed(n, self.sequential, self.seed, *key)(i)

    def _shuffled(self, n: int, i: np.ndarray, *key: int) -> np.ndarray:
        return Permutation(n, self.seed, *key)(i) if self.shuffle else i
