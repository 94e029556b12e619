"""Training recipes: every bundled one is valid, and a network is found wherever in models/ it lies."""

import re

import pytest

from jobs.training.recipe import TRAINING, load_either, load_training
from jobs.training.recipe_core import TrainRecipe, import_spec
from pipeline.recipe import RecipeError, bundled
from pipeline.recipe_schema import options


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


def test_a_step_is_of_stills_or_of_clips():
    assert load_training("toy", ["data.stills=6"]).data.stills == 6
    with pytest.raises(
        RecipeError, match=r"stills: 5 micro-batches are no whole number of steps of 2 .*give 4 or 6"
    ):
        load_training("toy", ["data.stills=5"])


def test_every_training_option_says_what_it_means():
    assert [o.key for o in options(TrainRecipe) if not o.meaning] == []


def test_training_recipes_inherit_and_a_network_of_another_kind_starts_anew(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: vivit\ndata: {fps: 4}\nmodel: {preset: null}\n")
    recipe = load_training(str(file))
    assert (recipe.name, recipe.trains, recipe.data.fps, recipe.data.batch) == ("mine", "vivit", 4, 16)
    assert recipe.model.options() == {"model": 3}
    file.write_text("base: toy\nmodel: {kind: dit, preset: XS/2}\n")
    assert load_training(str(file)).model.kind == "dit"
    assert load_training("vivit").data.fps == 8


def test_what_a_network_reads_lies_beside_its_recipe(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    file = tmp_path / "mine.yaml"
    file.write_text("base: video_ldm\nmodel: {preset: null, spatial: unet}\nstart: old/model\n")
    recipe = load_training(str(file))
    assert recipe.model.options() == {"spatial": str(tmp_path / "unet")}
    assert recipe.start == str(tmp_path / "old/model")
    monkeypatch.chdir(tmp_path)
    assert load_training(str(file), ["data.cache=run/latents"]).data.cache == str(tmp_path / "run/latents")


def test_a_recipe_for_training_is_told_from_one_for_curation(tmp_path):
    assert [isinstance(load_either(n), TrainRecipe) for n in ("toy", "embedded", "small")] == [
        False,
        False,
        True,
    ]
    assert isinstance(load_either("toy", training=True), TrainRecipe)
    for name, text in {
        "a": "base: small\n", "b": "base: a.yaml\n", "c": "optimizer: {lr: 1}\nmodel: {kind: dit}\n",
        "d": "base: smoke\n", "e": "base: d.yaml\n", "f": "cut: {crf: 1}\n", "g": "{}\n",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(text)
        assert isinstance(load_either(str(tmp_path / f"{name}.yaml")), TrainRecipe) == (name in "abc"), name
    (tmp_path / "h.yaml").write_text("base: h.yaml\n")
    with pytest.raises(RecipeError, match=r"h\.yaml → h\.yaml"):
        load_either(str(tmp_path / "h.yaml"))
    with pytest.raises(RecipeError, match=r"did you mean 'dit-xl'\?"):
        load_either("dit_xl")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("run.sampler=dpm++", "sampler 'dpm++' is none of auto, ancestral"),
        ("run.sampler_options={eta: 1}", "sampler auto has no option 'eta'"),
        ("run.features=inception", "feature network 'inception' is none of"),
        ("run.frechet=1", "give 0 for none, or 2 or more"),
        ("run.guidance_interval=[0.8, 0.2]", "the lower one first"),
        ("model.attention=factorized", "'full', 'factorised' or 'alternating'"),
        ("model.dim=abc", "valid integer"),
        ("model.depth=1.5", "valid integer"),
        ("model.heads=0", "give numbers above 0"),
        ("model.qk_norm=7", "valid boolean"),
        ("model.text_width=5", "dit takes no 'text_width'"),
        ("objective.shift=0", "greater than 0"),
        ("objective={schedule: cosine, shift: auto}", "shift auto is of schedule flow"),
        ("objective={schedule: scaled_linear, shift: 2}", "scaled_linear has none"),
    ],
)
def test_a_wrong_value_is_refused_when_the_recipe_is_read(change, says):
    with pytest.raises(RecipeError) as told:
        load_training("small", [change])
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_off_unless_asked_for_can_be_turned_off_again():
    assert load_training("toy-vq").model.options()["rate"] > 0
    assert load_training("toy-vq", ["model.rate=0"]).model.options()["rate"] == 0


@pytest.mark.parametrize("name", ["vae", "vivit"])
@pytest.mark.parametrize(
    "change", ["run.frechet=8", "run.sampler=ddim", "run.guidance=2", "compute.context=2"]
)
def test_what_a_trainer_does_not_do_is_not_taken_in_silence(name, change):
    with pytest.raises(RecipeError, match=rf"^--set {re.escape(change)}: \w"):
        load_training(name, [change])


@pytest.mark.parametrize("name", bundled(TRAINING))
def test_the_options_of_a_network_are_what_its_build_takes(name):
    recipe = load_training(name)
    again = type(recipe).model_validate(recipe.model_dump(mode="json"))  # as a checkpoint keeps it
    assert again.model_dump(mode="json") == recipe.model_dump(mode="json")


@pytest.mark.parametrize("order", [0, 1])
def test_of_several_settings_of_a_section_the_one_is_named_whose_key_is_wrong(order):
    settings = ["run.sampler=dpm++", "run.steps=9"]
    with pytest.raises(RecipeError, match=r"^--set run\.sampler=dpm\+\+: .*is none of"):
        load_training("small", settings[:: -1 if order else 1])
