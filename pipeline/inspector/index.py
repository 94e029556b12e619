"""A run's clips as columns in memory: what the inspector filters, sorts and counts.

Row i is the same clip everywhere, sorted by source and time. Columns come in two steps: `Index` reads the light ones
(about 200 bytes a clip), `read_captions` goes over the captions once, in the background, and leaves a few numbers of
each clip. Captions themselves, prompts and metadata stay in their files: `details` reads those of one clip.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.caption.choose import best
from pipeline.decide.rules import CHOSEN, DUPLICATE, funnel
from pipeline.faults import StoreError
from pipeline.inspector.nested import Marks, Names, by_key, flat, lengths, whole
from pipeline.io.store import Store
from pipeline.layers import Layered, unit_of
from pipeline.recipe import Rule
from pipeline.recipe_captions import Choose
from pipeline.tables import DECISION_SCHEMA

PLACE = ("media_tar", "media_offset", "media_size", "stills_offset", "stills_sizes")
LIGHT = (
    "clip_id",
    "source",
    "name",
    "start_s",
    "end_s",
    "start_frame",
    "duration_s",
    "width",
    "height",
    "fps",
)
CONSENSUS, FIT = "consensus", "visual_fit"
HUMAN = "human"  # a score: the share of people who would have this caption (pipeline.inspector.choices)
KEPT_DETAILS = 256  # clips


class Index:
    """The columns of one run. Raises StoreError where there is no run, or a file of it cannot be read.

    numbers: float32 [n] by column, NaN where it was not measured.
    kept: int8 [n], −1 where it was not decided yet.
    dropped: by rule, those it drops; flags and models: those with such a caption.
    ready: the captions were read; generation: how often they were.
    """

    def __init__(self, store: Store):
        self.store = self.media = store
        if not store.exists("run.json") and not store.list("videos", ".parquet"):
            raise StoreError(
                f"{store.uri} holds no clipmill run; make one with 'clipmill curate SOURCE --out {store.uri}'"
            )
        try:
            self.info: dict[str, Any] = {}
            if store.exists("run.json"):
                self.info = json.loads(store.read_bytes("run.json"))
            if "of" in self.info:  # another set of shards: what was measured lies with the run
                self.media = Store(self.info["of"])
            self.recipe: dict[str, Any] = self.info.get("recipe") or {}
            self._read_clips()
            self._read_decisions()
        except (pa.ArrowException, OSError, ValueError, KeyError) as e:
            raise StoreError(f"{store.uri} cannot be read: {e}") from e
        self.ready, self.generation = False, 0
        self._begin_captions()
        self._details: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._time_bases: dict[tuple[str, str], str | None] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.ids)

    # ------------------------------------------------------------ reading

    def _read_clips(self) -> None:
        self.layered = Layered(self.media)
        schema = self.layered.schema()
        scores = [f.name for f in schema if f.name.startswith("score_")]
        columns = [*LIGHT, *PLACE, *scores]
        tables = [t for _, t in self.layered.tables(columns)]
        self.sizes = np.array([len(t) for t in tables], np.int64)
        table = pa.concat_tables(tables, promote_options="permissive") if tables else _none(schema, columns)
        source = Names.of(table["source"])
        rank = np.argsort(np.argsort(np.array(source.names, object))) if source.names else np.zeros(0, int)
        start = table["start_frame"].to_numpy()
        order = np.lexsort((start, rank[source.codes])) if len(table) else np.zeros(0, np.int64)
        ids = table["clip_id"].take(pa.array(order))
        code = whole(ids.dictionary_encode()).indices.to_numpy()
        if len(order) and code.max() + 1 < len(order):  # an id that two sources share is the first one's
            first = np.sort(np.unique(code, return_index=True)[1])
            order, ids = order[first], ids.take(pa.array(first))
        self.position = np.full(
            len(table), -1, np.int32
        )  # row of what lies in the files, one after the other
        self.position[order] = np.arange(len(order), dtype=np.int32)
        self.measured = order.astype(np.int32)  # and the other way round
        self.first = np.cumsum(self.sizes) - self.sizes  # of each file
        self.ids: pa.Array = whole(ids.cast(pa.large_string()))
        self.sources = source.take(order)
        self.names = Names.of(table["name"]).take(order)
        take = pa.array(order)
        self.start = table["start_s"].to_numpy()[order]
        self.end = table["end_s"].to_numpy()[order]
        self.numbers = {c: _number(table[c])[order] for c in (*LIGHT[6:], *scores)}
        self.tars = Names.of(table["media_tar"]).take(order)
        self.offset, self.size, self.stills_at = (
            table[c].cast(pa.int64()).fill_null(-1).to_numpy()[order]
            for c in ("media_offset", "media_size", "stills_offset")
        )
        self.stills: pa.Array = whole(table["stills_sizes"].cast(pa.large_list(pa.int32())).take(take))
        self.still_count = lengths(self.stills).astype(np.int16)

    def _read_decisions(self) -> None:
        n, decided = len(self), DECISION_SCHEMA.empty_table()
        if self.store.exists("decisions.parquet"):
            decided = self.store.read_table("decisions.parquet")
        self.rules = _rules(decided, self.recipe) if len(decided) else []
        ids = whole(decided["clip_id"].cast(pa.large_string()))
        same = len(ids) == n and ids.equals(self.ids)
        row = np.arange(n) if same else whole(pc.index_in(self.ids, value_set=ids).fill_null(-1)).to_numpy()
        there = row >= 0
        keep = decided["keep"].cast(pa.int8()).fill_null(-1).to_numpy()
        self.kept = np.where(there, keep[row], -1).astype(np.int8) if len(keep) else np.full(n, -1, np.int8)
        back = np.full(len(ids), -1, np.int64)  # from rows of decisions to ours
        back[row[there]] = np.flatnonzero(there)
        self.dropped = Marks(n)
        owner, names = flat(whole(decided["dropped_by"]))
        coded = Names.of(names)
        for rule in self.rules:
            rows = back[owner[coded.codes == coded.code(rule["name"])]]
            self.dropped.put(rule["name"], rows[rows >= 0])
        copies = whole(decided["duplicate_of"].cast(pa.large_string()))
        original = pc.index_in(copies, value_set=self.ids).fill_null(-1).to_numpy()
        self.original = np.full(n, -1, np.int32)  # row of the clip that it repeats
        if len(ids):
            self.original[there] = original[row[there]]
        text = decided["caption"].cast(pa.large_string())
        self.caption: pa.Array = whole(text if same else text.take(pa.array(row, mask=~there)))
        self.model = _at(Names.of(decided["caption_model"]), row)
        self.shard, self.shard_offset = _at(Names.of(decided["shard"]), row), np.full(n, -1, np.int64)
        if len(ids):
            at = decided["offset"].cast(pa.int64()).fill_null(-1).to_numpy()
            self.shard_offset = np.where(there, at[row], -1)
        folders = [name.split("/")[-2] for name in self.shard.names]
        known = list(dict.fromkeys(folders))
        code = np.array([*(known.index(f) for f in folders), -1], np.int32)
        self.buckets = Names(code[self.shard.codes], known)

    def reload(self) -> None:
        """Take in layers that were added or removed since: `read_captions` goes over them again. Raises StoreError."""
        self.layered = Layered(self.media)
        with self._lock:
            self._details.clear()
        self.layer_models = _layer_models(self.layered)

    def _begin_captions(self) -> None:
        n = len(self)
        self.flags, self.models = Marks(n), Marks(n)
        self.layer_models = _layer_models(self.layered)
        self.captions_read = 0
        self.fit_score: str | None = None

    def read_captions(self) -> None:
        """Numbers of every clip from its captions; may run in the background. Raises StoreError."""
        choose = Choose.model_validate(self.recipe.get("choose") or {})
        new = _Captions(self, choose)
        self.captions_read = 0
        for i, (_, table) in enumerate(self.layered.tables(["captions"])):
            rows = self.position[self.first[i] : self.first[i] + self.sizes[i]]
            new.add(rows, whole(table["captions"]))
            self.captions_read += len(table)
        new.finish()
        self.generation += 1
        self.ready = True

    # ------------------------------------------------------------ asking

    def row(self, clip_id: str) -> int | None:
        """Of a clip; none where there is no such clip."""
        found = pc.index(self.ids, pa.scalar(clip_id, pa.large_string())).as_py()
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
        """Tar, offset and size of a clip's k-th still; none where none was kept."""
        sizes = self.stills[row].as_py() or []
        if self.stills_at[row] < 0 or not 0 <= k < len(sizes):
            return None
        return self.tars[row] or "", int(self.stills_at[row]) + sum(sizes[:k]), sizes[k]

    def source_neighbours(self, row: int) -> tuple[int | None, int | None]:
        """The clips before and after it in its source."""
        code = self.sources.codes
        before = row - 1 if row and code[row - 1] == code[row] else None
        after = row + 1 if row + 1 < len(code) and code[row + 1] == code[row] else None
        return before, after

    def copies(self, row: int) -> list[int]:
        """Clips that were dropped because they repeat it."""
        return np.flatnonzero(self.original == row).tolist()


