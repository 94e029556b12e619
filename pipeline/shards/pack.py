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
import hashlib
import io
import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decide.rules import Decided, decide
from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store
from pipeline.layers import no_run
from pipeline.recipe import Recipe
from pipeline.shards.media import check_tars
from pipeline.shards.plan import BLOCK, END, bucket, header, member, padded, plan, runs
from pipeline.shards.provenance import INDEXED, NOT_INDEXED, VIDEO_COLUMNS, made_by, provenance
from pipeline.stages import patiently
from pipeline.tables import CLIP_SCHEMA, DECISION_SCHEMA

WRITERS = 4  # tars written at a time: one waits for the disk or the network while another copies


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
    own = [f"{store.root}/{name}/" for name in ("clips", "media", "shards", "shards.partial", "videos")]
    if f"{beside.root}/".startswith(tuple(own)):
        raise StoreError(
            f"{beside.uri} is inside what the run keeps for itself: give another folder as --out"
        )
    return run


def read_run(store: Store) -> dict[str, Any]:
    """run.json. Raises StoreError where `store` holds no run."""
    if not store.exists("run.json"):
        raise no_run(store)
    return json.loads(store.read_bytes("run.json"))


# ---------------------------------------------------------------- what is written beside the mp4


def _samples(
    store: Store, decided: Decided, recipe: Recipe, run: dict[str, Any], tails: IO[bytes]
) -> pa.Table:
    """A row a kept clip: its columns for the index, its media, and its tail.

    The tail is what follows the mp4 in the tar, members and headers; it is appended to `tails`, so that
    only numbers stay in memory however many clips there are.
    """
    made = made_by(recipe, run, decided.clips.layers)
    rules = {name: rule.told() for name, rule in recipe.decide.rules.items()}
    repeated: dict[str, list[str]] = defaultdict(list)
    for copy, original in zip(
        *(decided.decisions[c].to_pylist() for c in ("clip_id", "duplicate_of")), strict=True
    ):
        if original:
            repeated[original].append(copy)

    keep = decided.decisions["keep"].to_numpy()
    parts = []
    there = decided.clips.schema().names
    for i, name in enumerate(decided.clips.files):
        chosen = np.flatnonzero(keep & (decided.file == i))
        if not len(chosen):
            continue
        embedded = [c for c in there if c.startswith("emb_") and recipe.shards.embeddings]
        columns = [c for c in there if not c.startswith("emb_")]
        clips = decided.clips.read(name, columns + embedded).take(pa.array(decided.row[chosen]))
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
            tail = b"".join(member(f"{clip['clip_id']}.{kind}", data) for kind, data in members.items())
            sar = video["sample_aspect_ratio"] or 1.0
            facts.append(
                {
                    "bucket": bucket(
                        clip["width"], clip["height"], sar, clip["duration_s"], recipe.shards.lengths_s
                    ),
                    "json_size": len(text),
                    "captions_hash": hashlib.blake2b(candidates(about), digest_size=16).hexdigest(),
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
        ("captions_hash", pa.string()),
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


# ---------------------------------------------------------------- writing


def _build(run: Store, store: Store, index: pa.Table, tails: IO[bytes]) -> None:
    """Make shards/ of `store` what `index` says, unless it already is; the clips are copied from `run`."""
    plan_hash = index.schema.metadata[b"plan"].decode()
    sizes: dict[str, int] = {}
    ends = index["offset"].to_numpy() - BLOCK  # each sample's start; its end follows
    ends = ends + BLOCK + padded(index["size"].to_numpy()) + index["tail_size"].to_numpy() + END
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
        _, counts = runs(names)
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


def candidates(about: dict[str, Any]) -> bytes:
    """What training may draw a caption from."""
    said = [[c[n] for n in ("model", "text", "raw", "scores")] for c in about["captions"]]
    return json.dumps([said, about["scores"]]).encode()


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
                tar.write(header(f"{row['clip_id']}.mp4", size))
                try:
                    ranges.copy(row["media_tar"], row["media_offset"], size, tar, row["media_sha256"])
                except StoreError as e:
                    raise StoreError(f"shards/{name} cannot be written, clip {row['clip_id']}: {e}") from e
                tail = os.pread(tails.fileno(), row["tail_size"], row["tail_at"])
                tar.write(bytes(padded(size) - size) + tail)
            tar.write(bytes(END))
            assert tar.tell() == sizes[name], "the plan and the tar disagree"

    first = 0
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = []
        for name, count in zip(*runs(index["tar"].to_pylist()), strict=True):
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
