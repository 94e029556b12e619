"""A run's clips as columns in memory: what the inspector filters, sorts and counts.

Row i is the same clip everywhere, sorted by source and time. Columns come in three steps: `Index` reads those of the
first page (about 100 bytes a clip), `read_measures` scores and the places of media, `read_captions` goes over the
captions once, in the background, and leaves a few numbers of each clip. Captions themselves, prompts and metadata stay
in their files: `details` reads those of one clip.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.decide.rules import DUPLICATE
from pipeline.faults import StoreError
from pipeline.inspector.captions import CONSENSUS, FIT, HUMAN, CaptionColumns
from pipeline.inspector.files import native, numbers, read_columns
from pipeline.inspector.nested import Marks, Names, flat, whole
from pipeline.io.store import Store
from pipeline.layers import Layered, open_run, unit_of
from pipeline.recipe import Rule
from pipeline.recipe_choose import Choose
from pipeline.tables import DECISION_SCHEMA

PLACE = ("media_tar", "media_offset", "media_size", "stills_offset", "stills_sizes")
SIZES = ("duration_s", "width", "height")
LIGHT = (
    "clip_id",
    "source",
    "name",
    "start_s",
    "end_s",
    "start_frame",
    *SIZES,
)
# What was chosen is read later: the texts of a million clips take as long as all the rest
DECIDED = [f.name for f in DECISION_SCHEMA if f.name not in ("source", "size", "tar", "caption")]
KEPT_DETAILS = 256  # clips


class Index:
    """The columns of one run. Raises StoreError where there is no run, or a file of it cannot be read.

    numbers: float32 [n] by column, NaN where it was not measured.
    kept: int8 [n], −1 where it was not decided yet.
    dropped: by rule, those it drops; flags and models: those with such a caption, chosen_flags:
        with such a chosen one.
    ready: the captions were read; generation: how often they were.
    """

    def __init__(self, store: Store):
        self.store = store
        self._lock, self._measuring = threading.Lock(), threading.Lock()
        self.places: Places | None = None
        try:
            self.info, self.media = open_run(store)
            self.stamp = stamp(store, self.media)  # before anything is read
            self.recipe: dict[str, Any] = self.info.get("recipe") or {}
            self._read_clips()
            self._read_decisions()
        except (pa.ArrowException, OSError, ValueError, KeyError) as e:
            raise StoreError(f"{store.uri} cannot be read: {e}") from e
        self.ready, self.generation = False, 0
        self._begin_captions()
        self._details: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._time_bases: dict[tuple[str, str], str | None] = {}

    def __len__(self) -> int:
        return len(self.ids)

    # ------------------------------------------------------------ reading

    def _read_clips(self) -> None:
        self.layered = Layered(self.media)
        pool = ThreadPoolExecutor(1)
        decided = pool.submit(self._decided)  # meanwhile
        self.sizes, columns = read_columns(self.layered, LIGHT)
        self.first = np.cumsum(self.sizes) - self.sizes  # of each file
        source = Names.of(columns["source"])
        start = numbers(columns["start_frame"], np.int64)
        by_name = np.argsort(np.array(source.names, object), kind="stable")
        rank = np.empty(len(by_name), np.int64)
        rank[by_name] = np.arange(len(by_name))
        order = np.lexsort((start, rank[source.codes]))
        ids = columns["clip_id"].cast(pa.large_string()).combine_chunks()
        self.ids: pa.Array = ids.take(pa.array(order))
        self._decisions: pa.Table = decided.result()
        pool.shutdown()
        same = self._decisions["clip_id"].cast(pa.large_string()).combine_chunks().equals(self.ids)
        if not same and len(order):
            code = self.ids.dictionary_encode().indices.to_numpy()
            first = np.sort(np.unique(code, return_index=True)[1])
            if len(first) < len(order):  # an id that two sources share is the first one's
                order, self.ids = order[first], self.ids.take(pa.array(first))
        # Row of what lies in the files, one after the other, and the other way round
        self.position = np.full(len(ids), -1, np.int32)
        self.position[order] = np.arange(len(order), dtype=np.int32)
        self.measured = order.astype(np.int32)
        self.sources, self.names = source.take(order), Names.of(columns["name"]).take(order)
        self.start, self.end = (numbers(columns[c], np.float64)[order] for c in ("start_s", "end_s"))
        self.numbers = {c: numbers(columns[c], np.float32)[order] for c in SIZES}

    @property
    def scores(self) -> list[str]:
        """Columns that were measured, read or not."""
        return [name for name in self.layered.schema().names if name.startswith("score_")]

    def read_measures(self) -> None:
        """Scores, frame rates and where the media lie, once, for whoever needs them first. Raises StoreError."""
        with self._measuring:
            if self.places is not None:
                return
            names = ["fps", *self.scores]
            try:
                _, columns = read_columns(self.layered, [*names, *PLACE])
            except (pa.ArrowException, ValueError, KeyError) as e:
                raise StoreError(f"{self.store.uri} cannot be read: {e}") from e
            self._add({c: numbers(columns[c], np.float32)[self.measured] for c in names})
            self.places = Places(columns, self.measured)

    def _add(self, columns: dict[str, np.ndarray]) -> None:
        with self._lock:  # a new mapping each time: others may be going through the one there is
            self.numbers = self.numbers | columns

    def _placed(self) -> Places:
        self.read_measures()
        assert self.places is not None
        return self.places

    def _decided(self) -> pa.Table:
        if not self.store.exists("decisions.parquet"):
            return DECISION_SCHEMA.empty_table()
        repeated = ["caption_model", "shard"]
        return self.store.files.using(
            "decisions.parquet", lambda f: pq.ParquetFile(native(f), read_dictionary=repeated).read(DECIDED)
        )

    def _read_decisions(self) -> None:
        n, decided = len(self), self._decisions
        ids = decided["clip_id"].cast(pa.large_string()).combine_chunks()
        same = ids.equals(self.ids)
        row = np.arange(n) if same else pc.index_in(self.ids, value_set=ids).fill_null(-1).to_numpy()
        there = row >= 0
        keep = decided["keep"].cast(pa.int8()).fill_null(-1).to_numpy()
        self.kept = np.where(there, keep[row], -1).astype(np.int8) if len(keep) else np.full(n, -1, np.int8)
        back = np.full(len(ids), -1, np.int64)  # from rows of decisions to ours
        back[row[there]] = np.flatnonzero(there)
        owner, names = flat(whole(decided["dropped_by"]))
        dropped_by = Names.of(names)
        self.rules = _rules(decided, self.recipe, owner, dropped_by) if len(decided) else []
        self.dropped = Marks(n)
        for rule in self.rules:
            rows = back[owner[dropped_by.codes == dropped_by.code(rule["name"])]]
            self.dropped.put(rule["name"], rows[rows >= 0])
        self.original = np.full(n, -1, np.int32)  # row of the clip that it repeats
        copies = decided["duplicate_of"].cast(pa.large_string()).combine_chunks()
        if copies.null_count < len(copies):
            original = pc.index_in(copies, value_set=self.ids).fill_null(-1).to_numpy()
            self.original[there] = original[row[there]]
        self._decided_at = None if same else pa.array(np.maximum(row, 0), mask=~there)
        self._caption: pa.ChunkedArray | None = None
        self._caption_lock = threading.Lock()
        self.model = _at(Names.of(decided["caption_model"]), row)
        self.shard, self.shard_offset = _at(Names.of(decided["shard"]), row), np.full(n, -1, np.int64)
        if len(ids):
            offset = decided["offset"].cast(pa.int64()).fill_null(-1).to_numpy()
            self.shard_offset = np.where(there, offset[row], -1)
        folders = [name.split("/")[-2] for name in self.shard.names]
        known = list(dict.fromkeys(folders))
        code = np.array([*(known.index(f) for f in folders), -1], np.int32)
        self.buckets = Names(code[self.shard.codes], known)
        del self._decisions

    @property
    def caption(self) -> pa.ChunkedArray:
        """The chosen caption of every clip; read when it is first asked for. Raises StoreError."""
        with self._caption_lock:
            if self._caption is None:
                empty = pa.chunked_array([pa.nulls(len(self), pa.large_string())])
                at, self._caption = self._decided_at, empty
                if self.store.exists("decisions.parquet"):
                    texts = self.store.read_table("decisions.parquet", ["caption"])["caption"]
                    if at is not None and len(texts):
                        texts = pa.chunked_array([texts.cast(pa.large_string()).combine_chunks().take(at)])
                    self._caption = texts if len(texts) == len(self) else empty
            return self._caption

    def chosen(self, rows: Sequence[int]) -> list[str]:
        """The chosen captions of a few clips, '' without one; of their own files while the column is not there."""
        if self._caption is not None or self.ready:
            return [self.caption[row].as_py() or "" for row in rows]
        found = dict.fromkeys(rows, "")
        for row, clip in self.many([row for row in rows if self.model[row] is not None]):
            said = (c["text"] for c in clip["captions"] or [] if c["model"] == self.model[row])
            found[row] = next(said, None) or ""
        return [found[row] for row in rows]

    def _begin_captions(self) -> None:
        n = len(self)
        self.flags, self.chosen_flags, self.models = Marks(n), Marks(n), Marks(n)
        self.layer_models = _layer_models(self.layered)
        self.captions_read = 0
        self.fit_score: str | None = None

    def read_captions(self) -> None:
        """Numbers of every clip from its captions; may run in the background. Raises StoreError."""
        choose = Choose.model_validate(self.recipe.get("choose") or {})
        self.captions_read = 0
        new = CaptionColumns(self.model, self.kept, choose)
        for i, (_, table) in enumerate(self.layered.tables(["captions"])):
            rows = self.position[self.first[i] : self.first[i] + self.sizes[i]]
            new.add(rows, whole(table["captions"]))
            self.captions_read += len(table)
        if new.undecided:
            self._caption, self.model = new.decided(self.caption)
        judges = [name for name in new.gaps if name not in (CONSENSUS, HUMAN)]  # who saw the pictures
        self.fit_score = next((name for name in (FIT, choose.method, *judges) if name in judges), None)
        self._add(new.numbers(self.fit_score, self.caption))
        self.flags, self.chosen_flags, self.models = new.flags, new.chosen_flags, new.models
        self.generation += 1
        self.ready = True

    # ------------------------------------------------------------ asking

    def row(self, clip_id: str) -> int | None:
        """Of a clip; none where there is no such clip."""
        try:
            wanted = pa.scalar(clip_id, pa.large_string())
        except UnicodeEncodeError:  # half a character
            return None
        found = pc.index(self.ids, wanted).as_py()
        return None if found < 0 else found

    def details(self, row: int) -> dict[str, Any]:
        """Every column but the embeddings of a clip, maps as mappings. Raises StoreError."""
        with self._lock:
            if row in self._details:
                self._details.move_to_end(row)
                return self._details[row]
        ((_, found),) = self.many([row])
        with self._lock:
            self._details[row] = found
            while len(self._details) > KEPT_DETAILS:
                self._details.popitem(last=False)
        return found

    def many(self, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows and their details, a file at a time. Raises StoreError."""
        names = [n for n in self.layered.schema().names if not n.startswith("emb_")]
        by_file: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            # of files that begin at one place all but the last are empty
            by_file[int(np.searchsorted(self.first, self.measured[row], "right")) - 1].append(row)
        for file, its in by_file.items():
            name = self.layered.files[file]
            at = self.measured[its] - self.first[file]
            table = self.layered.read(name, names).take(pa.array(at))
            for row, found in zip(its, table.to_pylist(), strict=True):
                found["meta"] = dict(found.get("meta") or [])
                for caption in found["captions"] or []:
                    caption |= {key: dict(caption[key] or []) for key in ("scores", "support", "cost")}
                yield row, found | {"unit": unit_of(name)}

    def time_base(self, clip: Mapping[str, Any]) -> Fraction | None:
        """Seconds a tick of the source of a clip; none where an older run did not note it. Raises StoreError."""
        key = clip["unit"], clip["source"]
        if key not in self._time_bases:
            table = self.media.read_table(f"videos/{key[0]}.parquet")
            found = {r["source"]: r.get("time_base") for r in table.to_pylist()}
            self._time_bases |= {(key[0], source): base for source, base in found.items()}
        said = self._time_bases.get(key)
        return Fraction(said) if said else None

    def still(self, row: int, k: int) -> tuple[str, int, int] | None:
        """Tar, offset and size of a clip's k-th still; none where none was kept. Raises StoreError."""
        return self._placed().still(row, k)

    def still_count(self, row: int) -> int:
        """Raises StoreError."""
        return len(self._placed().stills(row))

    def mp4(self, row: int) -> tuple[str, int, int]:
        """Tar ('' without one), offset and size of a clip's media. Raises StoreError."""
        return self._placed().mp4(row)

    def source_neighbours(self, row: int) -> tuple[int | None, int | None]:
        """The clips before and after it in its source."""
        code = self.sources.codes
        before = row - 1 if row and code[row - 1] == code[row] else None
        after = row + 1 if row + 1 < len(code) and code[row + 1] == code[row] else None
        return before, after

    def copies(self, row: int) -> list[int]:
        """Clips that were dropped because they repeat it."""
        return np.flatnonzero(self.original == row).tolist()


