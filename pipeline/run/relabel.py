"""Captions of a finished run done again where they lie: `Only` shows a stage the clips that want it, and
`RewriteStage` puts what it says into `clips/`, a unit in one step. See `pipeline.run.layering` for the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pyarrow as pa

from pipeline.io.store import Store
from pipeline.record import Video
from pipeline.stages import Produces, Resources, Stage
from pipeline.tables import CLIP_SCHEMA, caption_row


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
    """Puts the videos' captions into the rows of their units: warnings first, then `clips/`, which ends the work.

    Args:
        again: of each stage that was run again ('caption:…', 'judge:…') the clips that it was shown.
    """

    name = "rewrite"
    whole_unit = True
    sees_samples = False

    def __init__(self, out: Store | str, again: Mapping[str, Collection[str]]):
        self.out, self.again = out, again
        self.resources, self.produces = Resources(cpus=1.0), Produces()

    def setup(self) -> None:
        self.store = Store.of(self.out)

    def __call__(self, videos: list[Video]) -> list[Video]:
        for unit in dict.fromkeys(v.unit for v in videos):
            its = [v for v in videos if v.unit == unit and v.error is None]
            if its:
                self._warnings(f"videos/{unit}.parquet", {v.source.uri: v for v in its})
                self._captions(f"clips/{unit}.parquet", its)
        for v in videos:
            v.frames = None
        return videos

    def _captions(self, name: str, videos: list[Video]) -> None:
        table = self.store.read_table(name)
        new = {
            (v.source.uri, c.clip_id): [caption_row(k) for k in c.captions] for v in videos for c in v.clips
        }
        keys = zip(table["source"].to_pylist(), table["clip_id"].to_pylist(), strict=True)
        captions = [new.get(key, old) for key, old in zip(keys, table["captions"].to_pylist(), strict=True)]
        at = table.schema.get_field_index("captions")
        field = CLIP_SCHEMA.field("captions")
        self.store.write_table(name, table.set_column(at, field, pa.array(captions, field.type)))

    def _warnings(self, name: str, videos: dict[str, Video]) -> None:
        """What a captioner said of clips that it was not shown now still holds."""
        table = self.store.read_table(name)
        at = table.schema.get_field_index("warnings")
        before = table["warnings"].to_pylist()
        after = []
        for uri, old in zip(table["source"].to_pylist(), before, strict=True):
            v = videos.get(uri)
            ids = {c.clip_id for c in v.clips} if v else set()
            again = tuple(
                f"{stage}: clip {i}: " for stage, shown in self.again.items() for i in ids & {*shown}
            )
            after.append([w for w in old or [] if not w.startswith(again)])
            if v:
                after[-1] += [w for w in v.warnings if w not in after[-1]]
        if after != before:
            column = pa.array(after, table.schema.field(at).type)
            self.store.write_table(name, table.set_column(at, table.schema.field(at), column))
