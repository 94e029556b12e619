"""The frames of a clip, decoded as a trainer wants them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np


class BrokenSample(Exception):
    """A sample that cannot be read or decoded."""


def decode(mp4: bytes, frames: int, fps: float | None, size: tuple[int, int] | None, at: float) -> np.ndarray:
    """Frames of a clip as they are seen at evenly spaced times, uint8 [T, H, W, 3] RGB.

    Args:
        mp4: the clip.
        frames: T.
        fps: frames a second; none: T moments spread over the whole clip, each in the middle of its share.
        size: (H, W), the displayed picture scaled to cover it (bicubic) and cropped at the centre; none:
            as stored.
        at: where the window of T ÷ fps seconds lies in a longer clip, 0 (begin) to 1 (end).

    A time at or after the last frame shows the last frame. Raises BrokenSample.
    """
    import av
    from av.video.reformatter import VideoReformatter

    try:
        with av.open(io.BytesIO(mp4), "r") as container:
            if not container.streams.video:
                raise BrokenSample("no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the workers are the parallelism
            assert stream.time_base is not None
            start, length = _extent(container, stream)
            if fps is None:
                ticks = [start + length * (2 * i + 1) // (2 * frames) for i in range(frames)]
            else:
                step = 1 / (Fraction(fps).limit_denominator(1001) * stream.time_base)
                begin = start + max(Fraction(0), length - frames * step) * Fraction(at)
                ticks = [round(begin + i * step) for i in range(frames)]
            if ticks[0] > start:
                container.seek(ticks[0], stream=stream)
            sar = stream.sample_aspect_ratio or Fraction(1)  # 0 or none: unknown
            return _at(container.decode(stream), ticks, partial(_picture, VideoReformatter(), size, sar))
    except av.FFmpegError as e:
        raise BrokenSample(str(e)) from e


def _extent(container: Any, stream: Any) -> tuple[int, int]:
    """First PTS and length in ticks; from the packets where the header does not say."""
    if stream.duration:
        return stream.start_time or 0, stream.duration
    packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None]
    if not packets:
        raise BrokenSample("no frames")
    container.seek(0)
    start = min(pts for pts, _ in packets)
    return start, max(pts + duration for pts, duration in packets) - start


def _at(decoded: Iterator[Any], ticks: list[int], seen: Callable[[Any], np.ndarray]) -> np.ndarray:
    """The pictures seen at increasing times: of each, the last frame whose PTS is not after it."""
    pictures: list[np.ndarray] = []
    shown, picture = None, None
    for frame in decoded:
        while shown is not None and len(pictures) < len(ticks) and frame.pts > ticks[len(pictures)]:
            picture = seen(shown) if picture is None else picture
            pictures.append(picture)
        if len(pictures) == len(ticks):
            break
        shown, picture = frame, None
    if shown is None:
        raise BrokenSample("no frames")
    if len(pictures) < len(ticks):
        picture = seen(shown) if picture is None else picture
        pictures += [picture] * (len(ticks) - len(pictures))
    return np.stack(pictures)


def _picture(scaler: Any, size: tuple[int, int] | None, sar: Fraction, frame: Any) -> np.ndarray:
    """uint8 [H, W, 3] RGB; sar is the shape of a stored pixel, width ÷ height.

    One scaler for all frames of a clip: to set it up takes longer than to scale a small picture. Without
    FULL_CHR_H_INT swscale halves the width of the colours once more when it makes RGB of the scaled picture.
    """
    from av.video.reformatter import Interpolation

    if size is None:
        return frame.to_ndarray(format="rgb24")
    height, width = size
    shown = frame.width * sar  # width in square pixels
    scale = max(width / shown, Fraction(height, frame.height))
    w, h = max(width, round(shown * scale)), max(height, round(frame.height * scale))
    image = scaler.reformat(
        frame, w, h, "rgb24", interpolation=Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
    ).to_ndarray()
    top, left = (h - height) // 2, (w - width) // 2
    return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class Clock:
    """When the frames of a clip are shown: seconds from the first one on, and how long all of it lasts."""

    seconds: tuple[float, ...]
    duration: float

    @property
    def rate(self) -> float:
        """Frames a second."""
        return len(self.seconds) / self.duration if self.duration > 0 else 1.0


def clock(video: bytes | str) -> Clock:
    """Of an mp4, or a file of that name, from its packets; nothing is decoded. Raises BrokenSample."""
    import av

    from pipeline.io.ffmpeg import LISTED, picture_stream

    file = io.BytesIO(video) if isinstance(video, bytes) else f"file:{video}"
    try:
        with av.open(file, "r", options=LISTED) as container:
            stream = picture_stream(container)
            if stream is None:
                raise BrokenSample("no video stream")
            assert stream.time_base is not None
            start, length = _extent(container, stream)
            container.seek(0)
            times = sorted(p.pts for p in container.demux(stream) if p.pts is not None)
            if not times:
                raise BrokenSample("no frames")
            unit = float(stream.time_base)
            end = max(length, times[-1] - start)
            return Clock(tuple((t - times[0]) * unit for t in times), float(end * unit))
    except (av.FFmpegError, OSError) as e:
        raise BrokenSample(str(e)) from e


def size_of_clip(mp4: bytes) -> tuple[int, int]:
    """Height and width of its frames as stored; nothing is decoded. Raises BrokenSample."""
    import av

    try:
        with av.open(io.BytesIO(mp4), "r") as container:
            if not container.streams.video:
                raise BrokenSample("no video stream")
            stream = container.streams.video[0]
            return stream.height, stream.width
    except (av.FFmpegError, OSError) as e:
        raise BrokenSample(str(e)) from e


def size_of_picture(image: bytes | str) -> tuple[int, int]:
    """Height and width of a still picture, upright; nothing is decoded. Raises BrokenSample."""
    from PIL import ExifTags, Image

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            lies = (
                opened.getexif().get(ExifTags.Base.Orientation, 1) > 4 and opened.format != "TIFF"
            )  # told upright
            return opened.size if lies else (opened.height, opened.width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BrokenSample(str(e)) from e


def numbered(clip: bytes, numbers: Sequence[int]) -> np.ndarray:
    """The frames of these increasing numbers, uint8 [T, H, W, 3] RGB as stored; beyond the last one, the last.

    Args:
        clip: of shards; what anybody may hand in is read by `pipeline.split.shown`.

    Raises BrokenSample.
    """
    import av
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()  # one for all frames: to set it up takes longer than a small picture
    wanted, found = set(numbers), {}
    try:
        with av.open(io.BytesIO(clip), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the workers are the parallelism
            last = None
            for number, frame in enumerate(container.decode(stream)):
                last = frame
                if number in wanted:
                    found[number] = scaler.reformat(frame, format="rgb24").to_ndarray()
                    if len(found) == len(wanted):
                        break
            if last is None:
                raise BrokenSample("no frames")
            final = None if len(found) == len(wanted) else scaler.reformat(last, format="rgb24").to_ndarray()
    except (av.FFmpegError, OSError, IndexError) as e:
        raise BrokenSample(str(e)) from e
    pictures = [found.get(n, final) for n in numbers]
    return np.stack([p for p in pictures if p is not None])


def picture(image: bytes | str) -> np.ndarray:
    """A still picture, upright, uint8 [1, H, W, 3] RGB. Raises BrokenSample."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))[None]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BrokenSample(str(e)) from e
