"""ffmpeg's options: the encoder, and the filters that give a clip its picture."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.geometry import DEINTERLACE, UNSPECIFIED, Colours, Filter, Geometry
from pipeline.recipe import Cut

PRESETS = (  # x264's, from the slowest
    *("placebo", "veryslow", "slower", "slow", "medium"),
    *("fast", "faster", "veryfast", "superfast", "ultrafast"),
)


def picture_size(g: Geometry, height: int | None) -> tuple[int, int]:
    """Width and height of a clip: even, as 4:2:0 needs, and with `height` the shorter side scaled down to it."""
    w, h = (max(2, side - side % 2) for side in g.size)
    if height is None or height >= min(w, h):
        return w, h
    ratio = height / min(w, h)
    return max(2, 2 * round(w * ratio / 2)), max(2, 2 * round(h * ratio / 2))


def picture_filters(
    g: Geometry, time_base: Fraction, height: int | None, lut: Path | None = None
) -> list[Filter]:
    """Filters from the decoder's pictures, which ffmpeg leaves as they are stored (`as_stored`), to the clip's.

    An odd column or row is cut off, a single one doubled; the pixel shape stays. Pictures of another size in the
    clip are scaled to that of the geometry.

    Args:
        lut: .cube file from HDR to BT.709; used where the geometry asks for that.
    """
    w, h = g.size
    size = picture_size(g, height)
    filters: list[Filter] = [
        ("sidedata", [], {"mode": "delete", "type": "DISPLAYMATRIX"}),
        ("setparams", [], g.colours.tags()),
        ("scale", list(g.stored), {}),
    ]
    if g.deinterlace:
        # bwdif halves the time base
        filters += [DEINTERLACE, ("settb", [f"{time_base.numerator}/{time_base.denominator}"], {})]
    filters += [*g.cropping(), *g.orientation.filters()]
    if w == 1 or h == 1:
        filters.append(("scale", list(size), {"flags": "neighbor"}))
    elif w % 2 or h % 2:
        filters.append(("crop", [w - w % 2, h - h % 2, 0, 0], {}))
    if size[0] < w - 1:
        filters.append(("scale", list(size), {}))
    return [
        *filters,
        ("setsar", [f"{g.sar.numerator}/{g.sar.denominator}"], {"max": 65535}),
        *_colour_filters(g, lut),
    ]


FINE = {"flags": "bicubic+full_chroma_int+accurate_rnd"}


def _colour_filters(g: Geometry, lut: Path | None) -> list[Filter]:
    """To the clip's pixel format, range and matrix."""
    c, pix_fmt, filters = g.colours, clip_format(g), list[Filter]()
    span = "pc" if c.full_range else "tv"
    if g.tone_map:
        if c.model == "yuv":
            filters.append(("scale", [], FINE | {"in_range": span, "in_color_matrix": SWSCALE[c.matrix]}))
        filters += [("format", ["gbrp16le"], {}), ("lut3d", [], {"file": str(lut), "interp": "tetrahedral"})]
    if g.tone_map or c.model == "rgb":
        filters.append(
            ("scale", [], FINE | {"out_range": "tv", "out_color_matrix": SWSCALE[_shown(g).matrix]})
        )
    elif c.full_range:
        filters.append(("scale", [], {"in_range": "pc", "out_range": "tv"}))
    changed = g.tone_map or c.full_range
    return [
        *filters,
        ("format", [pix_fmt], {}),
        ("setparams", [], _shown(g).tags(False if changed else None)),
    ]


SWSCALE = {
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "smpte170m",
    7: "smpte240m",
    9: "bt2020",
    UNSPECIFIED: "bt601",
}


def _shown(g: Geometry) -> Colours:
    """The clip's colours."""
    c = g.colours
    if g.tone_map:
        return Colours("yuv", 1, 1, 1)
    if c.model == "rgb":  # BT.601, so that also readers that look at no tags see what is meant
        return Colours("yuv", 9 if c.hdr else 6, c.primaries, c.transfer)
    return Colours("yuv", c.matrix, c.primaries, c.transfer)


def clip_format(g: Geometry) -> str:
    """Pixel format of the clips: 10 bit for HDR that is kept."""
    return "yuv420p10le" if g.colours.hdr and not g.tone_map else "yuv420p"


def colour_options(g: Geometry) -> dict[str, Any]:
    """Options of the encoder for the clip's colours; ffmpeg before 5 does not take them from the pictures."""
    c = _shown(g)
    known = {"colorspace": c.matrix, "color_primaries": c.primaries, "color_trc": c.transfer}
    return {name: n for name, n in known.items() if n != UNSPECIFIED} | {"color_range": "tv"}


def as_stored(version: tuple[int, ...]) -> dict[str, Any]:
    """ffmpeg's options of an input whose pictures come as they are stored.

    Turning is left to `picture_filters`, and so is cropping by the container's word, which ffmpeg does since
    7.1. The codec's own cropping is done to the pixel, which ffmpeg before 7.1 has to be told. And filters do
    not begin anew where a picture's size changes: they would count anew, and lose what they hold.
    """
    cropping = {"apply_cropping": "codec"} if version >= (7, 1) else {"flags:v": "+unaligned"}
    return {"noautorotate": None, "reinit_filter": 0} | cropping


def encoder(cut: Cut, fps: float) -> dict[str, Any]:
    """ffmpeg's options for an encoder at constant quality, on one thread where it runs on the CPU.

    Args:
        fps: the source's mean rate, for the distance between keyframes and the header.
    """
    rate = Fraction(fps).limit_denominator(1001) or Fraction(25)
    name = cut.codec
    options: dict[str, Any] = {"c:v": name, "g": max(1, round(cut.keyframe_s * rate)), "threads:v": 1}
    speed = PRESETS.index(cut.preset) if cut.preset in PRESETS else None  # 0, slowest, to 9
    if name == "libx264":
        # The time base is no frame rate, but some ffmpeg take it for one and write an absurd level. And x264 takes
        # detail from fast, busy pictures (32 dB at CRF 18 in an aerial view at 60 fps): no more than this.
        x264 = f"fps={rate}:qpmax={min(51, cut.crf + 7)}"
        return options | {"preset": cut.preset, "crf": cut.crf, "x264-params": x264}
    if name == "libx265":
        x265 = "pools=none:frame-threads=1:log-level=error"
        return options | {"preset": cut.preset, "crf": cut.crf, "x265-params": x265, "tag:v": "hvc1"}
    if name == "libsvtav1":
        number = cut.preset if speed is None else min(12, 3 + speed)
        return options | {"preset": number, "crf": cut.crf, "svtav1-params": "lp=1"}
    if name in ("libaom-av1", "libvpx-vp9", "libvpx"):
        number = cut.preset if speed is None else min(8 if name == "libaom-av1" else 5, speed)
        return options | {"cpu-used": number, "crf": cut.crf, "b:v": 0}
    if name.endswith("_nvenc"):
        number = (
            "p4"
            if speed is None and not cut.preset
            else cut.preset
            if speed is None
            else f"p{max(1, 7 - speed)}"
        )
        return options | {"preset": number, "rc": "vbr", "cq": cut.crf, "b:v": 0}
    return options | {"q:v": cut.crf}
