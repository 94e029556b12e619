"""Shots to clips: Panda-70M's second stage (Chen et al. 2024, arXiv:2402.19479, section 3.1).

Long shots are cut into pieces; a piece is seen at two frames, 5 % from each end; neighbouring pieces
whose facing ends look alike are stitched into one event; events become clips. Distances are Euclidean
between unit-length image features, d² = 2 (1 − cosine), so thresholds belong to an embedder.

What differs from the release, on purpose:
- Lengths are seconds by PTS, not frames at the container's rate.
- The source was decoded once: a piece is seen at the kept samples nearest to the two frames (normally at
  most half a sampling interval away), and a piece too short to hold a sample is dropped.
- Features of a truncated, split or trimmed event are taken anew at its final ends.
- Still and redundant events are not dropped here: `end_distance` and the clip's embedding are stored,
  and rules decide later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING

import numpy as np

from pipeline.recipe import Events, RecipeError
from pipeline.record import Clip, Frames, Sample, Video
from pipeline.samples import picture, samples
from pipeline.split.damage import measure
from pipeline.split.shots import frames_within
from pipeline.stages import Produces, Resources, each
from pipeline.watch import telling

if TYPE_CHECKING:  # it imports torch
    from models.curation.embed import Embedder

Span = tuple[int, int]  # frames [start, end)

DAMAGE = ("damaged", "repeated")  # scores of pipeline.split.damage
COUNTS = (
    "pieces",
    "pieces_unseen",  # hold no sample
    "pieces_missed_cut",  # ends too far apart
    "events",
    "events_too_short",
    "events_truncated",
    "events_split",
)


@dataclass(frozen=True)
class Piece:
    """A stretch of one shot and the unit features [size] near its two ends."""

    start: int
    end: int
    first: np.ndarray
    last: np.ndarray


class EventStage:
    """Sets `video.clips` with the score `end_distance` and one embedding, and thins out the samples.

    The embedding is the normalised mean of the features near the clip's two ends, `end_distance` the
    distance between those. A clip too short to hold a sample has neither. A video may have no clips.
    Every clip has the scores `damaged` and `repeated` of pipeline.split.damage.
    Where the source's list gives intervals, each is one clip exactly; nothing is stitched or dropped. With `whole`
    every shot is one clip exactly.
    Without an embedder (kind none) every shot is one event, and clips have neither score nor embedding.
    What was dropped is in the video's counts, see COUNTS.
    """

    name = "events"
    whole_source = True

    def __init__(self, options: Events, whole: bool = False):
        self.options, self.whole = options, whole
        self.resources = Resources(cpus=1.0)
        if options.embedder.kind == "none":
            self.produces = Produces(scores=[*DAMAGE])
            return
        self.embedding, size = "efficientnet_lite0", 1280
        if options.embedder.kind == "open_clip":
            from models.curation.embed import open_clip_name
            from models.hub import MissingModel, open_clip_size

            self.embedding = open_clip_name(options.embedder.model)
            try:
                size = open_clip_size(options.embedder.model, options.embedder.pretrained)
            except MissingModel as e:
                raise RecipeError(f"events.embedder: {e}") from e
        self.produces = Produces(scores=["end_distance", *DAMAGE], embeddings={self.embedding: size})

    def setup(self) -> None:
        self.embedder: Embedder | None = None
        if self.options.embedder.kind == "none":
            return
        from models.curation.embed import EfficientNetLite0, OpenClip

        o, device, batch = self.options.embedder, self.resources.device(), self.resources.batch
        self.embedder = (
            OpenClip(o.model, o.pretrained, device, batch)
            if o.kind == "open_clip"
            else EfficientNetLite0(device, batch)
        )

    def __call__(self, videos: list[Video]) -> list[Video]:
        todo = [v for v in videos if "events" not in v.counts]
        features = [_Features(v) if self.embedder else None for v in todo]
        found = [self.pieces(v) for v in todo]
        self.look(features, found)
        work = []
        for video, f, spans in zip(each(todo), features, found, strict=True):
            counts: dict[str, int] = {}
            if self.whole or video.source.intervals is not None:
                counts["events"] = len(spans)
            else:
                counts = dict.fromkeys(COUNTS, 0)
                spans = self.events(video, spans, f, counts)
            work.append((video, f, spans, counts))
        self.look(features, [spans for _, _, spans, _ in work])
        for video, (_, f, spans, counts) in zip(each(todo), work, strict=True):
            self.finish(video, f, spans)
            video.counts |= counts
        return videos

    def look(self, features: list[_Features | None], spans: list[list[Span]]) -> None:
        """Have the samples near the ends of these spans embedded: those of the whole unit in full batches."""
        if self.embedder is None:
            return
        wanted: list[list[int]] = []
        for f, of_video in zip(features, spans, strict=True):
            assert f is not None
            ends = [e for a, b in of_video for e in end_samples(f.frames, a, b, self.options.position) or ()]
            wanted.append(sorted(set(ends) - f.known.keys()))

        def shown() -> Iterator[np.ndarray]:
            # not announced one by one: pictures of several videos are embedded at once
            for f, chosen in zip(features, wanted, strict=True):
                assert f is not None
                yield from (picture(f.frames.samples[i]) for i in telling(chosen))

        rows = iter(self.embedder.embed(shown()))
        for f, chosen in zip(features, wanted, strict=True):
            assert f is not None
            f.known |= {i: next(rows) for i in chosen}

    def finish(self, video: Video, features: _Features | None, spans: list[Span]) -> None:
        """Make clips of the spans."""
        frames, position = video.frames, self.options.position
        assert frames is not None
        clips = [video.clip(a, b) for a, b in spans]
        for clip in clips:
            clip.scores |= measure(clip, frames)
        if video.source.interval_meta:
            give_meta(video, clips)
        for clip in clips:
            ends = features and features.at_ends(clip.start_frame, clip.end_frame, position)
            if ends:
                clip.scores["end_distance"] = round(distance(*ends), 6)
                mean = ends[0] + ends[1]
                clip.embeddings[self.embedding] = mean / np.linalg.norm(mean)
        frames.samples = thinned(frames.samples, clips, self.options.clip_samples)
        for clip in clips:
            clip.sample_frames = [s.frame for s in samples(video, clip)]
            clip.sample_pts = frames.pts[clip.sample_frames].tolist()
        frames.thumbs = None
        video.clips = clips

    def pieces(self, video: Video) -> list[Span]:
        """The pieces of a video's shots; of given ones the shots themselves."""
        o, shots = self.options, [(s.start_frame, s.end_frame) for s in video.shots]
        if self.whole or video.source.intervals is not None:
            return shots
        return [piece for shot in shots for piece in pieces(video, shot, o.piece_s, o.piece_slack_s)]

    def events(
        self, video: Video, found: list[Span], features: _Features | None, counts: dict[str, int]
    ) -> list[Span]:
        """The clips of a video without given intervals, in order; counts what was dropped on the way.

        Args:
            found: its pieces.
        """
        o, whole = self.options, []
        if features is None:  # nothing to tell events apart by: every shot is one
            shots = [(s.start_frame, s.end_frame) for s in video.shots]
            counts["pieces"], counts["events"] = len(found), len(shots)
            return [span for shot in shots for span in fit(video, shot, o, counts)]
        for start, end in found:
            ends = features.at_ends(start, end, o.position)
            if ends is None:
                counts["pieces_unseen"] += 1
            elif distance(*ends) > o.max_inner:
                counts["pieces_missed_cut"] += 1
            else:
                whole.append(Piece(start, end, *ends))
        events = stitch(whole, o.max_outer, set(video.breaks()))
        counts["pieces"], counts["events"] = len(found), len(events)
        return [span for event in events for span in fit(video, event, o, counts)]


