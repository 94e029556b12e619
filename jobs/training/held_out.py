"""Which clips are not trained on: those of some sources, so that none has a neighbour among those that are."""

from __future__ import annotations

import hashlib

import pyarrow.compute as pc

from pipeline.shards.index import read_index

SOURCES = (
    "source_sha256",
    "source",
    "clip_id",
)  # the first that an index has; clips, where it knows no source


def split(folder: str, share: float) -> tuple[pc.Expression, pc.Expression]:
    """(trained on, held out) of a folder of shards, as `ShardReader` takes them.

    The sources of least hash, one at least: it depends on what sources there are, not on their order or place.
    Raises StoreError, and ValueError where there is one source alone.
    """
    index = read_index(folder, SOURCES)
    column = next(name for name in SOURCES if name in index.column_names)
    sources = [str(x) for x in index[column].unique().to_pylist()]
    if len(sources) < 2:
        raise ValueError(f"held_out {share:g}: {folder} has clips of one source alone; set it to 0")
    drawn = sorted(sources, key=lambda source: hashlib.sha256(source.encode()).digest())
    held = drawn[: min(len(drawn) - 1, max(1, round(share * len(drawn))))]
    return ~pc.field(column).isin(held), pc.field(column).isin(held)
