"""The frames of a clip that decoding kept, as pictures; what captioners, scores and choosers look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.record import Clip, Sample, Video
from pipeline.watch import telling


def samples(video: Video, clip: Clip) -> list[Sample]:
    """The sampled frames that lie in the clip, in order; none where a clip falls between two samples."""
    assert video.frames is not None
    return [s for s in video.frames.samples if clip.start_frame <= s.frame < clip.end_frame]


def spread(items: Sequence[Any], n: int) -> list[Any]:
    """n of the items, each the middle of one of n equal stretches; all of them if there are no more."""
    if len(items) <= n:
        return list(items)
    return [items[int((i + 0.5) * len(items) / n)] for i in range(n)]


def pictures(video: Video, clip: Clip, n: int) -> list[np.ndarray]:
    """At most n frames spread over the clip: uint8 [h, w, 3] RGB, upright."""
    return [picture(sample) for sample in spread(samples(video, clip), n)]


def gathered(videos: list[Video], n: int) -> tuple[list[tuple[Clip, int]], Iterator[np.ndarray]]:
    """What a model looks at of a unit's clips, at most n frames of each, so that it can be given full batches.

    Returns the clips that hold samples, each with the number of its frames, and the frames of all of them one after
    another: uint8 [h, w, 3] RGB, upright, each read when it is asked for.
    """
    looks = [[(c, chosen) for c in v.clips if (chosen := spread(samples(v, c), n))] for v in videos]

    def frames() -> Iterator[np.ndarray]:
        # not announced one by one: frames of several videos are in one batch
        for of_video in looks:
            for _, chosen in of_video:
                yield from map(picture, telling(chosen))

    return [(clip, len(chosen)) for of_video in looks for clip, chosen in of_video], frames()


def picture(sample: Sample) -> np.ndarray:
    """A sampled frame: uint8 [h, w, 3] RGB, upright."""
    import cv2

    bgr = cv2.imdecode(np.frombuffer(sample.jpeg, np.uint8), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ValueError(f"sampled frame {sample.frame} is not a JPEG")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
