"""The record that travels through the mill, and the parquet schemas it ends up in.

A `Video` is one source. It grows as it passes the stages: decoding gives it `frames`, the shot
detector `shots`, the event stage `clips`, and every later stage adds to the clips. Nothing is
overwritten. Scores, captions and embeddings live in maps keyed by the name of what made them, so a
new measure or model touches its own file and a recipe, never this one.

Times are exact: a frame is named by its index in presentation order and by its PTS, an integer in
ticks of the stream's `time_base` (a Fraction, seconds a tick). Seconds are always PTS × time_base,
never index ÷ fps, so variable frame rates and delayed starts need no special case.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, count
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.geometry import MATRICES, PRIMARIES, SAME_ASPECT, TRANSFERS, Geometry


@dataclass(frozen=True)
class Source:
    """One raw video to curate, as listed; nothing has been read yet."""

    uri: str  # unique in a run: an absolute path, a URL, or 'TAR#member'; without signatures and passwords
    name: str  # path below the SOURCE argument it came from; salts the clip ids
    meta: dict[str, str] = field(default_factory=dict)  # title, description, subtitles, … of the list's row
    intervals: tuple[tuple[float, float], ...] | None = None  # given clips, seconds: no splitting
    interval_meta: tuple[dict[str, str], ...] = ()  # metadata of each given clip, aligned with `intervals`
    size: int | None = None  # bytes, where listing knows it
    member: tuple[int, int] | None = None  # (offset, size) of the video inside a tar
    problem: str | None = None  # why listing it failed, one sentence; fetching it raises this …
    # Salts of ids that are taken, with the content's sha256: by clips of content that lay under this name before
    taken: frozenset[tuple[str, str]] = field(default=frozenset(), compare=False)
    passing: bool = False  # … as a TransientFault, for the next run to try again
    mtime_ns: int | None = (
        None  # local files: when they were last modified, ns since 1970, just before the run
    )
    # Where to fetch it (of a member: its tar), where `uri` lacks secrets of it. Never written, logged or shown.
    address: str | None = field(default=None, repr=False, compare=False)
    reach: str = field(default="public", compare=False)  # what may be connected to, see sources.network

    def intervals_key(self) -> str:
        """Names the clips that the list gives: other intervals are other clips. Empty where it gives none."""
        return "" if self.intervals is None else _key(self.intervals)

    def interval_meta_key(self) -> str:
        """Names what the list says of each given clip."""
        return _key(self.interval_meta) if any(self.interval_meta) else ""

    @property
    def bytes(self) -> int | None:
        """How many it has, where that is known; of a tar's member its own."""
        return self.size if self.member is None else self.member[1]


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@dataclass
class Sample:
    """One frame kept at model size: JPEG, RGB, upright."""

    frame: int  # index in presentation order
    jpeg: bytes


@dataclass
class Frames:
    """What the one analysis decode leaves behind for the later stages.

    `thumbs` goes no further than the shot detector, `grey` no further than the motion scores,
    `samples` no further than the captioners.
    """

    pts: np.ndarray  # int64 [n], ticks of time_base, strictly increasing
    end_pts: int  # where the last frame stops being shown
    thumbs: np.ndarray | None  # uint8 [n, 27, 48, 3] RGB, every frame (TransNetV2's input)
    samples: list[Sample]  # a few a second, sorted by frame
    grey: np.ndarray | None  # uint8 [m, h, w], a steady several a second
    grey_frame: np.ndarray  # int64 [m], frame index of each grey picture
    packets: np.ndarray | None = None  # int64 [p, 3], decode order: pts, dts, is_keyframe
    # int64 [r, 3]: a frame at which the source's clock starts again, ticks added to its stamps from there on,
    # where the frame before stops being shown; no shot spans one (pipeline.split.clock)
    restarts: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))
    # int64 [k, 5], frames at which the pictures change, stored: frame, width, height, pixel shape (width : height)
    shapes: np.ndarray = field(default_factory=lambda: np.empty((0, 5), np.int64))
    by_number: bool = False  # some PTS are not the frames' own: ffmpeg finds them by counting only
    marks: np.ndarray | None = (
        None  # uint8 [n, 9, 16] grey, every frame: proves that a cut has the right ones
    )

    damaged: np.ndarray | None = None  # bool [n]: shows damage (pipeline.split.damage)
    missing: np.ndarray | None = None  # int32 [n]: so many frames are missing behind it
    repeated: np.ndarray | None = None  # bool [n]: shows just what the frame before showed

    @property
    def ends(self) -> np.ndarray:
        """Where each frame stops being shown, int64 [n], ticks of time_base."""
        ends = np.append(self.pts[1:], self.end_pts)
        ends[self.restarts[:, 0] - 1] = self.restarts[:, 2]
        return ends


