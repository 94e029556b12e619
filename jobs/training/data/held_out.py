"""Which clips are not trained on: those of some sources, so that none has a neighbour among those that are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow.compute as pc

from pipeline.shards.index import read_index

SOURCES = (
    "source_sha256",
    "source",
    "clip_id",
)  # the first that an index has; clips, where it knows no source


def held_out(folder: str, share: float) -> pc.Expression:
    """Which clips of a folder of shards are held out, as `ShardReader` takes it. Raises as `trained_on`."""
    return _among(*_drawn(folder, share))


def trained_on(folders: Sequence[str], share: float) -> list[pc.Expression]:
    """Which clips of each folder of shards are not: those of sources that are held out of none.

    Raises StoreError, and ValueError where a folder has one source alone.
    """
    drawn = [_drawn(folder, share) for folder in folders]
    found = []
    for own, _ in drawn:
        held = sorted({source for column, sources in drawn if column == own for source in sources})
        found.append(~_among(own, held))
    return found


def _among(column: str, sources: list[str]) -> pc.Expression:
    return pc.field(column).isin(sources)


def _drawn(folder: str, share: float) -> tuple[str, list[str]]:
    """(column that names sources, those held out): of least hash, one at least: it depends on what sources there are,
    not on their order or place."""
    index = read_index(folder, SOURCES)
    column = next(name for name in SOURCES if name in index.column_names)
    sources = [str(x) for x in index[column].unique().to_pylist()]
    if len(sources) < 2:
        raise ValueError(f"held_out {share:g}: {folder} has clips of one source alone; set it to 0")
    drawn = sorted(sources, key=lambda source: hashlib.sha256(source.encode()).digest())
    return column, drawn[: min(len(drawn) - 1, max(1, round(share * len(drawn))))]
