"""The pictures of a video as they are shown, in a size of one's own: read as `decode` reads a source, kept in memory.

So a video that somebody hands in looks as the clips look that were cut from one: deinterlaced, cropped as its
container says, upright, in square pixels, HDR brought to BT.709.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pipeline.geometry import Geometry
from pipeline.recipe import Decode
from pipeline.split import sought
from pipeline.split.clock import Clock, Ticks
from pipeline.split.cropping import Crop, container_crop
from pipeline.split.decode import Reader
from pipeline.split.opening import DecodeError, check_limits, opened, video_stream
from pipeline.split.pictures import Pictures, Scaler

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Shown:
    """pictures: uint8 [T, H, W, 3] RGB. fps: of them, a second; of a file's own frames, their mean rate."""

    pictures: np.ndarray
    fps: float


def read(
    path: str,
    size: Callable[[float], Size] | None,
    fps: float | None = None,
    most: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Shown:
    """The frames of a video from its first one on.

    Args:
        size: of the pictures, by the aspect (width ÷ height) in which they are shown; they are scaled to cover it and
            cropped at the centre. None: its own, in square pixels.
        fps: what is seen so often a second while the video lasts; none: every frame, once.
        most: frames to read. numbers: of frames, from 0, in order: those alone; beyond the last one, the last.

    Raises DecodeError where nothing can be decoded.
    """
    if numbers is not None:
        with contextlib.suppress(sought.Unsure):
            return _sought(path, size, numbers)
    return _from_the_beginning(path, size, fps, most, numbers)


def _sought(path: str, size: Callable[[float], Size] | None, numbers: Sequence[int]) -> Shown:
    """Each decoded from the nearest keyframe on. Raises sought.Unsure, DecodeError."""
    options = Decode()
    with opened(path, options) as container:
        stream = video_stream(container, options)
        check_limits(stream.width, stream.height, None, options)
        time_base = Ticks.of(stream).time_base
        places = sought.Places.of(container, stream)
        last = len(places.stamps) - 1
        wanted = sorted({min(n, last) for n in numbers})
        seen: _Seen | None = None
        for n, frame in sought.frames(container, stream, places, sorted({0, *wanted})):
            if seen is None:  # what a video looks like says its first frame
                crop = _crop(path, container, stream, frame)
                seen = _Seen(frame, stream, time_base, options, crop, size, None, frozenset(wanted))
            if n in wanted:
                seen.add(n, frame, 0)
        assert seen is not None
        seen.end()
    length = float((places.stamps[-1] - places.stamps[0]) * time_base)
    return Shown(np.stack([seen.at(min(n, last)) for n in numbers]), last / length if length else 1.0)


def _crop(path: str, container: Any, stream: Any, first: Any) -> Crop:
    nth = list(container.streams.video).index(stream)
    return container_crop(path, container.format.name, nth, (first.width, first.height))


def _from_the_beginning(
    path: str,
    size: Callable[[float], Size] | None,
    fps: float | None = None,
    most: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Shown:
    """Frame after frame. Raises DecodeError."""
    options = Decode()
    with opened(path, options) as container:
        stream = video_stream(container, options)
        check_limits(stream.width, stream.height, None, options)
        time_base, rate, step, second = Ticks.of(stream)
        clock = Clock(step, second)
        reader = Reader(container, stream, lambda: None)
        seen: _Seen | None = None
        duration = 0
        for n, frame in enumerate(reader.frames()):
            if seen is None:
                crop = _crop(path, container, stream, frame)
                between = 1 / (Fraction(fps).limit_denominator(1001) * time_base) if fps else None
                wanted = None if numbers is None else frozenset(numbers)
                seen = _Seen(frame, stream, time_base, options, crop, size, between, wanted)
            clock.read(frame.pts, frame.dts)
            duration = frame.duration
            seen.add(n, frame, clock.elapsed)
            if most is not None and len(seen.shown) >= most:
                break
            if seen.wanted is not None and len(seen.chosen) == len(seen.wanted):
                break
        if seen is None:
            raise DecodeError(f"no frame can be decoded{reader.reason()}; the file is damaged or incomplete")
        seen.end()
        seen.until(clock.elapsed + (duration or step))
    shown = seen.shown[:most] if numbers is None else [seen.at(n) for n in numbers]
    pictures = np.stack(shown)
    if fps is None:
        n = len(clock.stamps)
        fps = float((n - 1) / (clock.elapsed * time_base) if clock.elapsed else rate)
    return Shown(pictures, fps)


class _Seen(Pictures):
    """What is seen at evenly spaced times, `between` ticks apart; where that is none every frame, or those `wanted`."""

    def __init__(
        self,
        first: Any,
        stream: Any,
        time_base: Fraction,
        options: Decode,
        crop: Crop,
        size: Callable[[float], Size] | None,
        between: Fraction | None,
        wanted: frozenset[int] | None,
    ):
        super().__init__(first, stream, time_base, options, crop)
        width, height = self.found.size
        own = height, max(1, round(width * self.found.sar))
        self.size = size(self.found.aspect) if size else own
        self.between, self.wanted = between, wanted
        self.shown: list[np.ndarray] = []
        self.chosen: dict[int, np.ndarray] = {}
        self.last: tuple[Any, Geometry] | None = None  # that is not wanted
        self.latest: np.ndarray | None = None
        self.fitted: dict[float, Scaler] = {}

    def until(self, elapsed: int) -> None:
        """The latest picture is shown up to this tick."""
        while (
            self.between is not None
            and self.latest is not None
            and round(len(self.shown) * self.between) < elapsed
        ):
            self.shown.append(self.latest)

    def at(self, n: int) -> np.ndarray:
        """The frame of that number, or the last."""
        if n not in self.chosen:
            assert self.last is not None
            self.chosen[n] = self._cropped(*self.last)
        return self.chosen[n]

    def _keep(self, n: int, frame: Any, elapsed: int, geometry: Geometry) -> None:
        self._recolour(frame)
        if self.wanted is not None:
            self.last = frame, geometry
            if n in self.wanted:
                self.chosen[n] = self._cropped(frame, geometry)
            return
        self.until(elapsed)
        self.latest = self._cropped(frame, geometry)
        if self.between is None:
            self.shown.append(self.latest)

    def _cropped(self, frame: Any, geometry: Geometry) -> np.ndarray:
        """Scaled to cover the size, uint8 [H, W, 3]."""
        height, width = self.size
        if geometry.aspect not in self.fitted:
            wide, high = geometry.size[0] * geometry.sar, geometry.size[1]  # in square pixels
            scale = max(width / wide, Fraction(height, high))
            covering = max(width, round(wide * scale)), max(height, round(high * scale))
            self.fitted[geometry.aspect] = Scaler(covering, "rgb24", geometry, fine=True)
        picture = self.fitted[geometry.aspect].upright(frame)
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        return picture[top : top + height, left : left + width]
