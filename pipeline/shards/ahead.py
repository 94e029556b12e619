"""The bytes of samples, each in one request, and of neighbours in one together before they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.io.store import Ranges

GAP = 1 << 20  # bytes that are read and thrown away rather than asked around: what a request costs in time


@dataclass(frozen=True)
class Place:
    """Where the files of a sample lie in its tar, in bytes, by the column that says so ('', 'json_', 'text_').

    sha256: of files, in hex, where it is known.
    """

    tar: str
    files: dict[str, tuple[int, int]]  # offset, size
    sha256: dict[str, str]

    @property
    def begin(self) -> int:
        return min((offset for offset, _ in self.files.values()), default=0)

    @property
    def end(self) -> int:
        return max((offset + size for offset, size in self.files.values()), default=0)


class Bytes:
    """What a tar holds between two offsets."""

    def __init__(self, ranges: Ranges, place: Place, data: bytes | memoryview, begin: int):
        self.ranges, self.place, self.data, self.begin = ranges, place, data, begin

    def file(self, which: str) -> bytes:
        """One of the sample's files; b'' where there is none. Raises StoreError where it has other bytes."""
        offset, size = self.place.files.get(which, (0, 0))
        found = bytes(self.data[offset - self.begin : offset - self.begin + size]) if size else b""
        if found and which in self.place.sha256:
            self.ranges.check(self.place.tar, offset, found, self.place.sha256[which])
        return found


class Ahead:
    """Samples by row, those of a group that is read together kept until each was used; of one process.

    requests: byte ranges asked for so far.
    """

    def __init__(self, ranges: Ranges):
        self.ranges, self.requests = ranges, 0
        self.held: dict[int, bytes] = {}
        self.current: list[int] = []

    def next(self, rows: list[int]) -> None:
        """These are used from now on; those before them are let go."""
        for row in self.current:
            self.held.pop(row, None)
        self.current = rows

    def clear(self) -> None:
        self.held, self.current = {}, []

    def load(self, group: Iterable[tuple[int, Place]]) -> None:
        """Read the samples of a group in as few requests as they lie in runs. Raises StoreError."""
        runs: list[list[tuple[int, Place]]] = []
        for row, place in sorted(group, key=lambda each: (each[1].tar, each[1].begin)):
            before = runs[-1][-1][1] if runs else None
            near = before is not None and before.tar == place.tar and place.begin - before.end <= GAP
            runs[-1].append((row, place)) if near else runs.append([(row, place)])
        for run in runs:
            tar, begin = run[0][1].tar, run[0][1].begin
            data = memoryview(self._read(tar, begin, max(place.end for _, place in run)))
            for row, place in run:
                self.held[row] = bytes(data[place.begin - begin : place.end - begin])

    def read(self, row: int, place: Place) -> Bytes:
        """A sample. Raises StoreError."""
        data = self.held.get(row)
        if data is None:
            data = self._read(place.tar, place.begin, place.end)
        return Bytes(self.ranges, place, data, place.begin)

    def _read(self, tar: str, begin: int, end: int) -> bytes:
        self.requests += 1
        return self.ranges.read(tar, begin, end - begin)
