"""When frames are shown: their PTS as ffmpeg's decoder gives them, and those that had to be made up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:  # the child has no need of pyarrow and pydantic
    pass


NO_PTS = np.iinfo(np.int64).min  # libav's AV_NOPTS_VALUE


class Clock:
    """PTS of each frame as ffmpeg's decoder has it, and the ticks that have passed since the first.

    A frame without PTS has the DTS of its packet, and so have all frames once PTS have run backwards more often
    than DTS (libavcodec's `best_effort_timestamp`).
    """

    def __init__(self, step: int):
        self.step = step  # ticks from frame to frame where the stamps do not tell
        self.elapsed = -step
        self.stamps: list[int | None] = []
        self.last_pts = self.last_dts = NO_PTS
        self.faulty_pts = self.faulty_dts = 0

    def read(self, pts: int | None, dts: int | None) -> None:
        self.faulty_pts += pts is not None and pts <= self.last_pts
        self.faulty_dts += dts is not None and dts <= self.last_dts
        last = self.stamps[-1] if self.stamps else None
        stamp = None
        if pts is not None or dts is not None:
            self.last_pts = cast(int, dts if pts is None else pts)
            self.last_dts = cast(int, pts if dts is None else dts)
            stamp = self.last_pts if self.faulty_pts <= self.faulty_dts else self.last_dts
        self.elapsed += self.step if stamp is None or last is None or stamp <= last else stamp - last
        self.stamps.append(stamp)


def timeline(stamps: Sequence[int | None], step: int) -> tuple[np.ndarray, int]:
    """Strictly increasing PTS from what the frames carried, and how many had to be made up.

    The longest strictly increasing subsequence is kept as it is (so one wild stamp costs one stamp, and where a
    clock was reset in mid-stream the longer part is kept). Between kept stamps the others are spread evenly,
    before the first and after the last they are a typical step apart. Only where a gap has fewer ticks than
    frames are the stamps behind it pushed on, a tick a frame.

    Args:
        stamps: PTS of the frames in order of presentation, in ticks; none where missing.
        step: ticks from one frame to the next where the stamps do not tell.

    Returns:
        int64 [n] and the number of entries that are not the frame's own stamp.
    """
    kept = _longest_increasing(stamps)
    n = len(stamps)
    if len(kept) == n:
        return np.array(stamps, np.int64), 0
    own = np.array([NO_PTS if s is None else s for s in stamps], np.int64)
    if not kept:
        return np.arange(n, dtype=np.int64) * step, n
    if len(kept) > 1:
        step = max(1, int(np.median(np.diff(own[kept]) / np.diff(kept))))
    base = own[kept[0]]  # floats hold differences of stamps exactly, stamps perhaps not
    pts = (
        np.rint(np.interp(np.arange(n), kept, (own[kept] - base).astype(np.float64))).astype(np.int64) + base
    )
    pts[: kept[0]] = base - step * np.arange(kept[0], 0, -1)
    pts[kept[-1] + 1 :] = own[kept[-1]] + step * np.arange(1, n - kept[-1])
    pts = np.maximum.accumulate(pts - np.arange(n)) + np.arange(n)
    return pts, int(np.count_nonzero(pts != own))


def _longest_increasing(stamps: Sequence[int | None]) -> list[int]:
    """Indices of the longest strictly increasing subsequence (patience sorting); of several the latest."""
    ends: list[int] = []  # the smallest stamp that ends an increasing run of each length
    at: list[int] = []  # where that stamp stands
    before: dict[int, int | None] = {}  # what comes before it in that run
    for i, stamp in enumerate(stamps):
        if stamp is None:
            continue
        length = bisect_left(ends, stamp)
        before[i] = at[length - 1] if length else None
        ends[length : length + 1] = [stamp]
        at[length : length + 1] = [i]
    run: list[int] = []
    last = at[-1] if at else None
    while last is not None:
        run.append(last)
        last = before[last]
    return run[::-1]


class Grid:
    """Picks the first frame at or after each k / rate seconds."""

    def __init__(self, rate: float, time_base: Fraction):
        per_tick = Fraction(rate).limit_denominator(10_000) * time_base
        self.slots, self.ticks = per_tick.numerator, per_tick.denominator  # so many slots in so many ticks
        self.next = 0

    def due(self, elapsed: int) -> bool:
        if elapsed * self.slots < self.next * self.ticks:
            return False
        self.next = elapsed * self.slots // self.ticks + 1
        return True
