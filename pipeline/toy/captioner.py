"""The captioner of the small world: the truth, read from the pictures."""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.caption.captioner import Captioner
from pipeline.record import Clip, Video
from pipeline.samples import pictures
from pipeline.toy.reader import read


class ToyReader(Captioner):
    """`toy-reader`: the true caption of a clip of the small world; none of anything else."""

    name = "toy-reader"
    frames = 16

    def setup(self) -> None:
        cv2.setNumThreads(1)

    def caption(self, video: Video, clip: Clip) -> str:
        seen = pictures(video, clip, self.frames)
        return read(np.stack(seen)).caption() if seen else ""
