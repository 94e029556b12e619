"""Micro-batches of one run's clips by their number, in buckets of shapes (see `jobs.training.data.loader.Loader`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.packing import pack, used
from jobs.training.task import PARTS, Batch
from pipeline.faults import StoreError
from pipeline.shards.latents import LatentReader
from pipeline.shards.order import Order, whole
from pipeline.shards.reader import PATIENCE, BrokenSample, Sample, ShardReader

ARRAYS = ("video", "mean", "logvar", "text", "text_mask")


@dataclass(frozen=True)
class Sizes:
    """What fits into a micro-batch; see `Loader`, by whose names these are called."""

    positions: Sequence[int]
    tokens: int
    batch: int | None
    packed: bool
    images: int
    areas: Sequence[int]
    lone: bool

    @property
    def clips(self) -> list[int]:
        """Samples of a micro-batch of each bucket."""
        return [self.batch or self.tokens // p for p in self.positions]

    @property
    def stills(self) -> list[int]:
        """Single frames of a micro-batch of each bucket: as many positions as the clips have."""
        return [n * p // a for n, p, a in zip(self.clips, self.positions, self.areas, strict=True)]


class Clips:
    """Two endless lists of micro-batches, of clips and of single frames, each dealt in epochs.

    Args:
        reader: with `shapes`.
    """

    def __init__(self, reader: ShardReader, sizes: Sizes):
        assert reader.shapes is not None
        self.reader, self.sizes = reader, sizes
        if sizes.images and len(reader.keys) < 2:
            raise ValueError("data.images takes frames of other clips, but there is only one: set it to 0")
        counts = np.bincount(reader.bucket, minlength=len(sizes.positions)).tolist()
        self.buckets = dict(zip(reader.shapes, counts, strict=True))  # clips in each
        if sizes.packed:
            runs, still_runs = (pack(counts, each, sizes.tokens) for each in (sizes.positions, sizes.areas))
        else:
            runs, still_runs = (whole(counts, each) for each in (sizes.clips, sizes.stills))
        how: dict[str, Any] = {"seed": reader.seed, "sequential": reader.sequential}
        self.order = Order(reader.bucket, runs, **how)
        self.still_order = Order(reader.bucket, still_runs, **how, beside=self.order)

    @property
    def used(self) -> list[int]:
        """Latent positions of a micro-batch of each composition."""
        return used(self.order.runs, self.sizes.positions)

    def rows(self, number: int, stills: bool = False) -> tuple[int, np.ndarray]:
        """(epoch, rows of the index) of a micro-batch of either list."""
        order = self.still_order if stills else self.order
        epoch, place = divmod(number, len(order))
        return epoch, order.batch(epoch, place)

    def batch(self, number: int, stills: bool, place: int) -> Batch:
        """A micro-batch of either list.

        Args:
            place: its number in the run, by which images are drawn.
        """
        self.reader.epoch, rows = self.rows(number, stills)
        self.reader.gather(self.still_order if stills else self.order, rows)
        return self._made(rows, stills, place)

    def examples(self, stills: bool) -> Iterator[Batch]:
        """A micro-batch of each composition, for planning."""
        self.reader.epoch = 0
        order = self.still_order if stills else self.order
        for run in range(len(order.runs)):
            yield self._made(order.example(run), stills, 0)

    def _made(self, rows: np.ndarray, stills: bool, place: int) -> Batch:
        if self.sizes.packed:
            return self._parts(rows, stills)
        if stills:
            return self._pictures(rows.tolist())
        samples = [self.reader.sound(int(row)) for row in rows]
        if not self.sizes.images:
            return collate(samples)
        images = [self._images(s, row, place) for s, row in zip(samples, rows.tolist(), strict=True)]
        beside = collate([image for clip in images for image in clip])
        batch = collate(samples) | {f"image_{name}": value for name, value in beside.items()}
        batch["skipped"] += batch.pop("image_skipped")
        return batch

    def _parts(self, rows: np.ndarray, stills: bool) -> Batch:
        parts: list[Batch] = []
        for _, alike in itertools.groupby(rows.tolist(), lambda row: int(self.reader.bucket[row])):
            same = list(alike)
            parts.append(
                self._pictures(same) if stills else collate([self.reader.sound(row) for row in same])
            )
        names = ("key", "caption", "skipped")
        return {name: [x for part in parts for x in part[name]] for name in names} | {PARTS: parts}

    def _pictures(self, rows: list[int]) -> Batch:
        """A frame of each of the clips, which are of one bucket, in its size."""
        assert self.reader.shapes is not None
        *_, height, width = self.reader.shapes[int(self.reader.bucket[rows[0]])]
        return collate([self._frame(self.reader.sound, row, height, width) for row in rows])

    def _images(self, sample: Sample, row: int, place: int) -> list[Sample]:
        """One frame of each of n other clips, in the sample's size; drawn by (seed, number of the batch, row)."""
        reader, wanted = self.reader, self.sizes.images
        assert reader.shapes is not None
        _, height, width = reader.shapes[reader.bucket[row]]
        every = range(len(reader.shapes))
        usable = [b for b in every if reader.shapes[b][1:] == (height, width)]
        usable = usable if isinstance(reader, LatentReader) else [*every]
        rng = np.random.default_rng([reader.seed, place, row])
        found: list[Sample] = []
        broken: list[str] = []
        itself = 0
        while len(found) < wanted and len(broken) < PATIENCE:
            try:
                other = self.order.drawn(usable, rng)
                if reader.keys[other] == sample["key"]:
                    itself += 1
                    if itself == PATIENCE:
                        raise StoreError(
                            f"{reader.folder}: no other clip of {width}×{height} to take images from; "
                            "set data.images to 0, or train from pixels"
                        )
                    continue
                found.append(self._frame(reader.read, other, height, width) | {"skipped": []})
            except BrokenSample:
                broken.append(reader.keys[other])
        if len(found) < wanted:
            raise StoreError(f"{reader.folder}: {PATIENCE} images in a row are broken; check the shards")
        found[0]["skipped"] = broken
        return found

    def _frame(self, read: Callable[..., Sample], row: int, height: int, width: int) -> Sample:
        """A frame as a clip of one frame; from a cache the first one, where only that stands alone."""
        if not isinstance(self.reader, LatentReader):
            return read(row, (1, height, width))
        sample = read(row)
        rng = np.random.default_rng([self.reader.seed, self.reader.epoch, row])
        at = int(rng.integers(sample["mean"].shape[1])) if self.sizes.lone else 0
        return sample | {k: sample[k][:, at : at + 1] for k in ("mean", "logvar") if sample[k] is not None}

    def table(self) -> str:
        """What fills each bucket, for a person (not of a cache, whose buckets were told when it was made), and how
        micro-batches are packed."""
        if not self.sizes.packed:
            return self.reader.table
        every = sum(n * run.repeats for n, run in zip(self.used, self.order.runs, strict=True))
        share = every / (self.sizes.tokens * len(self.order))
        line = (
            f"packed       {len(self.order):,} micro-batches an epoch, of {self.sizes.tokens:,} latent "
            f"positions each, {share:.1%} of them used"
        )
        return "\n".join(filter(None, (self.reader.table, line)))


def collate(samples: list[Sample]) -> Batch:
    """Samples of one bucket as a batch: arrays stacked, the rest in lists; without what no sample has."""
    batch: Batch = {name: [s[name] for s in samples] for name in samples[0]}
    batch["skipped"] = [key for s in samples for key in s["skipped"]]
    for name in ARRAYS:
        if name in batch and isinstance(batch[name][0], np.ndarray):
            batch[name] = torch.from_numpy(np.stack(batch[name]))
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) or value[:1] != [None]}
