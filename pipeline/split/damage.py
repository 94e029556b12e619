"""What is wrong with single frames, and how much of it a clip holds.

libavcodec says of a frame that errors were found in its data or that parts of it were made up (H.264, MPEG-2,
MPEG-4; of HEVC, VP9 and AV1 it mostly can't), the demuxer that a packet has bytes missing. Frames predicted from a
damaged one show its damage, too, until the next key frame. Frames that are not there leave a hole in the time stamps,
or are packets that the decoder refused.
"""

from __future__ import annotations

import numpy as np

from pipeline.record import Clip, Frames

SPREAD = (
    250  # frames that damage is taken to last where no key frame comes: x264's longest distance between two
)
STEADY = 0.9  # share of equal steps from which on a longer step is a hole and not the rhythm of the source


def spread(damaged: np.ndarray, key: np.ndarray, referred: np.ndarray) -> np.ndarray:
    """Frames that show damage: the damaged ones and those after a damaged one that others refer to.

    Args:
        damaged: bool [n], told by decoder or demuxer; key: key frames; referred: all but B-frames.
    """
    n = len(damaged)
    at = np.arange(n)
    start = np.maximum.accumulate(np.where(damaged & referred, at, -SPREAD - 1))
    clean = np.maximum.accumulate(np.where(key & ~damaged, at, -1))
    return damaged | ((start > clean) & (at - start < SPREAD))


def missing(pts: np.ndarray, restarts: np.ndarray, refused: np.ndarray) -> np.ndarray:
    """int32 [n]: how many frames are missing behind each.

    Args:
        pts: int64 [n]; in a source of steady rate a longer step is a hole.
        restarts: first frames on a clock that starts again; nothing is missing before one.
        refused: PTS of the packets that the decoder refused.
    """
    lost = np.zeros(len(pts), np.int32)
    steps = np.diff(pts)
    inner = np.ones(len(steps), bool)
    inner[restarts - 1] = False
    if inner.any():
        typical = float(np.median(steps[inner]))
        steady = np.abs(steps - typical) <= max(1.0, typical / 10)
        if steady[inner].mean() >= STEADY:
            holes = np.rint(steps / typical).clip(1, 1 << 30) - 1
            lost[:-1] = np.where(inner & ~steady, holes, 0)
    behind = np.searchsorted(pts, refused, side="right") - 1
    told = np.bincount(behind[behind >= 0], minlength=len(pts))
    return np.maximum(lost, told).astype(np.int32)


def repeated(thumbs: np.ndarray) -> np.ndarray:
    """bool [n]: frames that show just what the one before showed, from uint8 [n, 27, 48, 3] RGB."""
    same = np.zeros(len(thumbs), bool)
    for i in range(1, len(thumbs), 1024):
        same[i : i + 1024] = (thumbs[i : i + 1024] == thumbs[i - 1 : i - 1 + len(thumbs[i : i + 1024])]).all(
            (1, 2, 3)
        )
    return same


def measure(clip: Clip, frames: Frames) -> dict[str, float]:
    """The scores of a clip: `damaged`, share of its frames that show damage or are missing, and `repeated`."""
    inside = slice(clip.start_frame, clip.end_frame)
    found: dict[str, float] = {}
    if frames.damaged is not None and frames.missing is not None:
        lost = int(frames.missing[clip.start_frame : clip.end_frame - 1].sum())
        n = clip.end_frame - clip.start_frame + lost
        found["damaged"] = round((int(frames.damaged[inside].sum()) + lost) / n, 6)
    if frames.repeated is not None:
        found["repeated"] = round(float(frames.repeated[inside].mean()), 6)
    return found
