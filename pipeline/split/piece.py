"""One clip on its way into the tar, and which clips one process cuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.geometry import Geometry
from pipeline.record import Clip, Video
from pipeline.split.pictures import marks

# An x264 encoder with its lookahead takes about 70 bytes a pixel: a process stays below 0.6 GB.
PIXELS = 8 * 1280 * 720  # of all clips that one process encodes
MOST = 16  # clips a process, however small
GAP_S = 20.0  # from one clip to the next: rather seek in a new process than decode what nobody wants

# When a frame that came out is held for another than the one that was analysed, see Piece.check
NEARBY = 50  # frames to either side that are compared
CLEARER, MORE = 2.0, 0.5


class Inexact(Exception):
    """A clip did not come out as asked."""


@dataclass
class Piece:
    """One clip on its way into the tar."""

    video: Video
    clip: Clip
    path: Path  # of its mp4
    width: int = 0  # of the encoded picture, pixels
    height: int = 0
    sound: bytes | None = None  # an mp4 with its sound track, see pipeline.split.sound

    @property
    def pts(self) -> np.ndarray:
        """PTS of its frames, int64 [n], ticks of the source's time base."""
        assert self.video.frames is not None
        return self.video.frames.pts[self.clip.start_frame : self.clip.end_frame]

    @property
    def geometry(self) -> Geometry:
        """How it is shown."""
        return self.video.shown(self.clip)

    @property
    def edges(self) -> np.ndarray:
        """When each frame appears and the last one ends, int64 [n + 1], ticks from the clip's start."""
        end = self.video.end_of(self.clip.end_frame)
        return np.append(self.pts, end) - self.pts[0]

    def check(self, rgb: np.ndarray) -> None:
        """Whether its first and last frame are those analysed under their numbers. Raises Inexact.

        A frame is known by its mark, less the mean so that a constant difference of colours does not count: it may
        not be CLEARER times and MORE grey levels nearer to another frame than to its own. Still pictures pass, as
        they may: there a wrong frame shows the same.

        Args:
            rgb: the two frames, or one of one frame, each uint8 27 × 48 × 3, one after another.
        """
        frames = self.video.frames
        assert frames is not None
        if frames.marks is None:
            return
        first, last = self.clip.start_frame, self.clip.end_frame - 1
        numbers = [first] if first == last else [first, last]
        if rgb.size != len(numbers) * 27 * 48 * 3:
            raise Inexact(f"{self} came out without its first or last frame")
        for n, mark in zip(numbers, marks(rgb.reshape(-1, 27, 48, 3)), strict=True):
            near = np.arange(max(0, n - NEARBY), min(len(frames.marks), n + NEARBY + 1))
            known = frames.marks[near].reshape(len(near), -1).astype(np.float32)
            off = known - mark.reshape(-1).astype(np.float32)
            off = np.abs(off - off.mean(1, keepdims=True)).mean(1)
            own, best = float(off[n - near[0]]), int(off.argmin())
            if own > CLEARER * off[best] + MORE:
                raise Inexact(f"{self} came out with frame {near[best]} in the place of {n}")

    def __str__(self) -> str:
        return f"the clip at {self.clip.start_s:.3f}–{self.clip.end_s:.3f} s"


def groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Runs of neighbouring clips that one process decodes and encodes, bounded in memory."""
    group: list[Piece] = []
    for piece in pieces:
        w, h = piece.geometry.size
        most = max(1, min(MOST, PIXELS // (w * h)))
        if group and (len(group) >= most or piece.clip.start_s - max(p.clip.end_s for p in group) > GAP_S):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