@dataclass(frozen=True)
class Shot:
    """A run of frames between two cuts: [start_frame, end_frame)."""

    start_frame: int
    end_frame: int


@dataclass
class Caption:
    """What one model said of a clip, and what others thought of it."""

    model: str  # 'tags-baseline', 'Qwen/Qwen2.5-VL-7B-Instruct', …
    text: str
    outcome: str = "ok"  # 'ok' | 'empty' | 'truncated' | 'error'
    prompt: str = ""
    scores: dict[str, float] = field(default_factory=dict)  # 'consensus', 'clip_score', …
    reason: str = ""  # of outcome 'error': one sentence, with file and line of a captioner of the user's own


@dataclass(frozen=True)
class Media:
    """Where a clip's mp4 lies: a byte range of a staging tar."""

    tar: str  # relative to the output
    offset: int
    size: int
    sha256: str
    width: int  # of the encoded clip, upright, in stored pixels
    height: int


@dataclass
class Clip:
    """A semantically coherent stretch of one source: [start_frame, end_frame)."""

    clip_id: str
    start_frame: int
    end_frame: int
    start_s: float
    end_s: float
    scores: dict[str, float] = field(default_factory=dict)
    captions: list[Caption] = field(default_factory=list)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)  # what OCR read, most prominent first
    media: Media | None = None
    meta: dict[str, str] = field(default_factory=dict)  # its own (Source.interval_meta), over the source's
    sample_frames: list[int] = field(default_factory=list)  # frames kept for models, as in Frames.samples

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass
class Error:
    """Why a source could not be used."""

    stage: str
    message: str  # one sentence
    at: str  # UTC, ISO 8601
    kind: str = "source"  # whose fault, see pipeline.faults; 'transient' is tried again by the next run


