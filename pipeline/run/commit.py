"""Committing a unit of work, and changing what is committed.

A unit's clips go to `clips/<unit>.parquet`, then its sources to `videos/<unit>.parquet`; the latter
commits the unit. A unit without one never happened: its staging tar and clips are overwritten or
swept by the next run. The name of a staging tar holds a hash of its clips, so two workers that both do a
unit (one was taken for dead) cannot put other bytes under the rows of each other.

A chunk of a long source (`pipeline.run.chunks`) is kept in `chunks/` until all of them are there; then they are
committed as one source, under the unit's own name, whose clips lie in one staging tar a chunk. The files there are
`<unit>-<k>.<division>.parquet` (its row of videos/, which says that the chunk is finished) and, written before it,
`<unit>-<k>.<division>.clips.parquet`: chunks of other clips, of other bytes or with other metadata have other names.

A committed unit changes file by file, each in one step, clips first: killed in between, the rows of `videos/`
still say what is to be done, and the same command does it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.layers import forget, layers, read_ahead, unit_of
from pipeline.record import Source, Video
from pipeline.run.chunks import chunk_unit, of_chunk
from pipeline.stages import Produces, Resources
from pipeline.tables import VIDEO_SCHEMA, clip_row, clip_schema, video_row


class CommitStage:
    """The last stage: measured rows to parquet, the videos' file last."""

    name = "commit"
    whole_unit = True
    resources = Resources(cpus=1.0)

    def __init__(self, out: Store | str, columns: Produces):
        self.out, self.columns = out, columns
        self.produces = Produces()

    def setup(self) -> None:
        self.store = Store.of(self.out)

    def __call__(self, videos: list[Video]) -> list[Video]:
        scores, embeddings = self.columns.scores, self.columns.embeddings
        rows = [clip_row(v, c, scores, embeddings) for v in videos for c in v.clips if v.error is None]
        clips = pa.Table.from_pylist(rows, schema=clip_schema(scores, embeddings))
        if videos[0].chunks == 1:
            _commit(self.store, videos[0].unit, clips, [video_row(v) for v in videos])
        else:
            commit_chunk(self.store, videos[0], clips)
        for v in videos:
            v.frames = None
        return videos


def _commit(store: Store, unit: str, clips: pa.Table, videos: list[dict[str, Any]]) -> None:
    if clips.num_rows:
        store.write_table(f"clips/{unit}.parquet", clips)
    elif store.exists(f"clips/{unit}.parquet"):  # a killed run of the unit left it
        store.delete(f"clips/{unit}.parquet")
    store.write_table(f"videos/{unit}.parquet", pa.Table.from_pylist(videos, schema=VIDEO_SCHEMA))


# Chunks of a long source ---------------------------------------------------------------------------


CHUNK_FILE = re.compile(r"chunks/([^./]+)\.([0-9a-f]{16})(\.clips)?\.parquet")


def commit_chunk(store: Store, video: Video, clips: pa.Table) -> None:
    """Keep what a chunk gave; where it is the last of its source, commit that."""
    found = of_chunk(video.unit)
    assert found is not None
    name = f"chunks/{video.unit}.{video.division}"
    row = video_row(video) | {"unit": found[0]}
    store.write_table(f"{name}.clips.parquet", clips)
    store.write_table(f"{name}.parquet", pa.Table.from_pylist([row], schema=VIDEO_SCHEMA))
    put_together(store, row, video.division)


