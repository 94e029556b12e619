"""How stored pictures are shown: which part of them, which way up, of what shape, in what colours.

The one place that knows. The decode finds a source's `Geometry` once, from its container and its first frame;
what the models see (`pipeline.split.pictures`) and what is written (`pipeline.split.encode`) both follow it, and
what swscale, PyAV or ffmpeg of one age or another would do by themselves is switched off. It needs no more than
numpy: the decoding child, which has no use for pyarrow, imports it too.

The order is: interlaced pictures are deinterlaced; then crop, turn and mirror; then the size they are wanted in;
then the colours. Size and pixel shape may change in mid-stream (`reshaped`), the rest stays the first frame's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

Filter = tuple[str, list[Any], dict[str, Any]]  # an ffmpeg filter: name, arguments, options

# Numbers of ITU-T H.273, which are also libav's AVColorSpace, AVColorPrimaries and AVColorTransferCharacteristic.
UNSPECIFIED = 2
# What swscale converts, and every ffmpeg since 4.2 agrees on; not YCgCo, BT.2020 constant luminance, ICtCp, …
MATRICES = {1: "bt709", 2: "unknown", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020nc"}
PRIMARIES = {
    1: "bt709",
    2: "unknown",
    4: "bt470m",
    5: "bt470bg",
    6: "smpte170m",
    7: "smpte240m",
    8: "film",
    9: "bt2020",
    10: "smpte428",
    11: "smpte431",
    12: "smpte432",
    22: "ebu3213",
}
TRANSFERS = {
    1: "bt709",
    2: "unknown",
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    9: "log",
    10: "log_sqrt",
    11: "iec61966-2-4",
    12: "bt1361",
    13: "iec61966-2-1",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "smpte2084",
    17: "smpte428",
    18: "arib-std-b67",
}
MODELS = ("yuv", "rgb", "grey")  # rgb: also palettes and XYZ
HDR = {16: "pq", 18: "hlg"}  # transfer characteristics of high dynamic range (ITU-R BT.2100)


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
        a, b, c, d = _linear(matrix)
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, c < 0, b < 0)
        return cls(False, a < 0, d < 0)

    @property
    def rotation(self) -> int:
        """Degrees counter-clockwise (of a mirrored picture, those before it is flipped left to right)."""
        if self.transpose:
            return 90 if self.flip_y else 270
        return 180 if self.flip_y else 0

    @property
    def mirrored(self) -> bool:
        return self.transpose ^ self.flip_x ^ self.flip_y

    def upright(self, pictures: np.ndarray) -> np.ndarray:
        """[n, h, w, …] stored → [n, h, w, …] upright, a view."""
        if self.transpose:
            pictures = pictures.swapaxes(1, 2)
        return pictures[:, :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def filters(self) -> list[Filter]:
        found: list[Filter] = [("transpose", [0], {})] if self.transpose else []  # 0: about the main diagonal
        if self.flip_x:
            found.append(("hflip", [], {}))
        return [*found, ("vflip", [], {})] if self.flip_y else found


def askew(matrix: bytes) -> bool:
    """Whether a display matrix turns by something else than right angles (more than 1 in 100 off)."""
    a, b, c, d = map(abs, _linear(matrix))
    return min(a + d, b + c) > 0.01 * max(a + d, b + c)


def _linear(matrix: bytes) -> tuple[int, int, int, int]:
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32, 9).reshape(3, 3).tolist()
    return a, b, c, d


@dataclass(frozen=True)
class Colours:
    """What the numbers of a picture mean; the three names are those of ITU-T H.273."""

    model: str = "yuv"  # of MODELS
    matrix: int = UNSPECIFIED  # of MATRICES; unspecified is BT.601, as swscale has it
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    full_range: bool = False  # luma from 0 to 255, not from 16 to 235

    @classmethod
    def of(cls, model: str, matrix: int, primaries: int, transfer: int, full_range: bool) -> Colours:
        """From what a decoder says; what is reserved or not supported becomes unspecified."""
        if model != "yuv" or matrix not in MATRICES:
            matrix = UNSPECIFIED
        if transfer in HDR and model == "yuv" and matrix == UNSPECIFIED:
            matrix = 9  # BT.2100 knows no BT.601
        return cls(
            model,
            matrix,
            primaries if primaries in PRIMARIES else UNSPECIFIED,
            transfer if transfer in TRANSFERS else UNSPECIFIED,
            full_range or model != "yuv",
        )

    @property
    def hdr(self) -> str:
        """'pq', 'hlg' or ''."""
        return HDR.get(self.transfer, "")

    def tags(self, full_range: bool | None = None) -> dict[str, Any]:
        """Options of ffmpeg's setparams."""
        said: dict[str, Any] = {"color_primaries": self.primaries, "color_trc": self.transfer}
        if self.model == "yuv":
            said["colorspace"] = self.matrix
        if full_range is not None:
            said["range"] = "pc" if full_range else "tv"
        return said


