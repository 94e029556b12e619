"""Micro-batches for every trainer: clips in buckets of shapes, without end, resumable to the micro-batch.

**Order.** An epoch deals the clips of each bucket to micro-batches of its own and shuffles those, by (seed,
epoch) alone; what does not fill the last one of a bucket is repeated from the bucket's beginning, so that
no bucket is too small. Epoch follows epoch in one endless list. Micro-batch m of rank r is number
m · world + r of it: no rank ends before another, and the state is one number, how many were handed out.

**Weight.** A micro-batch holds as many clips as fit into `data.tokens` positions of the latents. A number
of clips is whole, so it holds more than half of them: of two ranks at the same step none has twice the
work of the other. The nearer `tokens` is to a common multiple of the buckets' positions, the more alike
(`Loader.weights` says how much).

**Packing.** With `data.pack` a micro-batch is no longer of one bucket: clips and pictures of every shape fill the
`data.tokens` positions together, each once an epoch (`jobs.training.packing`), and a batch is made of parts.

**Stills.** What things look like is learned sooner from single frames than from clips, whose frames are
much alike: the first `data.stills` micro-batches hold frames of clips, as many as the clips' would, dealt
in epochs of their own.

**Joint images.** `data.images` frames of other clips come with each clip, cut to its size, each with the
caption of its own clip.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.distributed import World
from jobs.training.packing import pack, used
from jobs.training.recipe_core import TrainRecipe
from jobs.training.recipe_diffusion import DiffusionData, DiffusionRecipe
from jobs.training.task import PARTS, Batch
from jobs.training.workers import prepared
from models.autoencoders.latents import Autoencoder, latent_shape
from pipeline.faults import StoreError
from pipeline.io.store import below
from pipeline.shards.buckets import Shape
from pipeline.shards.latents import LatentReader, made_of
from pipeline.shards.order import Order, whole
from pipeline.shards.reader import PATIENCE, BrokenSample, Sample, ShardReader

ARRAYS = ("video", "mean", "logvar", "text", "text_mask")


class Loader:
    """See the top of this file; a `jobs.training.task.Loader`.

    Args:
        reader: with `shapes`; where samples come from.
        positions: latent positions of one sample of each bucket, images included.
        tokens: positions a micro-batch may hold; batch: samples it holds, in place of that.
        packed: samples of all buckets share a micro-batch.
        images: image frames that come with each clip.
        stills: micro-batches of single frames before the first of clips; areas: latent positions of a frame
            of each bucket, where there are any.
        lone: of latents from a cache, any frame is a picture by itself, not the first alone.
        rank, world: this process's place among those that train together.
        workers: processes that decode; 0 decodes in this one.
        pin: page-locked memory, from which copies to a GPU need no waiting.

    A batch is {'key', 'caption', 'skipped': lists; 'video': uint8 [B, 3, T, H, W]} or, from a cache,
    {…, 'mean', 'logvar': float16 [B, C, T, h, w], 'text': [B, L, D], 'text_mask': bool [B, L]}; with images
    also the same of B · n clips of one frame, those of the first clip first, under 'image_key', 'image_video',
    'image_mean' and so on. Packed, it is {'key', 'caption', 'skipped', 'parts'}: of the parts each is a batch of one
    shape, in the order of 'key'.

    Raises ValueError where a bucket is larger than a micro-batch may be.
    """

    def __init__(
        self,
        reader: ShardReader,
        positions: Sequence[int],
        *,
        tokens: int = 8192,
        batch: int | None = None,
        packed: bool = False,
        images: int = 0,
        stills: int = 0,
        areas: Sequence[int] = (),
        lone: bool = False,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
    ):
        assert reader.shapes is not None
        if batch is None and max(positions) > tokens:
            worst = int(np.argmax(positions))
            raise ValueError(
                f"one clip of bucket {'×'.join(map(str, reader.shapes[worst]))} has {positions[worst]} latent "
                f"positions, more than data.tokens {tokens}: raise data.tokens, set data.batch, or make it smaller"
            )
        if packed and (batch is not None or images):
            raise ValueError(
                "packed samples are as many as data.tokens hold, pictures among them: no data.batch or images"
            )
        if images and len(reader.keys) < 2:
            raise ValueError("data.images takes frames of other clips, but there is only one: set it to 0")
        self.reader, self.positions, self.images, self.stills = reader, list(positions), images, stills
        self.sizes = [batch or tokens // p for p in positions]  # samples a micro-batch, by bucket
        self.tokens, self.packed, self.areas = tokens, packed, list(areas or positions)
        self.still_sizes = [n * p // a for n, p, a in zip(self.sizes, positions, self.areas, strict=True)]
        self.rank, self.world, self.workers, self.pin, self.lone = rank, world, workers, pin, lone
        self.first = self.step = (
            0  # the list's number before this rank's first; micro-batches handed out since
        )
        self.skipped = 0  # broken samples met by this rank
        counts = np.bincount(reader.bucket, minlength=len(positions)).tolist()
        self.buckets = dict(zip(reader.shapes, counts, strict=True))  # clips in each
        if packed:
            runs, still_runs = (pack(counts, each, tokens) for each in (self.positions, self.areas))
        else:
            runs, still_runs = (whole(counts, each) for each in (self.sizes, self.still_sizes))
        self.order = Order(reader.bucket, runs, reader.seed)
        self.still_order = Order(reader.bucket, still_runs, reader.seed)
        self.epoch_length, self.stills_length = len(self.order), len(self.still_order)

    @property
    def weights(self) -> tuple[int, int]:
        """Fewest and most latent positions of a micro-batch, over the buckets that have clips."""
        filled = used(self.order.runs, self.positions)
        return min(filled), max(filled)

    def rows(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, rows of the index) of a micro-batch of the endless list."""
        stills = number < self.stills
        order = self.still_order if stills else self.order
        epoch, place = divmod(number if stills else number - self.stills, len(order))
        return epoch, order.batch(epoch, place)

    def batch(self, number: int) -> Batch:
        """The micro-batch of that number of the endless list."""
        self.reader.epoch, rows = self.rows(number)
        return self._made(rows, number)

    def _made(self, rows: np.ndarray, number: int) -> Batch:
        if self.packed:
            return self._parts(rows, stills=number < self.stills)
        if number < self.stills:
            return self._pictures(rows.tolist())
        samples = [self.reader.sound(int(row)) for row in rows]
        if not self.images:
            return collate(samples)
        images = [self._images(s, row, place=number) for s, row in zip(samples, rows.tolist(), strict=True)]
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

    def examples(self) -> Iterator[Batch]:
        """A micro-batch of each composition, for planning."""
        self.reader.epoch = 0
        orders = [(self.still_order, 0)] if self.stills else []
        for order, number in (*orders, (self.order, self.stills)):
            for run in range(len(order.runs)):
                yield self._made(order.example(run), number)

    def _images(self, sample: Sample, row: int, place: int) -> list[Sample]:
        """One frame of each of n other clips, in the sample's size; drawn by (seed, number of the batch, row)."""
        reader, wanted = self.reader, self.images
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
                if reader.keys[other].as_py() == sample["key"]:
                    itself += 1
                    if itself == PATIENCE:
                        raise StoreError(
                            f"{reader.folder}: no other clip of {width}×{height} to take images from; "
                            "set data.images to 0, or train from pixels"
                        )
                    continue
                found.append(self._frame(reader.read, other, height, width) | {"skipped": []})
            except BrokenSample:
                broken.append(reader.keys[other].as_py())
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
        at = int(rng.integers(sample["mean"].shape[1])) if self.lone else 0
        return sample | {k: sample[k][:, at : at + 1] for k in ("mean", "logvar") if sample[k] is not None}

    def __iter__(self) -> Iterator[Batch]:
        for batch in prepared(_Batches(self), self.workers, self.pin):
            self.step += 1
            self.skipped += len(batch["skipped"])
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many micro-batches all ranks have taken, and what the list is made of; plain numbers."""
        return {"batches": self.first + self.step * self.world} | self._made_of()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a state of any rank, with any number of ranks and workers.

        Raises ValueError where the state is of other data or settings.
        """
        for name, mine in self._made_of().items():
            if name == "clips" and state.get(name) != mine:
                raise ValueError(
                    f"{self.reader.folder} has other clips than training began with (others chosen, other bytes or "
                    "captions): give those, or another --out, with start: where it is to begin with the model so far"
                )
            if state.get(name) != mine:
                raise ValueError(
                    f"the saved state has {name} {state.get(name)}, this loader {mine}; use the same"
                )
        self.first, self.step = state["batches"], 0

    def _made_of(self) -> dict[str, Any]:
        return {
            "seed": self.reader.seed,
            "clips": self.identity,
            "sizes": self.sizes,
            "images": self.images,
            "stills": self.stills,
        } | ({"packed": self.tokens} if self.packed else {})

    @functools.cached_property
    def identity(self) -> str:
        return self.reader.identity()

    def table(self) -> str:
        """What fills each bucket, for a person (not of a cache, whose buckets were told when it was made), and how
        micro-batches are packed."""
        if not self.packed:
            return self.reader.table
        filled = used(self.order.runs, self.positions)
        every = sum(n * run.repeats for n, run in zip(filled, self.order.runs, strict=True))
        share = every / (self.tokens * self.epoch_length)
        line = (
            f"packed       {self.epoch_length:,} micro-batches an epoch, of {self.tokens:,} latent "
            f"positions each, {share:.1%} of them used"
        )
        return "\n".join(filter(None, (self.reader.table, line)))


