"""Each source is read and decoded once; what the later stages look at is made on the way.

`DecodeStage` runs in a worker and hands a local file to `analyse`, which runs in a child process
(`pipeline.io.isolate`) because libav may hang or crash on what strangers made. The child imports nothing but
numpy, av and cv2; full pictures live there one at a time.

The picture stream is the first one that is not a cover picture, ffmpeg's `0:V:0`. Its frames' PTS are the ones
that ffmpeg's decoder gives (`best_effort_timestamp`), so `ffmpeg -copyts` finds the same frames by them; see
`timeline` for those that had to be made up.
"""

from __future__ import annotations

import contextlib
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.io.ffmpeg import OPEN, picture_stream
from pipeline.io.isolate import Child, ChildError, Stalled

if TYPE_CHECKING:  # the child has no need of pyarrow and pydantic
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from pipeline.recipe import Decode
    from pipeline.record import Video

THUMB = (48, 27)  # width, height: TransNetV2's input
NO_PTS = np.iinfo(np.int64).min  # libav's AV_NOPTS_VALUE
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
# Of AVColorSpace (ITU-T H.273, table 4) what swscale refuses: YCgCo, BT.2020 constant luminance, ICtCp, …
UNKNOWN_COLOURS = {8, *range(10, 18)}
PLAYLISTS = (
    b"#EXTM3U",
    b"ffconcat",
    b"<MPD",
    b"<SmoothStreamingMedia",
    b"[playlist]",
    b"[Reference]",
    b"v=0",
)


class DecodeStage:
    """Fills in what a Video is (size, rate, codec, …) and its `frames`."""

    name = "decode"

    def __init__(self, options: Decode):
        from pipeline.stages import Produces, Resources

        self.options = options
        self.resources = Resources(cpus=1)
        self.produces = Produces()
        self.child: Child | None = None

    def setup(self) -> None:
        self.child = Child(self.options.max_memory_gb)

    def __call__(self, videos: list[Video]) -> list[Video]:
        from pipeline.sources.fetch import release
        from pipeline.stages import StageError, fail

        for video in videos:
            try:
                self._decode(video)
            except StageError as e:
                fail(video, self.name, e)  # here, or run_stage would decode the whole unit again
                release(video.source)  # a good one stays for the cut
        return videos

    def _decode(self, video: Video) -> None:
        from pipeline.sources.fetch import localised
        from pipeline.stages import StageError

        assert self.child is not None, "setup() comes first"
        name, options = video.source.name, self.options
        with localised(video.source) as local:
            video.sha256 = local.sha256
            try:
                found: Analysis = self.child.call(
                    "pipeline.split.decode:analyse",
                    local.path,
                    SimpleNamespace(**options.model_dump()),
                    stall_s=options.stall_s,
                )
            except DecodeError as e:
                raise StageError(f"{name}: {e}") from e
            except MemoryError as e:
                limit = f"{options.max_memory_gb:g} GiB (decode.max_memory_gb)"
                raise StageError(
                    f"{name}: decoding it needs more memory than {limit}; raise the limit"
                ) from e
            except Stalled as e:
                raise StageError(
                    f"{name}: no frame for {options.stall_s:g} s; the decoder hangs on this file, re-encode it "
                    "or raise decode.stall_s"
                ) from e
            except ChildError as e:
                raise StageError(f"{name}: the decoder crashed on this file ({e}); re-encode it") from e
        found.fill(video)


@dataclass
class Analysis:
    """What one decode found; the fields are those of Video and Frames."""

    codec: str
    width: int
    height: int
    fps: float
    duration_s: float
    time_base: Fraction
    rotation: int
    sar: Fraction
    pix_fmt: str
    counts: dict[str, int]
    warnings: list[str]
    pts: np.ndarray
    end_pts: int
    thumbs: np.ndarray
    samples: list[tuple[int, bytes]]
    grey: np.ndarray
    grey_frame: np.ndarray
    packets: np.ndarray

    def fill(self, video: Video) -> None:
        from pipeline.record import Frames, Sample

        for name in (
            "codec",
            "width",
            "height",
            "fps",
            "duration_s",
            "time_base",
            "rotation",
            "sar",
            "pix_fmt",
        ):
            setattr(video, name, getattr(self, name))
        video.warnings = self.warnings
        video.counts |= self.counts
        video.frames = Frames(
            pts=self.pts,
            end_pts=self.end_pts,
            thumbs=self.thumbs,
            samples=[Sample(frame, jpeg) for frame, jpeg in self.samples],
            grey=self.grey,
            grey_frame=self.grey_frame,
            packets=self.packets,
        )