class _Captions:
    """Makes numbers of every clip from its captions, a file at a time; `finish` puts them into the index."""

    def __init__(self, index: Index, choose: Choose):
        self.index, self.choose, n = index, choose, len(index)
        self.count, self.flag_count = np.zeros(n, np.float32), np.zeros(n, np.float32)
        self.words, self.agreement = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
        self.chosen: dict[str, np.ndarray] = {}  # by score, of the chosen caption
        self.gaps: dict[str, np.ndarray] = {}  # by score, largest − smallest of a clip's captions
        self.flags, self.models = Marks(n), Marks(n)
        self.undecided: dict[
            int, tuple[str, str]
        ] = {}  # row → text and model of the caption that would stand

    def add(self, rows: np.ndarray, captions: pa.Array) -> None:
        """Args: rows: of each list of captions, −1 for one that is no clip of its own."""
        there = np.flatnonzero(rows >= 0)
        rows, captions = rows[there], captions.take(pa.array(there))
        owner, flat_captions = flat(captions)
        if len(there) and (self.index.kept[rows] < 0).any():
            self._choose(rows, captions)
        if not len(owner):
            return
        row = rows[owner]
        model = Names.of(flat_captions.field("model"))
        text = flat_captions.field("text").fill_null("")
        said = pc.not_equal(text, "").to_numpy(zero_copy_only=False)
        np.add.at(self.count, row[said], 1)
        for code, name in enumerate(model.names):
            self.models.put(name, row[said & (model.codes == code)])
        stands = self._stands(row, model)
        counted = pc.count_substring_regex(text, r"\S+").to_numpy(zero_copy_only=False)
        self.words[row[stands]] = counted[stands]
        of, flags = flat(flat_captions.field("flags"))
        named = Names.of(flags)
        np.add.at(self.flag_count, row[of], 1)
        for code, name in enumerate(named.names):
            self.flags.put(name, row[of[named.codes == code]])
        for name, (of, values) in by_key(flat_captions.field("scores")).items():
            self._score(name, row[of], values, stands[of])

    def _stands(self, row: np.ndarray, model: Names) -> np.ndarray:
        """bool [m]: it is its clip's chosen caption."""
        chosen = self.index.model
        ours = np.array([*(chosen.code(n) for n in model.names), -3], np.int32)
        stands = ours[model.codes] == chosen.codes[row]
        for r in set(row.tolist()) & self.undecided.keys() if self.undecided else ():
            stands |= (row == r) & (model.codes == model.code(self.undecided[r][1]))
        return stands

    def _choose(self, rows: np.ndarray, captions: pa.Array) -> None:
        for row, candidates in zip(rows.tolist(), captions.to_pylist(), strict=True):
            if self.index.kept[row] < 0 and (i := best(candidates or [], self.choose)) is not None:
                self.undecided[row] = candidates[i]["text"], candidates[i]["model"]

    def _score(self, name: str, row: np.ndarray, values: np.ndarray, stands: np.ndarray) -> None:
        there = np.isfinite(values)
        row, values, stands = row[there], values[there], stands[there]
        n = len(self.index)
        of_chosen = self.chosen.setdefault(name, np.full(n, np.nan, np.float32))
        of_chosen[row[stands]] = values[stands]
        some, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        high, low = np.full(len(some), -np.inf), np.full(len(some), np.inf)
        np.maximum.at(high, inverse, values)
        np.minimum.at(low, inverse, values)
        gap = self.gaps.setdefault(name, np.full(n, np.nan, np.float32))
        gap[some] = np.where(counts > 1, high - low, np.nan)
        if name == CONSENSUS:
            self.agreement[some] = np.bincount(inverse, values) / counts

    def finish(self) -> None:
        index = self.index
        judges = [name for name in self.gaps if name not in (CONSENSUS, HUMAN)]  # who saw the pictures
        index.fit_score = next((name for name in (FIT, self.choose.method, *judges) if name in judges), None)
        none = np.full(len(index), np.nan, np.float32)
        index.numbers |= {
            "agreement": self.agreement,
            "fit": self.chosen.get(index.fit_score or "", none),
            "gap": self.gaps.get(index.fit_score or "", none),
            "flag_count": self.flag_count,
            "captions": self.count,
            "words": self.words,
        } | {CHOSEN + name: values for name, values in self.chosen.items()}
        index.flags, index.models = self.flags, self.models
        if self.undecided:
            index.caption, index.model = _with_undecided(index.caption, index.model, self.undecided)