class _Batches:
    """What a worker runs: worker w of W prepares every W-th of its rank's micro-batches, from the w-th on."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def __call__(self, worker: int, workers: int) -> Iterator[Batch]:
        own = self.loader
        for step in itertools.count(own.step + worker, workers):
            yield own.batch(own.first + step * own.world + own.rank)


def collate(samples: list[Sample]) -> Batch:
    """Samples of one bucket as a batch: arrays stacked, the rest in lists; without what no sample has."""
    batch: Batch = {name: [s[name] for s in samples] for name in samples[0]}
    batch["skipped"] = [key for s in samples for key in s["skipped"]]
    for name in ARRAYS:
        if name in batch and isinstance(batch[name][0], np.ndarray):
            batch[name] = torch.from_numpy(np.stack(batch[name]))
    return {name: value for name, value in batch.items() if isinstance(value, Tensor) or value[:1] != [None]}


# ---------------------------------------------------------------- from a recipe


def shapes_of(recipe: TrainRecipe) -> list[Shape]:
    return [(b.frames, b.height, b.width) for b in recipe.data.buckets]


def positions_of(recipe: TrainRecipe, autoencoder: Autoencoder) -> list[int]:
    """Latent positions of a sample of each bucket, images included. Raises ValueError."""
    images = beside(recipe).images
    for name in ("images", "stills"):
        wanted = getattr(beside(recipe), name)
        if wanted and autoencoder.stride[0] > 1 and not autoencoder.causal:
            raise ValueError(
                f"data.{name} {wanted}: this autoencoder takes {autoencoder.stride[0]} frames at once, so a single "
                "image has no latent; set it to 0, or use a causal or an image autoencoder"
            )
    found = []
    for shape in shapes_of(recipe):
        t, h, w = latent_shape(autoencoder, *shape)
        found.append((t + images) * h * w)
    return found


def beside(recipe: TrainRecipe) -> DiffusionData:
    """Images, stills and the cache of a recipe; of a trainer that knows none, as where they are not asked for."""
    return recipe.data if isinstance(recipe.data, DiffusionData) else DiffusionData()


def made_with(recipe: DiffusionRecipe, weights: Mapping[str, str]) -> dict[str, Any]:
    """What a cache of a recipe depends on, but for the clips.

    Args:
        weights: `System.weights`.
    """
    frozen = recipe.text.kind in ("transformers", "diffusers")
    return {
        "buckets": [list(s) for s in shapes_of(recipe)],
        "fps": recipe.data.fps,
        "captions": recipe.data.captions,
        "seed": recipe.seed,
        "autoencoder": recipe.autoencoder.model_dump(mode="json", exclude={"path"}),
        "text": recipe.text.model_dump(mode="json", include={"length"}) if frozen else None,
        **weights,
    }


def clips_of(recipe: DiffusionRecipe, data: str) -> ShardReader:
    """The clips of the run in folder `data`, whether or not the recipe has a cache of them."""
    return reader_of(recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": None})}), data)


def check_cache(recipe: DiffusionRecipe, data: str, weights: Mapping[str, str]) -> None:
    """Raise ValueError or StoreError where the recipe's cache is not one of these clips by these encoders."""
    cache = recipe.data.cache
    assert cache is not None
    there = made_of(cache)
    for name, mine in made_with(recipe, weights).items():
        if there.get(name) != mine:
            raise ValueError(
                f"data.cache {cache} was made with {name} {there.get(name)}, this recipe has {mine}; "
                "encode again, or train with what it was made with"
            )
    if there["clips"] != clips_of(recipe, data).identity():
        raise ValueError(
            f"data.cache {cache} was made of other clips than {data} has now (others chosen, other bytes or captions): "
            "run the same 'clipmill encode' again, which does what has changed"
        )


