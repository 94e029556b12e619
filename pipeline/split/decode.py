"""Each source is read and decoded once; what the later stages look at is made on the way.

`DecodeStage` runs in a worker and hands a local file to `analyse`, which runs in a child process
(`pipeline.io.isolate`) because libav may hang or crash on what strangers made. The child imports nothing but
numpy, av and cv2; full pictures live there one at a time.

The picture stream is the first one that is not a cover picture, ffmpeg's `0:V:0`. Its frames' PTS are the ones
that ffmpeg's decoder gives (`best_effort_timestamp`), so `ffmpeg -copyts` finds the same frames by them; see
`timeline` for those that had to be made up.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from pipeline.geometry import Geometry
from pipeline.io.answer import Of, Refused, checked, whole
from pipeline.io.isolate import Child, ChildError, Killed, Stalled

if TYPE_CHECKING:  # the child has no need of pyarrow and pydantic
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from pipeline.recipe import Decode
    from pipeline.record import Video

from pipeline.split.clock import NO_PTS, Clock, Ticks, timeline
from pipeline.split.cropping import container_crop
from pipeline.split.opening import (
    ENCRYPTED,
    DecodeError,
    check_limits,
    claimed_duration,
    opened,
    scrambled,
    video_stream,
)
from pipeline.split.pictures import Pictures, marks

DAMAGED, KEY, REFERRED = 1, 2, 4  # what a frame's flags say
B_FRAME = 3  # AV_PICTURE_TYPE_B
TELLING = {"h264", "mpeg1video", "mpeg2video", "mpeg4"}  # decoders that find errors in what they are given
NO_HEADER = {"mpegts", "mpeg"}  # their length is guessed from the first and the last stamp, which may jump


class DecodeStage:
    """Fills in what a Video is (size, rate, codec, …) and its `frames`."""

    name = "decode"
    whole_source = True

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
        from pipeline.stages import each, fail, patiently

        for video in each(videos):
            try:
                patiently(partial(self._decode, video))
            except Exception as e:
                fail(video, self.name, e)  # here, or run_stage would decode the whole unit again
            finally:
                if video.frames is None:  # a good one's download stays for the cut
                    release(video.source)
        return videos

    def _decode(self, video: Video) -> None:
        from pipeline.faults import SourceFault, TransientFault
        from pipeline.sources.fetch import localised

        assert self.child is not None, "setup() comes first"
        name, options = video.source.name, self.options
        with localised(video.source) as local:
            video.sha256 = local.sha256
            try:
                answer = self.child.call(
                    "pipeline.split.decode:gather",
                    local.path,
                    SimpleNamespace(**options.model_dump()),
                    stall_s=options.stall_s,
                    raises=(DecodeError,),
                )
                found = Analysis.of(answer, options.sample_size)
            except DecodeError as e:
                raise SourceFault(f"{name}: {e}") from e
            except MemoryError as e:
                limit = f"{options.max_memory_gb:g} GiB (decode.max_memory_gb)"
                raise SourceFault(
                    f"{name}: decoding it needs more memory than {limit}; raise the limit"
                ) from e
            except Stalled as e:
                raise SourceFault(
                    f"{name}: no frame for {options.stall_s:g} s; the decoder hangs on this file, re-encode it "
                    "or raise decode.stall_s"
                ) from e
            except Killed as e:
                raise TransientFault(f"{name}: the decoder is killed on this file ({e})") from e
            except (ChildError, Refused) as e:
                self.child.close()  # it may no longer be itself
                raise SourceFault(f"{name}: the decoder crashed on this file ({e}); re-encode it") from e
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
    geometry: dict[str, int | str | Fraction]  # Geometry.plain
    interlaced: float
    field_order: str
    counts: dict[str, int]
    warnings: list[str]
    pts: Annotated[np.ndarray, Of("int64", "n")]
    end_pts: int
    thumbs: Annotated[np.ndarray, Of("uint8", "n", 27, 48, 3)]
    sample_frame: Annotated[np.ndarray, Of("int64", "s")]
    sample_jpeg: list[bytes]
    grey: Annotated[np.ndarray, Of("uint8", "m", "*", "*")]
    grey_frame: Annotated[np.ndarray, Of("int64", "m")]
    packets: Annotated[np.ndarray, Of("int64", "*", 3)]
    restarts: Annotated[np.ndarray, Of("int64", "*", 3)]
    shapes: Annotated[np.ndarray, Of("int64", "*", 5)]
    by_number: bool
    flags: Annotated[np.ndarray, Of("uint8", "n")]  # DAMAGED, KEY, REFERRED
    refused: Annotated[np.ndarray, Of("int64", "*")]  # PTS of packets that the decoder refused

    @classmethod
    def of(cls, answer: Any, sample_size: int) -> Analysis:
        """From what a child answered, which may be anything. Raises Refused."""
        found = checked(cls, answer)
        n = len(found.pts)
        numbers = (found.width, found.height, found.time_base, found.sar, found.fps, found.duration_s)
        if not (
            n
            and _ascending(found.pts, int(found.pts[0]), found.end_pts)
            and len(found.sample_jpeg) == len(found.sample_frame)
            and _ascending(found.sample_frame, 0, n)
            and _ascending(found.grey_frame, 0, n)
            and _ascending(found.restarts[:, 0], 1, n)
            and _ascending(found.shapes[:, 0], 1, n)
            and ((found.shapes > 0) & (found.shapes < 1 << 31)).all()
            and all(number > 0 for number in numbers)
            and found.rotation in (0, 90, 180, 270)
            and found.shown.size == (found.width, found.height)
            and found.shown.sar == found.sar
        ):
            raise Refused("its answer contradicts itself")
        if not all(_is_sample(jpeg, sample_size) for jpeg in found.sample_jpeg):
            raise Refused("its answer holds a picture that is none")
        return found

    @property
    def shown(self) -> Geometry:
        """Raises Refused."""
        try:
            return Geometry.of(self.geometry)
        except (ValueError, KeyError, TypeError) as e:
            raise Refused("its answer holds no geometry") from e

    @property
    def samples(self) -> list[tuple[int, bytes]]:
        return list(zip(self.sample_frame.tolist(), self.sample_jpeg, strict=True))

    def fill(self, video: Video) -> None:
        from pipeline.record import Frames, Sample
        from pipeline.split import damage

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
            "interlaced",
            "field_order",
        ):
            setattr(video, name, getattr(self, name))
        video.geometry = self.shown
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
            restarts=self.restarts,
            shapes=self.shapes,
            by_number=self.by_number,
            marks=marks(self.thumbs),
            damaged=damage.spread(*(self.flags & bit > 0 for bit in (DAMAGED, KEY, REFERRED))),
            missing=damage.missing(self.pts, self.restarts[:, 0], self.refused),
            repeated=damage.repeated(self.thumbs),
        )


def _ascending(numbers: np.ndarray, least: int, end: int) -> bool:
    """Whether they grow, from no less than `least` to less than `end`."""
    return not len(numbers) or bool(
        numbers[0] >= least and numbers[-1] < end and (numbers[1:] > numbers[:-1]).all()
    )


def _is_sample(jpeg: bytes, longest: int) -> bool:
    """Whether it says that it is a JPEG of no more than that size; a small file can claim to be a huge picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture:
            return max(picture.size) <= longest
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def analyse(path: str, options: Decode, beat: Callable[[], None] = lambda: None) -> Analysis:
    """What `gather` gives, in this process: no child, and arrays in one piece."""
    return Analysis(**{name: whole(value) for name, value in gather(path, options, beat).items()})


