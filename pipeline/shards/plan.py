"""Where everything in the shards lies: buckets, tars and offsets, before a byte is copied.

A sample is `key.mp4 key.json key.txt`, each a header block and its bytes, padded to whole blocks (tar, ustar).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.recipe import Shards

BLOCK = 512  # tar: a member is a header block and its bytes, padded to whole blocks
END = 2 * BLOCK  # of a tar: two blocks of zeros
ASPECTS = {
    "21x9": 21 / 9,
    "16x9": 16 / 9,
    "4x3": 4 / 3,
    "1x1": 1.0,
    "3x4": 3 / 4,
    "9x16": 9 / 16,
    "9x21": 9 / 21,
}
SIDES = [144, 240, 360, 480, 720, 1080, 1440, 2160, 4320]  # pixels, the shorter side


def bucket(width: int, height: int, sar: float, duration_s: float, lengths_s: tuple[float, ...]) -> str:
    """Folder of clips that train well together, e.g. '16x9_360p_4-8s'.

    Classes, because real footage has hundreds of exact sizes: the nearest aspect ratio as displayed,
    the largest standard shorter side that it reaches within 2 % (rounding to even sizes loses a row or
    two), and the length between two edges.

    Args:
        width, height: stored pixels.
        sar: shape of one pixel, width ÷ height.
        lengths_s: increasing edges, seconds; a clip as long as an edge lies above it.
    """
    above = [e for e in lengths_s if e > duration_s]
    below = [e for e in lengths_s if e <= duration_s]
    length = f"{below[-1] if below else 0:g}-{above[0]:g}s" if above else f"{below[-1] if below else 0:g}s-up"
    return f"{_shape(width, height, sar)}_{length}"


@functools.cache
def _shape(width: int, height: int, sar: float) -> str:
    ratio = math.log(width * sar / height)
    aspect = min(ASPECTS, key=lambda name: abs(math.log(ASPECTS[name]) - ratio))
    reached = [s for s in SIDES if min(width, height) * 1.02 >= s]
    return f"{aspect}_{reached[-1]}p" if reached else f"{aspect}_under{SIDES[0]}p"


def split(sizes: np.ndarray, max_items: int, max_bytes: int) -> list[int]:
    """Cut a list into the fewest consecutive runs within both limits, as even as they can be.

    Args:
        sizes: int64 [n], bytes an item takes. An item above `max_bytes` becomes a run of its own.

    Returns the edges, [0, …, n]; [0] for an empty list.
    """
    total = np.concatenate([[0], np.cumsum(sizes)])

    def cut(share: float) -> list[int]:
        items, size = max(1, int(max_items * share)), max_bytes * share
        edges = [0]
        while edges[-1] < len(sizes):
            start = edges[-1]
            end = int(np.searchsorted(total, total[start] + size, "right")) - 1
            edges.append(min(max(end, start + 1), start + items, len(sizes)))
        return edges

    fewest = best = cut(1.0)
    low, high = 0.0, 1.0
    for _ in range(24 if len(fewest) > 2 else 0):  # the smallest share of the limits that needs no more runs
        middle = (low + high) / 2
        if middle * max_items >= 1 and len(edges := cut(middle)) == len(fewest):
            high, best = middle, edges
        else:
            low = middle
    return best


def plan(samples: pa.Table, recipe: Shards) -> pa.Table:
    """The index: samples in the order they are stored, with bucket, tar and offsets.

    Args:
        samples: a row a kept clip, in any order, as `_samples` makes it.

    Adds `tar` (relative to the folder of the shards), `shard` (the same, relative to the run), `offset` and `size` of
    the mp4, `json_offset` and `json_size`; its metadata holds `plan`, a hash of all that determines the shards' bytes.
    """
    order = pa.array(
        hashlib.blake2b(f"{recipe.seed}\0{c}".encode(), digest_size=8).digest()
        for c in samples["clip_id"].to_pylist()
    ).cast(pa.binary())
    keys = [(name, "ascending") for name in ("bucket", "order", "clip_id")]
    samples = samples.take(pc.sort_indices(samples.append_column("order", order), keys))
    media, tail = samples["media_size"].to_numpy(), samples["tail_size"].to_numpy()
    size = BLOCK + padded(media) + tail
    start = np.zeros(len(samples), np.int64)
    tars: list[str] = []
    names, counts = runs(samples["bucket"].to_pylist())
    first = 0
    for name, count in zip(names, counts, strict=True):
        edges = split(size[first : first + count], recipe.max_clips, recipe.max_bytes - END)
        for number, (a, b) in enumerate(pairwise(edges)):
            inside = slice(first + a, first + b)
            start[inside] = np.concatenate([[0], np.cumsum(size[inside])[:-1]])
            tars += [f"{name}/{name}-{number:06d}.tar"] * (b - a)  # wids caches by the last part alone
        first += count
    where = {
        "tar": pa.array(tars, pa.string()),
        "shard": pa.array((f"shards/{t}" for t in tars), pa.string()),
        "offset": pa.array(start + BLOCK),
        "size": pa.array(media),
        "json_offset": pa.array(start + BLOCK + padded(media) + BLOCK),
        "json_size": samples["json_size"].combine_chunks(),
    }
    index = samples.drop_columns(["json_size"])
    for i, (name, column) in enumerate(where.items()):
        index = index.add_column(2 + i, name, column)
    return index.replace_schema_metadata({"plan": _plan_hash(index)})


def _plan_hash(index: pa.Table) -> str:
    """What the bytes of the shards follow from: names, order, media and tails."""
    what = zip(*(index[c].to_pylist() for c in ("tar", "clip_id", "media_sha256", "tail_hash")), strict=True)
    text = hashlib.sha256()
    for row in what:
        text.update("\0".join(row).encode() + b"\n")
    text.update(",".join(index.schema.names).encode())
    return text.hexdigest()


def runs(values: list[str]) -> tuple[list[str], list[int]]:
    """The distinct values of a sorted list and how often each occurs."""
    counts: dict[str, int] = defaultdict(int)
    for v in values:
        counts[v] += 1
    return list(counts), list(counts.values())


def padded(size: Any) -> Any:
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """The header block (ustar) of a member; the same bytes for the same name and size, whoever writes it.

    What `tarfile` writes for a file of mode 644, user and time 0, in a tenth of the time.
    """
    assert len(name) <= 100, f"{name} is too long for a tar header"
    head = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0"
    head += b"%011o\0" % size + b"00000000000\0"
    tail = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    checksum = sum(head) + sum(tail) + 8 * ord(" ")
    return head + b"%06o\0 " % checksum + tail


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(padded(len(data)) - len(data))