def reader_of(recipe: TrainRecipe, data: str) -> ShardReader:
    """Clips of the run in folder `data`, or of the recipe's cache. Raises StoreError, ValueError."""
    shapes = shapes_of(recipe)
    if not isinstance(recipe, DiffusionRecipe) or not recipe.data.cache:
        return ShardReader(
            below(data, "shards"),
            fps=recipe.data.fps,
            shapes=shapes,
            captions=recipe.data.captions,
            seed=recipe.seed,
            layout="CTHW",
        )
    made_of(recipe.data.cache)  # it is finished
    return LatentReader(recipe.data.cache, shapes, length=recipe.text.length, seed=recipe.seed)


def build_loader(
    recipe: TrainRecipe,
    data: str,
    autoencoder: Autoencoder,
    world: World,
) -> Loader:
    """The loader of a recipe over the run in folder `data`. Raises StoreError, ValueError."""
    return Loader(
        reader_of(recipe, data),
        positions_of(recipe, autoencoder),
        tokens=recipe.data.tokens,
        batch=recipe.data.batch,
        packed=beside(recipe).pack,
        images=beside(recipe).images,
        stills=beside(recipe).stills,
        areas=[math.prod(latent_shape(autoencoder, *s)[1:]) for s in shapes_of(recipe)],
        lone=autoencoder.stride[0] == 1,
        rank=world.data_rank,
        world=world.data_size,
        workers=recipe.data.workers,
        pin=world.device.type == "cuda",
    )
