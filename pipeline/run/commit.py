"""Committing a unit of work, and knowing which sources are done.

A unit's clips go to `clips/<unit>.parquet`, then its sources to `videos/<unit>.parquet`; the latter
commits the unit. A unit without one never happened: its staging tar and clips are overwritten or
swept by the next run.
"""

from __future__ import annotations

import pyarrow as pa

from pipeline.io.store import Store
from pipeline.record import VIDEO_SCHEMA, Video, clip_row, clip_schema, video_row
from pipeline.stages import Produces, Resources


class CommitStage:
    """The last stage: measured rows to parquet, the videos' file last."""

    name = "commit"
    whole_unit = True
    resources = Resources(cpus=1.0)

    def __init__(self, out: str, columns: Produces):
        self.out, self.columns = out, columns
        self.produces = Produces()

    def setup(self) -> None:
        self.store = Store(self.out)

    def __call__(self, videos: list[Video]) -> list[Video]:
        unit = videos[0].unit
        scores, embeddings = self.columns.scores, self.columns.embeddings
        rows = [clip_row(v, c, scores, embeddings) for v in videos for c in v.clips if v.error is None]
        if rows:
            table = pa.Table.from_pylist(rows, schema=clip_schema(scores, embeddings))
            self.store.write_table(f"clips/{unit}.parquet", table)
        elif self.store.exists(f"clips/{unit}.parquet"):  # a killed run of the unit left it
            self.store.delete(f"clips/{unit}.parquet")
        videos_table = pa.Table.from_pylist([video_row(v) for v in videos], schema=VIDEO_SCHEMA)
        self.store.write_table(f"videos/{unit}.parquet", videos_table)
        for v in videos:
            v.frames = None
        return videos


def done_sources(store: Store) -> set[str]:
    """Sources that are committed, read from the parquet alone."""
    return {
        source
        for name in store.list("videos", ".parquet")
        for source in store.read_table(name, ["source"])["source"].to_pylist()
    }


def forget_errors(store: Store) -> int:
    """Take failed sources out of the record so that the next run tries them again; returns how many."""
    forgotten = 0
    for name in store.list("videos", ".parquet"):
        table = store.read_table(name)
        good = table.filter(pa.compute.equal(table["status"], "ok"))
        if good.num_rows < table.num_rows:
            forgotten += table.num_rows - good.num_rows
            if good.num_rows:
                store.write_table(name, good)
            else:
                store.delete(name)
    return forgotten


def sweep_uncommitted(store: Store) -> None:
    """Remove staging tars and clip rows of units that were never committed, and partial files."""
    store.sweep()
    committed = {n.removeprefix("videos/").removesuffix(".parquet") for n in store.list("videos", ".parquet")}
    for folder, suffix in (("media", ".tar"), ("clips", ".parquet")):
        for name in store.list(folder, suffix):
            if name.removeprefix(f"{folder}/").removesuffix(suffix) not in committed:
                store.delete(name)
