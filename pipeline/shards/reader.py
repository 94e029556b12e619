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

import binascii
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store
from pipeline.shards.buckets import Shape, fit, table
from pipeline.shards.order import Order, whole
from pipeline.shards.pixels import BrokenSample, decode

try:
    from torch.utils.data import IterableDataset
except ImportError:  # reading needs no torch
    IterableDataset = object  # type: ignore[assignment, misc]

Sample = dict[str, Any]
CaptionRule = Literal["chosen", "sample", "fields"] | Callable[[dict[str, Any], np.random.Generator], str]


UNREAD = {"meta"}  # columns of the index that no reader needs in memory
PATIENCE = 100  # broken samples in a row after which the data as a whole is at fault


def read_index(folder: str, columns: Collection[str] | None = None) -> pa.Table:
    """Where every sample of a folder of shards lies: clip_id, bucket, tar, offset, size, json_offset, json_size, …

    From `index.parquet`, of which `columns` alone where they are given; without one, from the headers of the tars
    below the folder (any WebDataset of mp4 and json). Raises StoreError where there is neither.
    """
    store = Store(folder)
    if store.exists("index.parquet"):
        names = store.read_schema("index.parquet").names
        wanted = [n for n in names if n not in UNREAD and (columns is None or n in columns)]
        return store.read_table("index.parquet", wanted)
    rows = [row for name in store.list(suffix=".tar") for row in _scan(store, name)]
    if not rows:
        raise StoreError(
            f"{folder} holds neither index.parquet nor tars with mp4 files; give a folder of shards"
        )
    return pa.Table.from_pylist(rows)


