"""ffmpeg's options: the encoder, and the filters that give a clip its picture."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from pipeline.recipe import Cut
from pipeline.record import Video

PRESETS = (  # x264's, from the slowest
    *("placebo", "veryslow", "slower", "slow", "medium"),
    *("fast", "faster", "veryfast", "superfast", "ultrafast"),
)


def picture_size(video: Video, height: int | None) -> tuple[int, int]:
    """Width and height of a clip: even, as 4:2:0 needs, and with `height` the shorter side scaled down to it."""
    w, h = (max(2, side - side % 2) for side in (video.width, video.height))
    if height is None or height >= min(w, h):
        return w, h
    ratio = height / min(w, h)
    return max(2, 2 * round(w * ratio / 2)), max(2, 2 * round(h * ratio / 2))


def picture_filters(video: Video, height: int | None) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Filters (name, arguments, options) from the upright source picture to the clip's.

    An odd column or row is cut off, a single one doubled; the pixel shape stays. A source that changes its
    size in mid-stream keeps the first (for all others the first filter does nothing).
    """
    w, h = video.width, video.height
    size = picture_size(video, height)
    filters: list[tuple[str, list[Any], dict[str, Any]]] = [("scale", [w, h], {})]
    if w == 1 or h == 1:
        filters = [("scale", list(size), {"flags": "neighbor"})]
    elif w % 2 or h % 2:
        filters.append(("crop", [w - w % 2, h - h % 2, 0, 0], {}))
    if size[0] < w - 1:
        filters.append(("scale", list(size), {}))
    return [
        *filters,
        ("setsar", [f"{video.sar.numerator}/{video.sar.denominator}"], {"max": 65535}),
        ("format", ["yuv420p"], {}),
    ]


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
