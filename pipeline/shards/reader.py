"""The shard reader of every trainer: clips by byte range, decoded where they are needed.

    reader = ShardReader("run/shards", frames=16, fps=8, size=(256, 256), batch_size=8)
    loader = ShardLoader(reader, workers=4)
    for batch in loader:                        # {'key': [...], 'video': uint8 [8, 16, 256, 256, 3], …}
        ...
        checkpoint["data"] = loader.state_dict()

**Order.** An epoch is a list of batches (`pipeline.shards.order`). Clips are shuffled by (seed, epoch), dealt to
batches (each of one bucket, where `by_bucket`), and the batches are shuffled. The list does not depend on ranks,
workers or machines. Step s of rank r is batch s · world + r; worker w of W prepares the steps s ≡ w (mod W),
which is the order in which a DataLoader asks its workers. So every rank has the same number of steps,
a clip is in one batch of an epoch, and a state saved with one number of workers or ranks continues
with another (with the same `batch_size` and `seed`).

**Ends.** What does not fill a batch, or a step of all ranks, is either repeated from the beginning of the
same list (`last='wrap'`: every clip at least once an epoch) or left out (`last='drop'`: at most once;
another tail each epoch).

**Broken samples.** A clip that cannot be read or decoded is replaced by the next of its bucket, so batches
stay whole and no rank waits for another; its key is in the replacement's `skipped`.

Randomness (which window of time, which caption) comes from (seed, epoch, clip) alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store
from pipeline.shards.ahead import Ahead, Bytes, Place
from pipeline.shards.buckets import Shape, fit, table
from pipeline.shards.captions import CaptionRule, caption_of
from pipeline.shards.index import Texts, digest, only, open_index, row_groups, rows_where
from pipeline.shards.order import Order, Sequential, whole
from pipeline.shards.pixels import BrokenSample, decode

try:
    from torch.utils.data import IterableDataset
except ImportError:  # reading needs no torch
    IterableDataset = object  # type: ignore[assignment, misc]

Sample = dict[str, Any]


FILES = {"": "media_sha256", "json_": "", "text_": "text_sha256"}  # of a sample: columns' beginnings, hashes
PATIENCE = 100  # broken samples in a row after which the data as a whole is at fault


class ShardReader(IterableDataset):
    """Samples of one rank, in order, from where the state says; an `IterableDataset` where torch is there.

    Args:
        folder: DIR/shards, local or s3:// or gs://.
        frames: frames a sample (T).
        fps: of the sampled frames; none spreads them evenly over the whole clip. A clip shorter than
            `frames / fps` repeats its last frame.
        size: (height, width): the picture as displayed is scaled to cover it and cropped at the centre.
            None keeps the stored size, one frame shape a clip.
        window: where the frames lie in a longer clip: 'random' or 'center'.
        captions: 'chosen', or 'sample' (any candidate, by its consensus or CLIP score, where it has one), or 'fields'
            (some fields, in some order, of its first structured caption, see `pipeline.caption.structured`; the
            chosen one where it has none), or a function (key.json, generator) → text.
        batch_size: samples a batch. Without a `ShardLoader`, use it for the DataLoader too.
        by_bucket: every batch from one bucket (one aspect class and length).
        shapes: (frames, height, width) of the buckets to sort clips into (`fit`), in place of `frames`,
            `size` and `by_bucket`.
        rank, world: this process's place among those that train together.
        last: see above.
        shuffle: False reads in the order of the index (evaluation).
        sequential: clips that lie together are read in one request, and shuffled less thoroughly
            (`pipeline.shards.order`); for object stores.
        where: keep samples of which this is true, an arrow expression over the index, e.g.
            `pc.field("score_motion") > 0.1`.
        layout: of a video, 'THWC' or 'CTHW'.
        check: compare what is read with the index's media_sha256, where it has one; a sample of other bytes is broken.
            Costs a thousandth of decoding; False for those who only copy.
        decode: False gives `video` as mp4 bytes.

    Yields {'key', 'video', 'caption', 'meta', 'skipped'}: video is uint8 [T, H, W, 3] RGB (or
    [3, T, H, W]), meta is key.json, skipped lists the keys of broken samples that this one stands for.

    The state is (epoch, first, step, sample): the next sample is number `sample` of the rank's batch
    `step`, counted from batch `first` of the epoch, before which all ranks have been.
    """

    def __init__(
        self,
        folder: str,
        *,
        frames: int = 16,
        fps: float | None = None,
        size: tuple[int, int] | None = None,
        window: Literal["random", "center"] = "random",
        captions: CaptionRule = "chosen",
        batch_size: int = 1,
        by_bucket: bool = False,
        shapes: Sequence[Shape] | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        last: Literal["wrap", "drop"] = "wrap",
        shuffle: bool = True,
        sequential: Sequential | None = None,
        where: pc.Expression | None = None,
        layout: Literal["THWC", "CTHW"] = "THWC",
        decode: bool = True,
        check: bool = True,
    ):
        if frames < 1 or batch_size < 1 or not 0 <= rank < world:
            raise ValueError(
                f"frames {frames} and batch_size {batch_size} must be ≥ 1, rank {rank} in [0, world {world})"
            )
        self.folder, self.frames, self.fps, self.size, self.window = folder, frames, fps, size, window
        self.captions, self.batch_size, self.by_bucket, self.decode = captions, batch_size, by_bucket, decode
        self.seed, self.rank, self.world, self.last, self.shuffle = seed, rank, world, last, shuffle
        self.layout, self.check, self.sequential = layout, check, sequential
        self.index = open_index(folder)
        self.rows: np.ndarray | None = None  # of the index, that are read; none: all
        if where is not None:
            self.rows = rows_where(folder, where)
        self.table = ""  # of the buckets, for a person
        self.shapes = shapes
        if shapes:
            sizes = self._sizes()
            found = fit(sizes, shapes, fps)
            timed = "duration_s" in sizes.column_names
            seconds = sizes["duration_s"].to_numpy() if timed else None
            self.table = table(found, shapes, len(sizes), fps, seconds)
            if len(found.rows) != len(sizes) or len(found.short):
                self.rows = found.rows if self.rows is None else self.rows[found.rows]
            self.bucket = found.bucket
        self.keys = Texts(self.index.keys.data, self.index.keys.ends, self.rows)
        if not shapes:
            buckets = self.index.columns["bucket"] if by_bucket else np.zeros(len(self.index), np.int16)
            self.bucket = buckets if self.rows is None else buckets[self.rows]
        self.epoch = self.first = self.step = self.sample = 0
        self.skipped: list[str] = []  # keys of broken samples met by this process
        self._open: tuple[int, Ahead] | None = None
        self._gathered = -1  # the epoch whose groups are held
        counts = np.bincount(self.bucket).tolist()
        self.order = Order(
            self.bucket, whole(counts, [batch_size] * len(counts), last), seed, shuffle, sequential
        )
        if self.steps() == 0:
            raise StoreError(
                f"{folder}: {len(self.keys)} samples are not one batch of {batch_size} for each of {world} ranks; "
                f"use last='wrap', a smaller batch_size, or keep more clips"
            )

    def _sizes(self) -> pa.Table:
        """What the samples that are read measure, as far as the index says."""
        columns = {
            n: self.index.columns[n] for n in ("duration_s", "width", "height") if n in self.index.columns
        }
        if not columns:
            return pa.table({"key": pa.nulls(len(self.index) if self.rows is None else len(self.rows))})
        return pa.table({n: x if self.rows is None else x[self.rows] for n, x in columns.items()})

    def contents(self) -> pa.Table:
        """What training sees of each sample, by row, without reading it: its id, the hash of its bytes, its captions.

        Of shards without hashes, where the bytes lie; without captions, nothing is said of them.
        """
        index = pa.concat_tables(self._contents())
        return index if self.rows is None else index.take(pa.array(self.rows))

    def _contents(self) -> Iterator[pa.Table]:
        """Of all rows of the index, a row group at a time."""
        hashed = "media_sha256" in self.index.columns
        captions = "caption" if self.captions == "chosen" else "captions_hash"
        names = ["clip_id", *(["media_sha256"] if hashed else ["tar", "offset", "size"]), captions]
        for rows in row_groups(self.folder, names):
            yield rows.select([n for n in names if n in rows.column_names])

    def identity(self) -> str:
        """A hash of `contents` and of the buckets: of another folder, other bytes, other captions it is another."""
        used = None
        order = [self.bucket]
        if self.rows is not None:
            used = np.zeros(len(self.index), bool)
            used[self.rows] = True
            order.append(np.cumsum(used, dtype=np.int32)[self.rows])

        def made() -> str:
            return digest(self._contents() if used is None else only(self._contents(), used), *order)

        chosen = self.captions == "chosen"
        whole = order if used is None else [*order, used]
        return self.index.kept(f"identity {chosen} {digest([], *whole)}", made)

    # ------------------------------------------------------------ the order

    def steps(self) -> int:
        """Batches of every rank between batch `first` of the epoch and its end."""
        left = len(self.order) - self.first
        return -(-left // self.world) if self.last == "wrap" else left // self.world

    def __len__(self) -> int:
        """Samples of this rank between batch `first` of the epoch and its end."""
        return self.steps() * self.batch_size

    def __iter__(self) -> Iterator[Sample]:
        """The rest of the epoch, then the state is at the next one.

        In a worker of a DataLoader: this worker's batches of it; the state is the worker's own copy.
        """
        for place, rows in self._share():
            self.gather(self.order, rows)
            for i in range(place, len(rows)):
                sample = self.sound(int(rows[i]))
                self.advance(1)
                yield sample
        self.next_epoch()

    def iter_batches(self) -> Iterator[list[Sample]]:
        """As iterating, in lists of `batch_size`; the first is shorter where the state is inside a batch."""
        for place, rows in self._share():
            self.gather(self.order, rows)
            yield [self.sound(int(row)) for row in rows[place:]]

    def _share(self) -> Iterator[tuple[int, np.ndarray]]:
        """(place to begin at, rows) of each batch that this process prepares, from the state on."""
        worker, workers = _worker()
        begin, place = self.step, self.sample
        for step in range(begin + worker, self.steps(), workers):
            number = (self.first + step * self.world + self.rank) % len(self.order)
            yield (place if step == begin else 0), self.order.batch(self.epoch, number)

    def advance(self, samples: int) -> None:
        """Move the state on; for a trainer with a DataLoader of its own, which has taken so many."""
        self.step, self.sample = divmod(self.step * self.batch_size + self.sample + samples, self.batch_size)

    def next_epoch(self) -> None:
        self.epoch, self.first, self.step, self.sample = self.epoch + 1, 0, 0, 0

    # ------------------------------------------------------------ the state

    def state_dict(self) -> dict[str, int]:
        """Where the next sample is; plain numbers. Of this process's own iteration, see `ShardLoader`."""
        return {
            "epoch": self.epoch,
            "first": self.first + self.step * self.world,
            "sample": self.sample,
            "world": self.world,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "samples": len(self.keys),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state of any rank of the same run (all ranks save the same at the same step).

        Raises ValueError where the state is of other data or settings, or of another number of ranks
        in the middle of a batch.
        """
        mine = {"batch_size": self.batch_size, "seed": self.seed, "samples": len(self.keys)}
        for name, value in mine.items():
            if state[name] != value:
                raise ValueError(
                    f"the saved state has {name} {state[name]}, this reader {value}; use the same"
                )
        if state["sample"] and state["world"] != self.world:
            raise ValueError(
                "the saved state is inside a batch; with another number of ranks, save between batches"
            )
        self.epoch, self.step, self.sample, self.first = state["epoch"], 0, state["sample"], state["first"]

    # ------------------------------------------------------------ samples

    @property
    def samples(self) -> int:
        """Of an epoch, those that are repeated to fill its last batch included."""
        return len(self.order) * self.batch_size

    def nth(self, number: int) -> Sample:
        """The sample of that number of the endless list, whichever rank's it is; the state stays as it is.

        So a reader is a source of a mixture (`pipeline.shards.mixture`).
        """
        self.epoch, place = divmod(number, self.samples)
        batch, at = divmod(place, self.batch_size)
        rows = self.order.batch(self.epoch, batch)
        self.gather(self.order, rows)
        return self.sound(int(rows[at]))

    def sound(self, row: int, shape: Shape | None = None) -> Sample:
        """The sample of a row, or of the next sound one of its bucket. Raises StoreError after PATIENCE broken."""
        broken: list[str] = []
        alike: np.ndarray | None = None
        while len(broken) < PATIENCE:
            try:
                return self.read(row, shape) | {"skipped": broken}
            except BrokenSample as e:
                why = e
            broken.append(self.keys[row])
            self.skipped.append(broken[-1])
            if alike is None:
                alike = np.flatnonzero(self.bucket == self.bucket[row])
            row = int(alike[(np.searchsorted(alike, row) + 1) % len(alike)])
        raise StoreError(f"{self.folder}: {PATIENCE} samples in a row are broken, the last: {why}")

    def read(self, row: int, shape: Shape | None = None) -> Sample:
        """One sample by its row of the index, in a shape of its own where one is given. Raises BrokenSample."""
        return self._sample(row, shape)[0]

    def _sample(self, row: int, shape: Shape | None) -> tuple[Sample, Bytes]:
        """The sample, and the files that it is made from."""
        if shape is None and self.shapes:
            shape = self.shapes[self.bucket[row]]
        frames, picture = (self.frames, self.size) if shape is None else (shape[0], shape[1:])
        key, place = self.keys[row], self.place(row)
        rng = np.random.default_rng([self.seed, self.epoch, row])
        at = rng.random() if self.window == "random" else 0.5
        try:
            files = self._files().read(row, place)
            video: Any = files.file("")
            meta = json.loads(files.file("json_") or b"{}")
            if self.decode:
                video = decode(video, frames, self.fps, picture, at)
                video = video.transpose(3, 0, 1, 2) if self.layout == "CTHW" else video
        except (BrokenSample, StoreError, OSError, ValueError) as e:
            raise BrokenSample(f"{key} in {place.tar}: {e}") from e
        return {
            "key": key,
            "video": video,
            "caption": caption_of(meta, self.captions, rng),
            "meta": meta,
        }, files

    def place(self, row: int) -> Place:
        """Where the files of a sample lie."""
        at, columns = row if self.rows is None else int(self.rows[row]), self.index.columns
        files, hashes = {}, {}
        for which, hashed in FILES.items():
            if f"{which}size" in columns and (size := int(columns[f"{which}size"][at])):
                files[which] = int(columns[f"{which}offset"][at]), size
            if self.check and hashed in columns and any(sha256 := columns[hashed][at].tobytes()):
                hashes[which] = sha256.hex()
        return Place(self.index.names["tar"][columns["tar"][at]], files, hashes)

    def gather(self, order: Order, rows: np.ndarray) -> None:
        """These samples are read next: read what lies together with them in as few requests, where the order is of
        such groups. What was read for an earlier epoch is let go."""
        if order.sequential is None:
            return
        files = self._files()
        if self._gathered != self.epoch:
            files.clear()
            self._gathered = self.epoch
        files.next(rows.tolist())
        for row in rows.tolist():
            if row not in files.held:
                group = order.group(row).tolist()
                with contextlib.suppress(
                    StoreError
                ):  # whatever is wrong is told of each sample when it is read
                    files.load((other, self.place(other)) for other in group)

    def _files(self) -> Ahead:
        """Open files of this process; a worker opens its own after the fork."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), Ahead(Ranges(Store(self.folder))))
        return self._open[1]

    @property
    def requests(self) -> int:
        """Byte ranges that this process has asked for."""
        return self._files().requests

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


class ShardLoader:
    """Batches of a reader, prepared by worker processes, resumable to the batch (needs torch).

    Args:
        reader: its `batch_size` is the batch; its state moves as batches are handed out.
        workers: processes; 0 prepares in this one.
        collate: list of samples → batch.
        options: for `torch.utils.data.DataLoader` (prefetch_factor, pin_memory, multiprocessing_context).

    Iterating gives the rest of the current epoch; the next iteration is the next epoch.
    """

    def __init__(
        self,
        reader: ShardReader,
        workers: int = 0,
        collate: Callable[[list[Sample]], Any] | None = None,
        **options: Any,
    ):
        self.reader, self.workers, self.collate = reader, workers, collate or stack
        self.options = options

    def __len__(self) -> int:
        """Batches that are left of the epoch."""
        return self.reader.steps() - self.reader.step

    def __iter__(self) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            _Batches(self.reader, self.collate), batch_size=None, num_workers=self.workers, **self.options
        )
        for batch in loader:
            self.reader.advance(self.reader.batch_size - self.reader.sample)
            yield batch
        self.reader.next_epoch()

    def state_dict(self) -> dict[str, int]:
        """Where the next batch is; batches that workers prepare ahead do not count."""
        return self.reader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reader.load_state_dict(state)


class _Batches(IterableDataset):
    """What a worker of a `ShardLoader` runs."""

    def __init__(self, reader: ShardReader, collate: Callable[[list[Sample]], Any]):
        self.reader, self.collate = reader, collate

    def __iter__(self) -> Iterator[Any]:
        return map(self.collate, self.reader.iter_batches())


def stack(samples: list[Sample]) -> dict[str, Any]:
    """A batch: lists of what is in the samples, `video` a tensor [B, …] where all have one shape."""
    import torch

    batch: dict[str, Any] = {name: [s[name] for s in samples] for name in samples[0]}
    batch["skipped"] = [key for s in samples for key in s["skipped"]]
    if len({getattr(v, "shape", None) for v in batch["video"]} - {None}) == 1:
        batch["video"] = torch.from_numpy(np.stack(batch["video"]))
    return batch


def _worker() -> tuple[int, int]:
    """(number of this DataLoader worker, how many there are); (0, 1) outside of one."""
    if IterableDataset is object:
        return 0, 1
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
