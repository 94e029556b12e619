"""From where a training goes on, and whether it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.training import checkpoint, exported
from jobs.training.distributed import World
from jobs.training.recipe_core import TrainRecipe


def resume_point(recipe: TrainRecipe, out: Path, world: World) -> Path | None:
    """The last good checkpoint, the same on all ranks; what is half-written is removed.

    Raises CheckpointError where it was made with another recipe.
    """
    step, failed = None, ""
    if world.rank == 0:
        try:
            step = checkpoint.newest(out)
        except exported.CheckpointError as e:
            failed = str(e)
    step, failed = world.gather((step, failed))[0]
    if failed:
        raise exported.CheckpointError(failed)
    folder = None if step is None else checkpoint.checkpoints(out)[step]
    if folder:
        saved = exported.read_meta(folder)["recipe"]
        if found := checkpoint.difference(saved, recipe.model_dump(mode="json")):
            key, there, here = found
            raise exported.CheckpointError(
                f"{out} was trained with {key} {there!r}, this recipe has {here!r}: use the same, or another --out"
            )
        check_horizon(out, saved, recipe)
    if world.rank == 0:
        checkpoint.set_aside(out, step or 0)
        checkpoint.clean(out, step or 0)
    world.gather(None)
    return folder


def check_horizon(out: Path, saved: dict[str, Any], recipe: TrainRecipe) -> None:
    """Raise CheckpointError where a decaying rate would reach 0 elsewhere than it was begun for, unasked."""
    o, then = recipe.optimizer, saved["optimizer"]["decay_until"] or saved["run"]["steps"]
    if o.decay == "constant" or o.decay_until is not None or recipe.run.steps == then:
        return
    raise exported.CheckpointError(
        f"{out}: its rate decays until step {then}, so {recipe.run.steps} steps would not be the same training: use "
        f"--steps {then}, or ask for another decay from here on by --set optimizer.decay_until={recipe.run.steps}"
    )
