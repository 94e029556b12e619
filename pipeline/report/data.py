"""What the report shows of a run: its tables, the clips worth a look, and their pictures."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decide.rules import CHOSEN, DUPLICATE, funnel
from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store
from pipeline.layers import Layered, open_run
from pipeline.recipe import Rule
from pipeline.tables import DECISION_SCHEMA, VIDEO_SCHEMA

KEPT_SHOWN = 24  # clips
DROPPED_SHOWN = 8  # clips a rule
TWINS_SHOWN = 12  # pairs of copies
RULES_SHOWN = 16  # rules with pictures
FRAMES = 3  # pictures a clip
PICTURE_SIDE = 384  # pixels, the longer one
PICTURE_BYTES = 6_500_000  # of all pictures together; base64 makes 4 bytes of 3


@dataclass(frozen=True)
class Limit:
    """One way a clip can be dropped, and how many are."""

    name: str  # as in dropped_by
    column: str | None
    min: float | None
    max: float | None
    alone: int  # clips that fail it
    only: int  # clips that fail nothing else
    left: int  # clips left once it and every rule before it are applied
    words: str = ""  # what it asks of a text


HEAVY = {  # columns read for the shown clips only
    *("captions", "text", "meta", "sample_frames", "sample_pts", "stills_sizes"),
}


class Run:
    """What the files of one run say; row i of `clips` and of `decisions` is the same clip."""

    def __init__(self, store: Store):
        """Raises StoreError where there is no run, or a file of it cannot be read."""
        self.store = store
        try:
            self.info, self.media = open_run(store)
            units = self.media.list("videos", ".parquet")
            self.videos: list[dict[str, Any]] = self.media.tables(units, VIDEO_SCHEMA).to_table().to_pylist()
            self._layered = Layered(self.media)
            schema = self._layered.schema()
            light = [n for n in schema.names if n not in HEAVY and not n.startswith("emb_")]
            parts = [schema.empty_table().select(light).append_column("file", pa.array([], pa.int32()))]
            for i, (_, table) in enumerate(self._layered.tables(light)):
                parts.append(table.append_column("file", pa.array([i] * len(table), pa.int32())))
            clips = _once(pa.concat_tables(parts, promote_options="permissive"))
            self._file = clips["file"].to_numpy()  # of `_layered.files`, where each clip was measured
            self.clips = clips.drop_columns(["file"])
            decided = DECISION_SCHEMA.empty_table()
            if store.exists("decisions.parquet"):
                decided = store.read_table("decisions.parquet")
        except (pa.ArrowException, OSError, ValueError) as e:
            raise StoreError(f"{store.uri} cannot be read: {e}") from e
        row = pc.index_in(self.clips["clip_id"], value_set=decided["clip_id"].combine_chunks())
        self.decisions = decided.take(row)  # nulls where a clip was not decided yet
        self.decided = self.decisions["keep"].is_valid().to_numpy().astype(bool)
        self.keep = np.array([bool(k) for k in self.decisions["keep"].to_pylist()], bool)
        self.dropped_by: list[list[str]] = [d or [] for d in self.decisions["dropped_by"].to_pylist()]
        self.duplicate_of: list[str | None] = self.decisions["duplicate_of"].to_pylist()
        self.recipe: dict[str, Any] = self.info.get("recipe") or {}
        self.limits = self._limits(decided) if len(decided) else []

    def _limits(self, decided: pa.Table) -> list[Limit]:
        """Every rule in the order it was applied."""
        used = (decided.schema.metadata or {}).get(b"decide")
        decide = json.loads(used) if used else self.recipe.get("decide")
        rules: dict[str, Any] = (decide or {}).get("rules") or {}
        only = Counter(names[0] for names in self.dropped_by if len(names) == 1)
        limits = []
        for drop in funnel(decided):
            rule = rules.get(drop.rule) or {}
            bounds = rule.get("column"), rule.get("min"), rule.get("max")
            words = Rule.model_validate(rule).words() if rule else ""
            limits.append(Limit(drop.rule, *bounds, drop.alone, only[drop.rule], drop.left, words))
        return limits

    def details(self, rows: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Every column but the embeddings of a few clips."""
        names = [n for n in self._layered.schema().names if not n.startswith("emb_")]
        by_file: dict[int, dict[str, int]] = defaultdict(dict)
        for i in rows:
            by_file[int(self._file[i])][self.clips["clip_id"][i].as_py()] = i
        found = {}
        sources = self.clips["source"]
        for file, ids in by_file.items():
            table = self._layered.read(self._layered.files[file], names)
            for row in table.filter(pc.is_in(table["clip_id"], value_set=pa.array(list(ids)))).to_pylist():
                if row["source"] == sources[i := ids[row["clip_id"]]].as_py():
                    found[i] = row
        return found

    def has(self, column: str | None) -> bool:
        """It is a number of every clip."""
        if column is None or column.startswith(CHOSEN):
            return column is not None
        return column in self.clips.schema.names and not pa.types.is_string(
            self.clips.schema.field(column).type
        )

    def values(self, column: str) -> np.ndarray:
        """A number a clip, float64 [n], NaN where it was not measured."""
        if column.startswith(CHOSEN):
            return self._of_chosen_caption(column.removeprefix(CHOSEN))
        return self.clips[column].cast(pa.float64()).to_numpy().astype(np.float64)

    def shards(self) -> tuple[int, int]:
        """How many tars there are, and their bytes."""
        sizes = [i.size for i in self.store.files.below("shards") if i.path.endswith(".tar")]
        return len(sizes), sum(sizes)

    def _of_chosen_caption(self, score: str) -> np.ndarray:
        chosen = dict(
            zip(*(self.decisions[c].to_pylist() for c in ("clip_id", "caption_model")), strict=True)
        )
        found = {}
        for _, table in self._layered.tables(["clip_id", "captions"]):
            for row in table.to_pylist():
                for caption in row["captions"] or []:
                    if caption["model"] == chosen.get(row["clip_id"]):
                        found[row["clip_id"]] = dict(caption["scores"] or []).get(score)
        ids = self.clips["clip_id"].to_pylist()
        return np.array([math.nan if found.get(i) is None else found[i] for i in ids], np.float64)


