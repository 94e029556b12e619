"""Whether the clips that a run's shards are copied from are still there."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow.compute as pc

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.layers import clip_files


class MediaGone(StoreError):
    """Staging tars of kept clips were deleted."""


def check(store: Store) -> None:
    """Raise MediaGone where a tar is missing that holds a clip kept by the last decision (before any: a clip)."""
    kept = None
    if store.exists("decisions.parquet"):
        decisions = store.read_table("decisions.parquet", ["clip_id", "keep"])
        kept = decisions.filter(decisions["keep"])["clip_id"].combine_chunks()
    wanted: set[str] = set()
    for name in clip_files(store):
        table = store.read_table(name, ["clip_id", "media_tar"])
        if kept is not None:
            table = table.filter(pc.is_in(table["clip_id"], value_set=kept))
        wanted |= set(table["media_tar"].to_pylist())
    check_tars(store, wanted)


def check_tars(store: Store, wanted: Iterable[str]) -> None:
    """Raise MediaGone where one of these tars is missing."""
    wanted = set(wanted)
    missing = sorted(wanted - set(store.list("media", ".tar"))) if wanted else []
    if not missing:
        return
    gone = "media/ of it is gone"
    if len(missing) < len(wanted):
        gone = f"{len(missing):,} of {len(wanted):,} tars of its media/ are gone, e.g. {missing[0]}"
    raise MediaGone(
        f"{store.uri}: {gone}: its shards are final, and nothing can be decided, captioned or added again; put back "
        "what was deleted, or give a new folder as --out"
    )
