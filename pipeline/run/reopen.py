"""The clips of a finished run as records again, with the frames that models were shown before.

`ReopenStage` reads the JPEGs that lie beside each clip in its staging tar. Where a run kept none (`cut.stills`), it
decodes the clip's own mp4 and takes the frames of `clips.sample_frames`; where an older clipmill did not note those
either, the frames that the recipe takes of such a clip. No source is read. Scores, text and metadata that captioners
look at come from the rows, with all layers over them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.faults import SourceFault
from pipeline.io.answer import Refused, checked
from pipeline.io.isolate import Child, ChildError
from pipeline.io.store import Ranges, Store
from pipeline.layers import Layered
from pipeline.recipe import Decode
from pipeline.record import Clip, Frames, Media, Sample, Source, Stills, Video
from pipeline.run.log import log
from pipeline.split.events import evenly
from pipeline.split.resample import Resampled
from pipeline.stages import Produces, Resources, each, fail
from pipeline.tables import caption_of


class ReopenStage:
    """Makes records of the rows again, with `frames`: the pictures shown before and when they are shown.

    Videos of several committed units may come together; each is left the clips that it came with.
    """

    name = "reopen"

    def __init__(self, out: Store | str, options: Decode, most: int, layered: bool = True):
        """
        Args:
            most: frames of a clip, where its row does not say which (`events.clip_samples`).
            layered: clips come with their layers over them; else as `curate` wrote them.
        """
        self.out, self.options, self.most, self.layered = out, options, most, layered
        self.resources, self.produces = Resources(cpus=1.0), Produces()

    def setup(self) -> None:
        self.store = Store.of(self.out)
        self.child = Child(self.options.max_memory_gb)
        self.ranges: Ranges | None = None
        self.clips: Layered | None = None

    def __call__(self, videos: list[Video]) -> list[Video]:
        self.ranges = self.ranges or Ranges(self.store)
        # what other units are given meanwhile is not read
        clips = self.clips = self.clips or Layered(self.store, None if self.layered else ())
        for unit in dict.fromkeys(v.unit for v in videos):
            its = [v for v in videos if v.unit == unit]
            rows = {r["source"]: r for r in self.store.read_table(f"videos/{unit}.parquet").to_pylist()}
            table = clips.read(f"clips/{unit}.parquet")
            wanted = pa.array([c.clip_id for v in its for c in v.clips])
            found = table.filter(pc.is_in(table["clip_id"], value_set=wanted)).to_pylist()
            for video in each(its):
                uri = video.source.uri
                self._reopen(video, rows[uri], [r for r in found if r["source"] == uri])
        return videos

    def _reopen(self, video: Video, row: Mapping[str, Any], clips: list[dict[str, Any]]) -> None:
        """Make it what its rows say."""
        again = video_of(row, [clip_of(r) for r in clips], video.source)
        vars(video).update(vars(again))
        try:
            seen = []
            for clip, its in zip(video.clips, clips, strict=True):
                stills = (
                    self._stills(clip) if row.get("time_base") and its.get("sample_pts") is not None else None
                )
                seen.append(stills or self._decoded(clip, its.get("sample_frames") is not None))
            self._frames(video, seen)
        except SourceFault as e:
            log.warning("%s: %s; its captions stay as they are", video.source.name, e)
            fail(video, self.name, e)

    def _stills(self, clip: Clip) -> Resampled | None:
        """What lies beside a clip's mp4; None where nothing does. Raises StoreError."""
        assert clip.media is not None
        assert self.ranges is not None
        stills = clip.media.stills
        if stills is None:
            return None
        data = self.ranges.read(clip.media.tar, stills.offset, sum(stills.sizes), stills.sha256)
        ends = np.cumsum((0, *stills.sizes)).tolist()
        jpegs = [data[a:b] for a, b in pairwise(ends)]
        return Resampled(
            np.array(clip.sample_pts, np.int64), Fraction(0), jpegs, np.array(clip.sample_frames)
        )

    def _frames(self, video: Video, found: list[Resampled]) -> None:
        """Set `frames` from what each of the video's clips holds; other frames have no time.

        Args:
            found: of each clip; with a time base the PTS of all its frames from 0 on, without one those of the samples.
        """
        video.time_base = next((seen.time_base for seen in found if seen.time_base), video.time_base)
        last = max(c.end_frame for c in video.clips)
        pts = np.zeros(last + 1, np.int64)
        samples: dict[int, bytes] = {}
        for clip, seen in zip(video.clips, found, strict=True):
            start = round(Fraction(clip.start_s) / video.time_base)
            if seen.time_base:
                pts[clip.start_frame : clip.end_frame] = start + seen.pts
            else:
                pts[clip.start_frame], pts[seen.frames] = start, seen.pts
            if not pts[clip.end_frame]:
                pts[clip.end_frame] = round(Fraction(clip.end_s) / video.time_base)
            samples |= dict(zip(clip.sample_frames, seen.jpegs, strict=True))
        video.frames = Frames(
            pts=pts[:last],
            end_pts=int(pts[last]),
            thumbs=None,
            samples=[Sample(n, samples[n]) for n in sorted(samples)],
            grey=None,
            grey_frame=np.zeros(0, np.int64),
        )

    def _decoded(self, clip: Clip, noted: bool) -> Resampled:
        """What a clip's mp4 holds. Raises SourceFault, StoreError.

        Args:
            noted: its row says which frames models were shown; where not, it is given them here.
        """
        assert clip.media is not None
        assert self.ranges is not None
        media, options = clip.media, self.options
        data = self.ranges.read(media.tar, media.offset, media.size, media.sha256)
        wanted = [n - clip.start_frame for n in clip.sample_frames] if noted else None
        with tempfile.NamedTemporaryFile(prefix="clipmill-clip-", suffix=".mp4") as f:
            f.write(data)
            f.flush()
            try:
                answer = self.child.call(
                    "pipeline.split.resample:resample",
                    f.name,
                    wanted,
                    SimpleNamespace(**options.model_dump()),
                    stall_s=options.stall_s,
                )
                seen = checked(Resampled, answer)
            except (ChildError, Refused, MemoryError) as e:
                raise SourceFault(f"clip {clip.clip_id} cannot be decoded again: {e}") from e
        shown = len(seen.jpegs)
        if wanted is None and shown == len(seen.frames):
            some = evenly(shown, self.most)
            seen.jpegs, wanted = [seen.jpegs[i] for i in some], seen.frames[some].tolist()
            clip.sample_frames = [clip.start_frame + n for n in wanted]
            shown = len(some)
        if len(seen.pts) != clip.end_frame - clip.start_frame or wanted is None or shown != len(wanted):
            raise SourceFault(
                f"clip {clip.clip_id} has {len(seen.pts)} frames, which are not those of its row"
            )
        return seen


