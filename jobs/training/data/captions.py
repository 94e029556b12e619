"""Captions of the clips that are trained on, without reading the clips."""

from __future__ import annotations

from jobs.training.data.held_out import SOURCES, trained_on
from jobs.training.data.loader import sources_of
from jobs.training.recipe_core import TrainRecipe
from pipeline.io.store import below
from pipeline.shards.index import read_index

MOST = 100_000  # of a run


def captions_of(recipe: TrainRecipe, data: str, held: float, most: int = MOST) -> list[str]:
    """Of all runs that are trained on, but for a share of the sources of each; at most so many of each run.

    Raises StoreError, and ValueError where an index has none.
    """
    found: list[str] = []
    folders = [below(folder, "shards") for _, folder in sources_of(recipe, data)]
    trained = trained_on(folders, held) if held else [None] * len(folders)
    for shards, where in zip(folders, trained, strict=True):
        index = read_index(shards, ["caption", *SOURCES])
        if "caption" not in index.column_names:
            raise ValueError(f"{shards} has no index with captions: shard the run with clipmill shard")
        kept = index if where is None else index.filter(where)
        step = max(1, -(-len(kept) // most))
        found += [caption or "" for caption in kept["caption"].to_pylist()[::step]]
    return found