def _with_undecided(
    caption: pa.Array, model: Names, undecided: dict[int, tuple[str, str]]
) -> tuple[pa.Array, Names]:
    texts = caption.to_pylist()
    names, codes = list(model.names), model.codes.copy()
    for row, (text, who) in undecided.items():
        texts[row] = text
        if who not in names:
            names.append(who)
        codes[row] = names.index(who)
    return pa.array(texts, pa.large_string()), Names(codes, names)


def _layer_models(layered: Layered) -> set[str]:
    return {layer.name.partition(":")[2] for layer in layered.layers if layer.captions}


def _rules(decided: pa.Table, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rule in the order it was applied, with what it asks and how many clips it drops."""
    used = (decided.schema.metadata or {}).get(b"decide")
    decide = json.loads(used) if used else recipe.get("decide")
    asked: dict[str, Any] = (decide or {}).get("rules") or {}
    found = []
    for drop in funnel(decided):
        rule = asked.get(drop.rule) or {}
        found.append(
            {"name": drop.rule, "column": rule.get("column"), "min": rule.get("min"), "max": rule.get("max")}
            | {"words": Rule.model_validate(rule).words() if rule else ""}
            | {"alone": drop.alone, "in_order": drop.in_order, "left": drop.left}
            | {"duplicates": drop.rule == DUPLICATE}
        )
    return found


def _number(column: pa.ChunkedArray) -> np.ndarray:
    """float32 [n], NaN for null."""
    return column.cast(pa.float64(), safe=False).to_numpy().astype(np.float32)


def _at(names: Names, row: np.ndarray) -> Names:
    return names.take(row) if len(names.codes) else Names(np.full(len(row), -1), [])


def _none(schema: pa.Schema, columns: list[str]) -> pa.Table:
    return pa.schema([schema.field(c) for c in columns]).empty_table()


def finite(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
