"""Buckets: clips sorted by the shape they are trained in, and dealt to batches of one shape each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from pipeline.faults import StoreError

Shape = tuple[int, int, int]  # frames, height, width


def deal(
    bucket: np.ndarray,
    size: Callable[[int], int],
    rng: np.random.RandomState | None,
    last: Literal["wrap", "drop"] = "wrap",
) -> list[np.ndarray]:
    """Deal rows to batches of one bucket each.

    Args:
        bucket: int [n], which bucket each row is in.
        size: samples a batch of a bucket holds.
        rng: shuffles the rows of each bucket; none leaves them in order.
        last: what does not fill a batch is repeated from the bucket's beginning, or left out.

    Returns int64 [batches, size] for every bucket that has rows, in the order of the buckets.
    """
    dealt = []
    for b in np.unique(bucket).tolist():
        rows = np.flatnonzero(bucket == b)
        if rng is not None:
            rng.shuffle(rows)
        dealt.append(np.resize(rows, (whole_batches(len(rows), size(b), last), size(b))))
    return dealt


def whole_batches(samples: int, size: int, last: Literal["wrap", "drop"] = "wrap") -> int:
    """Batches that so many samples make."""
    return -(-samples // size) if last == "wrap" else samples // size


def fit(index: pa.Table, shapes: Sequence[Shape], fps: float | None) -> np.ndarray:
    """Which shape each clip of an index is trained in, int32 [n].

    The longest that it fills at `fps`; of several as long the nearest aspect ratio; of several as near the
    largest that needs no enlarging, or else the smallest. A clip that fills none goes to the shortest and
    repeats its last frame. Raises StoreError where the index does not say what clips measure.
    """
    if len(shapes) == 1:
        return np.zeros(len(index), np.int32)
    needed = {"width", "height"} | ({"duration_s"} if fps else set())
    if missing := sorted(needed - set(index.column_names)):
        raise StoreError(
            f"the index of the shards has no {missing[0]}, by which clips go to buckets: "
            "give one bucket, or shards with index.parquet as 'clipmill shard' writes it"
        )
    frames, height, width = np.array(shapes).T  # [k] each
    w, h = (index[c].fill_null(1).to_numpy()[:, None] for c in ("width", "height"))  # [n, 1]
    filled = np.ones((len(index), len(shapes)), bool)
    if fps:
        shown = index["duration_s"].fill_null(0.0).to_numpy()[:, None] * fps
        filled = (shown > frames - 0.5) | (frames == frames.min())  # half a frame: durations are rounded
    length = np.where(filled, frames, 0)
    crop = np.abs(np.log(w / h) - np.log(width / height)).round(6)
    enlarged = np.maximum(height / h, width / w) > 1.02  # encoders round sides to even numbers
    area = np.where(enlarged, -1, 1) * height * width
    order = np.lexsort((-area, enlarged, crop, -length))  # by the last key first, along the shapes
    return order[:, 0].astype(np.int32)