@dataclass
class Video:
    """One source on its way through the mill."""

    source: Source
    unit: str  # the unit of work it is committed with
    sha256: str = ""
    codec: str = ""
    width: int = 0  # upright, stored pixels
    height: int = 0
    fps: float = 0.0  # mean rate from PTS: (n − 1) ÷ (last − first)
    duration_s: float = 0.0  # first PTS to the end of the last frame
    time_base: Fraction = Fraction(1, 90000)
    rotation: int = 0  # degrees counter-clockwise that make the stored picture upright: 0, 90, 180, 270
    sar: Fraction = Fraction(1)  # shape of one upright pixel, width ÷ height
    pix_fmt: str = ""
    geometry: Geometry = field(
        default_factory=Geometry
    )  # all of how it is shown; rotation and sar are also there
    interlaced: float = 0.0  # share of the frames that are flagged as two fields
    field_order: str = ""  # the field that is shown first: 'top', 'bottom', '' where unknown or progressive
    frames: Frames | None = None
    shots: list[Shot] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # survived trouble, e.g. a truncated end
    counts: dict[str, int] = field(default_factory=dict)  # 'shots', 'events_too_short', …
    error: Error | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # wall seconds a stage spent on it
    chunk: int = 0  # of a long source: which of its `chunks` this is (pipeline.run.chunks)
    chunks: int = 1
    division: str = ""  # of a chunk: names what its source is divided into (pipeline.run.chunks)
    committed: set[tuple[int, str]] = field(
        default_factory=set
    )  # chunks an earlier run has finished, each with its `division`

    @property
    def salt(self) -> str:
        """What salts the clip ids: the name, with a number where content that has moved on has these ids already."""
        name = self.source.name
        salts = chain([name], (f"{name}\0{n}" for n in count(2)))
        return next(salt for salt in salts if (self.sha256, salt) not in self.source.taken)

    def pts_of(self, frame: int) -> int:
        """PTS of a frame; of frame n (one past the last) the PTS at which the video ends."""
        assert self.frames is not None
        return int(self.frames.pts[frame]) if frame < len(self.frames.pts) else self.frames.end_pts

    def end_of(self, frame: int) -> int:
        """PTS at which the frame before this one stops being shown: mostly the PTS of this one."""
        assert self.frames is not None
        for start, _, end in self.frames.restarts.tolist():
            if start == frame:
                return end
        return self.pts_of(frame)

    def shown(self, clip: Clip) -> Geometry:
        """How a clip is shown; where pictures of several sizes are in it, as the largest of them."""
        found = [self.geometry]
        for frame, shape in self._shapes():
            if frame <= clip.start_frame:
                found = []
            if frame < clip.end_frame:
                found.append(shape)
        return max(found, key=lambda g: g.stored[0] * g.stored[1])

    def breaks(self) -> list[int]:
        """Frames before which shots and clips end: the clock starts again there, or the picture's aspect changes."""
        assert self.frames is not None
        found, before = self.frames.restarts[:, 0].tolist(), self.geometry
        for frame, shape in self._shapes():
            if abs(shape.aspect / before.aspect - 1) > SAME_ASPECT:
                found.append(frame)
            before = shape
        return sorted(found)

    def _shapes(self) -> list[tuple[int, Geometry]]:
        if self.frames is None:
            return []
        return [
            (frame, self.geometry.reshaped(w, h, Fraction(x, y)))
            for frame, w, h, x, y in self.frames.shapes.tolist()
        ]

    def time_of(self, frame: int) -> float:
        """Seconds on the source's own clock (PTS × time_base)."""
        return float(self.pts_of(frame) * self.time_base)

    def clip(self, start_frame: int, end_frame: int) -> Clip:
        """A new clip of [start_frame, end_frame), identified and timed."""
        start, end = self.pts_of(start_frame) * self.time_base, self.end_of(end_frame) * self.time_base
        return Clip(
            clip_id=clip_id(self.sha256, self.salt, start, end),
            start_frame=start_frame,
            end_frame=end_frame,
            start_s=float(start),
            end_s=float(end),
        )


def clip_id(source_sha256: str, name: str, start: Fraction, end: Fraction) -> str:
    """20 hex digits from the source's content, its name (`Video.salt`), and the clip's exact start and end.

    The name is the path below the SOURCE argument, so moving the folder keeps the ids while two byte
    copies in one folder stay two clips (and the duplicate search tells which is the copy). No dot,
    so it is a safe WebDataset key.
    """
    text = f"{source_sha256}\0{name}\0{start}\0{end}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def _described(fields: list[tuple[str, pa.DataType, str]]) -> pa.Schema:
    return pa.schema([pa.field(n, t, metadata={"doc": doc}) for n, t, doc in fields])


CAPTION = pa.struct(
    [
        ("model", pa.string()),
        ("text", pa.string()),
        ("outcome", pa.string()),
        ("prompt", pa.string()),
        ("scores", pa.map_(pa.string(), pa.float32())),
        ("reason", pa.string()),  # of outcome 'error', one sentence; '' otherwise
    ]
)

