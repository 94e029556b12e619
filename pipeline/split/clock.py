"""When frames are shown: their PTS as ffmpeg's decoder gives them, and those that had to be made up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np

NO_PTS = np.iinfo(np.int64).min  # libav's AV_NOPTS_VALUE
NO_RESTARTS = np.empty((0, 3), np.int64)


LONGEST_S = 60.0  # nothing is shown longer: a gap above that is a jump of the clock (see `_breaks`)
SETTLED = 4  # stamps in a row that make a new clock; fewer are wild ones
EXCURSION = 100  # frames after which a clock that goes on where it was is a new one all the same


class Ticks(NamedTuple):
    """How a stream counts time, with what stands in for what it does not say."""

    time_base: Fraction  # seconds a tick
    rate: Fraction  # frames a second
    step: int  # ticks from frame to frame
    second: int  # ticks

    @classmethod
    def of(cls, stream: Any) -> Ticks:
        time_base = stream.time_base or Fraction(1, 90000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        return cls(time_base, rate, max(1, round(1 / (rate * time_base))), max(1, round(1 / time_base)))


class Clock:
    """PTS of each frame as ffmpeg's decoder has it, and the ticks that have passed since the first.

    A frame without PTS has the DTS of its packet, and so have all frames once PTS have run backwards more often
    than DTS (libavcodec's `best_effort_timestamp`). `own` says whether every stamp was the frame's own PTS so far.
    """

    def __init__(self, step: int, second: int):
        self.step = step  # ticks from frame to frame where the stamps do not tell
        self.longest = _longest_gap(step, second)
        self.elapsed = -step
        self.stamps: list[int | None] = []
        self.own, self.fell = True, False
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
        fell, self.fell = self.fell, pts is None and stamp is not None and last is not None and stamp <= last
        if (
            self.fell and not fell
        ):  # the DTS may be that of the packet that pushed the frame out, on a new clock
            stamp = None
        self.own &= stamp is not None and stamp == pts
        known = stamp is not None and last is not None and 0 < stamp - last <= self.longest
        self.elapsed += cast(int, stamp) - cast(int, last) if known else self.step
        self.stamps.append(stamp)


@dataclass(frozen=True)
class Timeline:
    """When the frames of a source are shown, on one clock that only goes forward.

    Each row of `restarts` is a frame at which the source's clock starts again, the ticks that were added to the
    stamps from there on (0: it jumped forward and is kept), and where the frame before stops being shown.
    """

    pts: np.ndarray  # int64 [n], strictly increasing
    repaired: int  # how many are not the frame's own stamp, moved as its restart says
    restarts: np.ndarray  # int64 [r, 3]


def timeline(stamps: Sequence[int | None], step: int, second: int) -> Timeline:
    """One clock for all frames, from the stamps that they carried.

    Where the clock starts again (joined recordings) or jumps ahead by more than LONGEST_S, a new part begins.
    What fell back goes on a typical step behind the part before it; the first part keeps its own clock. Stamps
    that start again more often than once a second tell nothing, and frames are spread evenly.

    Within a part the longest strictly increasing subsequence is kept as it is, so one wild stamp costs one stamp.
    Between kept stamps the others are spread evenly, before the first and after the last they are a typical step
    apart. Only where a gap has fewer ticks than frames are the stamps behind it pushed on, a tick a frame.

    Args:
        stamps: PTS of the frames in order of presentation, in ticks; none where missing.
        step: ticks from one frame to the next where the stamps do not tell.
        second: ticks of a second.
    """
    n = len(stamps)
    breaks, wild = _breaks(stamps, step, second)
    stamps = list(stamps)
    for i in wild:
        stamps[i] = None
    if len(breaks) > 3 and n * step < len(breaks) * second:
        first = next(s for s in stamps if s is not None)
        return Timeline(np.arange(n, dtype=np.int64) * step + first, n - 1, NO_RESTARTS)
    parts: list[np.ndarray] = []
    restarts: list[tuple[int, int, int]] = []
    shift = repaired = ends = 0
    for start, end in pairwise([0, *breaks, n]):
        pts, made_up, typical = _repaired(stamps[start:end], step)
        repaired += made_up
        if parts:
            if pts[0] + shift < ends:
                shift = ends - int(pts[0])
            restarts.append((start, shift, ends))
        parts.append(pts + shift)
        ends = int(parts[-1][-1]) + typical
    return Timeline(np.concatenate(parts), repaired, np.array(restarts, np.int64).reshape(-1, 3))


def _longest_gap(step: int, second: int) -> int:
    """Ticks that a frame may be shown: a slide show's are long, too."""
    return max(round(LONGEST_S * second), 100 * step)


def _breaks(stamps: Sequence[int | None], step: int, second: int) -> tuple[list[int], list[int]]:
    """Frames at which the clock starts again, and frames with stamps that left it for a while.

    It starts again with SETTLED stamps in a row that all lie before, or far behind, it. Where the old clock goes
    on within EXCURSION stamps, those in between were wild and nothing started.
    """
    known = [(i, s) for i, s in enumerate(stamps) if s is not None]
    longest = _longest_gap(step, second)
    found: list[int] = []
    wild: set[int] = set()
    trusted: list[tuple[int, int]] = []  # on the clock of the moment

    def off(stamp: int, frame: int) -> int:
        at, last = trusted[-1]
        return -1 if stamp <= last else int(stamp - last > longest + (frame - at) * step)

    def goes_on(old: tuple[int, int], new: tuple[int, int]) -> bool:
        return abs(new[1] - old[1] - (new[0] - old[0]) * step) <= SETTLED * step

    for k, (i, s) in enumerate(known):
        if i in wild:
            continue
        if trusted and (way := off(s, i)):
            run = known[k : k + SETTLED]
            before = next(
                (n for n in range(2, min(EXCURSION, len(trusted)) + 1) if goes_on(trusted[-n], (i, s))), 0
            )
            after = next(
                (n for n in range(1, EXCURSION) if goes_on(trusted[-1], known[min(k + n, len(known) - 1)])), 0
            )
            if before:  # so the last few that were trusted had left it
                wild.update(j for j, _ in trusted[1 - before :])
                del trusted[1 - before :]
            elif after:
                wild.update(j for j, _ in known[k : k + after])
                continue
            elif len(run) < SETTLED or any(off(t, j) != way for j, t in run):
                continue
            else:
                found.append(i)
                trusted = []
        trusted.append((i, s))
    return found, sorted(wild)


def _repaired(stamps: Sequence[int | None], step: int) -> tuple[np.ndarray, int, int]:
    """Strictly increasing int64 PTS of one part, how many are not the frame's own stamp, and the typical step."""
    kept = _longest_increasing(stamps)
    n = len(stamps)
    own = np.array([NO_PTS if s is None else s for s in stamps], np.int64)
    if not kept:
        return np.arange(n, dtype=np.int64) * step, n, step
    if len(kept) > 1:
        step = max(1, int(np.median(np.diff(own[kept]) / np.diff(kept))))
    if len(kept) == n:
        return own, 0, step
    base = own[kept[0]]  # floats hold differences of stamps exactly, stamps perhaps not
    pts = (
        np.rint(np.interp(np.arange(n), kept, (own[kept] - base).astype(np.float64))).astype(np.int64) + base
    )
    pts[: kept[0]] = base - step * np.arange(kept[0], 0, -1)
    pts[kept[-1] + 1 :] = own[kept[-1]] + step * np.arange(1, n - kept[-1])
    pts = np.maximum.accumulate(pts - np.arange(n)) + np.arange(n)
    return pts, int(np.count_nonzero(pts != own)), step


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
