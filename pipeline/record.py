"""The record that travels through the mill; pipeline.tables says what parquet it ends up in.

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

from pipeline.geometry import SAME_ASPECT, Geometry


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
    raw: str = ""  # what the captioner said, word for word, where that is not the text
    flags: list[str] = field(default_factory=list)  # what is odd about it (pipeline.caption.hygiene)
    support: dict[str, list[float]] = field(
        default_factory=dict
    )  # by score: one number a sentence of the text
    cost: dict[str, float] = field(default_factory=dict)  # 'prompt_tokens', 'completion_tokens', 'usd'
    made_from: list[str] = field(default_factory=list)  # models of the captions that it puts together


@dataclass(frozen=True)
class Stills:
    """Where the frames that models were shown of a clip lie: JPEGs one after another in the tar of its mp4."""

    offset: int
    sizes: tuple[int, ...]  # bytes of each, in the order of `Clip.sample_frames`
    sha256: str  # of all of them


@dataclass(frozen=True)
class Media:
    """Where a clip's mp4 lies: a byte range of a staging tar."""

    tar: str  # relative to the output
    offset: int
    size: int
    sha256: str
    width: int  # of the encoded clip, upright, in stored pixels
    height: int
    stills: Stills | None = None


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
    sample_pts: list[int] = field(default_factory=list)  # their PTS, ticks of the source's time base

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
