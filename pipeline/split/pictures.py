"""What is kept of each frame: as it is shown, at a few sizes, in a few rhythms."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the child has no need of pyarrow and pydantic
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

    from pipeline.recipe import Decode

from pipeline.geometry import (
    DEINTERLACE,
    SAME_ASPECT,
    SMALLEST_INTERLACED,
    Colours,
    Filter,
    Geometry,
    Orientation,
    askew,
)
from pipeline.io.answer import Rows, Strings
from pipeline.split.clock import Grid
from pipeline.split.cropping import Crop
from pipeline.split.tone import to_709

THUMB = (48, 27)  # width, height: TransNetV2's input
GREY = np.array([0.2126, 0.7152, 0.0722])  # luma of BT.709


# Scaling -------------------------------------------------------------------------------------------


class Scaler:
    """Scales frames (swscale, bicubic) so that, made upright, they have one size.

    Args:
        fine: chroma at full resolution and exact rounding, for pictures that are looked at closely.
    """

    def __init__(self, size: tuple[int, int], pix_fmt: str, geometry: Geometry, fine: bool = False):
        from av.video.reformatter import Interpolation, VideoReformatter

        self.orientation, self.colours = geometry.orientation, geometry.colours
        self.width, self.height = size[::-1] if self.orientation.transpose else size  # as stored
        self.pix_fmt = pix_fmt
        self.reformatter, self.flags = VideoReformatter(), Interpolation.BICUBIC
        if fine:
            self.flags |= Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

    def stored(self, frame: VideoFrame) -> np.ndarray:
        """uint8 [h, w] or [h, w, 3]."""
        if self.colours.hdr:
            return self._toned(self._scaled(frame, "rgb48le"))
        return self._scaled(frame, self.pix_fmt)

    def _scaled(self, frame: VideoFrame, pix_fmt: str) -> np.ndarray:
        return self.reformatter.reformat(
            frame, self.width, self.height, pix_fmt, interpolation=self.flags, threads=1
        ).to_ndarray()

    def _toned(self, rgb48: np.ndarray) -> np.ndarray:
        shown = to_709(rgb48 / 65535, self.colours.hdr, self.colours.primaries) * 255
        if self.pix_fmt == "gray":
            shown = shown @ GREY
        elif self.pix_fmt == "bgr24":
            shown = shown[..., ::-1]
        return shown.round().astype(np.uint8)

    def upright(self, frame: VideoFrame) -> np.ndarray:
        return np.ascontiguousarray(self.orientation.upright(self.stored(frame)[None])[0])


class _Stack:
    """Scaled frames, upright, in `rows`: uint8 [n, h, w] or [n, h, w, 3]."""

    def __init__(self, scaler: Scaler):
        turned = scaler.orientation.transpose
        size = (scaler.width, scaler.height) if turned else (scaler.height, scaler.width)
        self.scaler = scaler
        self.rows = Rows(size if scaler.pix_fmt == "gray" else (*size, 3))

    def add(self, frame: VideoFrame) -> None:
        self.rows.append(self.scaler.orientation.upright(self.scaler.stored(frame)[None])[0])


# Before scaling ------------------------------------------------------------------------------------


class _Prepared:
    """Frames as they are before they are scaled: deinterlaced and cropped by libavfilter, where they need it.

    Frames that need nothing pass as they are, at no cost. From the first interlaced frame on all pass through
    bwdif, which gives them back one later and leaves alone those that are not interlaced.
    """

    def __init__(self, deinterlace: bool):
        self.deinterlace = deinterlace
        self.interlaced = False  # there was such a frame
        self.graph: Any = None
        self.made_for: object = None
        self.waiting: deque[tuple[int, int, Geometry]] = deque()

    def add(
        self, n: int, frame: VideoFrame, elapsed: int, geometry: Geometry
    ) -> Iterator[tuple[int, VideoFrame, int, Geometry]]:
        """Frame n goes in; those that are ready come out, in order, with what came in with them."""
        self.interlaced |= self.deinterlace and frame.interlaced_frame
        filters = ([DEINTERLACE] if self.interlaced else []) + geometry.cropping()
        if not filters:
            yield from self.rest()
            yield n, frame, elapsed, geometry
            return
        kind = (geometry.stored, geometry.crop, frame.format.name, self.interlaced)
        if kind != self.made_for:
            yield from self.rest()
            self.graph, self.made_for = _graph(frame, filters), kind
        self.waiting.append((n, elapsed, geometry))
        frame.pts = n
        self.graph.vpush(frame)
        yield from self._ready()

    def rest(self) -> Iterator[tuple[int, VideoFrame, int, Geometry]]:
        """What has not come out yet."""
        if self.graph is not None:
            self.graph.vpush(None)
            yield from self._ready()
            self.graph = self.made_for = None

    def _ready(self) -> Iterator[tuple[int, VideoFrame, int, Geometry]]:
        from av.error import BlockingIOError, EOFError

        while self.waiting:
            try:
                frame = self.graph.vpull()
            except (BlockingIOError, EOFError):
                return
            n, elapsed, geometry = self.waiting.popleft()
            yield n, frame, elapsed, geometry


def _graph(frame: VideoFrame, filters: list[Filter]) -> Any:
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    time_base = frame.time_base or Fraction(1, 1000)
    nodes = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    ]
    for name, args, named in filters:
        said = ":".join([*map(str, args), *(f"{k}={v}" for k, v in named.items())])
        nodes.append(graph.add(name, said))
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def _top_first(frame: VideoFrame) -> bool:
    """Whether an interlaced frame's top field is shown before the other, which PyAV does not say."""
    from av.error import BlockingIOError

    graph = _graph(frame, [("select", ["eq(interlace_type,TOPFIRST)"], {})])
    graph.vpush(frame)
    try:
        graph.vpull()
    except BlockingIOError:
        return False
    return True


