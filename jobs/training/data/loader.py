"""Micro-batches for every trainer: clips in buckets of shapes, without end, resumable to the micro-batch.

**Order.** An epoch deals the clips of each bucket to micro-batches of its own and shuffles those, by (seed,
epoch) alone; what does not fill the last one of a bucket is repeated from the bucket's beginning, so that
no bucket is too small. Epoch follows epoch in one endless list. Micro-batch m of rank r is number
m · world + r of it: no rank ends before another, and the state is one number, how many were handed out.

**Weight.** A micro-batch holds as many clips as fit into `data.tokens` positions of the latents. A number
of clips is whole, so it holds more than half of them: of two ranks at the same step none has twice the
work of the other. The nearer `tokens` is to a common multiple of the buckets' positions, the more alike
(`Loader.weights` says how much).

**Mixture.** Of several runs (`data.mixture`) each gives a set share of the micro-batches, at every moment to within
one of them (`pipeline.shards.mixture`), and goes through epochs of its own. Micro-batches hold about as many positions,
so shares of them are shares of the work.

**Sequential reads.** With `data.shuffle: shards` clips that lie together are read in one request and shuffled within a
window (`pipeline.shards.order`), for object stores; of a mixture each source then gives `data.streams` micro-batches in
a row, so that the streams of each stay with their workers.

**Packing.** With `data.pack` a micro-batch is no longer of one bucket: clips and pictures of every shape fill the
`data.tokens` positions together, each once an epoch (`jobs.training.data.packing`), and a batch is made of parts.

**Stills.** What things look like is learned sooner from single frames than from clips, whose frames are
much alike: the first `data.stills` micro-batches hold frames of clips, as many as the clips' would, dealt
in epochs of their own.

**Joint images.** `data.images` frames of other clips come with each clip, cut to its size, each with the
caption of its own clip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from typing import Any, Literal

import numpy as np
from pyarrow.compute import Expression

from jobs.training.data.clips import Clips, Sizes
from jobs.training.data.held_out import held_out, trained_on
from jobs.training.data.numbered import Numbered
from jobs.training.diffusion.recipe import DiffusionData, DiffusionRecipe
from jobs.training.distributed import World
from jobs.training.recipe_core import TrainRecipe
from jobs.training.task import Batch
from models.autoencoders.latents import Strided, latent_shape
from pipeline.faults import StoreError
from pipeline.io.store import below
from pipeline.shards.buckets import Shape
from pipeline.shards.latents import LatentReader, made_of
from pipeline.shards.mixture import Mixture
from pipeline.shards.reader import ShardReader


class Loader(Numbered):
    """See the top of this file; a `jobs.training.task.Loader`.

    Args:
        readers: with `shapes`, the same of all; where samples come from. shares: of the micro-batches, of each.
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
        readers: ShardReader | Sequence[ShardReader],
        positions: Sequence[int],
        *,
        shares: Sequence[float] = (1.0,),
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
        super().__init__(rank, world, workers, pin)
        self.readers = [readers] if isinstance(readers, ShardReader) else list(readers)
        shapes = self.readers[0].shapes
        assert shapes is not None
        if batch is None and max(positions) > tokens:
            worst = int(np.argmax(positions))
            raise ValueError(
                f"one clip of bucket {'×'.join(map(str, shapes[worst]))} has {positions[worst]} latent "
                f"positions, more than data.tokens {tokens}: raise data.tokens, set data.batch, or make it smaller"
            )
        if packed and (batch is not None or images):
            raise ValueError(
                "packed samples are as many as data.tokens hold, pictures among them: no data.batch or images"
            )
        made = Sizes(list(positions), tokens, batch, packed, images, list(areas or positions), lone)
        self.clips = [Clips(reader, made) for reader in self.readers]
        self.sequential = self.readers[0].sequential
        together = self.sequential.streams if self.sequential else 1
        self.mixture = Mixture(shares, [reader.folder for reader in self.readers], together)
        self.made, self.stills = made, stills
        self.buckets = {shape: sum(c.buckets[shape] for c in self.clips) for shape in shapes}  # clips in each

    @property
    def epoch_length(self) -> int:
        """Micro-batches of clips until each source has been gone through."""
        return self.mixture.epoch([len(clips.order) for clips in self.clips])

    @property
    def weights(self) -> tuple[int, int]:
        """Fewest and most latent positions of a micro-batch, over the buckets that have clips."""
        filled = [n for clips in self.clips for n in clips.used]
        return min(filled), max(filled)

    def at(self, number: int) -> tuple[Clips, int, bool]:
        """(source, number in its list, whether that is the list of stills) of a micro-batch of the endless list."""
        stills = number < self.stills
        source, own = self.mixture.at(number if stills else number - self.stills)
        return self.clips[source], own, stills

    def rows(self, number: int) -> tuple[int, np.ndarray]:
        """(epoch, rows of the index) in its source of a micro-batch of the endless list."""
        clips, own, stills = self.at(number)
        return clips.rows(own, stills)

    def batch(self, number: int) -> Batch:
        """The micro-batch of that number of the endless list."""
        clips, own, stills = self.at(number)
        return clips.batch(own, stills, number)

    def examples(self) -> Iterator[Batch]:
        """A micro-batch of each composition of each source, for planning."""
        for stills in (True, False) if self.stills else (False,):
            for clips in self.clips:
                yield from clips.examples(stills)

    def of_shape(self, shape: Shape, count: int, seed: int) -> list[tuple[ShardReader, int]]:
        """So many clips of a bucket, or all where there are fewer, as reader and row; each once, in an order of the
        seed, sources in their shares."""
        rows = [np.flatnonzero(r.bucket == list(r.shapes or ()).index(shape)) for r in self.readers]
        left = [np.random.default_rng(seed).permutation(each)[:count].tolist()[::-1] for each in rows]
        found: list[tuple[ShardReader, int]] = []
        number = 0
        while any(left) and len(found) < count:
            source, _ = self.mixture.at(number)
            number += 1
            if left[source]:
                found.append((self.readers[source], left[source].pop()))
        return found

    def changed(self, name: str, there: Any, mine: Any) -> str:
        if name != "clips":
            return super().changed(name, there, mine)
        each = zip(self.readers, str(there).split(), str(mine).split(), strict=False)
        other = next((r for r, a, b in each if a != b), self.readers[0])
        return (
            f"{other.folder} has other clips than training began with (others chosen, other bytes or "
            "captions): give those, or another --out, with start: where it is to begin with the model so far"
        )

    def made_of(self) -> dict[str, Any]:
        sizes = self.made
        return (
            {
                "seed": self.readers[0].seed,
                "clips": self.identity,
                "sizes": sizes.clips,
                "images": sizes.images,
                "stills": self.stills,
            }
            | ({"packed": sizes.tokens} if sizes.packed else {})
            | ({"shares": self.mixture.parts} if len(self.readers) > 1 else {})
            | ({"sequential": list(astuple(self.sequential))} if self.sequential else {})
        )

    @functools.cached_property
    def identity(self) -> str:
        return " ".join(reader.identity() for reader in self.readers)

    def table(self) -> str:
        """Of each source its share, what fills its buckets, and how micro-batches are packed."""
        lines = []
        for clips, share in zip(self.clips, self.mixture.shares, strict=True):
            told = f"{clips.reader.folder}: {share:.1%} of the micro-batches, {len(clips.order):,} an epoch"
            lines += [f"source       {told}"] if len(self.clips) > 1 else []
            lines.append(clips.table())
        readers = self.world * max(self.workers, 1)
        if self.sequential and self.sequential.streams % readers:
            lines.append(
                f"streams      data.streams {self.sequential.streams} is no multiple of {readers}, the processes × "
                "workers that read: clips that lie together are read by several; make it one"
            )
        return "\n".join(filter(None, lines))


