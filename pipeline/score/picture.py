"""How good a clip's pictures are: sharpness, exposure, clipping, black borders."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from pipeline.record import Sample

PICTURE = ["sharpness", "exposure", "clipped", "black_borders"]

PICTURE_SIZE = 256  # longer side of a decoded sample, pixels


# ------------------------------------------------------------------------------------- picture quality

BLACK = 20  # luma at or below which a border counts as black (JPEG ringing included)


def decode_grey(jpegs: Sequence[Sample]) -> np.ndarray:
    """uint8 [n, h, w] luma, longer side `PICTURE_SIZE` whatever the source's size: sharpness needs one scale.

    Large JPEGs are decoded at a half, a quarter or an eighth by scaling the DCT, which is several times
    cheaper than decoding and shrinking.
    """
    if not jpegs:
        return np.empty((0, 0, 0), np.uint8)
    # An eighth of the size tells the size: all samples of a video have one.
    longer = 8 * max(_decode(jpegs[0], cv2.IMREAD_REDUCED_GRAYSCALE_8).shape)
    reduced = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4}
    reduced |= {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 1: cv2.IMREAD_GRAYSCALE}
    flag = next((flag for k, flag in reduced.items() if longer // k >= PICTURE_SIZE), cv2.IMREAD_GRAYSCALE)
    pictures = np.stack([_decode(s, flag) for s in jpegs])
    height, width = pictures.shape[1:]
    scale = PICTURE_SIZE / max(height, width)
    if scale == 1:
        return pictures
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.stack([cv2.resize(p, size, interpolation=how) for p in pictures])


def _decode(sample: Sample, flag: int) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(sample.jpeg, np.uint8), flag)
    if picture is None:
        raise ValueError(f"the sample of frame {sample.frame} is not a JPEG")
    return picture


def active_area(pictures: np.ndarray) -> tuple[slice, slice] | None:
    """Rows and columns inside the black bars of all pictures [n, h, w]; None where everything is black."""
    bright = pictures.max(0) > BLACK
    # A line belongs to a bar while a stray bright pixel or two (noise, ringing) is all it has.
    rows = np.flatnonzero(bright.mean(1) > 0.02)
    columns = np.flatnonzero(bright.mean(0) > 0.02)
    if not len(rows) or not len(columns):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def picture_scores(pictures: np.ndarray, area: tuple[slice, slice] | None) -> dict[str, float]:
    """`PICTURE` of uint8 [n, h, w]. An all-black clip has an exposure and nothing else."""
    if area is None:
        return {"exposure": pictures.mean() / 255}
    inside = pictures[:, area[0], area[1]]
    return {
        # Pech-Pacheco et al. 2000
        "sharpness": float(np.median([cv2.Laplacian(p, cv2.CV_16S).var() for p in inside])),
        "exposure": inside.mean() / 255,
        "clipped": float(((inside <= 3) | (inside >= 252)).mean()),
        "black_borders": 1 - inside[0].size / pictures[0].size,
    }
