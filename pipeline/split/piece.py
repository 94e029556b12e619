"""One clip on its way into the tar, and which clips one process cuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.record import Clip, Video

# An x264 encoder with its lookahead takes about 70 bytes a pixel: a process stays below 0.6 GB.
PIXELS = 8 * 1280 * 720  # of all clips that one process encodes
MOST = 16  # clips a process, however small
GAP_S = 20.0  # from one clip to the next: rather seek in a new process than decode what nobody wants


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

    @property
    def pts(self) -> np.ndarray:
        """PTS of its frames, int64 [n], ticks of the source's time base."""
        assert self.video.frames is not None
        return self.video.frames.pts[self.clip.start_frame : self.clip.end_frame]

    @property
    def edges(self) -> np.ndarray:
        """When each frame appears and the last one ends, int64 [n + 1], ticks from the clip's start."""
        end = self.video.pts_of(self.clip.end_frame)
        return np.append(self.pts, end) - self.pts[0]

    def __str__(self) -> str:
        return f"the clip at {self.clip.start_s:.3f}–{self.clip.end_s:.3f} s"


def groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Runs of neighbouring clips that one process decodes and encodes, bounded in memory."""
    group: list[Piece] = []
    for piece in pieces:
        v = piece.video
        most = max(1, min(MOST, PIXELS // (v.width * v.height)))
        if group and (len(group) >= most or piece.clip.start_s - max(p.clip.end_s for p in group) > GAP_S):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
