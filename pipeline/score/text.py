"""On-screen text by OCR: how much of the picture it covers, and what it says.

PP-OCRv6 detection (DB: Liao et al., AAAI 2020) and recognition through RapidOCR, with the ONNX weights
that its package carries. The detector alone is no measure: on footage without text it now and then marks
half the picture. A box counts once the recogniser has read something in it with confidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from pipeline.recipe import Text
from pipeline.record import Video
from pipeline.samples import pictures
from pipeline.stages import Produces, Resources, each
from pipeline.watch import telling

SAME_TEXT = 0.8  # likeness of two readings (2 × matching letters ÷ all letters) that makes them one


@dataclass(frozen=True)
class Line:
    """One line of text in one picture."""

    text: str
    box: np.ndarray  # float [4, 2], corners x, y in pixels
    share: float  # of the picture's area


class TextStage:
    """Adds `text_area` (fraction of the picture under text, in the frame with most) and `Clip.text`.

    Looks at a few samples spread over the clip, one at a time: a clip's text depends on no other clip.
    """

    name = "text"
    resources = Resources(cpus=1.0)
    produces = Produces(scores=["text_area"])

    def __init__(self, recipe: Text):
        self.recipe = recipe
        self._ocr: Any = None

    def setup(self) -> None:
        from pathlib import Path

        import cv2
        import rapidocr

        cv2.setNumThreads(1)
        models = Path(rapidocr.__file__).parent / "models"
        self._ocr = rapidocr.RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_cls": False,  # no upside-down lines: samples are upright
                "Global.text_score": self.recipe.confidence,
                "Det.model_path": str(models / "PP-OCRv6_det_small.onnx"),  # given: nothing is downloaded
                "Det.limit_type": "max",
                "Det.limit_side_len": self.recipe.size,
                "Rec.model_path": str(models / "PP-OCRv6_rec_small.onnx"),
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, videos: list[Video]) -> list[Video]:
        for video in each(videos):
            for clip in telling(video.clips):
                seen = pictures(video, clip, self.recipe.frames)
                if not seen:
                    continue
                read = [self.lines(p) for p in seen]
                covered = [covered_share(lines, p.shape[:2]) for lines, p in zip(read, seen, strict=True)]
                clip.scores["text_area"] = round(max(covered), 6)
                clip.text = prominent([line for lines in read for line in lines])
        return videos

    def lines(self, rgb: np.ndarray) -> list[Line]:
        """The lines read in uint8 RGB [h, w, 3] with at least the recipe's confidence."""
        result = self._ocr(np.ascontiguousarray(rgb[..., ::-1]))
        if result.boxes is None:
            return []
        area = rgb.shape[0] * rgb.shape[1]
        boxes = [np.asarray(b, np.float64) for b in result.boxes]
        return [Line(t.strip(), b, _area(b) / area) for t, b in zip(result.txts, boxes, strict=True)]


def _area(box: np.ndarray) -> float:
    """Area of a polygon [n, 2] (shoelace formula)."""
    (x, y), (x1, y1) = box.T, np.roll(box, -1, 0).T
    return abs(float((x * y1 - x1 * y).sum())) / 2


def covered_share(lines: list[Line], shape: tuple[int, int]) -> float:
    """Fraction of a picture of (height, width) under the union of the boxes."""
    import cv2

    covered = np.zeros(shape, np.uint8)
    for line in lines:
        cv2.fillConvexPoly(covered, np.round(line.box).astype(np.int32), 1)
    return float(covered.mean())


def prominent(lines: list[Line]) -> list[str]:
    """The distinct texts, largest first; readings of one text in several pictures count as its largest."""
    kept: list[tuple[str, str]] = []
    for line in sorted(lines, key=lambda line: -line.share):
        plain = "".join(c for c in line.text.casefold() if c.isalnum())
        if plain and all(SequenceMatcher(None, plain, k).ratio() < SAME_TEXT for k, _ in kept):
            kept.append((plain, line.text))
    return [text for _, text in kept]
