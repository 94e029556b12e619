"""How a clip is laid out on screen: the second witness of the near-duplicate search.

Image features tell what is seen: another moment of one scene, or another take in one studio, comes near
a copy. The signature tells where light and dark are, and when: a copy keeps it through re-encoding,
scaling, slight cropping, changed brightness and a logo; other moments do not, unless nothing moves.
"""

from __future__ import annotations

import numpy as np

from pipeline.record import Clip, Sample, Video
from pipeline.samples import samples
from pipeline.stages import Produces, Resources, each

NAME = "signature"
MOMENTS, GRID = 4, 8  # pictures a clip; cells along each side of a picture
SIZE = MOMENTS * GRID * GRID


class SignatureStage:
    """Adds the embedding `signature` to every clip that holds a sample."""

    name = "signature"
    resources = Resources(cpus=1.0)
    produces = Produces(embeddings={NAME: SIZE})

    def setup(self) -> None:
        import cv2

        cv2.setNumThreads(1)

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            for clip in video.clips:
                seen = moments(video, clip)
                if seen:
                    clip.embeddings[NAME] = signature([grey(s) for s in seen])
        return videos


def moments(video: Video, clip: Clip) -> list[Sample]:
    """MOMENTS samples of a clip, each the nearest to the middle of its share of the time; none if it holds none."""
    inside = samples(video, clip)
    if not inside:
        return []
    times = np.array([video.time_of(s.frame) for s in inside])
    wanted = clip.start_s + clip.duration_s * (np.arange(MOMENTS) + 0.5) / MOMENTS
    return [inside[int(np.abs(times - t).argmin())] for t in wanted]


def signature(pictures: list[np.ndarray]) -> np.ndarray:
    """float32 [SIZE] of unit length, from MOMENTS luma pictures uint8 [H, W].

    A picture becomes the mean luma of GRID × GRID cells, less their mean and scaled to unit length, so
    brightness and contrast cancel; one of a single tone becomes zeros, which resemble nothing.
    """
    import cv2

    cells = [cv2.resize(p, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(np.float32) for p in pictures]
    x = np.stack([c - c.mean() for c in cells]).reshape(len(cells), -1)
    x[np.abs(x).max(1) < 1] = 0  # less than one grey level is noise of the codec
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    pictures_used = max(1, int(x.any(1).sum()))
    return np.round(x.ravel() / np.float32(pictures_used**0.5), 6)


def grey(sample: Sample) -> np.ndarray:
    """uint8 [h, w] luma at a quarter of the sample's size."""
    import cv2

    picture = cv2.imdecode(np.frombuffer(sample.jpeg, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_4)
    assert picture is not None, f"sample {sample.frame} is no JPEG"
    return picture
