"""The frames of a clip that models were shown, taken again from its own mp4.

The mp4 holds frame `start_frame` of the source as its frame 0, upright and at the source's times, so the same
frames are found by number. They have been through the encoder: pictures are as close to the first ones as the
clip's quality (cut.crf) makes them, and smaller where cut.height is below decode.sample_size.
Runs in a child process (pipeline.io.isolate); imports nothing but numpy, av and cv2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import numpy as np

from pipeline.io.answer import Of
from pipeline.io.ffmpeg import OPEN
from pipeline.split.pictures import fitted


@dataclass
class Resampled:
    """What an mp4 holds."""

    pts: Annotated[np.ndarray, Of("int64", "n")]  # of every frame, ticks of time_base
    time_base: Fraction
    jpegs: list[bytes]  # of the wanted frames that are there, in their order


def resample(
    path: str, wanted: list[int], size: int, quality: int, beat: Callable[[], None] = lambda: None
) -> Resampled:
    """Decode an mp4 that the cut wrote.

    Args:
        wanted: frames to keep, numbered from 0, increasing.
        size: longer side of a kept frame, pixels (never enlarged).
        quality: of the JPEGs.
    """
    import av
    import cv2
    from av.video.reformatter import Interpolation, VideoReformatter

    keep, pts, jpegs = set(wanted), [], []
    reformatter = VideoReformatter()
    with av.open(f"file:{path}", options=OPEN, metadata_errors="replace") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        time_base = stream.time_base or Fraction(1, 90000)
        for n, frame in enumerate(container.decode(stream)):
            beat()
            pts.append(frame.pts)
            if n in keep:
                sar = stream.sample_aspect_ratio or Fraction(1)
                width, height = fitted(frame.width, frame.height, sar, size)
                small = reformatter.reformat(
                    frame, width, height, "bgr24", interpolation=Interpolation.BICUBIC, threads=1
                )
                options = [cv2.IMWRITE_JPEG_QUALITY, quality]
                jpegs.append(cv2.imencode(".jpg", small.to_ndarray(), options)[1].tobytes())
    return Resampled(np.array(pts, np.int64), time_base, jpegs)