def gather(path: str, options: Decode, beat: Callable[[], None]) -> dict[str, Any]:
    """Read a video file once and keep what `Frames` describes.

    Frames that decode are used and the trouble with others is told in `warnings`. A change of picture size or
    pixel shape in mid-stream is a warning too; thumbs and grey pictures keep the sizes the first one gave.

    Args:
        path: a local file; no other file and no network is opened, whatever it says.
        options: anything with the fields of `recipe.Decode`.
        beat: called at every packet.

    Returns the fields of Analysis; of large ones the blocks they were gathered in.

    Raises DecodeError if nothing can be decoded or a limit is exceeded.
    """
    with opened(path, options) as container:
        if container.format.name == "mpegts" and scrambled(path):
            raise DecodeError(ENCRYPTED)
        stream = video_stream(container, options)
        claimed_s = claimed_duration(container, stream)
        known_s = None if container.format.name in NO_HEADER else claimed_s
        check_limits(stream.width, stream.height, known_s, options)
        codec = stream.codec_context.codec.canonical_name
        time_base, _, step, second = Ticks.of(stream)
        longest = int(options.max_duration_s / time_base)
        reader = Reader(container, stream, beat)
        clock = Clock(step, second)
        pictures: Pictures | None = None
        duration = 0
        for n, frame in enumerate(reader.frames()):
            if pictures is None:
                nth = list(container.streams.video).index(stream)
                crop = container_crop(path, container.format.name, nth, (frame.width, frame.height))
                pictures = Pictures(frame, stream, time_base, options, crop)
            clock.read(frame.pts, frame.dts)
            if clock.elapsed > longest:
                check_limits(0, 0, float(clock.elapsed * time_base), options)
            duration = frame.duration
            pictures.add(n, frame, clock.elapsed)
        if pictures is None:
            raise DecodeError(f"no frame can be decoded{reader.reason()}; the file is damaged or incomplete")
        pictures.end()
    line = timeline(clock.stamps, step, second)
    pts, repaired, restarts = line.pts, line.repaired, line.restarts
    end_pts = int(pts[-1]) + (duration or (int(pts[-1] - pts[-2]) if len(pts) > 1 else step))
    jumped = int((pts[restarts[:, 0]] - restarts[:, 2]).sum())  # ticks in which nothing is shown
    shown_s = float((end_pts - int(pts[0]) - jumped) * time_base)
    span_s = float((int(pts[-1]) - int(pts[0]) - jumped) * time_base)
    warnings = reader.warnings() + pictures.warnings()
    if len(restarts):
        more = f" and {len(restarts) - 1} more times" if len(restarts) > 1 else ""
        at_s = float(restarts[0, 2] * time_base)
        warnings.append(f"the clock starts again at frame {restarts[0, 0]} ({at_s:.3f} s){more}")
    if repaired:
        warnings.append(f"{repaired} of {len(pts)} timestamps were missing or out of order and were made up")
    # Some headers count from 0, others from the first frame.
    ends_s = max(shown_s, float(end_pts * time_base))
    if claimed_s is not None and ends_s < claimed_s - max(1.0, 0.05 * claimed_s):
        warnings.append(
            f"the pictures end after {shown_s:.2f} s of the {claimed_s:.2f} s that the header claims"
        )
    geometry = pictures.geometry
    return {
        "codec": codec,
        "width": geometry.size[0],
        "height": geometry.size[1],
        "fps": (len(pts) - 1) / span_s if len(pts) > 1 else 1 / shown_s,
        "duration_s": shown_s,
        "time_base": time_base,
        "rotation": geometry.orientation.rotation,
        "sar": geometry.sar,
        "pix_fmt": pictures.pix_fmt,
        "geometry": geometry.plain(),
        "interlaced": pictures.interlaced / pictures.frames,
        "field_order": pictures.field_order,
        "counts": {
            "frames": len(pts),
            "timestamps_repaired": repaired,
            "clock_restarts": len(restarts),
            **pictures.counts(),
        },
        "warnings": warnings,
        "pts": pts,
        "end_pts": end_pts,
        "thumbs": pictures.thumbs.rows,
        "sample_frame": np.array(pictures.sample_frame, np.int64),
        "sample_jpeg": pictures.sample_jpeg,
        "grey": pictures.grey.rows,
        "grey_frame": np.array(pictures.grey_frame, np.int64),
        "packets": np.array(reader.packets, np.int64).reshape(-1, 3),
        "restarts": restarts,
        "shapes": np.array(pictures.shapes, np.int64).reshape(-1, 5),
        "flags": np.frombuffer(bytes(reader.flags), np.uint8),
        "refused": np.array(reader.lost, np.int64),
        "by_number": bool(repaired or restarts[:, 1].any() or not clock.own),
    }