@dataclass(frozen=True)
class Geometry:
    """How the pictures of one source are shown."""

    stored: tuple[int, int] = (0, 0)  # width and height as the decoder gives them
    crop: tuple[int, int, int, int] = (
        0,
        0,
        0,
        0,
    )  # left, top, right, bottom: stored pixels that are not shown
    orientation: Orientation = field(default_factory=Orientation)
    sar: Fraction = Fraction(1)  # shape of one upright pixel, width ÷ height
    deinterlace: bool = False  # frames that are flagged as interlaced
    colours: Colours = field(default_factory=Colours)
    tone_map: bool = False  # clips are shown in BT.709 instead of HDR (the models always see that)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright, in stored pixels."""
        left, top, right, bottom = self.crop
        w, h = self.stored[0] - left - right, self.stored[1] - top - bottom
        return (h, w) if self.orientation.transpose else (w, h)

    @property
    def aspect(self) -> float:
        """Width ÷ height as shown."""
        return self.size[0] * float(self.sar) / self.size[1]

    def reshaped(self, width: int, height: int, sar: Fraction) -> Geometry:
        """For pictures of another stored size and pixel shape (as stored, width ÷ height) further on."""
        left, top, right, bottom = self.crop
        fits = left + right < width and top + bottom < height
        return replace(
            self,
            stored=(width, height),
            crop=self.crop if fits else (0, 0, 0, 0),
            sar=1 / sar if self.orientation.transpose else sar,
        )

    @property
    def as_stored(self) -> bool:
        """Whether a copy of the stream, which carries pixel shape and colours only, is shown the same."""
        return (
            not any(self.crop)
            and self.orientation == Orientation()
            and not self.deinterlace
            and not self.tone_map
        )

    def plain(self) -> dict[str, int | str | Fraction]:
        """As plain values, for the answer of the decoding child; `of` is the way back."""
        o, c = self.orientation, self.colours
        return {
            **{f"stored{i}": v for i, v in enumerate(self.stored)},
            **{f"crop{i}": v for i, v in enumerate(self.crop)},
            "transpose": int(o.transpose),
            "flip_x": int(o.flip_x),
            "flip_y": int(o.flip_y),
            "sar": self.sar,
            "deinterlace": int(self.deinterlace),
            "tone_map": int(self.tone_map),
            "model": c.model,
            "matrix": c.matrix,
            "primaries": c.primaries,
            "transfer": c.transfer,
            "full_range": int(c.full_range),
        }

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Geometry:
        """Raises KeyError, TypeError, ValueError for what describes no picture."""
        found = cls(
            stored=(said["stored0"], said["stored1"]),
            crop=(said["crop0"], said["crop1"], said["crop2"], said["crop3"]),
            orientation=Orientation(*(bool(said[name]) for name in ("transpose", "flip_x", "flip_y"))),
            sar=said["sar"],
            deinterlace=bool(said["deinterlace"]),
            colours=Colours(
                said["model"],
                said["matrix"],
                said["primaries"],
                said["transfer"],
                bool(said["full_range"]),
            ),
            tone_map=bool(said["tone_map"]),
        )
        c = found.colours
        if not (
            all(0 < side < 1 << 20 for side in (*found.stored, *found.size))
            and min(found.crop) >= 0
            and found.sar > 0
            and c.model in MODELS
            and (c.matrix in MATRICES and c.primaries in PRIMARIES and c.transfer in TRANSFERS)
        ):
            raise ValueError("no geometry")
        return found

    def cropping(self) -> list[Filter]:
        if not any(self.crop):
            return []
        left, top, right, bottom = self.crop
        w, h = self.stored
        return [("crop", [w - left - right, h - top - bottom, left, top], {"exact": 1})]


SAME_ASPECT = 0.01  # relative difference below which two aspects are one: sizes are rounded

# Frame for frame: as many come out as go in. Frames that are not flagged pass unchanged.
DEINTERLACE: Filter = ("bwdif", [], {"mode": "send_frame", "parity": "auto", "deint": "interlaced"})
SMALLEST_INTERLACED = (3, 4)  # width and height below which bwdif refuses
