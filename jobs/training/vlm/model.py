"""A vision–language model and its tokenizer, made from a recipe, or from what training left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from jobs.training import lora
from jobs.training.exported import Trained, load_model, longest_average
from jobs.training.parallelize import on_meta
from jobs.training.vlm.kinds import kind
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vlm.visuals import Visuals
from models.language.seeing import Seeing, blocks_of


def visuals_of(model: Seeing, recipe: VLMRecipe) -> Visuals:
    """How it looks at clips. Raises ValueError."""
    frames, written = recipe.frames, recipe.written
    length = 0 if written is None else written.length
    return kind(recipe.model.kind).visuals(model, frames.sampling(), frames.times, frames.static, length)


def set_trained(model: Seeing, recipe: VLMRecipe) -> None:
    """Freeze and adapt the parts as the recipe has it. Raises ValueError."""
    how: dict[str, list[nn.Module]] = {}
    for part, modules in model.parts().items():
        how.setdefault(getattr(recipe.train, part), []).extend(modules)
    for module in how.get("frozen", []):
        module.requires_grad_(False)
    for module in how.get("lora", []):
        assert recipe.lora is not None
        lora.adapt(module, blocks_of(module), recipe.lora, recipe.seed)


@torch.no_grad()
def begin_with(model: Seeing, folder: str, kept: Mapping[str, str]) -> None:
    """Give a new model the averaged weights of a trained one, adapters folded in.

    Args:
        kept: files of the new one's tokenizer.

    Raises ValueError where it is another model.
    """
    try:
        trained = trained_at(folder)
    except ValueError as e:
        raise ValueError(f"start: {e}") from e
    if trained.state["tokenizer"] != dict(kept):
        raise ValueError(
            f"start {folder} was trained with another tokenizer: use the same, or leave start out"
        )
    if on_meta(model):  # weights come from the first rank
        return
    given, own = model_of(trained)[0].state_dict(), model.state_dict()
    for name in sorted(given.keys() ^ own.keys()):
        raise ValueError(f"start {folder}: one has {name}, the other not: use the same options of model")
    for name, x in given.items():
        if own[name].shape != x.shape:
            raise ValueError(f"start {folder} has another {name}: use the same options of model")
        own[name].copy_(x)


def trained_at(folder: str) -> Trained:
    """With its longest average, where one was kept. Raises ValueError."""
    try:
        trained = load_model(Path(folder), longest_average(Path(folder)) or None)
    except OSError as e:
        raise ValueError(f"{folder}: {e}") from e
    if trained.recipe.get("trains") != "vlm":
        raise ValueError(
            f"{folder} is a {trained.recipe.get('trains')} model: name one of clipmill train vlm"
        )
    return trained


def model_of(trained: Trained) -> tuple[Seeing, VLMRecipe]:
    """(model with its adapters folded in, recipe). Raises ValueError, CheckpointError, MissingModel."""
    recipe = VLMRecipe.model_validate(trained.recipe)
    model = kind(recipe.model.kind).network(recipe, trained.state["tokenizer"], torch.device("cpu"))
    if recipe.lora:
        set_trained(model, recipe)
    trained.load_into(model, "vlm")
    if recipe.lora:
        for part in model.parts().values():
            for module in part:
                lora.merge(module)
    model.requires_grad_(False)
    return model.eval(), recipe
