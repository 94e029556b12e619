"""The frames of a clip that models were shown, taken again from its own mp4.

The mp4 holds frame `start_frame` of the source as its frame 0, upright and at the source's times, so the same
frames are found by number. They have been through the encoder: pictures are as close to the first ones as the
clip's quality (cut.crf) makes them, and smaller where cut.height is below decode.sample_size.
Runs in a child process (pipeline.io.isolate); imports nothing but numpy, av and cv2.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from pipeline.io.ffmpeg import OPEN
from pipeline.split.pictures import fitted


def resample(
    path: str, wanted: list[int], size: int, quality: int, beat: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Decode an mp4 that the cut wrote.

    Args:
        wanted: frames to keep, numbered from 0.
        size: longer side of a kept frame, pixels (never enlarged).
        quality: of the JPEGs.

    Returns `pts` (ticks of `time_base`, of every frame), `time_base` (numerator, denominator) and
    `samples`, (frame, JPEG) pairs. Raises ValueError where a wanted frame is not there.
    """
    import av
    import cv2
    from av.video.reformatter import Interpolation, VideoReformatter

    keep, pts, samples = set(wanted), [], []
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
                samples.append((n, cv2.imencode(".jpg", small.to_ndarray(), options)[1].tobytes()))
    if len(samples) < len(keep):
        raise ValueError(f"the clip has {len(pts)} frames, and frame {max(keep)} was wanted")
    return {
        "pts": pts,
        "time_base": (time_base.numerator, time_base.denominator),
        "samples": samples,
    }