# Reading -------------------------------------------------------------------------------------------


class Reader:
    """Demuxes and decodes one stream to its end, over whatever can be skipped."""

    def __init__(self, container: InputContainer, stream: VideoStream, beat: Callable[[], None]):
        self.container, self.stream, self.beat = container, stream, beat
        self.codec = stream.codec_context.codec.canonical_name
        self.packets: list[tuple[int, int, int]] = []
        self.refused: list[str] = []  # why, for each packet that the decoder refused
        self.lost: list[int] = []  # their PTS
        self.incomplete: set[int] = set()  # PTS of packets with bytes missing
        self.flags = bytearray()  # of each frame
        self.stopped = ""  # why reading ended before the end of the file

    def frames(self) -> Iterator[VideoFrame]:
        """In the decoder's order of presentation."""
        from av.error import EOFError, FFmpegError, MemoryError

        stamp = NO_PTS
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
                stamp = dts if packet.pts is None else pts
                if packet.is_corrupt:
                    self.incomplete.add(stamp)
                if packet.is_keyframe and packet.has_sidedata("encryption_info"):
                    raise DecodeError(ENCRYPTED)
            try:
                for frame in decoder.decode(packet):
                    self.flags.append(self._flags(frame))
                    yield frame
            except EOFError:  # flushed before
                return
            except MemoryError:
                raise
            except FFmpegError as e:
                self.refused.append(str(e.strerror))
                if packet is not None and stamp != NO_PTS:
                    self.lost.append(stamp)
            if packet is None:
                return

    def _flags(self, frame: VideoFrame) -> int:
        damaged, referred = frame.is_corrupt, frame.pict_type != B_FRAME
        if not damaged and self.codec not in TELLING:
            damaged = (frame.dts if frame.pts is None else frame.pts) in self.incomplete
            referred &= not frame.key_frame  # where recordings were joined it is whole
        return DAMAGED * damaged | KEY * frame.key_frame | REFERRED * referred

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
        damaged = sum(flags & DAMAGED for flags in self.flags)
        if damaged:
            found.append(f"damaged frames: {damaged}")
        if self.stopped:
            found.append(f"reading stopped before the end ({self.stopped.lower()})")
        return found
