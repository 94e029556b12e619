"""Captions for clips that are finished: some captioners, some clips, nothing else.

A layer over a committed run. `work` finds the clips that lack a caption, `stages` gives the stages that write
it, and any runner takes them: `ReopenStage` reads the clips' own mp4 from the staging tars and takes the frames
that models were shown before (`clips.sample_frames`; where an older clipmill did not note them, those that the
recipe takes of such a clip), captioners and the choice follow as in a first run, and
`RewriteStage` puts the captions into `clips/`, a unit in one step. No source is read, nothing else is measured.
Scores, text and metadata that captioners read come from the rows.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decide.rules import clip_files
from pipeline.faults import SourceFault
from pipeline.graph import build
from pipeline.io.answer import Refused, checked
from pipeline.io.isolate import Child, ChildError
from pipeline.io.store import Ranges, Store
from pipeline.recipe import Decode, Recipe
from pipeline.record import Caption, Clip, Frames, Media, Sample, Source, Video
from pipeline.run.commit import tables
from pipeline.run.log import log
from pipeline.split.events import evenly
from pipeline.split.resample import Resampled
from pipeline.stages import Produces, Resources, Stage, each, fail
from pipeline.tables import CAPTION, CLIP_SCHEMA

Wanted = Mapping[str, set[str]]  # captioner → ids of the clips that want its caption


def failed(store: Store) -> dict[str, set[str]]:
    """The clips on which a captioner failed, by captioner."""
    found: dict[str, set[str]] = defaultdict(set)
    columns = ["clip_id", "captions.list.element.model", "captions.list.element.outcome"]
    for _, table in tables(store, clip_files(store), columns):
        for row in table.to_pylist():
            for caption in row["captions"] or []:
                if caption["outcome"] == "error":
                    found[caption["model"]].add(row["clip_id"])
    return dict(found)


def work(store: Store, wanted: Wanted, listed: Mapping[str, Source]) -> list[list[Video]]:
    """The wanted clips by unit of work, their ids alone: `ReopenStage` reads the rest. A video holds no other clip.

    Args:
        listed: sources by uri; those found there have the given clips of the list.
    """
    ids = set().union(*wanted.values())
    units = []
    for name, table in tables(store, clip_files(store), ["clip_id", "source"]):
        clips: dict[str, list[Clip]] = defaultdict(list)
        for row in table.to_pylist():
            if row["clip_id"] in ids:
                clips[row["source"]].append(Clip(row["clip_id"], 0, 0, 0.0, 0.0))
        unit = name.removeprefix("clips/").removesuffix(".parquet")
        videos = [Video(listed.get(uri, Source(uri, uri)), unit, clips=some) for uri, some in clips.items()]
        if videos:
            units.append(videos)
    return units


def stages(store: Store, recipe: Recipe, wanted: Wanted) -> list[Stage]:
    """Reopen, the captioners that have something to do, the choice, rewrite."""
    again: list[Stage] = [ReopenStage(store, recipe.decode, recipe.events.clip_samples)]
    for stage in build(recipe, store):
        model = getattr(stage, "model", None) if stage.name.startswith("caption:") else None
        if model is not None and wanted.get(model):
            again.append(Only(stage, wanted[model]))
        elif stage.name == "choose":
            again.append(stage)
    return [*again, RewriteStage(store, [s.name for s in again if isinstance(s, Only)])]


class ReopenStage:
    """Makes records of the rows again, with the `frames` of the clips' mp4: all times, the pictures shown before."""

    name = "reopen"

    def __init__(self, out: Store | str, options: Decode, most: int):
        """Args: most: frames of a clip, where its row does not say which (`events.clip_samples`)."""
        self.out, self.options, self.most = out, options, most
        self.resources, self.produces = Resources(cpus=1.0), Produces()

    def setup(self) -> None:
        self.store = Store.of(self.out)
        self.child = Child(self.options.max_memory_gb)
        self.ranges: Ranges | None = None

    def __call__(self, videos: list[Video]) -> list[Video]:
        self.ranges = self.ranges or Ranges(self.store)
        unit = videos[0].unit
        rows = {r["source"]: r for r in self.store.read_table(f"videos/{unit}.parquet").to_pylist()}
        table = self.store.read_table(f"clips/{unit}.parquet")
        wanted = pa.array([c.clip_id for v in videos for c in v.clips])
        clips = table.filter(pc.is_in(table["clip_id"], value_set=wanted)).to_pylist()
        for video in each(videos):
            uri = video.source.uri
            its = [r for r in clips if r["source"] == uri]
            mine = [clip_of(r) for r in its]
            noted = [r.get("sample_frames") is not None for r in its]
            vars(video).update(vars(video_of(rows[uri], mine, video.source)))
            try:
                self._frames(video, [self._clip(*c) for c in zip(mine, noted, strict=True)])
            except SourceFault as e:
                log.warning("%s: %s; its captions stay as they are", video.source.name, e)
                fail(video, self.name, e)
        return videos

    def _frames(self, video: Video, found: list[Resampled]) -> None:
        """Set `frames` from what each of the video's clips holds; frames outside them have no time."""
        video.time_base = found[0].time_base
        last = max(c.end_frame for c in video.clips)
        pts = np.zeros(last + 1, np.int64)
        samples: dict[int, bytes] = {}
        for clip, seen in zip(video.clips, found, strict=True):
            pts[clip.start_frame : clip.end_frame] = (
                round(Fraction(clip.start_s) / video.time_base) + seen.pts
            )
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

    def _clip(self, clip: Clip, noted: bool) -> Resampled:
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