def _once(clips: pa.Table) -> pa.Table:
    """Sorted by source and time; a clip id that two sources share is the first one's, as in `decide`."""
    clips = clips.sort_by([(c, "ascending") for c in ("source", "start_frame", "clip_id")])
    code = clips["clip_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return clips.take(np.sort(np.unique(code, return_index=True)[1])).combine_chunks()


def pictures(file: Any, duration_s: float) -> list[bytes]:
    """FRAMES JPEGs of a clip, from its beginning, middle and end.

    Keyframes where it has a few, which are cheap to reach: a picture may be a second off, which a contact
    sheet can afford and thousands of full decodes it cannot.
    """
    import av
    from av.video.reformatter import VideoReformatter

    for skip in ("NONKEY", "NONREF"):
        file.seek(0)
        with av.open(file, format="mp4") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.skip_frame = skip
            start = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
            wanted = [start + (i + 0.5) / FRAMES * duration_s for i in range(FRAMES)]
            nearest: list[Any] = [None] * FRAMES
            decoded = 0
            for frame in container.decode(stream):
                decoded += 1
                for i, t in enumerate(wanted):
                    if nearest[i] is None or abs(frame.time - t) < abs(nearest[i].time - t):
                        nearest[i] = frame
            sar = float(stream.sample_aspect_ratio or 1)
        if decoded > 1:
            break
    if nearest[0] is None:
        raise ValueError("no frame in it")
    scaler = VideoReformatter()
    return [_jpeg(frame, sar, scaler) for frame in nearest]


def _jpeg(frame: Any, sar: float, scaler: Any) -> bytes:
    import cv2

    shape = frame.width * sar, frame.height
    scale = min(PICTURE_SIDE / shape[0], PICTURE_SIDE / shape[1], 1.0)
    width, height = (max(2, round(side * scale)) for side in shape)
    small = scaler.reformat(frame, width, height, "bgr24", threads=1).to_ndarray()
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 70])[1].tobytes()


def all_pictures(run: Run, rows: list[int]) -> dict[int, list[bytes] | str]:
    """Pictures of some clips, or the reason why there are none; together at most PICTURE_BYTES."""
    import av

    clips = run.clips

    def one(i: int) -> list[bytes] | str:
        columns = ("media_tar", "media_offset", "media_size", "media_sha256", "duration_s")
        place = [clips[c][i].as_py() for c in columns]
        if None in place:
            return "no media was written"
        tar, offset, size, sha256, duration = place
        try:
            with contextlib.closing(Ranges(run.media)) as ranges:
                return pictures(io.BytesIO(ranges.read(tar, offset, size, sha256)), duration)
        except (StoreError, OSError, av.FFmpegError, ValueError, IndexError) as e:
            return f"the picture cannot be read from {tar}: {str(e) or type(e).__name__}"

    found: dict[int, list[bytes] | str] = {}
    spent = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for i, got in zip(rows, pool.map(one, rows), strict=True):
            spent += sum(map(len, got)) if isinstance(got, list) else 0
            found[i] = got if spent <= PICTURE_BYTES else "left out to keep this page small"
    return found


def evenly(rows: Sequence[int], count: int) -> list[int]:
    """`count` of the rows, spread evenly over their order."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]


@dataclass
class Shown:
    """The clips the page has room for, by row."""

    kept: list[int]
    dropped: dict[str, list[int]]  # by rule; a clip appears once
    twins: list[tuple[int, int]]  # (kept, copy)

    def rows(self) -> list[int]:
        ordered = [*self.kept, *(i for pair in self.twins for i in pair)]
        ordered += [i for rows in self.dropped.values() for i in rows]
        return list(dict.fromkeys(ordered))


def choose(run: Run) -> Shown:
    """Kept clips spread over sources and time; for each rule from its closest calls to its clearest."""
    kept = evenly(np.flatnonzero(run.keep).tolist(), KEPT_SHOWN)

    row_of = {c: i for i, c in enumerate(run.clips["clip_id"].to_pylist())} if any(run.duplicate_of) else {}
    pairs = [(row_of[d], i) for i in range(len(run.keep)) if (d := run.duplicate_of[i]) in row_of]
    twins = [pairs[k] for k in evenly(range(len(pairs)), TWINS_SHOWN)]

    failing = defaultdict(list)
    for i, names in enumerate(run.dropped_by):
        for name in names:
            failing[name].append(i)
    dropped: dict[str, list[int]] = {}
    used = {copy for _, copy in twins}
    for limit in [r for r in run.limits if r.name != DUPLICATE][:RULES_SHOWN]:
        rows = [i for i in failing[limit.name] if i not in used]
        if limit.column is not None and run.has(limit.column):
            values = run.values(limit.column)
            low = -math.inf if limit.min is None else limit.min
            high = math.inf if limit.max is None else limit.max
            rows.sort(key=lambda i: max(low - values[i], values[i] - high))
        dropped[limit.name] = evenly(rows, DROPPED_SHOWN)
        used.update(dropped[limit.name])
    return Shown(kept, dropped, twins)