def _scan(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """The samples of one tar; a sample is a run of members with one name up to the first dot."""
    row: dict[str, Any] = {}
    with store.open(name) as f, tarfile.open(fileobj=f, mode="r:") as tar:
        for member in tar:
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != row.get("clip_id"):
                if "offset" in row:
                    yield row
                row = {"clip_id": key, "bucket": name.rpartition("/")[0], "tar": name}
                row |= {"json_offset": None, "json_size": None}
            if kind == "mp4":
                row |= {"offset": member.offset_data, "size": member.size}
            elif kind == "json":
                row |= {"json_offset": member.offset_data, "json_size": member.size}
    if "offset" in row:
        yield row


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
        self.layout = layout
        # a folder without an index is looked through once; else columns are read one by one, which takes least memory
        self._scanned = None if Store(folder).exists("index.parquet") else read_index(folder)
        self.rows: np.ndarray | None = None  # of the index, that are read; none: all
        if where is not None:
            index = read_index(folder) if self._scanned is None else self._scanned
            self.rows = (
                index.append_column("row", pa.array(np.arange(len(index)))).filter(where)["row"].to_numpy()
            )
        self.table = ""  # of the buckets, for a person
        self.shapes = shapes
        if shapes:
            index = self._columns(["clip_id", "duration_s", "width", "height"])
            found = fit(index, shapes, fps)
            timed = "duration_s" in index.column_names
            seconds = index["duration_s"].fill_null(0.0).to_numpy() if timed else None
            self.table = table(found, shapes, len(index), fps, seconds)
            if len(found.rows) != len(index) or len(found.short):
                self.rows = found.rows if self.rows is None else self.rows[found.rows]
            self.bucket = found.bucket
            del index, found, seconds
        self.keys = self._columns(["clip_id"])["clip_id"].combine_chunks()
        self.tars = self._columns(["tar"])["tar"].combine_chunks().dictionary_encode()
        if not shapes:
            named = self._columns(["bucket"])["bucket"].combine_chunks() if by_bucket else None
            kinds = np.zeros(len(self.keys), np.int16)
            self.bucket = kinds if named is None else named.dictionary_encode().indices.to_numpy()
        hashes = self._columns(["media_sha256"]) if check else pa.table({})
        self.sha256 = from_hex(hashes["media_sha256"]) if hashes.num_columns else None
        del hashes
        places = (self._columns([c])[c].fill_null(0).to_numpy() for c in ("offset", "json_offset"))
        self.offsets = np.stack([*places], 1)
        lengths = (self._columns([c])[c].fill_null(0).to_numpy() for c in ("size", "json_size"))
        self.sizes = np.stack([x.astype(np.uint32) for x in lengths], 1)
        pa.default_memory_pool().release_unused()  # what reading took
        self.epoch = self.first = self.step = self.sample = 0
        self.skipped: list[str] = []  # keys of broken samples met by this process
        self._ranges: tuple[int, Ranges] | None = None
        counts = np.bincount(self.bucket).tolist()
        self.order = Order(self.bucket, whole(counts, [batch_size] * len(counts), last), seed, shuffle)
        if self.steps() == 0:
            raise StoreError(
                f"{folder}: {len(self.keys)} samples are not one batch of {batch_size} for each of {world} ranks; "
                f"use last='wrap', a smaller batch_size, or keep more clips"
            )

    def _columns(self, names: Sequence[str]) -> pa.Table:
        """Those of the index that there are, of the rows that are read."""
        if self._scanned is None:
            index = read_index(self.folder, names)
        else:
            index = self._scanned.select([n for n in names if n in self._scanned.column_names])
        return index if self.rows is None else index.take(pa.array(self.rows))

    def contents(self) -> pa.Table:
        """What training sees of each sample, by row, without reading it: its id, the hash of its bytes, its captions.

        Of shards without hashes, where the bytes lie; without captions, nothing is said of them.
        """
        captions = "caption" if self.captions == "chosen" else "captions_hash"
        index = self._columns(["clip_id", "media_sha256", captions])
        if "media_sha256" in index.column_names:
            return index
        places = self._columns(["tar", "offset", "size"])
        return pa.table({c: t[c] for t in (index, places) for c in t.column_names})

    def identity(self) -> str:
        """A hash of `contents` and of the buckets: of another folder, other bytes, other captions it is another."""
        return digest(self.contents(), self.bucket)

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
            for i in range(place, len(rows)):
                sample = self.sound(int(rows[i]))
                self.advance(1)
                yield sample
        self.next_epoch()

    def iter_batches(self) -> Iterator[list[Sample]]:
        """As iterating, in lists of `batch_size`; the first is shorter where the state is inside a batch."""
        for place, rows in self._share():
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

    def sound(self, row: int, shape: Shape | None = None) -> Sample:
        """The sample of a row, or of the next sound one of its bucket. Raises StoreError after PATIENCE broken."""
        broken: list[str] = []
        alike: np.ndarray | None = None
        while len(broken) < PATIENCE:
            try:
                return self.read(row, shape) | {"skipped": broken}
            except BrokenSample as e:
                why = e
            broken.append(self.keys[row].as_py())
            self.skipped.append(broken[-1])
            if alike is None:
                alike = np.flatnonzero(self.bucket == self.bucket[row])
            row = int(alike[(np.searchsorted(alike, row) + 1) % len(alike)])
        raise StoreError(f"{self.folder}: {PATIENCE} samples in a row are broken, the last: {why}")

    def read(self, row: int, shape: Shape | None = None) -> Sample:
        """One sample by its row of the index, in a shape of its own where one is given. Raises BrokenSample."""
        if shape is None and self.shapes:
            shape = self.shapes[self.bucket[row]]
        frames, picture = (self.frames, self.size) if shape is None else (shape[0], shape[1:])
        key = self.keys[row].as_py()
        rng = np.random.default_rng([self.seed, self.epoch, row])
        (offset, json_offset), (size, json_size) = self.offsets[row].tolist(), self.sizes[row].tolist()
        tar = self.tars[row].as_py()
        at = rng.random() if self.window == "random" else 0.5
        try:
            wanted = None if self.sha256 is None else self.sha256[row].as_py()
            video: Any = self._files().read(tar, offset, size, wanted and wanted.hex())
            meta = json.loads(self._files().read(tar, json_offset, json_size)) if json_size else {}
            if self.decode:
                video = decode(video, frames, self.fps, picture, at)
                video = video.transpose(3, 0, 1, 2) if self.layout == "CTHW" else video
        except (BrokenSample, StoreError, OSError, ValueError) as e:
            raise BrokenSample(f"{key} in {tar}: {e}") from e
        return {"key": key, "video": video, "caption": self._caption(meta, rng), "meta": meta}

    def _caption(self, meta: dict[str, Any], rng: np.random.Generator) -> str:
        if callable(self.captions):
            return self.captions(meta, rng)
        told = [c for c in meta.get("captions", []) if c["text"]]
        if self.captions == "fields":
            from pipeline.caption.structured import record_of, sampled

            scores = {k: v for k, v in json_of(meta.get("scores") or {}).items() if v is not None}
            found = (r for c in told if (r := record_of(c.get("raw") or "", scores)))
            if (record := next(found, None)) is not None:
                return sampled(record, str(rng.integers(1 << 62)))
            return meta.get("caption") or ""
        if self.captions == "chosen" or not told:
            return meta.get("caption") or ""
        weights = np.array([max([0.0, *json_of(c["scores"]).values()]) for c in told])
        weights = np.maximum(weights, 1e-3) / np.maximum(weights, 1e-3).sum()
        return told[int(np.searchsorted(np.cumsum(weights)[:-1], rng.random(), "right"))]["text"]

    def _files(self) -> Ranges:
        """Open files of this process; a worker opens its own after the fork."""
        if self._ranges is None or self._ranges[0] != os.getpid():
            self._ranges = (os.getpid(), Ranges(Store(self.folder)))
        return self._ranges[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ranges": None}


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


def digest(rows: pa.Table, *more: np.ndarray) -> str:
    """A hash of a table's values, and of arrays, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for name in rows.column_names:
        column = rows[name].cast(pa.large_string()).fill_null("").combine_chunks()
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        for chunk in chunks:
            ends = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            found.update(np.diff(ends).tobytes())
            found.update(memoryview(chunk.buffers()[2] or b"")[int(ends[0]) : int(ends[-1])])
    for array in more:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def from_hex(column: pa.ChunkedArray) -> pa.Array:
    """Hashes as bytes, half as long as their digits; None where there is none."""
    chunks = [
        pa.array([None if v is None else bytes.fromhex(v) for v in chunk.to_pylist()], pa.binary(32))
        if chunk.null_count or (pc.binary_length(chunk).to_numpy() != 64).any()
        else _unhexed(chunk)
        for chunk in column.cast(pa.string()).chunks
    ]
    return pa.chunked_array(chunks, pa.binary(32)).combine_chunks()


def _unhexed(chunk: pa.StringArray) -> pa.Array:
    data = memoryview(chunk.buffers()[2])[64 * chunk.offset : 64 * (chunk.offset + len(chunk))]
    return pa.Array.from_buffers(pa.binary(32), len(chunk), [None, pa.py_buffer(binascii.unhexlify(data))])


def json_of(told: Any) -> dict[str, Any]:
    """What a map of key.json holds: JSON text (see `pipeline.shards.provenance`); older shards have a map."""
    return json.loads(told) if isinstance(told, str) else told


def _worker() -> tuple[int, int]:
    """(number of this DataLoader worker, how many there are); (0, 1) outside of one."""
    if IterableDataset is object:
        return 0, 1
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