class DecodeError(Exception):
    """A file that cannot be used; the message is a sentence that lacks only the file's name."""


def analyse(path: str, options: Decode, beat: Callable[[], None] = lambda: None) -> Analysis:
    """Read a video file once and keep what `Frames` describes.

    Frames that decode are used and the trouble with others is told in `warnings`. A change of picture size in
    mid-stream is a warning too; all pictures are scaled to the sizes the first one gave.

    Args:
        path: a local file; no other file and no network is opened, whatever it says.
        options: anything with the fields of `recipe.Decode`.
        beat: called at every packet.

    Raises DecodeError if nothing can be decoded or a limit is exceeded.
    """
    with _opened(path, options) as container:
        stream = _video_stream(container, options)
        claimed_s = _claimed_duration(container, stream)
        _check_limits(stream.width, stream.height, claimed_s, options)
        codec = stream.codec_context.codec.canonical_name
        time_base = stream.time_base or Fraction(1, 90000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        step = max(1, round(1 / (rate * time_base)))
        longest = int(options.max_duration_s / time_base)
        reader = _Reader(container, stream, beat)
        clock = _Clock(step)
        pictures: _Pictures | None = None
        duration = 0
        for n, frame in enumerate(reader.frames()):
            if pictures is None:
                pictures = _Pictures(frame, stream.sample_aspect_ratio or Fraction(1), time_base, options)
            clock.read(frame.pts, frame.dts)
            if clock.elapsed > longest:
                _check_limits(0, 0, float(clock.elapsed * time_base), options)
            pictures.add(n, frame, clock.elapsed)
            duration = frame.duration
        if pictures is None:
            raise DecodeError(f"no frame can be decoded{reader.reason()}; the file is damaged or incomplete")
    pts, repaired = timeline(clock.stamps, step)
    end_pts = int(pts[-1]) + (duration or (int(pts[-1] - pts[-2]) if len(pts) > 1 else step))
    shown_s = float((end_pts - int(pts[0])) * time_base)
    span_s = float((int(pts[-1]) - int(pts[0])) * time_base)
    warnings = reader.warnings() + pictures.warnings()
    if repaired:
        warnings.append(f"{repaired} of {len(pts)} timestamps were missing or out of order and were made up")
    # Some headers count from 0, others from the first frame.
    ends_s = max(shown_s, float(end_pts * time_base))
    if claimed_s is not None and ends_s < claimed_s - max(1.0, 0.05 * claimed_s):
        warnings.append(
            f"the pictures end after {shown_s:.2f} s of the {claimed_s:.2f} s that the header claims"
        )
    return Analysis(
        codec=codec,
        width=pictures.width,
        height=pictures.height,
        fps=(len(pts) - 1) / span_s if len(pts) > 1 else 1 / shown_s,
        duration_s=shown_s,
        time_base=time_base,
        rotation=pictures.orientation.rotation,
        sar=pictures.sar,
        pix_fmt=pictures.pix_fmt,
        counts={"frames": len(pts), "timestamps_repaired": repaired},
        warnings=warnings,
        pts=pts,
        end_pts=end_pts,
        thumbs=pictures.thumbs.upright(),
        samples=pictures.samples,
        grey=pictures.grey.upright(),
        grey_frame=np.array(pictures.grey_frame, np.int64),
        packets=np.array(reader.packets, np.int64).reshape(-1, 3),
    )


# Opening -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str, options: Decode) -> Iterator[InputContainer]:
    import av

    _check_regular(path)
    limits = {"max_pixels": str(options.max_pixels)}  # for the decoders that look for the stream's parameters
    av.logging.set_level(av.logging.ERROR)  # libav's own words go into the exception
    try:
        with av.logging.Capture():
            container = av.open("file:" + path, "r", options=OPEN | limits, metadata_errors="replace")
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError as e:
        raise DecodeError(_why_not(path, e)) from e
    finally:
        av.logging.set_level(None)
    with container:
        yield container


def _check_regular(path: str) -> None:
    try:
        info = Path(path).stat()
    except OSError as e:
        raise DecodeError(f"cannot be read: {e.strerror}; check the path") from e
    if not stat.S_ISREG(info.st_mode):
        raise DecodeError("not a regular file; give a video file")
    if not info.st_size:
        raise DecodeError("the file is empty; fetch it again")


def _why_not(path: str, e: Any) -> str:
    """What is wrong with a file that libav did not open."""
    _, demuxer, words = e.log or (0, "", "")
    with open(path, "rb") as f:
        head = f.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    if demuxer in ("hls", "concat", "dash", "sdp") or any(
        mark in head if mark[:1] == b"<" else head.startswith(mark) for mark in PLAYLISTS
    ):
        return "it is a playlist, which could open other files or the network; give the video itself"
    if "whitelist" in words:
        return f"its format, {demuxer}, is not a video file's; give a video file"
    reason = words.strip().lower() if words.strip() else e.strerror.lower()
    return f"not a readable video ({reason}); it is damaged, incomplete or something else"


def _video_stream(container: InputContainer, options: Decode) -> VideoStream:
    stream = picture_stream(container)
    if stream is None:
        kinds = {s.type for s in container.streams}
        has = "only a cover picture" if "video" in kinds else f"only {', '.join(sorted(kinds)) or 'nothing'}"
        raise DecodeError(f"no video stream ({has}); give a file with pictures")
    if stream.codec_context is None:
        raise DecodeError("no decoder for its video codec; re-encode it, say to H.264")
    stream.thread_type = "NONE"
    stream.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(options.max_pixels)}
    return stream