# The pictures --------------------------------------------------------------------------------------


class Pictures:
    """What is kept of the frames as they pass; shapes and sizes are those of the first.

    Args:
        stream: of the frames; says the pixel shape (the container's word goes before the codec's).
        crop: what the container cuts off.
    """

    def __init__(
        self, first: VideoFrame, stream: VideoStream, time_base: Fraction, options: Decode, crop: Crop
    ):
        self.stream, self.options = stream, options
        self.follows = stream.container.format.name in SHAPELESS
        self.trouble: list[str] = []
        self.found = self._geometry(first, crop)
        self.pix_fmt = first.format.name
        self.look = (first.width, first.height, self._sar(True, True))
        self.changes = 0
        self.shapes: list[tuple[int, int, int, int, int]] = []  # Frames.shapes
        self.first_change = ""
        self.frames = self.interlaced = 0
        self.field_order = ""
        big = all(side >= least for side, least in zip(self.found.stored, SMALLEST_INTERLACED, strict=True))
        self.prepared = _Prepared(options.deinterlace and big)
        width, height = self.found.size
        sar = self.found.sar
        self.thumbs = _Stack(Scaler(THUMB, "rgb24", self.found))
        self.grey = _Stack(Scaler(fitted(width, height, sar, options.grey_size), "gray", self.found))
        self.grey_frame: list[int] = []
        self.grey_grid = Grid(options.grey_fps, time_base)
        self.now = self.found
        self.scalers: list[tuple[float, Scaler]] = []  # of samples, by aspect
        self.sample_frame: list[int] = []
        self.sample_jpeg = Strings()
        self.sample_grid = Grid(options.sample_fps, time_base)

    def _geometry(self, first: VideoFrame, crop: Crop) -> Geometry:
        matrix: Any = first.side_data.get("DISPLAYMATRIX")
        orientation = Orientation()
        if matrix is not None:
            orientation = Orientation.of(bytes(matrix))
            if askew(bytes(matrix)):
                self.trouble.append(
                    f"it asks to be turned by an odd angle and was turned by {orientation.rotation} degrees"
                )
        colours = _colours(first)
        if colours.model == "yuv" and first.colorspace not in (colours.matrix, 0, UNSPECIFIED_MATRIX):
            name = "BT.2020" if colours.matrix == 9 else "BT.601"
            self.trouble.append(f"the colour matrix is not supported and was taken for {name}")
        sar = self._sar(True, True)
        return Geometry(
            stored=(first.width, first.height),
            crop=crop,
            orientation=orientation,
            sar=1 / sar if orientation.transpose else sar,
            colours=colours,
            tone_map=bool(colours.hdr) and self.options.hdr == "tone_map",
        )

    def _sar(self, first: bool, key: bool) -> Fraction:
        """Of the frame that has just been decoded, as stored.

        libav knows the newest the decoder has read, which holds from the next keyframe on that it puts out.
        """
        if first or not self.follows:
            return self.stream.sample_aspect_ratio or Fraction(1)
        return (key and self.stream.codec_context.sample_aspect_ratio) or self.look[2]

    @property
    def geometry(self) -> Geometry:
        """Once all frames have passed."""
        return replace(self.found, deinterlace=self.prepared.interlaced)

    def add(self, n: int, frame: VideoFrame, elapsed: int) -> None:
        """Frame n, that many ticks after the first."""
        look = (frame.width, frame.height, self._sar(n == 0, frame.key_frame))
        if look != self.look:
            before, self.look = self.look, look
            self.first_change = self.first_change or f"{_said(before)} to {_said(look)} at frame {n}"
            self.changes += 1
            width, height, sar = look
            self.shapes.append((n, width, height, sar.numerator, sar.denominator))
            self.now = self.found.reshaped(*look)
        self.frames += 1
        if frame.interlaced_frame:
            self.interlaced += 1
            self.field_order = self.field_order or ("top" if _top_first(frame) else "bottom")
        for ready in self.prepared.add(n, frame, elapsed, self.now):
            self._keep(*ready)

    def end(self) -> None:
        """No more frames come."""
        for ready in self.prepared.rest():
            self._keep(*ready)

    def _keep(self, n: int, frame: VideoFrame, elapsed: int, geometry: Geometry) -> None:
        self._recolour(frame)
        self.thumbs.add(frame)
        if self.grey_grid.due(elapsed):
            self.grey.add(frame)
            self.grey_frame.append(n)
        if self.sample_grid.due(elapsed):
            self.sample_jpeg.append(self._jpeg(frame, geometry))
            self.sample_frame.append(n)

    def _recolour(self, frame: VideoFrame) -> None:
        """A later frame's own say must not make the models see what no clip shows."""
        colours = self.found.colours
        if colours.model == "yuv":
            frame.colorspace, frame.color_range = colours.matrix, 2 if colours.full_range else 1

    def counts(self) -> dict[str, int]:
        return {"picture_changes": self.changes} if self.changes else {}

    def warnings(self) -> list[str]:
        found = list(self.trouble)
        if self.changes:
            more = f" and {self.changes - 1} more times" if self.changes > 1 else ""
            found.append(f"the picture size changes from {self.first_change}{more}")
        return found

    def _jpeg(self, frame: VideoFrame, geometry: Geometry) -> bytes:
        import cv2

        aspect = geometry.aspect
        scaler = next((s for a, s in self.scalers if abs(aspect / a - 1) <= SAME_ASPECT), None)
        if scaler is None:  # one a shape, so that all of a clip have one size
            size = fitted(*geometry.size, geometry.sar, self.options.sample_size)
            scaler = Scaler(size, "bgr24", geometry, fine=True)
            self.scalers.append((aspect, scaler))

        quality = [cv2.IMWRITE_JPEG_QUALITY, self.options.jpeg_quality]
        return cv2.imencode(".jpg", scaler.upright(frame), quality)[1].tobytes()