def clip_of(row: Mapping[str, Any]) -> Clip:
    """A row of clips/ as a record again."""
    media = Media(
        row["media_tar"],
        row["media_offset"],
        row["media_size"],
        row["media_sha256"],
        row["width"],
        row["height"],
        Stills(row["stills_offset"], tuple(row["stills_sizes"]), row["stills_sha256"])
        if row.get("stills_offset") is not None
        else None,
    )
    return Clip(
        clip_id=row["clip_id"],
        start_frame=row["start_frame"],
        end_frame=row["end_frame"],
        start_s=row["start_s"],
        end_s=row["end_s"],
        scores={
            k.removeprefix("score_"): v for k, v in row.items() if k.startswith("score_") and v is not None
        },
        captions=[caption_of(c) for c in row["captions"] or []],
        embeddings={
            k.removeprefix("emb_"): np.array(v, np.float32)
            for k, v in row.items()
            if k.startswith("emb_") and v is not None
        },
        text=list(row["text"] or []),
        media=media,
        meta=dict(row["meta"] or []),
        sample_frames=list(row.get("sample_frames") or []),
        sample_pts=list(row.get("sample_pts") or []),
    )


def video_of(row: Mapping[str, Any], clips: list[Clip], source: Source) -> Video:
    """A row of videos/ and clips of it as a record again; without shots and frames.

    Args:
        source: as listed; what the row says of it stands.
    """
    meta = dict(row["meta"] or [])
    video = Video(
        source=replace(source, uri=row["source"], name=row["name"], meta=meta),
        unit=row["unit"],
        sha256=row["sha256"],
        codec=row["codec"] or "",
        width=row["width"],
        height=row["height"],
        fps=row["fps"],
        duration_s=row["duration_s"],
        rotation=row["rotation"],
        sar=Fraction(row["sample_aspect_ratio"]).limit_denominator(10_000),
        time_base=Fraction(row.get("time_base") or "1/90000"),
        clips=clips,
        warnings=list(row["warnings"] or []),
        counts=dict(row["counts"] or []),
    )
    for clip in clips:
        clip.meta = {k: v for k, v in clip.meta.items() if meta.get(k) != v}  # its own, over the source's
    return video
