"""A training recipe: what is trained, on what, how; YAML checked before any work, like a curation recipe.

Bundled ones lie in recipes/training. A checkpoint keeps its recipe; a resumed run must have the same, apart
from `run` (steps, how often to save and look). recipe_core.py has what all share, <trains>/recipe.py the rest.
"""

from __future__ import annotations

from typing import Any

from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.recipe_core import TrainRecipe
from jobs.training.selector.recipe import SelectorRecipe
from jobs.training.vae.recipe import VAERecipe
from jobs.training.vivit.recipe import ViViTRecipe
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vq.recipe import VQRecipe
from jobs.training.world.recipe import WorldRecipe
from pipeline.recipe import RECIPES, Recipe, load
from pipeline.recipe_file import bases, bundled, load_as
from pipeline.recipe_schema import RecipeError, nearest

TRAINING = RECIPES / "training"

KINDS: dict[str, type[TrainRecipe]] = {
    "diffusion": DiffusionRecipe,
    "vae": VAERecipe,
    "vq": VQRecipe,
    "vlm": VLMRecipe,
    "vivit": ViViTRecipe,
    "world": WorldRecipe,
    "selector": SelectorRecipe,
}


def load_training(name_or_file: str, overrides: list[str] | None = None) -> TrainRecipe:
    """Raises RecipeError: one sentence with the key, what is wrong, and the fix."""
    return load_as(_kind(name_or_file), name_or_file, overrides, TRAINING)


def _kind(name_or_file: str) -> type[TrainRecipe]:
    """By `trains` of the recipe's file, or of what it is based on."""
    trains = next((data["trains"] for data in bases(name_or_file, TRAINING) if "trains" in data), "diffusion")
    if trains not in KINDS:
        raise RecipeError(
            f"recipe {name_or_file}: trains: {trains!r} is none of {', '.join(KINDS)}{nearest(str(trains), KINDS)}"
        )
    return KINDS[trains]


def load_either(
    name_or_file: str, overrides: list[str] | None = None, training: bool = False
) -> Recipe | TrainRecipe:
    """A recipe for curation or, where only that can be meant or is asked for, for training. Raises RecipeError."""
    if training or is_training(name_or_file):
        return load_training(name_or_file, overrides)
    return load(name_or_file, overrides)


def is_training(name_or_file: str) -> bool:
    """Whether a recipe is one for training: by where its name is found, or by the sections of its file."""
    if not name_or_file.endswith((".yaml", ".yml")) and "/" not in name_or_file:
        names, others = bundled(RECIPES), bundled(TRAINING)
        if name_or_file not in [*names, *others]:
            raise RecipeError(
                f"recipe {name_or_file!r} not found{nearest(name_or_file, [*names, *others])}; name a .yaml file or "
                f"one of {', '.join(names)}, or for training {', '.join(others)}"
            )
        return name_or_file not in names
    training = {key for kind in KINDS.values() for key in kind.model_fields}
    for data in bases(name_or_file, RECIPES):
        if only := data.keys() & (training ^ Recipe.model_fields.keys()):
            return bool(only & training)
        base = str(data.get("base", ""))
        if base in bundled(TRAINING) and base not in bundled(RECIPES):
            return True
        if base in bundled(RECIPES):
            return False
    return False


def recipe_of(data: dict[str, Any]) -> TrainRecipe:
    """A recipe from what `model_dump` gave."""
    return KINDS[data["trains"]].model_validate(data)