# ---------------------------------------------------------------- from a recipe


def shapes_of(recipe: TrainRecipe) -> list[Shape]:
    return [(b.frames, b.height, b.width) for b in recipe.data.buckets]


def positions_of(recipe: TrainRecipe, autoencoder: Strided) -> list[int]:
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


def reader_of(
    recipe: TrainRecipe,
    data: str,
    where: Expression | None = None,
    window: Literal["random", "center"] = "random",
) -> ShardReader:
    """Clips of the run in folder `data` (`where` and `window` as `ShardReader` has them), or of the recipe's cache.

    Raises StoreError, ValueError.
    """
    shapes, sequential = shapes_of(recipe), recipe.data.sequential()
    if not isinstance(recipe, DiffusionRecipe) or not recipe.data.cache:
        return ShardReader(
            below(data, "shards"),
            fps=recipe.data.fps,
            shapes=shapes,
            captions=recipe.data.captions,
            seed=recipe.seed,
            layout="CTHW",
            sequential=sequential,
            where=where,
            window=window,
        )
    made_of(recipe.data.cache)  # it is finished
    options: Any = {"length": recipe.text.length, "seed": recipe.seed, "sequential": sequential}
    return LatentReader(recipe.data.cache, shapes, **options)


def sources_of(recipe: TrainRecipe, data: str) -> list[tuple[TrainRecipe, str]]:
    """(recipe as for it alone, folder) of each run that is trained on: that in folder `data`, then the mixture's."""
    found = []
    for folder, given in [(data, {})] + [
        (m.data, m.model_dump(exclude={"data", "share"})) for m in recipe.data.mixture
    ]:
        alone = recipe.data.model_copy(update={"mixture": (), **given})
        found.append((recipe.model_copy(update={"data": alone}), folder))
    return found


