"""Buckets: clips sorted by the shape they are trained in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.faults import StoreError, counted

Shape = tuple[int, int, int]  # frames, height, width


AT_ONCE = 1 << 20  # rows that are looked at together
NEAR = 0.05  # of the picture: a bucket that crops so much more than another is still as good


@dataclass(frozen=True)
class Fitted:
    """What each bucket is filled with.

    rows: of the index, those of clips first, then those whose stills are taken; bucket: of each of them, int16 [n].
    kept: share of the picture that the crop leaves, of each. short: rows of clips that fill no bucket.
    """

    rows: np.ndarray
    bucket: np.ndarray
    kept: np.ndarray
    short: np.ndarray


def fit(index: pa.Table, shapes: Sequence[Shape], fps: float | None) -> Fitted:
    """Which shapes each clip of an index is trained in.

    Of those that it fills at `fps`, the ones that keep most of the picture (to NEAR); of these the longest; of several
    as long the largest that needs no enlarging, or else the smallest. Where some shapes have one frame and others
    more, every clip gives a still, too. A clip that fills no shape is left out; where an index does not say how long
    clips are, all fill the one shape.

    Raises StoreError where the index does not say what clips measure, or no clip fills any shape.
    """
    n, measured = len(index), {"width", "height"} | ({"duration_s"} if fps else set())
    missing = sorted(measured - set(index.column_names))
    if missing and len(shapes) > 1:
        raise StoreError(
            f"the index of the shards has no {missing[0]}, by which clips go to buckets: "
            "give one bucket, or shards with index.parquet as 'clipmill shard' writes it"
        )
    if missing:
        every = _numbers(np.arange(n))
        return Fitted(every, np.zeros(n, np.int16), np.ones(n, np.float32), every[:0])
    frames = np.array(shapes)[:, 0]
    moving = frames > 1 if (frames > 1).any() else frames > 0
    bucket, kept = _best(index, shapes, fps, moving)
    rows = _numbers(np.flatnonzero(bucket >= 0))
    found = [(rows, bucket[rows], kept[rows])]
    if not moving.all():
        bucket, kept = _best(index, shapes, None, ~moving)
        found.append((_numbers(np.arange(n)), bucket, kept))
    short = _numbers(np.flatnonzero(bucket < 0)) if moving.all() else np.arange(0)
    if n and len(short) == n:
        seconds = index["duration_s"].fill_null(0.0).to_numpy()
        raise StoreError(
            f"none of {n:,} clips fills a bucket: the longest lasts {seconds.max():.2f} s, {frames.min()} frames at "
            f"{fps:g} a second need {frames.min() / fps if fps else 0:.2f} s: give fewer frames or a higher data.fps"
        )
    every, buckets, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Fitted(every, buckets, shares, short)


def _numbers(rows: np.ndarray) -> np.ndarray:
    """In half the memory where that is enough."""
    return rows.astype(np.int32) if not len(rows) or rows[-1] < 1 << 31 else rows


def _best(
    index: pa.Table, shapes: Sequence[Shape], fps: float | None, usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(the best of the usable shapes or −1, share of the picture that it keeps) of each clip, some rows at a time."""
    frames, height, width = np.array(shapes).T  # [k] each
    enough = frames - 0.5  # half a frame: durations are rounded
    steps = np.unique(enough)
    bucket, kept = np.empty(len(index), np.int16), np.empty(len(index), np.float32)
    for at in range(0, len(index), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        w, h = (index[c][part].fill_null(1).to_numpy().astype(np.int64) for c in ("width", "height"))
        shown = np.full(len(w), np.inf)  # frames
        if fps:
            shown = index["duration_s"][part].fill_null(0.0).to_numpy() * fps
        # clips measure a few sizes, and fill the same shapes as others: each such kind is looked at once
        kinds = w << 36 | h << 8 | np.searchsorted(steps, shown)
        _, some, kind = np.unique(kinds, return_index=True, return_inverse=True)
        filled = usable & (shown[some, None] > enough)  # [n, k]
        best, share = _best_of(w[some, None], h[some, None], filled, frames, height, width)
        bucket[part], kept[part] = best[kind], share[kind]
    return bucket, kept


def _best_of(
    w: np.ndarray,
    h: np.ndarray,
    filled: np.ndarray,
    frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """As `_best`, of clips of w × h pixels [n, 1] that fill some of the shapes [n, k]."""
    kept = np.exp(-np.abs(np.log(w / h) - np.log(width / height)))
    near = filled & (kept >= np.where(filled, kept, 0.0).max(1, keepdims=True) - NEAR)
    length = np.where(near, frames, 0)
    enlarged = np.maximum(height / h, width / w) > 1.02  # encoders round sides to even numbers
    area = np.where(enlarged, -1, 1) * height * width
    ranked = np.lexsort((-area, enlarged, -kept.round(6), -length))  # by the last key first, along the shapes
    best, every = ranked[:, 0], np.arange(len(w))
    return np.where(filled.any(1), best, -1).astype(np.int16), kept[every, best]


def table(
    fitted: Fitted, shapes: Sequence[Shape], clips: int, fps: float | None, seconds: np.ndarray | None
) -> str:
    """Lines for a person: what fills each bucket, how it is cropped and timed, what is left out and why.

    Args:
        seconds: length of each clip of the index, where it is known.
    """
    lines = []
    for number, (frames, height, width) in enumerate(shapes):
        mine = fitted.bucket == number
        name = f"bucket       {frames}×{height}×{width}: "
        if not mine.any():
            lines.append(f"{name}no clip fills it, so it is never trained")
            continue
        said = counted(int(mine.sum()), "clip" if frames > 1 else "picture")
        kept = fitted.kept[mine]
        said += f", {kept.mean():.0%} of the picture kept" + (
            f" (least {kept.min():.0%})" if kept.min() < 0.9 else ""
        )
        if seconds is not None and frames > 1:
            long = seconds[fitted.rows[mine]]
            shown = f"{frames / fps:.3g} s" if fps else "all, at rates of their own,"
            said += f"; {shown} of {long.min():.3g} to {long.max():.3g} s"
        lines.append(name + said)
    if len(fitted.short):
        lines.append(
            f"left out     {len(fitted.short):,} of {counted(clips, 'clip')}, too short for every bucket"
        )
    return "\n".join(lines)
