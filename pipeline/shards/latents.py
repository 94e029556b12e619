"""The latent cache: what a frozen autoencoder and text encoder make of a run's clips, kept as shards.

    DIR/cache.json                        what the latents were made of and with; another cache is refused
    DIR/<bucket>/<bucket>-000000.tar      WebDataset: key.latents.npy key.text.npy key.json
    DIR/<bucket>/<bucket>-000000.parquet  the rows of that tar; written after it, so it says the tar is whole
    DIR/statistics.json                   count, mean and standard deviation a channel of all latents
    DIR/index.parquet                     all rows; written last, so it says the cache is whole

key.latents.npy is float16 [2, C, T, h, w], mean and log-variance ([1, …] of an encoder without variance);
key.text.npy is float16 [L, D], one row a token, without padding; buckets are named frames × height × width.

The list of tars follows from the clips and their buckets. Each is one unit of work, written whole or not at
all, by whichever rank it falls to; batches never span two. So the bytes depend neither on the number of
ranks nor on how often the work was killed. A tar says which clips, bytes and captions it was made of
(`Part.of`): when the run has changed, what differs is made anew, and so is a tar whose broken clips can be read
again. Copy c of a clip has the window of time and the caption that epoch c of training from pixels would show;
the variety of later epochs is given up.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.shards.buckets import Shape
from pipeline.shards.index import digest
from pipeline.shards.plan import split
from pipeline.shards.reader import BrokenSample, Sample, ShardReader

MAX_CLIPS, MAX_BYTES = 256, 256 << 20  # of a tar: what a killed rank loses at most
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Part:
    """One tar to write."""

    name: str  # without suffix
    shape: Shape
    rows: np.ndarray  # of the run's index
    of: str  # a hash of what the rows are
    copy: int = 0


@dataclass(frozen=True)
class Encoded:
    """One clip in the cache.

    mean, logvar: float32 [C, T, h, w]; logvar None where the encoder has no variance.
    text: float32 [L, D], tokens only; None where the text encoder is trained along or absent.
    """

    key: str
    caption: str
    mean: np.ndarray
    logvar: np.ndarray | None = None
    text: np.ndarray | None = None


def name_of(shape: Shape) -> str:
    return "x".join(map(str, shape))


# ---------------------------------------------------------------- writing


def plan(
    reader: ShardReader, clip_bytes: Sequence[int], max_clips: int = MAX_CLIPS, copies: int = 1
) -> list[Part]:
    """The tars of a cache, in order: a bucket's clips as they come in the run's index, copy after copy.

    Args:
        reader: with `shapes`.
        clip_bytes: about what a clip of each bucket takes.
    """
    assert reader.shapes is not None
    parts, contents = [], reader.contents()
    for bucket, shape in enumerate(reader.shapes):
        rows, name = np.flatnonzero(reader.bucket == bucket), name_of(shape)
        edges = split(np.full(len(rows), clip_bytes[bucket]), max_clips, MAX_BYTES)
        for number, (copy, (a, b)) in enumerate(product(range(copies), pairwise(edges))):
            of = digest([contents.take(pa.array(rows[a:b]))])
            parts.append(Part(f"{name}/{name}-{number:06d}", shape, rows[a:b], of, copy))
    return parts


def begin(store: Store, made_of: dict[str, Any]) -> bool:
    """Say what the cache is made of; whether the run's clips have changed since.

    Args:
        made_of: 'clips', the run's identity, and what else latents depend on.

    Raises StoreError where the folder holds a cache made with something else.
    """
    changed = False
    if store.exists("cache.json"):
        there = json.loads(store.read_bytes("cache.json"))
        if differs := [name for name in made_of if name != "clips" and there.get(name) != made_of[name]]:
            raise StoreError(
                f"{store.uri} holds a cache whose {differs[0]} was {there.get(differs[0])}, "
                f"not {made_of[differs[0]]}; give another folder, or delete it"
            )
        if there["clips"] == made_of["clips"]:
            return False
        changed = True
        if store.exists("index.parquet"):
            store.delete("index.parquet")  # until all of it is of the new clips
    store.write_bytes("cache.json", json.dumps(made_of, indent=1).encode())
    return changed


def is_done(store: Store, part: Part) -> bool:
    """It is there, and of the clips that the run has now."""
    name = f"{part.name}.parquet"
    return store.exists(name) and (store.read_schema(name).metadata or {}).get(b"of", b"").decode() == part.of


def broken_in(store: Store, part: Part) -> list[str]:
    """Keys of the clips that could not be read when a part was made."""
    found: list[str] = json.loads(
        (store.read_schema(f"{part.name}.parquet").metadata or {}).get(b"broken", b"[]")
    )
    return found


def write(store: Store, part: Part, clips: Iterable[Encoded], broken: list[str]) -> None:
    """Write one tar and then its rows.

    Args:
        broken: keys of clips that could not be read; looked at when `clips` has ended.

    Raises StoreError where a latent is not finite or beyond float16.
    """
    rows = []
    with (
        store.writer(f"{part.name}.tar") as f,
        tarfile.open(fileobj=f, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for clip in clips:
            rows.append(_write_clip(tar, clip, part))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    store.write_table(
        f"{part.name}.parquet", table.replace_schema_metadata({"broken": json.dumps(broken), "of": part.of})
    )


SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("clip_id", "bucket", "tar")]
    + [
        (name, pa.int64())
        for name in ("offset", "size", "text_offset", "text_size", "json_offset", "json_size")
    ]
    + [(name, pa.int32()) for name in ("frames", "height", "width")]
    + [("caption", pa.string()), ("count", pa.int64())]
    + [(name, pa.list_(pa.float64())) for name in ("sum", "squares")]
    + [("media_sha256", pa.string()), ("text_sha256", pa.string())]  # of the latents' file and the text's
)


def _write_clip(tar: tarfile.TarFile, clip: Encoded, part: Part) -> dict[str, Any]:
    """Append a clip's members; returns its row, with the sums that the statistics are made of."""
    latents = _half(np.stack([clip.mean] if clip.logvar is None else [clip.mean, clip.logvar]), clip.key)
    frames, height, width = part.shape
    about = {"caption": clip.caption, "frames": frames, "height": height, "width": width}
    drawn, told = _npy(latents), None if clip.text is None else _npy(_half(clip.text, clip.key))
    offset, size = _add(tar, f"{clip.key}.latents.npy", drawn)
    at, length = (None, None) if told is None else _add(tar, f"{clip.key}.text.npy", told)
    json_offset, json_size = _add(tar, f"{clip.key}.json", json.dumps(about, ensure_ascii=False).encode())
    stored = latents.astype(np.float64)
    squares = (stored[0] ** 2).sum((1, 2, 3))  # [C]
    if clip.logvar is not None:  # the variance of what will be sampled: that of the mean, and σ²
        squares += np.exp(stored[1]).sum((1, 2, 3))
    return {
        "clip_id": clip.key,
        "bucket": name_of(part.shape),
        "tar": f"{part.name}.tar",
        "offset": offset,
        "size": size,
        "text_offset": at,
        "text_size": length,
        "json_offset": json_offset,
        "json_size": json_size,
        **about,
        "count": stored[0][0].size,
        "sum": stored[0].sum((1, 2, 3)).tolist(),
        "squares": squares.tolist(),
        "media_sha256": hashlib.sha256(drawn).hexdigest(),
        "text_sha256": None if told is None else hashlib.sha256(told).hexdigest(),
    }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Append a member without user or time; returns (offset, size) of its bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset, len(data)