class Only:
    """A stage that is shown some clips of each video."""

    def __init__(self, stage: Stage, ids: set[str]):
        self.stage, self.ids = stage, ids
        self.name, self.produces = stage.name, stage.produces

    @property
    def resources(self) -> Resources:
        return self.stage.resources

    @resources.setter
    def resources(self, value: Resources) -> None:
        self.stage.resources = value

    def setup(self) -> None:
        self.stage.setup()

    def __call__(self, videos: list[Video]) -> list[Video]:
        all_ = [v.clips for v in videos]
        try:
            for v in videos:
                v.clips = [c for c in v.clips if c.clip_id in self.ids]
            self.stage([v for v in videos if v.clips])
        finally:
            for v, clips in zip(videos, all_, strict=True):
                v.clips = clips
        return videos


class RewriteStage:
    """Puts the videos' captions into the rows of their unit: warnings first, then `clips/`, which ends the work."""

    name = "rewrite"
    whole_unit = True

    def __init__(self, out: Store | str, captioners: list[str]):
        self.out, self.captioners = out, captioners  # names of their stages
        self.resources, self.produces = Resources(cpus=1.0), Produces()

    def setup(self) -> None:
        self.store = Store.of(self.out)

    def __call__(self, videos: list[Video]) -> list[Video]:
        unit = videos[0].unit
        self._warnings(f"videos/{unit}.parquet", {v.source.uri: v for v in videos})
        name = f"clips/{unit}.parquet"
        table = self.store.read_table(name)
        new = {
            (v.source.uri, c.clip_id): [caption_row(k) for k in c.captions] for v in videos for c in v.clips
        }
        keys = zip(table["source"].to_pylist(), table["clip_id"].to_pylist(), strict=True)
        captions = [new.get(key, old) for key, old in zip(keys, table["captions"].to_pylist(), strict=True)]
        at = table.schema.get_field_index("captions")
        field = CLIP_SCHEMA.field("captions")
        self.store.write_table(name, table.set_column(at, field, pa.array(captions, field.type)))
        for v in videos:
            v.frames = None
        return videos

    def _warnings(self, name: str, videos: dict[str, Video]) -> None:
        """What a captioner said of clips that it was not shown now still holds."""
        table = self.store.read_table(name)
        at = table.schema.get_field_index("warnings")
        before = table["warnings"].to_pylist()
        after = []
        for uri, old in zip(table["source"].to_pylist(), before, strict=True):
            v = videos.get(uri)
            ids = [c.clip_id for c in v.clips] if v else []
            again = tuple(f"{stage}: clip {i}: " for stage in self.captioners for i in ids)
            after.append([w for w in old or [] if not w.startswith(again)] if v else old)
            if v:
                after[-1] += [w for w in v.warnings if w not in after[-1]]
        if after != before:
            column = pa.array(after, table.schema.field(at).type)
            self.store.write_table(name, table.set_column(at, table.schema.field(at), column))


# Rows back to records ------------------------------------------------------------------------------


def clip_of(row: Mapping[str, Any]) -> Clip:
    """A row of clips/ as a record again."""
    media = Media(
        row["media_tar"],
        row["media_offset"],
        row["media_size"],
        row["media_sha256"],
        row["width"],
        row["height"],
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
        captions=[Caption(**{**c, "scores": dict(c["scores"] or [])}) for c in row["captions"] or []],
        embeddings={
            k.removeprefix("emb_"): np.array(v, np.float32)
            for k, v in row.items()
            if k.startswith("emb_") and v is not None
        },
        text=list(row["text"] or []),
        media=media,
        meta=dict(row["meta"] or []),
        sample_frames=list(row.get("sample_frames") or []),
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
        clips=clips,
        warnings=list(row["warnings"] or []),
        counts=dict(row["counts"] or []),
    )
    for clip in clips:
        clip.meta = {k: v for k, v in clip.meta.items() if meta.get(k) != v}  # its own, over the source's
    return video


def caption_row(caption: Caption) -> dict[str, Any]:
    """A caption as it stands in clips/."""
    return {f.name: getattr(caption, f.name) for f in CAPTION} | {"scores": list(caption.scores.items())}