def _claimed_duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds, by the header; none where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else None


def _check_limits(width: int, height: int, seconds: float | None, options: Decode) -> None:
    if width * height > options.max_pixels:
        raise DecodeError(
            f"its pictures of {width}x{height} are larger than decode.max_pixels={options.max_pixels}; "
            "scale it down or raise the limit"
        )
    if seconds is not None and seconds > options.max_duration_s:
        raise DecodeError(
            f"it lasts {seconds:.0f} s or more, longer than decode.max_duration_s={options.max_duration_s:g}; "
            "cut it up or raise the limit"
        )


# Reading -------------------------------------------------------------------------------------------


class _Reader:
    """Demuxes and decodes one stream to its end, over whatever can be skipped."""

    def __init__(self, container: InputContainer, stream: VideoStream, beat: Callable[[], None]):
        self.container, self.stream, self.beat = container, stream, beat
        self.packets: list[tuple[int, int, int]] = []
        self.refused: list[str] = []  # why, for each packet that the decoder refused
        self.damaged = 0
        self.stopped = ""  # why reading ended before the end of the file

    def frames(self) -> Iterator[VideoFrame]:
        """In the decoder's order of presentation."""
        from av.error import EOFError, FFmpegError, MemoryError

        packets = self.container.demux(self.stream)
        decoder = self.stream.codec_context
        while True:
            self.beat()
            try:
                packet = next(packets, None)
            except FFmpegError as e:
                self.stopped, packet = str(e.strerror), None
            if packet is not None and packet.size:
                pts = NO_PTS if packet.pts is None else packet.pts
                dts = NO_PTS if packet.dts is None else packet.dts
                self.packets.append((pts, dts, packet.is_keyframe))
            try:
                for frame in decoder.decode(packet):
                    self.damaged += frame.is_corrupt
                    yield frame
            except EOFError:  # flushed before
                return
            except MemoryError:
                raise
            except FFmpegError as e:
                self.refused.append(str(e.strerror))
            if packet is None:
                return

    def reason(self) -> str:
        reason = self.stopped or (self.refused[0] if self.refused else "")
        return f" ({reason.lower()})" if reason else ""

    def warnings(self) -> list[str]:
        found = []
        if self.refused:
            n = len(self.refused)
            found.append(
                f"{n} of {len(self.packets)} packets could not be decoded ({self.refused[0].lower()})"
            )
        if self.damaged:
            found.append(f"damaged frames: {self.damaged}")
        if self.stopped:
            found.append(f"reading stopped before the end ({self.stopped.lower()})")
        return found


class _Clock:
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