def put_together(store: Store, row: dict[str, Any], division: str) -> None:
    """Commit a source whose chunks, all of one division, are all there, as one row and one file of clips; else nothing.

    Args:
        row: of the chunk that ended last.

    Two workers that end at once may both do it, and write the same. An error of one chunk is the source's.
    """
    unit = row["unit"]
    names = [f"chunks/{chunk_unit(unit, k)}.{division}" for k in range(row["chunks"])]
    there = store.list("chunks", ".parquet")
    if not {f"{name}.parquet" for name in names} <= set(there):
        return
    try:
        rows = [store.read_table(f"{name}.parquet").to_pylist()[0] for name in names]
        tables = [store.read_table(f"{name}.clips.parquet") for name in names]
    except StoreError:
        if store.exists(f"videos/{unit}.parquet"):  # somebody else was quicker
            return
        raise
    last, row = row, next((r for r in rows if r["status"] != "ok"), rows[0])
    seconds: Counter[str] = Counter()
    for r in rows:
        seconds.update(dict(r["seconds"]))
    row |= {
        "size": last["size"],
        "mtime_ns": last["mtime_ns"],
        "warnings": list(dict.fromkeys(w for r in rows for w in r["warnings"])),
        "clips": sum(r["clips"] for r in rows) if row["status"] == "ok" else 0,
        "seconds": list(seconds.items()),
    }
    clips = pa.concat_tables(tables)
    _commit(store, unit, clips if row["status"] == "ok" else clips[:0], [row])
    for name in there:  # those of other divisions too
        if _owner(name) == unit:
            store.delete(name)


def _owner(name: str) -> str | None:
    """The unit of the source of which a file in chunks/ is; None: of none."""
    file = CHUNK_FILE.fullmatch(name)
    chunk = of_chunk(file[1]) if file else None
    return chunk[0] if chunk else None


def take_up_chunks(store: Store, units: list[list[Video]]) -> None:
    """Tell the sources of a run that is resumed which chunks of theirs are finished; forget failed ones and others."""
    alone = {unit[0].unit: unit[0] for unit in units if len(unit) == 1}
    for name in store.list("chunks", ".parquet"):
        file = CHUNK_FILE.fullmatch(name)
        chunk = of_chunk(file[1]) if file else None
        if file is None or chunk is None or chunk[0] not in alone:
            store.delete(name)
        elif not file[3]:
            if store.read_table(name, ["status"])["status"].to_pylist() == ["ok"]:
                alone[chunk[0]].committed.add((chunk[1], file[2]))
            else:
                store.delete(name)  # else the source could be put together with it before it is tried again


# What is committed ---------------------------------------------------------------------------------

IDENTITY = ["source", "name", "sha256", "status", "stage", "error", "error_kind", "meta"]
FINGERPRINT = ["size", "mtime_ns", "intervals_key", "interval_meta_key", "salt"]  # older runs lack them
Known = Mapping[str, Mapping[str, Any]]  # rows by uri, see known_sources