VIDEO_SCHEMA = _described(
    [
        ("source", pa.string(), "absolute path or URL"),
        ("name", pa.string(), "path below the SOURCE argument"),
        ("unit", pa.string(), "unit of work it was committed with"),
        ("sha256", pa.string(), "of the source's bytes; null where they could not be read"),
        ("status", pa.string(), "'ok' or 'error'"),
        ("error", pa.string(), "one sentence; null when ok"),
        ("stage", pa.string(), "stage that failed; null when ok"),
        ("error_at", pa.string(), "UTC time of the failure, ISO 8601"),
        ("error_kind", pa.string(), "whose fault: 'source', 'worker' or 'transient'; null when ok"),
        ("warnings", pa.list_(pa.string()), "trouble that was survived"),
        ("duration_s", pa.float64(), "first PTS to end of last frame, seconds"),
        ("width", pa.int32(), "upright, stored pixels"),
        ("height", pa.int32(), "upright, stored pixels"),
        ("fps", pa.float64(), "mean frame rate from PTS"),
        ("frames", pa.int64(), "decoded frames"),
        ("codec", pa.string(), "name of the video codec"),
        ("rotation", pa.int32(), "degrees counter-clockwise applied to make it upright"),
        ("sample_aspect_ratio", pa.float64(), "pixel width ÷ height"),
        ("clips", pa.int32(), "rows it has in clips/"),
        ("counts", pa.map_(pa.string(), pa.int64()), "shots, events dropped while splitting, …"),
        ("seconds", pa.map_(pa.string(), pa.float64()), "wall seconds per stage"),
        ("meta", pa.map_(pa.string(), pa.string()), "the other columns of the list it came from"),
        ("size", pa.int64(), "bytes of the source; null where listing did not know"),
        ("mtime_ns", pa.int64(), "when it was last modified, ns since 1970; null where it is not local"),
        ("intervals_key", pa.string(), "hash of the clips that the list gives; '' where it gives none"),
        ("interval_meta_key", pa.string(), "hash of what the list says of each of these clips"),
        ("chunks", pa.int32(), "units it was divided into after splitting, 1 for most"),
        ("pix_fmt", pa.string(), "libav's name of the pixel format"),
        (
            "crop",
            pa.list_(pa.int32(), 4),
            "left, top, right, bottom that the container cuts off, stored pixels",
        ),
        ("mirrored", pa.bool_(), "its left and right are swapped to show it"),
        ("interlaced", pa.float32(), "share of the frames that are flagged as interlaced, 0 to 1"),
        ("field_order", pa.string(), "'top' or 'bottom' is shown first; null where progressive or unknown"),
        ("hdr", pa.string(), "'pq' or 'hlg'; null where not high dynamic range"),
        ("color_matrix", pa.string(), "ffmpeg's names; 'unknown' is taken for BT.601, null of RGB and grey"),
        ("color_primaries", pa.string(), "ffmpeg's names, 'unknown' where the source does not say"),
        ("color_transfer", pa.string(), "ffmpeg's names, 'unknown' where the source does not say"),
        ("full_range", pa.bool_(), "luma from 0 to 255, not from 16 to 235"),
        (
            "salt",
            pa.string(),
            "name that is in its clip ids: the one it was measured under, with a number where that is taken",
        ),
    ]
)

# The fixed part of clips/*.parquet; `clip_schema` adds a column per score and per embedding.
CLIP_SCHEMA = _described(
    [
        ("clip_id", pa.string(), "20 hex digits, see pipeline.record.clip_id"),
        ("source", pa.string(), "as in videos/"),
        ("name", pa.string(), "as in videos/"),
        ("source_sha256", pa.string(), "of the source's bytes"),
        ("start_s", pa.float64(), "PTS of the first frame, seconds on the source's clock"),
        ("end_s", pa.float64(), "PTS at which the last frame ends, seconds"),
        ("start_frame", pa.int64(), "first frame, index in presentation order"),
        ("end_frame", pa.int64(), "one past the last frame"),
        ("duration_s", pa.float64(), "end_s − start_s"),
        ("width", pa.int32(), "of the clip, pixels"),
        ("height", pa.int32(), "of the clip, pixels"),
        ("fps", pa.float64(), "mean frame rate of the source"),
        ("captions", pa.list_(CAPTION), "every candidate, with what scored it"),
        ("text", pa.list_(pa.string()), "text read in the picture, most prominent first"),
        ("meta", pa.map_(pa.string(), pa.string()), "the source's metadata"),
        ("media_tar", pa.string(), "staging tar with the clip's mp4, relative to the output"),
        ("media_offset", pa.int64(), "first byte of the mp4 in that tar"),
        ("media_size", pa.int64(), "bytes of the mp4"),
        ("media_sha256", pa.string(), "of the mp4's bytes"),
        (
            "sample_frames",
            pa.list_(pa.int64()),
            "frames that captioners, scores and choosers were shown a choice of, numbered as start_frame",
        ),
    ]
)