def _npy(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def _half(x: np.ndarray, key: str) -> np.ndarray:
    """As float16. Raises StoreError where that is not possible."""
    if not np.abs(x, dtype=np.float32).max(initial=0) <= LARGEST:  # NaN compares false
        raise StoreError(
            f"clip {key}: its latents or text features are not finite or beyond float16's {LARGEST:g}; "
            "check the encoder's weights, or give another"
        )
    return x.astype(np.float16)


def finish(store: Store, parts: Sequence[Part]) -> pa.Table | None:
    """Write statistics and index once every tar is there; returns the index, or None while some are missing.

    Any rank that is done calls it, whoever is last writes; two at once write the same bytes.
    """
    if not all(is_done(store, part) for part in parts):
        return None
    planned = {f"{part.name}{suffix}" for part in parts for suffix in (".tar", ".parquet")}
    for name in (*store.list(suffix=".tar"), *store.list(suffix=".parquet")):
        if "/" in name and name not in planned:  # of clips that the run no longer has
            store.delete(name)
    tables = [store.read_table(f"{part.name}.parquet") for part in parts]
    broken = [key for t in tables for key in json.loads((t.schema.metadata or {}).get(b"broken", b"[]"))]
    tables = [t.replace_schema_metadata() for t in tables]  # those begun by an older version lack the hashes
    index = pa.concat_tables(tables, promote_options="default").combine_chunks()
    if not len(index):
        raise StoreError(
            f"{store.uri}: no clip could be read, so there is nothing to keep; check the run's shards"
        )
    count = sum(index["count"].to_pylist())
    sums, squares = (np.array(index[name].to_pylist()).sum(0) for name in ("sum", "squares"))  # [C]
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    measured = {"count": count, "mean": mean.tolist(), "std": std.tolist(), "broken": broken}
    store.write_bytes("statistics.json", json.dumps(measured, indent=1).encode())
    index = index.drop_columns(["count", "sum", "squares"])
    store.write_table("index.parquet", index)
    return index


# ---------------------------------------------------------------- reading


def made_of(folder: str) -> dict[str, Any]:
    """cache.json of a finished cache. Raises StoreError where there is none."""
    store = Store(folder)
    if not store.exists("index.parquet") or not store.exists("cache.json"):
        raise StoreError(
            f"{folder} holds no finished cache; make one with: clipmill encode RUN --out {folder}"
        )
    return json.loads(store.read_bytes("cache.json"))


def statistics(folder: str) -> dict[str, Any]:
    """count, mean and std (lists [C]) of a finished cache, and the keys of `broken` clips it leaves out."""
    return json.loads(Store(folder).read_bytes("statistics.json"))


class LatentReader(ShardReader):
    """Samples of a cache in place of decoded clips; order, replacement and state are ShardReader's.

    Args:
        shapes: of the cache's buckets, in the order of the recipe it was made by.
        length: tokens that texts are padded to.

    Yields {'key', 'caption', 'mean', 'logvar', 'text', 'text_mask', 'meta', 'skipped'}: float16 [C, T, h, w]
    twice (logvar None where there is none), float16 [length, D] and bool [length] (None without text).
    """

    def __init__(self, folder: str, shapes: Sequence[Shape], length: int, **options: Any):
        super().__init__(folder, by_bucket=True, decode=False, **options)
        number = {name_of(shape): i for i, shape in enumerate(shapes)}
        of = np.array([number[name] for name in self.index.names["bucket"]], np.int16)
        self.shapes, self.length, self.bucket = shapes, length, of[self.bucket]

    def read(self, row: int, shape: Shape | None = None) -> Sample:
        """One sample; `shape` is the cache's own and must not be given. Raises BrokenSample."""
        sample, files = self._sample(row, None)
        try:
            latents = np.load(io.BytesIO(sample.pop("video")))
            features = files.file("text_")
            text = np.load(io.BytesIO(features)) if features else None
        except (StoreError, OSError, ValueError, EOFError) as e:
            raise BrokenSample(f"{sample['key']} in {files.place.tar}: {e}") from e
        mean, logvar = latents[0], latents[1] if len(latents) == 2 else None
        told = {"text": None, "text_mask": None} if text is None else _padded(text, self.length)
        return sample | {"mean": mean, "logvar": logvar} | told


def _padded(text: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """[n, D] → [length, D] and where the n tokens are."""
    features = np.zeros((length, text.shape[1]), text.dtype)
    features[: len(text)] = text[:length]
    return {"text": features, "text_mask": np.arange(length) < len(text)}