# Pictures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes upright: first transposed, then flipped."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @classmethod
    def of(cls, matrix: bytes) -> Orientation:
        """From a display matrix: int32 [3, 3] in native order, (x', y') = (a·x + c·y, b·x + d·y).

        ISO/IEC 14496-12, 6.2.2 (libavutil/display.h); angles between are taken to the nearest right angle.
        """
        (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32, 9).reshape(3, 3).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    @property
    def rotation(self) -> int:
        """Degrees counter-clockwise (of a mirrored picture, those before it is flipped left to right)."""
        if self.transpose:
            return 90 if self.flip_y else 270
        return 180 if self.flip_y else 0

    def upright(self, pictures: np.ndarray) -> np.ndarray:
        """[n, h, w, …] stored → [n, h, w, …] upright, a view."""
        if self.transpose:
            pictures = pictures.swapaxes(1, 2)
        return pictures[:, :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


class _Scaler:
    """Scales frames (swscale, bicubic) so that, made upright, they have one size."""

    def __init__(self, size: tuple[int, int], pix_fmt: str, orientation: Orientation):
        from av.video.reformatter import Interpolation, VideoReformatter

        self.width, self.height = size[::-1] if orientation.transpose else size  # as stored
        self.pix_fmt, self.orientation = pix_fmt, orientation
        self.reformatter, self.bicubic = VideoReformatter(), Interpolation.BICUBIC

    def stored(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [h, w] or [h, w, 3]."""
        return self.reformatter.reformat(
            frame, self.width, self.height, self.pix_fmt, interpolation=self.bicubic, threads=1
        ).to_ndarray()

    def upright(self, frame: VideoFrame) -> np.ndarray:
        return np.ascontiguousarray(self.orientation.upright(self.stored(frame)[None])[0])


class _Stack:
    """Scaled frames in one growing block of memory."""

    def __init__(self, scaler: _Scaler):
        self.scaler = scaler
        self.data = bytearray()

    def add(self, frame: VideoFrame) -> None:
        self.data += self.scaler.stored(frame).tobytes()

    def upright(self) -> np.ndarray:
        """uint8 [n, h, w] or [n, h, w, 3]."""
        colours = () if self.scaler.pix_fmt == "gray" else (3,)
        stored = np.frombuffer(self.data, np.uint8).reshape(
            -1, self.scaler.height, self.scaler.width, *colours
        )
        return np.ascontiguousarray(self.scaler.orientation.upright(stored))


class _Grid:
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


class _Pictures:
    """What is kept of the frames as they pass; shapes and sizes are those of the first."""

    def __init__(self, first: VideoFrame, stored_sar: Fraction, time_base: Fraction, options: Decode):
        matrix: Any = first.side_data.get("DISPLAYMATRIX")
        self.orientation = Orientation() if matrix is None else Orientation.of(bytes(matrix))
        turned = self.orientation.transpose
        self.width, self.height = (first.height, first.width) if turned else (first.width, first.height)
        self.sar = 1 / stored_sar if turned else stored_sar
        self.pix_fmt = first.format.name
        self.options = options
        self.stored_size = (first.width, first.height)
        self.changes = 0
        self.first_change = ""
        self.approximate = False  # a colour matrix that had to be guessed

        def scaler(size: tuple[int, int], pix_fmt: str) -> _Scaler:
            return _Scaler(size, pix_fmt, self.orientation)

        self.thumbs = _Stack(scaler(THUMB, "rgb24"))
        self.grey = _Stack(scaler(fitted(self.width, self.height, self.sar, options.grey_size), "gray"))
        self.grey_frame: list[int] = []
        self.grey_grid = _Grid(options.grey_fps, time_base)
        self.sample = scaler(fitted(self.width, self.height, self.sar, options.sample_size), "bgr24")
        self.samples: list[tuple[int, bytes]] = []
        self.sample_grid = _Grid(options.sample_fps, time_base)

    def add(self, n: int, frame: VideoFrame, elapsed: int) -> None:
        """Frame n, that many ticks after the first."""
        if (frame.width, frame.height) != self.stored_size:
            (w, h), self.stored_size = self.stored_size, (frame.width, frame.height)
            self.first_change = self.first_change or f"{w}x{h} to {frame.width}x{frame.height} at frame {n}"
            self.changes += 1
        if frame.colorspace in UNKNOWN_COLOURS:
            frame.colorspace, self.approximate = UNSPECIFIED, True
        self.thumbs.add(frame)
        if self.grey_grid.due(elapsed):
            self.grey.add(frame)
            self.grey_frame.append(n)
        if self.sample_grid.due(elapsed):
            self.samples.append((n, self._jpeg(frame)))

    def warnings(self) -> list[str]:
        found = []
        if self.changes:
            more = f" and {self.changes - 1} more times" if self.changes > 1 else ""
            found.append(f"the picture size changes from {self.first_change}{more}")
        if self.approximate:
            found.append("the colour matrix is not supported and was taken for BT.601")
        return found

    def _jpeg(self, frame: VideoFrame) -> bytes:
        import cv2

        quality = [cv2.IMWRITE_JPEG_QUALITY, self.options.jpeg_quality]
        return cv2.imencode(".jpg", self.sample.upright(frame), quality)[1].tobytes()


def fitted(width: int, height: int, sar: Fraction, longest: int) -> tuple[int, int]:
    """The largest size with square pixels, no side enlarged and none above `longest`."""
    w, h = (width, height / sar) if sar > 1 else (width * sar, Fraction(height))
    shrink = min(Fraction(1), longest / Fraction(max(w, h)))
    return max(1, round(w * shrink)), max(1, round(h * shrink))