DECISION_SCHEMA = _described(
    [
        ("clip_id", pa.string(), "as in clips/"),
        ("source", pa.string(), "as in clips/"),
        ("keep", pa.bool_(), "it is in the shards"),
        ("dropped_by", pa.list_(pa.string()), "every rule it fails, in the recipe's order"),
        ("duplicate_of", pa.string(), "clip_id of the copy that was kept"),
        ("caption", pa.string(), "the chosen caption"),
        ("caption_model", pa.string(), "who wrote it"),
        ("shard", pa.string(), "tar, relative to the output; null when dropped"),
        ("offset", pa.int64(), "first byte of the mp4 in that tar"),
        ("size", pa.int64(), "bytes of the mp4"),
        ("tar", pa.string(), "the same tar, relative to shards/, as in shards/index.parquet"),
    ]
)


def clip_schema(scores: list[str], embeddings: dict[str, int]) -> pa.Schema:
    """CLIP_SCHEMA plus one `score_*` column a measure and one `emb_*` column a model."""
    schema = CLIP_SCHEMA
    for name in scores:
        schema = schema.append(pa.field(f"score_{name}", pa.float64()))
    for name, size in embeddings.items():
        schema = schema.append(pa.field(f"emb_{name}", pa.list_(pa.float32(), size)))
    return schema


def video_row(v: Video) -> dict[str, Any]:
    """A row of VIDEO_SCHEMA."""
    known = v.error is None
    seen, g, c = bool(v.width), v.geometry, v.geometry.colours
    return {
        "source": v.source.uri,
        "name": v.source.name,
        "unit": v.unit,
        "sha256": v.sha256 or None,
        "status": "ok" if known else "error",
        "error": None if v.error is None else v.error.message,
        "stage": None if v.error is None else v.error.stage,
        "error_at": None if v.error is None else v.error.at,
        "error_kind": None if v.error is None else v.error.kind,
        "warnings": v.warnings,
        "duration_s": v.duration_s if v.width else None,
        "width": v.width or None,
        "height": v.height or None,
        "fps": v.fps or None,
        "frames": v.counts.get("frames"),
        "codec": v.codec or None,
        "rotation": v.rotation if v.width else None,
        "sample_aspect_ratio": float(v.sar) if v.width else None,
        "clips": len(v.clips) if known else 0,
        "counts": list(v.counts.items()),
        "seconds": list(v.seconds.items()),
        "meta": list(v.source.meta.items()),
        "size": v.source.bytes,
        "mtime_ns": v.source.mtime_ns,
        "intervals_key": v.source.intervals_key(),
        "interval_meta_key": v.source.interval_meta_key(),
        "chunks": v.chunks,
        "pix_fmt": v.pix_fmt or None,
        "crop": list(g.crop) if seen else None,
        "mirrored": g.orientation.mirrored if seen else None,
        "interlaced": v.interlaced if seen else None,
        "field_order": v.field_order or None,
        "hdr": c.hdr or None,
        "color_matrix": MATRICES[c.matrix] if seen and c.model == "yuv" else None,
        "color_primaries": PRIMARIES[c.primaries] if seen else None,
        "color_transfer": TRANSFERS[c.transfer] if seen else None,
        "full_range": c.full_range if seen else None,
        "salt": v.salt,
    }


def clip_row(v: Video, c: Clip, scores: list[str], embeddings: dict[str, int]) -> dict[str, Any]:
    """A row of `clip_schema(scores, embeddings)`; what was not measured is null."""
    assert c.media is not None
    row: dict[str, Any] = {
        "clip_id": c.clip_id,
        "source": v.source.uri,
        "name": v.source.name,
        "source_sha256": v.sha256,
        "start_s": c.start_s,
        "end_s": c.end_s,
        "start_frame": c.start_frame,
        "end_frame": c.end_frame,
        "duration_s": c.duration_s,
        "width": c.media.width,
        "height": c.media.height,
        "fps": v.fps,
        "captions": [
            {
                "model": k.model,
                "text": k.text,
                "outcome": k.outcome,
                "prompt": k.prompt,
                "scores": list(k.scores.items()),
                "reason": k.reason,
            }
            for k in c.captions
        ],
        "text": c.text,
        "meta": list((v.source.meta | c.meta).items()),
        "media_tar": c.media.tar,
        "media_offset": c.media.offset,
        "media_size": c.media.size,
        "media_sha256": c.media.sha256,
        "sample_frames": c.sample_frames,
    }
    row |= {f"score_{name}": c.scores.get(name) for name in scores}
    row |= {f"emb_{name}": c.embeddings.get(name) for name in embeddings}
    return row