class Places:
    """Where the media of a run's clips lie.

    Args:
        columns: PLACE, as they were measured; measured: int32 [n], of each row its place there.
    """

    def __init__(self, columns: Mapping[str, pa.ChunkedArray], measured: np.ndarray):
        self._measured, self._tars = measured, Names.of(columns["media_tar"])
        self._offset, self._size, self._stills_at = (
            numbers(columns[c], np.int64) for c in ("media_offset", "media_size", "stills_offset")
        )
        self._stills = columns["stills_sizes"]

    def mp4(self, row: int) -> tuple[str, int, int]:
        at = int(self._measured[row])
        return self._tars[at] or "", int(self._offset[at]), int(self._size[at])

    def stills(self, row: int) -> list[int]:
        """Bytes of each."""
        at = int(self._measured[row])
        return [] if self._stills_at[at] < 0 else self._stills[at].as_py() or []

    def still(self, row: int, k: int) -> tuple[str, int, int] | None:
        at, sizes = int(self._measured[row]), self.stills(row)
        if not 0 <= k < len(sizes):
            return None
        return self._tars[at] or "", int(self._stills_at[at]) + sum(sizes[:k]), sizes[k]


def stamp(store: Store, media: Store) -> dict[str, Any]:
    """What tells that a run has changed: by kind, the files with their sizes and times. Raises StoreError."""

    def seen(store: Store, folder: str) -> frozenset[tuple[str, int, int]]:
        return frozenset((i.path, i.size, i.mtime_ns) for i in store.files.below(folder))

    decided = store.files.info("decisions.parquet")
    return {
        "decisions": (decided.size, decided.mtime_ns),
        "layers": seen(media, "layers"),
        "clips": seen(media, "videos"),  # the last file of a unit
    }