def tables(store: Store, names: Sequence[str], columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Some columns of many parquet files, file by file in their order."""
    return read_ahead(lambda name: store.read_table(name, columns), names)


def units(store: Store) -> set[str]:
    """Names of the committed units."""
    return {unit_of(name) for name in store.list("videos", ".parquet")}


def done_sources(store: Store) -> set[str]:
    """Sources that are committed, read from the parquet alone."""
    names = store.list("videos", ".parquet")
    return {s for _, table in tables(store, names, ["source"]) for s in table["source"].to_pylist()}


def known_sources(store: Store) -> dict[str, dict[str, Any]]:
    """What is committed of every source, by uri: IDENTITY, FINGERPRINT where it was stored, and `unit`."""
    found = {}
    for name, table in tables(store, store.list("videos", ".parquet"), IDENTITY + FINGERPRINT):
        unit = unit_of(name)
        for row in table.to_pylist():
            found[row["source"]] = row | {"unit": unit, "meta": dict(row["meta"] or [])}
    return found


# Changing it ---------------------------------------------------------------------------------------


def failed(known: Known, kinds: Collection[str] | None = None) -> list[str]:
    """Sources that ended in an error; of these kinds only, where some are given."""
    bad = (uri for uri, row in known.items() if row["status"] != "ok")
    return [uri for uri in bad if kinds is None or known[uri]["error_kind"] in kinds]


def mended(known: Known, problems: Mapping[str, str | None]) -> list[str]:
    """Errors of listing (a bad row of a list, a damaged tar) that are no longer so.

    Args:
        problems: of every source that is listed now, what is wrong with it.
    """
    return [uri for uri, row in known.items() if row["stage"] == "list" and problems.get(uri) != row["error"]]


def drop(store: Store, uris: Iterable[str], known: Known) -> None:
    """Take sources and their clips out of the record; their bytes stay in staging tars that others share."""
    by_unit: dict[str, set[str]] = defaultdict(set)
    for uri in uris:
        by_unit[known[uri]["unit"]].add(uri)
    for unit, gone in by_unit.items():
        _drop(store, unit, gone)


def _drop(store: Store, unit: str, uris: Collection[str]) -> None:
    videos = store.read_table(f"videos/{unit}.parquet")
    left = videos.filter(_without(videos, uris))
    if not left.num_rows:
        store.delete(f"videos/{unit}.parquet")  # never committed now: the sweep takes the rest
        return
    clips = f"clips/{unit}.parquet"
    if store.exists(clips):
        table = store.read_table(clips)
        kept = table.filter(_without(table, uris))
        if 0 < kept.num_rows < table.num_rows:
            store.write_table(clips, kept)
        elif not kept.num_rows:
            store.delete(clips)
        if kept.num_rows < table.num_rows:
            forget(store, unit, kept)
    store.write_table(f"videos/{unit}.parquet", left)


def _without(table: pa.Table, uris: Collection[str]) -> pa.ChunkedArray:
    return pc.invert(pc.is_in(table["source"], value_set=pa.array(uris, pa.string())))


@dataclass(frozen=True)
class Revision:
    """What a committed source's rows say from now on. Size and time of modification always follow `source`."""

    source: Source
    moved: bool = False  # its uri and name are the new ones; clip ids stay as they were
    metadata: bool = False  # its metadata and its clips' are the new ones


def revise(store: Store, revisions: Mapping[str, Revision], known: Known) -> dict[str, int]:
    """Rewrite the rows of committed sources, given by the uri they are committed under; nothing is measured.

    Returns of which of them how many clips kept the metadata that they had, as no given interval became them.
    """
    kept: Counter[str] = Counter()
    by_unit: dict[str, dict[str, Revision]] = defaultdict(dict)
    for uri, revision in revisions.items():
        by_unit[known[uri]["unit"]][uri] = revision
    for unit, changes in by_unit.items():
        videos = store.read_table(f"videos/{unit}.parquet").to_pylist()
        clips = f"clips/{unit}.parquet"
        if any(r.moved or r.metadata for r in changes.values()) and store.exists(clips):
            old = {row["source"]: dict(row["meta"] or []) for row in videos}
            table, unmatched = _revised_clips(store.read_table(clips), changes, old)
            kept += unmatched
            store.write_table(clips, table)
        for row in videos:
            if (change := changes.get(row["source"])) is None:
                continue
            s = change.source
            row |= {"size": s.bytes, "mtime_ns": s.mtime_ns}
            if change.moved:
                salt = row.get("salt") or row["name"]
                row |= {"source": s.uri, "name": s.name, "salt": salt}
            if change.metadata:
                row |= {"meta": list(s.meta.items())}
                if s.uri not in kept:  # else the list goes on to say something else than the clips
                    row |= {"interval_meta_key": s.interval_meta_key()}
        store.write_table(f"videos/{unit}.parquet", pa.Table.from_pylist(videos, schema=VIDEO_SCHEMA))
    return dict(kept)


def _revised_clips(
    table: pa.Table, changes: Mapping[str, Revision], old: Mapping[str, dict[str, str]]
) -> tuple[pa.Table, Counter[str]]:
    """A unit's clips with what `changes` say of their sources; every other column as it was.

    And how many clips of given intervals, by source, have no interval in the list.
    """
    sources = table["source"].to_pylist()
    change = [changes.get(s) for s in sources]
    moved = [c if c and c.moved else None for c in change]
    told = [c if c and c.metadata else None for c in change]
    new: dict[str, list[Any]] = {}
    kept: Counter[str] = Counter()
    if any(moved):
        new["source"] = [c.source.uri if c else s for c, s in zip(moved, sources, strict=True)]
        names = table["name"].to_pylist()
        new["name"] = [c.source.name if c else n for c, n in zip(moved, names, strict=True)]
    if any(told):
        own = _given_meta(table, told)
        metas = [dict(m or []) for m in table["meta"].to_pylist()]
        for i, c in enumerate(told):
            if c is not None:
                before = old[sources[i]]
                mine = {
                    k: v for k, v in metas[i].items() if before.get(k) != v
                }  # the clip's, over the source's
                metas[i] = c.source.meta | own.get(i, mine)
                kept[c.source.uri] += bool(c.source.interval_meta) and i not in own
        new["meta"] = [list(m.items()) for m in metas]
    for name, values in new.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, table.schema.field(i), pa.array(values, table.schema.field(i).type))
    return table, +kept


