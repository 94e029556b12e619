"""What can be measured of a clip without a neural network: motion, picture quality, overlays.

Everything is read from what the one decode left behind: `Frames.grey` (about 128 pixels, 8 a second) for
motion and `Frames.samples` (JPEG, 2 a second, each decoded once to 256 pixels) for the rest. Nothing depends
on the codec, and speeds are displacements ÷ seconds of PTS, so nothing depends on the frame rate either. A
measure that cannot be made is left out of `clip.scores` (a null column), never set to 0.

| score | meaning |
|---|---|
| motion | mean length of the optical flow, picture diagonals a second |
| motion_object | the part of it that the camera does not explain, diagonals a second |
| pan_x, pan_y | net camera travel, picture widths (right +) and heights (down +) a second |
| zoom | net natural logarithm of scale a second, zooming in + |
| stillness | fraction of the clip's time in which nothing has changed for half a second |
| sharpness | variance of the Laplacian of luma at 256 pixels, median over samples |
| exposure | mean luma, 0 (black) to 1 (white), black borders aside |
| clipped | fraction of pixels crushed to black or blown to white, black borders aside |
| black_borders | fraction of the picture in black bars along its sides |
| watermark | fraction of the picture under overlays that stay put while the content around them changes |

Two more come from the decoding itself (pipeline/split/damage.py): damaged, the fraction of frames that show damage or
are missing, and repeated, the fraction that show just what the frame before showed.
"""

from __future__ import annotations

import cv2

from pipeline.recipe import Scores
from pipeline.record import Clip, Video
from pipeline.samples import samples
from pipeline.score.motion import MOTION, motion_of
from pipeline.score.picture import PICTURE, active_area, decode_grey, picture_scores
from pipeline.score.watermark import COMPANY, Evidence, watermarks
from pipeline.stages import Produces, Resources, each
from pipeline.watch import telling


class ScoreStage:
    """Adds the scores of the table above to every clip; drops `Frames.grey`, which nothing later needs."""

    name = "scores"
    whole_source = True
    resources = Resources(cpus=1.0)

    def __init__(self, recipe: Scores):
        self.recipe = recipe
        self.produces = Produces(
            scores=MOTION * recipe.motion + PICTURE * recipe.picture + ["watermark"] * recipe.watermark
        )

    def setup(self) -> None:
        cv2.setNumThreads(1)

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            if video.frames is None:
                continue
            if self.recipe.motion:
                for clip in telling(video.clips):
                    _put(clip, motion_of(video, clip))
            if self.recipe.picture or self.recipe.watermark:
                for first in range(0, len(video.clips), COMPANY):
                    self._score_pictures(video, video.clips[first : first + COMPANY])
            video.frames.grey = None
        return videos

    def _score_pictures(self, video: Video, clips: list[Clip]) -> None:
        evidence: list[Evidence | None] = []
        for clip in telling(clips):
            pictures = decode_grey(samples(video, clip))
            if not len(pictures):
                evidence.append(None)
                continue
            area = active_area(pictures)
            if self.recipe.picture:
                _put(clip, picture_scores(pictures, area))
            if self.recipe.watermark:
                evidence.append(Evidence.of(pictures, area))
        if self.recipe.watermark:
            for clip, share in zip(clips, watermarks(evidence), strict=True):
                if share is not None:
                    _put(clip, {"watermark": share})


def _put(clip: Clip, scores: dict[str, float]) -> None:
    clip.scores |= {name: round(float(value), 6) for name, value in scores.items()}