def _layer_models(layered: Layered) -> set[str]:
    return {layer.name.partition(":")[2] for layer in layered.layers if layer.captions}


def _rules(
    decided: pa.Table, recipe: dict[str, Any], owner: np.ndarray, dropped_by: Names
) -> list[dict[str, Any]]:
    """Every rule in the order it was applied, with what it asks and how many clips it drops.

    Args:
        owner: rows of decisions, of each rule that some row fails; dropped_by: that rule.
    """
    metadata = decided.schema.metadata or {}
    used = metadata.get(b"decide")
    decide = json.loads(used) if used else recipe.get("decide")
    asked: dict[str, Any] = (decide or {}).get("rules") or {}
    alone = dropped_by.counts()
    is_first = np.append(True, owner[1:] != owner[:-1])[: len(owner)]
    in_order = dropped_by.counts(is_first)
    found, left = [], len(decided)
    for name in json.loads(metadata.get(b"rules", b"[]")):
        rule = asked.get(name) or {}
        left -= in_order.get(name, 0)
        found.append(
            {"name": name, "column": rule.get("column"), "min": rule.get("min"), "max": rule.get("max")}
            | {"words": Rule.model_validate(rule).words() if rule else ""}
            | {"alone": alone.get(name, 0), "in_order": in_order.get(name, 0), "left": left}
            | {"duplicates": name == DUPLICATE}
        )
    return found


def _at(names: Names, row: np.ndarray) -> Names:
    return names.take(row) if len(names.codes) else Names(np.full(len(row), -1), [])


def finite(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
