"""A world model trained in stages of growing context, each in OUT/stage-N, beginning with what the one before has
learnt (Large World Model, Liu et al. 2024, sec. 3.1).

A stage is a training like any other, and so is resumed like any other: those that are done are passed over, the one
that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.training.loop import Outcome, train
from jobs.training.recipe_core import TrainRecipe
from jobs.training.world.recipe import WorldRecipe


def stages_of(recipe: TrainRecipe, out: Path) -> Iterator[tuple[TrainRecipe, Path]]:
    """Each stage's recipe and folder; the recipe itself where it has none."""
    if not isinstance(recipe, WorldRecipe) or not recipe.stages:
        yield recipe, out
        return
    before: str | None = None
    for number in range(len(recipe.stages)):
        folder = out / f"stage-{number + 1}"
        yield recipe.of_stage(number, before), folder
        before = str(folder)


def train_all(recipe: TrainRecipe, data: str, out: Path, **options: Any) -> tuple[Outcome, Path]:
    """`jobs.training.loop.train` of every stage; what the last one came to, or the one that was stopped, and its
    folder. Raises what that does."""
    for stage, folder in stages_of(recipe, out):
        outcome = train(stage, data, folder, **options)
        if outcome.signal:
            break
    return outcome, folder
