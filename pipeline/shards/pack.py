"""Kept clips to WebDataset shards, by copying byte ranges: no model, no decoding.

    DIR/shards/<bucket>/<bucket>-000000.tar   key.mp4 key.json key.txt (and key.<embedder>.npy)
    DIR/shards/index.parquet                  a row a sample: where it is, what was measured and decided
    DIR/shards/wids.json                      list of the tars for `wids`

The folder is a function of what was measured and the recipe: tar headers carry no time or user, the
order is a hash of seed and clip id. The whole plan, with every offset, is known before a byte is
copied. Its hash is kept in the index, so an unchanged plan writes nothing.

New shards grow in `shards.partial`, tar by tar, index last, and take the place of the old ones in one
step; `decisions.parquet` and the recipe in `run.json` follow. Killed anywhere, the same command again
keeps the finished tars and ends as an undisturbed one does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decide.rules import Decided, decide, schema
from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store
from pipeline.recipe import Recipe, Shards
from pipeline.record import CLIP_SCHEMA, DECISION_SCHEMA
from pipeline.shards.media import check_tars
from pipeline.shards.provenance import INDEXED, NOT_INDEXED, VIDEO_COLUMNS, made_by, provenance
from pipeline.stages import patiently

BLOCK = 512  # tar: a member is a header block and its bytes, padded to whole blocks
END = 2 * BLOCK  # of a tar: two blocks of zeros
WRITERS = 4  # tars written at a time: one waits for the disk or the network while another copies

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


def shard(store: Store, recipe: Recipe, beside: Store | None = None) -> pa.Table:
    """Decide on every clip of a run and make its shards what the decisions say.

    Args:
        beside: where to put decisions, shards and recipe, in place of the run's own; a folder for another
            set of shards of the same run, whose run.json says `of` which.

    Returns the contents of decisions.parquet (DECISION_SCHEMA). Raises RecipeError for a rule on an
    unknown column, StoreError where `store` holds no run or the output cannot be written.
    """
    run = read_run(store)
    out = store if beside is None else beside
    if "of" in run:
        raise StoreError(
            f"{store.uri} is a set of shards of {run['of']}, with nothing measured: "
            f"clipmill shard {run['of']} --out {store.uri}"
        )
    there = run
    if beside is not None:
        there = _check_beside(store, beside)
        run = {k: v for k, v in run.items() if k not in ("outcome", "asked")}
        run["of"] = str(Path(store.uri).absolute()) if store.local else store.uri
    decided = decide(store, recipe)
    with out.scratch() as tails:
        samples = _samples(store, decided, recipe, run, tails)
        index = plan(samples, recipe.shards)
        _build(store, out, index, tails)
    decisions = _located(decided.decisions, index)
    old = out.read_table("decisions.parquet") if out.exists("decisions.parquet") else None
    if old is None or not old.equals(decisions) or old.schema.metadata != decisions.schema.metadata:
        out.write_table("decisions.parquet", decisions)
    run = run | {
        "recipe": run["recipe"] | recipe.model_dump(mode="json", include={"decide", "shards", "choose"})
    }
    if run != there:
        out.write_bytes("run.json", json.dumps(run, indent=1).encode())
    return decisions


def _check_beside(store: Store, beside: Store) -> dict[str, Any]:
    """What run.json says in a folder for another set of shards; {} in a new one. Raises StoreError."""
    run = json.loads(beside.read_bytes("run.json")) if beside.exists("run.json") else {}
    if run and "of" not in run:
        raise StoreError(f"{beside.uri} holds a run: give another folder as --out")
    if not run and not beside.exists("shards.partial/.plan") and any(n != ".lock" for n in beside.list()):
        raise StoreError(
            f"{beside.uri} is not empty and holds no shards: give a new or empty folder as --out"
        )
    own = [
        f"{store.uri.rstrip('/')}/{name}/"
        for name in ("clips", "media", "shards", "shards.partial", "videos")
    ]
    if f"{beside.uri.rstrip('/')}/".startswith(tuple(own)):
        raise StoreError(
            f"{beside.uri} is inside what the run keeps for itself: give another folder as --out"
        )
    return run


def read_run(store: Store) -> dict[str, Any]:
    """run.json. Raises StoreError where `store` holds no run."""
    if not store.exists("run.json"):
        raise StoreError(
            f"{store.uri} holds no clipmill run; make one with: clipmill curate SOURCE --out {store.uri}"
        )
    return json.loads(store.read_bytes("run.json"))


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
    size = BLOCK + _padded(media) + tail
    start = np.zeros(len(samples), np.int64)
    tars: list[str] = []
    names, counts = _runs(samples["bucket"].to_pylist())
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
        "json_offset": pa.array(start + BLOCK + _padded(media) + BLOCK),
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


def _runs(values: list[str]) -> tuple[list[str], list[int]]:
    """The distinct values of a sorted list and how often each occurs."""
    counts: dict[str, int] = defaultdict(int)
    for v in values:
        counts[v] += 1
    return list(counts), list(counts.values())


def _padded(size: Any) -> Any:
    return -(-size // BLOCK) * BLOCK


# ---------------------------------------------------------------- what is written beside the mp4


def _samples(
    store: Store, decided: Decided, recipe: Recipe, run: dict[str, Any], tails: IO[bytes]
) -> pa.Table:
    """A row a kept clip: its columns for the index, its media, and its tail.

    The tail is what follows the mp4 in the tar, members and headers; it is appended to `tails`, so that
    only numbers stay in memory however many clips there are.
    """
    made = made_by(recipe, run)
    rules = {name: rule.told() for name, rule in recipe.decide.rules.items()}
    repeated: dict[str, list[str]] = defaultdict(list)
    for copy, original in zip(
        *(decided.decisions[c].to_pylist() for c in ("clip_id", "duplicate_of")), strict=True
    ):
        if original:
            repeated[original].append(copy)

    keep = decided.decisions["keep"].to_numpy()
    parts = []
    for i, name in enumerate(decided.files):
        chosen = np.flatnonzero(keep & (decided.file == i))
        if not len(chosen):
            continue
        there = schema(store, name).names
        embedded = [c for c in there if c.startswith("emb_") and recipe.shards.embeddings]
        columns = [c for c in there if not c.startswith("emb_")]
        clips = store.read_table(name, columns + embedded).take(pa.array(decided.row[chosen]))
        vectors = {c.removeprefix("emb_"): clips[c].combine_chunks() for c in embedded}
        clips = clips.select(columns)
        verdicts = decided.decisions.take(pa.array(chosen)).select(["caption", "caption_model"])
        sources = store.read_table(name.replace("clips/", "videos/", 1), VIDEO_COLUMNS).to_pylist()
        videos = {v.pop("source"): v for v in sources}
        facts = []
        for r, (clip, verdict) in enumerate(zip(clips.to_pylist(), verdicts.to_pylist(), strict=True)):
            video = videos[clip["source"]]
            about = provenance(clip, verdict, video, rules, repeated[clip["clip_id"]]) | {"made_by": made}
            text = json.dumps(about, ensure_ascii=False).encode()  # on one line: C does it
            members = {"json": text, "txt": (verdict["caption"] or "").encode()}
            members |= {f"{n}.npy": _npy(v[r]) for n, v in vectors.items() if v[r].is_valid}
            tail = b"".join(_member(f"{clip['clip_id']}.{kind}", data) for kind, data in members.items())
            sar = video["sample_aspect_ratio"] or 1.0
            facts.append(
                {
                    "bucket": bucket(
                        clip["width"], clip["height"], sar, clip["duration_s"], recipe.shards.lengths_s
                    ),
                    "json_size": len(text),
                    "tail_at": tails.tell(),
                    "tail_size": len(tail),
                    "tail_hash": hashlib.blake2b(tail, digest_size=16).hexdigest(),
                }
            )
            tails.write(tail)
        table = pa.Table.from_pylist(facts, schema=_FACTS)
        media = clips.select([c for c in clips.column_names if c.startswith("media_")])
        light = clips.drop_columns([c for c in clips.column_names if c in NOT_INDEXED])
        parts.append(_side_by_side(light, verdicts, media, table))
    if not parts:
        light = pa.schema([CLIP_SCHEMA.field(name) for name in INDEXED]).empty_table()
        media = pa.schema([f for f in CLIP_SCHEMA if f.name.startswith("media_")]).empty_table()
        verdicts = DECISION_SCHEMA.empty_table().select(["caption", "caption_model"])
        parts.append(_side_by_side(light, verdicts, media, _FACTS.empty_table()))
    return pa.concat_tables(parts, promote_options="default").combine_chunks()


_FACTS = pa.schema(
    [
        ("bucket", pa.string()),
        ("json_size", pa.int64()),
        ("tail_at", pa.int64()),
        ("tail_size", pa.int64()),
        ("tail_hash", pa.string()),
    ]
)


def _side_by_side(clips: pa.Table, *others: pa.Table) -> pa.Table:
    """clip_id, bucket, then every other column."""
    all_ = {name: t[name] for t in (clips, *others) for name in t.column_names}
    return pa.table({name: all_[name] for name in dict.fromkeys(["clip_id", "bucket", *all_])})


def _npy(vector: pa.FixedSizeListScalar) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(vector.values.to_numpy(), np.float32))
    return file.getvalue()


def _header(name: str, size: int) -> bytes:
    """The header block (ustar) of a member; the same bytes for the same name and size, whoever writes it.

    What `tarfile` writes for a file of mode 644, user and time 0, in a tenth of the time.
    """
    assert len(name) <= 100, f"{name} is too long for a tar header"
    head = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + 2 * b"0000000\0"
    head += b"%011o\0" % size + b"00000000000\0"
    tail = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    checksum = sum(head) + sum(tail) + 8 * ord(" ")
    return head + b"%06o\0 " % checksum + tail


def _member(name: str, data: bytes) -> bytes:
    return _header(name, len(data)) + data + bytes(_padded(len(data)) - len(data))


# ---------------------------------------------------------------- writing


def _build(run: Store, store: Store, index: pa.Table, tails: IO[bytes]) -> None:
    """Make shards/ of `store` what `index` says, unless it already is; the clips are copied from `run`."""
    plan_hash = index.schema.metadata[b"plan"].decode()
    sizes: dict[str, int] = {}
    ends = index["offset"].to_numpy() - BLOCK  # each sample's start; its end follows
    ends = ends + BLOCK + _padded(index["size"].to_numpy()) + index["tail_size"].to_numpy() + END
    names = index["tar"].to_pylist()
    for name, end in zip(names, ends.tolist(), strict=True):
        sizes[name] = end

    if _plan_of(store, "shards") == plan_hash and _whole(store, "shards", sizes):
        store.delete_folder("shards.partial")
        return
    check_tars(run, index["media_tar"].to_pylist())
    store.sweep("shards.partial")
    if _plan_of(store, "shards.partial") != plan_hash:
        if not _is(store, "shards.partial/.plan", plan_hash):
            store.delete_folder("shards.partial")
            store.write_bytes("shards.partial/.plan", plan_hash.encode())
        _write_tars(run, store, index, tails, sizes)
        _, counts = _runs(names)
        tars = [
            {"url": name, "nsamples": count, "filesize": sizes[name]}
            for name, count in zip(sizes, counts, strict=True)
        ]
        listing = {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": "clipmill",
            "shardlist": tars,
        }
        store.write_bytes("shards.partial/wids.json", json.dumps(listing, indent=1).encode())
        inner = [c for c in index.column_names if c.startswith(("media_", "tail_")) and c != "media_sha256"]
        store.write_table("shards.partial/index.parquet", index.drop_columns(inner))
    if store.exists("shards.partial/.plan"):
        store.delete("shards.partial/.plan")
    store.replace_folder("shards.partial", "shards", last="index.parquet")


def _plan_of(store: Store, folder: str) -> str:
    """The plan that a finished folder of shards was made by; '' where there is none."""
    if not store.exists(f"{folder}/index.parquet"):
        return ""
    metadata = store.read_schema(f"{folder}/index.parquet").metadata or {}
    return metadata.get(b"plan", b"").decode()


def _is(store: Store, name: str, text: str) -> bool:
    return store.exists(name) and store.read_bytes(name).decode() == text


def _whole(store: Store, folder: str, sizes: dict[str, int]) -> bool:
    return all(
        store.exists(f"{folder}/{n}") and store.size(f"{folder}/{n}") == size for n, size in sizes.items()
    )


def _write_tars(run: Store, store: Store, index: pa.Table, tails: IO[bytes], sizes: dict[str, int]) -> None:
    """Write every tar into shards.partial that is not yet there (a tar appears when it is complete)."""
    columns = ["clip_id", "media_tar", "media_offset", "media_size", "media_sha256", "tail_at", "tail_size"]
    tails.flush()

    def write(name: str, samples: pa.Table) -> None:
        ranges = Ranges(run)
        with contextlib.closing(ranges), store.writer(f"shards.partial/{name}") as tar:
            for row in samples.to_pylist():
                size = row["media_size"]
                tar.write(_header(f"{row['clip_id']}.mp4", size))
                try:
                    ranges.copy(row["media_tar"], row["media_offset"], size, tar, row["media_sha256"])
                except StoreError as e:
                    raise StoreError(f"shards/{name} cannot be written, clip {row['clip_id']}: {e}") from e
                tail = os.pread(tails.fileno(), row["tail_size"], row["tail_at"])
                tar.write(bytes(_padded(size) - size) + tail)
            tar.write(bytes(END))
            assert tar.tell() == sizes[name], "the plan and the tar disagree"

    first = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = []
        for name, count in zip(*_runs(index["tar"].to_pylist()), strict=True):
            if not store.exists(f"shards.partial/{name}"):
                work = partial(write, name, index.select(columns).slice(first, count))
                jobs.append(pool.submit(patiently, work))
            first += count
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _located(decisions: pa.Table, index: pa.Table) -> pa.Table:
    """decisions with the shard, offset and size of every kept clip."""
    row = pc.index_in(decisions["clip_id"], value_set=index["clip_id"].combine_chunks())
    where = index.select(["tar", "shard", "offset", "size"]).take(row)
    columns = {n: where[n] for n in ("shard", "offset", "size", "tar")}
    for name, column in columns.items():
        i, field = decisions.schema.get_field_index(name), DECISION_SCHEMA.field(name)
        decisions = (
            decisions.append_column(field, column) if i < 0 else decisions.set_column(i, field, column)
        )
    return decisions
