"""A diffusion model that begins with another one: `start` of its recipe, all of it or with adapters (`lora`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.training.diffusion.build import (
    build_network,
    check_encoders,
    give_weights,
    normalizer_of,
    trained_at,
)
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.diffusion.system import System, knows_frames
from jobs.training.exported import CheckpointError
from jobs.training.parallelize import on_meta
from models.hub import MissingModel


@torch.no_grad()
def begin_with(system: System, folder: str) -> None:
    """Give a new system the averaged weights and the normaliser of a trained one, adapters folded in.

    A layer that takes more channels than the other's did (known frames, a low-resolution video) gets 0 for them, so do
    the ends of branches that the other has not; what else is new stays as it was made. So the network says what the
    other says, whatever else it is told. Of the other only its network is read.

    Raises ValueError where something else differs, or adapters alone could not learn what is new.
    """
    mine = system.recipe
    spatial = mine.model.options().get("spatial")
    try:
        trained, _ = trained_at(folder, located={"model.spatial": spatial} if spatial else {})
        other = DiffusionRecipe.model_validate(trained.recipe)
        check_same(system, other, trained.state, folder)
        system.normalizer = normalizer_of(trained.state).to(system.device)
        if on_meta(system.network):  # weights come from the first rank, which compares the two
            return
        network = build_network(other, system.autoencoder.channels, system.text, fresh=False)
        give_weights(network, trained, other)
    except (CheckpointError, MissingModel) as e:
        raise ValueError(f"start: {e}") from e
    own, given = system.network.state_dict(), network.state_dict()
    if lost := sorted(given.keys() - own.keys()):
        raise ValueError(f"start {folder} has {lost[0]}, which this recipe's network has not: {SAME_OPTIONS}")
    new = sorted(own.keys() - given.keys())
    inputs = inputs_of(mine, system.autoencoder.channels), inputs_of(other, system.autoencoder.channels)
    for name, x in given.items():
        if own[name].shape == x.shape:
            own[name].copy_(x)
        elif widened(own[name], x, *inputs):
            new.append(name)
        else:
            raise ValueError(f"start {folder} has another {name}: {SAME_OPTIONS}")
    for name in filter(ENDS.search, new):
        own[name].zero_()
    if mine.lora and new:
        raise ValueError(
            f"lora trains adapters alone, which cannot learn {new[0]}: start {folder} was trained without it; turn off "
            "the tasks and options that it does not know, or leave lora out"
        )


ENDS = re.compile(r"low_level\.mlp\.2\.|temporal\.\d+\.known\.")  # of branches that the other may not have
SAME_OPTIONS = "use the same options of model, or leave start out"


def check_same(system: System, other: DiffusionRecipe, state: dict[str, Any], folder: str) -> None:
    """Raise ValueError where the other's weights are tied to something else: which numbers go in, which come out."""
    there, here = _ties(other), _ties(system.recipe)
    for name, x in here.items():
        if there[name] != x:
            raise ValueError(
                f"start {folder} was trained with another {name}: use the same, or leave start out"
            )
    check_encoders(system, state, f"start {folder}", "name those in")


def _ties(recipe: DiffusionRecipe) -> dict[str, Any]:
    """But for where files lie: what is in them is compared."""
    return {
        "model.kind": recipe.model.kind,
        "autoencoder": recipe.autoencoder.model_dump(exclude={"path", "precision"}),
        "text": recipe.text.model_dump(exclude={"model", "dropout"}),
        "objective.schedule": recipe.objective.schedule,
        "objective.prediction": recipe.objective.prediction,
    }


def inputs_of(recipe: DiffusionRecipe, channels: int) -> list[tuple[str, int]]:
    """The channels that a network takes, in the order of `with_conditions`."""
    parts = {"z": channels, "known": 0, "low": 0}
    if knows_frames(recipe.tasks):
        parts["known"] = channels + 1
    if recipe.tasks.upsampling:
        parts["low"] = channels
    return [(name, i) for name, n in parts.items() for i in range(n)]


def widened(
    mine: Tensor, given: Tensor, here: Sequence[tuple[str, int]], there: Sequence[tuple[str, int]]
) -> bool:
    """Give a layer's weight [D, …] that of one which takes fewer inputs, and 0 for the others.

    A convolution's second axis ends in the inputs (a network's own come before them), a linear layer's has them once
    for each position of a patch. False, and nothing is done, where the two do not differ by inputs.
    """
    if mine.ndim != given.ndim or mine.ndim < 2 or not set(there) < set(here):
        return False
    times = 1 if given.ndim > 2 else given.shape[1] // len(there)
    before = given.shape[1] - times * len(there)
    if mine.shape != (len(given), before + times * len(here), *given.shape[2:]):
        return False
    mine.zero_()
    mine[:, :before] = given[:, :before]
    known = mine[:, before:].unflatten(1, (times, len(here)))  # D times inputs …
    known[:, :, [here.index(x) for x in there]] = given[:, before:].unflatten(1, (times, len(there)))
    return True