def readers_of(recipe: TrainRecipe, data: str, held_out: float = 0.0) -> list[ShardReader]:
    """Of each run that is trained on, but for a share of the sources of each. Raises StoreError, ValueError."""
    found: list[ShardReader] = []
    sources = sources_of(recipe, data)
    kept = trained_on([below(folder, "shards") for _, folder in sources], held_out) if held_out else None
    for i, (alone, folder) in enumerate(sources):
        try:
            found.append(reader_of(alone, folder, kept[i] if kept else None))
        except StoreError as e:
            raise StoreError(f"data.mixture {folder}: {e}") if found else e from None
    return found


def held_out_of(recipe: TrainRecipe, data: str, share: float) -> ShardReader | None:
    """The clips of the run in folder `data` that are not trained on, their middle; None where the share is 0.

    Raises StoreError, ValueError.
    """
    if not share:
        return None
    return reader_of(recipe, data, held_out(below(data, "shards"), share), "center")


def build_loader(
    recipe: TrainRecipe,
    data: str,
    autoencoder: Strided,
    world: World,
    held_out: float = 0.0,
) -> Loader:
    """The loader of a recipe over the run in folder `data`; held_out: share of the sources that it leaves out.

    Raises StoreError, ValueError.
    """
    return loader_of(
        recipe,
        data,
        positions_of(recipe, autoencoder),
        world,
        held_out,
        packed=beside(recipe).pack,
        images=beside(recipe).images,
        stills=beside(recipe).stills,
        areas=[math.prod(latent_shape(autoencoder, *s)[1:]) for s in shapes_of(recipe)],
        lone=autoencoder.stride[0] == 1,
    )


def loader_of(
    recipe: TrainRecipe,
    data: str,
    positions: Sequence[int],
    world: World,
    held_out: float = 0.0,
    **options: Any,
) -> Loader:
    """The same for a model whose samples have so many positions, by bucket; options: of `Loader`."""
    return Loader(
        readers_of(recipe, data, held_out),
        positions,
        shares=recipe.data.shares(),
        tokens=recipe.data.tokens,
        batch=recipe.data.batch,
        rank=world.data_rank,
        world=world.data_size,
        workers=recipe.data.workers,
        pin=world.device.type == "cuda",
        **options,
    )