# Containers that have no word for the pixel shape: the codec's holds, which may change
SHAPELESS = {
    "mpegts",
    "mpeg",
    "mpegvideo",
    "h264",
    "hevc",
    "m4v",
    "flv",
    "live_flv",
    "ivf",
    "av1",
    "obu",
    "dv",
}
UNSPECIFIED_MATRIX = 2
FULL_RANGE = 2  # AVCOL_RANGE_JPEG


def _colours(frame: VideoFrame) -> Colours:
    form = frame.format
    model = "yuv"
    if form.is_rgb or form.has_palette or form.name.startswith(("xyz", "bayer")):
        model = "rgb"
    elif form.name.startswith(("gray", "mono", "ya8", "ya16")):
        model = "grey"
    full = frame.color_range == FULL_RANGE or form.name.startswith("yuvj")
    return Colours.of(model, frame.colorspace, frame.color_primaries, frame.color_trc, full)


def _said(look: tuple[int, int, Fraction]) -> str:
    width, height, sar = look
    return f"{width}x{height}" + (f" (pixels {sar.numerator}:{sar.denominator})" if sar != 1 else "")


def marks(thumbs: np.ndarray) -> np.ndarray:
    """uint8 [n, 27, 48, 3] RGB → uint8 [n, 9, 16] grey: by which a frame is known again among its neighbours."""
    out = np.empty((len(thumbs), 9, 16), np.uint8)
    for i in range(0, len(thumbs), 1024):
        some = thumbs[i : i + 1024]
        out[i : i + 1024] = some.reshape(len(some), 9, 3, 16, 3, 3).mean((2, 4, 5)).round()
    return out


def fitted(width: int, height: int, sar: Fraction, longest: int) -> tuple[int, int]:
    """The largest size with square pixels, no side enlarged and none above `longest`."""
    w, h = (width, height / sar) if sar > 1 else (width * sar, Fraction(height))
    shrink = min(Fraction(1), longest / Fraction(max(w, h)))
    return max(1, round(w * shrink)), max(1, round(h * shrink))
