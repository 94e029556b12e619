"""The frames of a clip that models were shown, taken again from its own mp4.

The mp4 holds frame `start_frame` of the source as its frame 0, upright and at the source's times, so the same
frames are found by number. They have been through the encoder: pictures are as close to the first ones as the
clip's quality (cut.crf) makes them, and smaller where cut.height is below decode.sample_size.
Runs in a child process (pipeline.io.isolate); imports nothing but numpy, av and cv2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

import numpy as np

from pipeline.io.answer import Of
from pipeline.io.ffmpeg import OPEN
from pipeline.split.clock import Grid
from pipeline.split.cropping import container_crop
from pipeline.split.pictures import Pictures

if TYPE_CHECKING:  # the child has no need of pydantic
    from pipeline.recipe import Decode


@dataclass
class Resampled:
    """What an mp4 holds."""

    pts: Annotated[np.ndarray, Of("int64", "n")]  # of every frame, ticks of time_base
    time_base: Fraction
    jpegs: list[bytes]  # of the wanted frames that are there, in their order
    frames: Annotated[np.ndarray, Of("int64", "s")]  # which these are


class _These(Grid):
    """Frames by number, where a Grid goes by time."""

    def __init__(self, frames: Sequence[int]):
        self.frames = set(frames)

    def due(self, elapsed: int) -> bool:
        return elapsed in self.frames


def resample(
    path: str, wanted: list[int] | None, options: Decode, beat: Callable[[], None] = lambda: None
) -> Resampled:
    """Decode an mp4 that the cut wrote.

    Args:
        wanted: frames to keep, numbered from 0, increasing; none: `sample_fps` of them a second, as of a source.
        options: anything with the fields of `recipe.Decode`; pictures are made as the first time.
    """
    import av

    pts: list[int] = []
    pictures: Pictures | None = None
    with av.open(f"file:{path}", options=OPEN, metadata_errors="replace") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        time_base = stream.time_base or Fraction(1, 90000)
        for n, frame in enumerate(container.decode(stream)):
            beat()
            pts.append(frame.pts or 0)
            if pictures is None:
                crop = container_crop(path, container.format.name, 0, (frame.width, frame.height))
                pictures = Pictures(frame, stream, time_base, options, crop)
                pictures.grey_grid = _These([])
                if wanted is not None:
                    pictures.sample_grid = _These(wanted)
            pictures.add(n, frame, n if wanted is not None else pts[n] - pts[0])
        if pictures is not None:
            pictures.end()
    jpegs = [] if pictures is None else pictures.sample_jpeg.whole()
    kept = [] if pictures is None else pictures.sample_frame
    return Resampled(np.array(pts, np.int64), time_base, jpegs, np.array(kept, np.int64))