class _Features:
    """Unit features [size] of a video's samples, by their index; those that were looked at."""

    def __init__(self, video: Video):
        assert video.frames is not None
        self.video, self.frames = video, video.frames
        self.known: dict[int, np.ndarray] = {}

    def at_ends(self, start: int, end: int, position: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Those near the two ends of [start, end); None where it holds no sample."""
        ends = end_samples(self.frames, start, end, position)
        return None if ends is None else (self.known[ends[0]], self.known[ends[1]])


def give_meta(video: Video, clips: list[Clip]) -> None:
    """Each given clip gets the metadata of its interval; of equal intervals the first one's."""
    given: dict[Span, dict[str, str]] = {}
    for (start, end), meta in zip(video.source.intervals or (), video.source.interval_meta, strict=True):
        given.setdefault(frames_within(video, start, end), meta)
    for clip in clips:
        clip.meta = given[clip.start_frame, clip.end_frame]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Euclidean distance of two features."""
    return float(np.linalg.norm(a - b))


def pieces(video: Video, shot: Span, piece_s: float, slack_s: float) -> list[Span]:
    """While more than piece_s + slack_s of a shot remains, cut off piece_s (or the frames that fit in it)."""
    start, end = shot
    out = []
    while end - start > 1 and _length(video, start, end) > _exact(piece_s) + _exact(slack_s):
        cut = _within(video, start, _exact(piece_s))
        out.append((start, cut))
        start = cut
    return [*out, (start, end)]


def end_samples(frames: Frames, start: int, end: int, position: float) -> tuple[int, int] | None:
    """Indices of the samples in [start, end) nearest to the frames at `position` from its two ends.

    The frames are int((1 − p) s + p (e − 1)) and int(p s + (1 − p)(e − 1)), as in Panda-70M, where p is
    .05; near is meant in time, and of two equally near samples the earlier is taken.
    """
    inside = [i for i, s in enumerate(frames.samples) if start <= s.frame < end]
    if not inside:
        return None
    last = end - 1
    shown = frames.pts[[frames.samples[i].frame for i in inside]]
    wanted = (int((1 - position) * start + position * last), int(position * start + (1 - position) * last))
    first, second = (inside[int(np.abs(shown - frames.pts[w]).argmin())] for w in wanted)
    return first, second


def stitch(pieces: list[Piece], max_outer: float, breaks: Collection[int] = ()) -> list[Span]:
    """Join neighbours; an event starts at the first piece, after a gap, at a restart of the clock (first frames
    of which are given), or where facing ends differ."""
    events: list[Span] = []
    for i, piece in enumerate(pieces):
        before = pieces[i - 1] if i else None
        apart = before is None or before.end != piece.start or piece.start in breaks
        if before is None or apart or distance(before.last, piece.first) > max_outer:
            events.append((piece.start, piece.end))
        else:
            events[-1] = (events[-1][0], piece.end)
    return events


def fit(video: Video, event: Span, o: Events, counts: dict[str, int]) -> list[Span]:
    """The clips of one event, in Panda-70M's order: drop if short, truncate or split if long, trim.

    So min_s is asked before trimming. A split is into the fewest equal parts; one frame that is shown
    longer than max_s stays whole.
    """
    start, end = event
    if _length(video, start, end) < _exact(o.min_s):
        counts["events_too_short"] += 1
        return []
    longest = _exact(o.max_s)
    parts = []
    while end - start > 1 and (rest := _length(video, start, end)) > longest:
        share = longest if o.longer == "truncate" else rest / ceil(rest / longest)
        cut = _within(video, start, share)
        parts.append((start, cut))
        start = end if o.longer == "truncate" else cut
    if start < end:
        parts.append((start, end))
    if (start, end) != event:
        counts["events_truncated" if o.longer == "truncate" else "events_split"] += 1
    trimmed = [_trimmed(video, part, o.trim) for part in parts]
    kept = [(a, b) for a, b in trimmed if a < b]
    counts["events_too_short"] += len(trimmed) - len(kept)
    return kept


def thinned(samples: list[Sample], clips: list[Clip], most: int) -> list[Sample]:
    """The samples that later stages may look at: at most `most` of each clip, evenly chosen."""
    kept: set[int] = set()
    for clip in clips:
        inside = [i for i, s in enumerate(samples) if clip.start_frame <= s.frame < clip.end_frame]
        kept.update(inside[i] for i in evenly(len(inside), most))
    return [samples[i] for i in sorted(kept)]


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of 0 … n − 1, evenly chosen, the ends among them."""
    return np.linspace(0, n - 1, min(most, n)).round().astype(int).tolist()


def _trimmed(video: Video, span: Span, fraction: float) -> Span:
    """The frames shown wholly within the middle 1 − 2 · fraction of a span; may be empty."""
    assert video.frames is not None
    start, end = span
    margin = _length(video, start, end) * _exact(fraction) / video.time_base
    first = int(np.searchsorted(video.frames.pts, ceil(video.pts_of(start) + margin)))
    return first, _before(video, video.end_of(end) - margin)


def _length(video: Video, start: int, end: int) -> Fraction:
    """Seconds that [start, end) is shown."""
    return (video.end_of(end) - video.pts_of(start)) * video.time_base


def _within(video: Video, start: int, seconds: Fraction) -> int:
    """The latest end of frames from `start` on that are shown no longer than `seconds`; at least one frame."""
    return max(start + 1, _before(video, video.pts_of(start) + seconds / video.time_base))


def _before(video: Video, tick: Fraction) -> int:
    """One past the last frame that is no longer shown at a tick."""
    assert video.frames is not None
    return int(np.searchsorted(video.frames.ends, floor(tick), side="right"))


def _exact(option: float) -> Fraction:
    """A recipe's number as written: 0.1 is 1/10, not the float next to it."""
    return Fraction(str(option))
