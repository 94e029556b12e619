"""What is kept of each frame: upright, at a few sizes, in a few rhythms."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # the child has no need of pyarrow and pydantic
    from av.video.frame import VideoFrame

    from pipeline.recipe import Decode

from pipeline.io.answer import Rows, Strings
from pipeline.split.clock import Grid

THUMB = (48, 27)  # width, height: TransNetV2's input
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
# Of AVColorSpace (ITU-T H.273, table 4) what swscale refuses: YCgCo, BT.2020 constant luminance, ICtCp, …
UNKNOWN_COLOURS = {8, *range(10, 18)}


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
    """Scaled frames, upright, in `rows`: uint8 [n, h, w] or [n, h, w, 3]."""

    def __init__(self, scaler: _Scaler):
        turned = scaler.orientation.transpose
        size = (scaler.width, scaler.height) if turned else (scaler.height, scaler.width)
        self.scaler = scaler
        self.rows = Rows(size if scaler.pix_fmt == "gray" else (*size, 3))

    def add(self, frame: VideoFrame) -> None:
        self.rows.append(self.scaler.orientation.upright(self.scaler.stored(frame)[None])[0])


class Pictures:
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
        self.grey_grid = Grid(options.grey_fps, time_base)
        self.sample = scaler(fitted(self.width, self.height, self.sar, options.sample_size), "bgr24")
        self.sample_frame: list[int] = []
        self.sample_jpeg = Strings()
        self.sample_grid = Grid(options.sample_fps, time_base)

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
            self.sample_jpeg.append(self._jpeg(frame))
            self.sample_frame.append(n)

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
