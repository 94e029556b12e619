"""Captions for clips that are finished: some captioners, some clips, nothing else.

`work` finds the clips that lack a caption, `stages` gives the stages that write it, and any runner takes them:
`ReopenStage` gives the records again, captioners and the choice follow as in a first run, and `RewriteStage` puts the
captions into `clips/`, a unit in one step. No source is read, nothing else is measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import pyarrow as pa

from pipeline.graph import build
from pipeline.io.store import Store
from pipeline.layers import clip_files
from pipeline.recipe import Recipe
from pipeline.record import Clip, Source, Video
from pipeline.run.commit import tables
from pipeline.run.reopen import ReopenStage
from pipeline.stages import Produces, Resources, Stage
from pipeline.tables import CLIP_SCHEMA, caption_row

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
