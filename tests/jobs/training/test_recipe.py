"""Training recipes: every bundled one is valid, and a network is found wherever in models/ it lies."""

import pytest

from jobs.training.recipe import TRAINING, import_spec, load_training
from pipeline.recipe import RecipeError, bundled


@pytest.mark.parametrize("name", bundled(TRAINING))
def test_every_bundled_training_recipe_is_valid(name: str):
    recipe = load_training(name)
    assert recipe.name == name
    assert import_spec(recipe.model.kind).build


@pytest.mark.parametrize("kind", ["magic", "attention", "discriminator", "../dit", ""])
def test_a_network_that_is_none_is_one_sentence(kind: str):
    with pytest.raises(RecipeError, match="there is no models/") as e:
        load_training("small", [f"model={{kind: '{kind}'}}"])
    assert "\n" not in str(e.value)