def _given_meta(table: pa.Table, told: list[Revision | None]) -> dict[int, dict[str, str]]:
    """Row → what the list says of that clip, where one of the list's intervals became it."""
    rows: dict[str, list[int]] = defaultdict(list)
    starts, ends = table["start_s"].to_pylist(), table["end_s"].to_pylist()
    for i, c in enumerate(told):
        if c is not None and c.source.interval_meta:
            rows[c.source.uri].append(i)
    found: dict[int, dict[str, str]] = {}
    for c in {c.source.uri: c for c in told if c is not None}.values():
        mine = rows[c.source.uri]
        became = dict(zip(c.source.intervals or (), c.source.interval_meta, strict=True)) if mine else {}
        of = {(starts[i], ends[i]): i for i in mine}
        for interval, meta in became.items():
            clip = of.get(_clip_of(interval, of))
            if clip is not None:
                found.setdefault(clip, meta)  # of equal intervals the first one's, as when they were cut
    return found


def _clip_of(interval: tuple[float, float], clips: Collection[tuple[float, float]]) -> tuple[float, float]:
    """Start and end of the clip that a given interval became; NaN where it holds no frame.

    A clip starts and ends with the first frames at or after its interval's times (pipeline.split.shots), or where
    the video ends. So of the times of all clips of the source it has the first ones at or after its own.
    """
    start_s, end_s = (t - 1e-6 for t in interval)
    start = min((a for a, _ in clips if a >= start_s), default=math.inf)
    end = min((b for _, b in clips if b >= end_s), default=max(b for _, b in clips))
    return (start, end) if start < end_s else (math.nan, math.nan)


def sweep_uncommitted(store: Store) -> None:
    """Remove what is of no committed unit and of no finished chunk: tars that no row speaks of, rows, partial files.

    For the driver, before and after its workers are at it.
    """
    store.sweep()
    committed = units(store)
    clips = set(store.list("clips", ".parquet"))
    for name in clips:
        if name.removeprefix("clips/").removesuffix(".parquet") not in committed:
            store.delete(name)
    there = {layer.folder for layer in layers(store)}
    for name in store.list("layers", ".parquet"):
        if unit_of(name) not in committed or name.rpartition("/")[0] not in there:
            store.delete(name)
    rows: dict[str, list[str]] = defaultdict(list)  # unit → files that speak of its tars
    kept = store.list("chunks", ".parquet")
    for name in kept:
        owner = _owner(name)
        if owner in committed:  # put together, or it has become other units
            store.delete(name)
        elif owner and f"{name.removesuffix('.clips.parquet')}.parquet" in kept:
            rows[owner] += [name] if name.endswith(".clips.parquet") else []
    tars: dict[str, list[str]] = defaultdict(list)
    for name in store.list("media", ".tar"):
        unit = name.removeprefix("media/").split(".")[0]
        chunk = of_chunk(unit)
        tars[chunk[0] if chunk and unit not in committed else unit].append(name)
    for unit, names in tars.items():
        mine = [f"clips/{unit}.parquet"] if f"clips/{unit}.parquet" in clips else []
        if unit not in committed:
            mine = rows[unit]
        elif mine and len(names) == 1:  # its clips lie in one at least: no need to read
            continue
        used = {
            tar for file in mine for tar in store.read_table(file, ["media_tar"])["media_tar"].to_pylist()
        }
        for name in names:
            if name not in used:
                store.delete(name)
