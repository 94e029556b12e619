"""Captioners of the small world: the truth, read from the pictures, and something like it."""

from __future__ import annotations

import hashlib
from typing import Any

import cv2
import numpy as np

from pipeline.caption.captioner import Captioner
from pipeline.record import Clip, Video
from pipeline.samples import pictures
from pipeline.toy.reader import read
from pipeline.toy.world import one_off, parse


class ToyReader(Captioner):
    """`toy-reader`: the true caption of a clip of the small world; none of anything else."""

    name = "toy-reader"
    frames = 16

    def setup(self) -> None:
        cv2.setNumThreads(1)

    def caption(self, video: Video, clip: Clip) -> str:
        seen = pictures(video, clip, self.frames)
        return read(np.stack(seen)).caption() if seen else ""


class CarelessReader(ToyReader):
    """`careless-<seed>`: the truth but for one attribute, the same of a clip each time; for trying selectors on.

    Args:
        options: {'seed': which mistakes it makes}.
    """

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.seed = int((options or {}).get("seed", 0))
        self.name = f"careless-{self.seed}"

    def caption(self, video: Video, clip: Clip) -> str:
        told = super().caption(video, clip)
        if not told:
            return ""
        digest = hashlib.sha256(f"{self.seed} {clip.clip_id}".encode()).digest()
        wrong = one_off(parse(told))
        return wrong[int.from_bytes(digest[:8]) % len(wrong)].caption()
