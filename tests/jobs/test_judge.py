"""clipmill judge: true pictures are all right, wrong ones are wrong where they are, and a model is run whole."""

import json

import numpy as np
import pytest

from jobs import judge, shard
from jobs.training.loop import train
from jobs.training.recipe_diffusion import DiffusionRecipe
from pipeline.toy import world as toy_world
from tests.fixtures.run_folder import make_run_folder


def drawn(caption: str) -> np.ndarray:
    scene = toy_world.scene(np.random.default_rng(0), toy_world.parse(caption))
    return toy_world.render(scene, 64)


def test_captions_are_of_all_combinations_none_twice():
    every = judge.draw_captions(450, 0)
    assert len(set(every)) == 450
    assert judge.draw_captions(20, 0) == every[:20] != judge.draw_captions(20, 1)
    assert {toy_world.parse(c).pan for c in every} == {"none"}


def test_true_pictures_are_right_and_others_wrong_where_they_differ():
    caption = "two red circles move left on black"
    whole = judge.verdict(drawn(caption), caption)
    assert all(whole[a] for a in judge.ATTRIBUTES)
    for attribute, other in {
        "count": "three red circles move left on black",
        "colour": "two blue circles move left on black",
        "shape": "two red squares move left on black",
        "direction": "two red circles move up on black",
        "background": "two red circles move left on white",
    }.items():
        found = judge.verdict(drawn(other), caption)
        assert [a for a in judge.ATTRIBUTES if not found[a]] == [attribute]
        assert found[f"{attribute}_seen"] == getattr(toy_world.parse(other), attribute)


def test_the_table_counts_right_misread_and_unreadable():
    captions = [
        "one green square moves right on white",
        "one green square moves up on white",
        "one red square moves right on white",
    ]
    verdicts = [judge.verdict(drawn(c), captions[0]) for c in captions]
    verdicts.append(judge.verdict(np.full((8, 32, 32, 3), 232, np.uint8), captions[0]))  # an empty picture
    rows = dict(line.split(maxsplit=1) for line in judge.table(verdicts).splitlines()[1:6])
    assert rows["direction"].split() == ["50.0%", "25.0%", "25.0%"]
    assert rows["colour"].split() == ["50.0%", "25.0%", "25.0%"]
    assert rows["count"].split() == ["75.0%", "0.0%", "25.0%"]
    assert rows["background"].split() == ["100.0%", "0.0%", "0.0%"]
    assert judge.table(verdicts).endswith("all five right in 25.0% of 4 videos")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    make_run_folder(folder / "run", sources=2)
    assert shard.main([str(folder / "run")]) == 0
    recipe = {
        "name": "t",
        "data": {"fps": 4, "buckets": [{"frames": 4, "height": 32, "width": 32}], "batch": 2, "workers": 0},
        "autoencoder": {"kind": "dct", "patch": 8, "keep": 2},
        "text": {"kind": "words", "length": 16, "width": 16, "depth": 1},
        "model": {"kind": "dit", "dim": 32, "depth": 1, "heads": 2},
        "run": {"steps": 2, "sample_every": 0, "sample_steps": 2},
    }
    train(DiffusionRecipe.model_validate(recipe), str(folder / "run"), folder / "model", device="cpu")
    return str(folder / "model")


def test_a_model_is_sampled_read_and_its_videos_kept(model, tmp_path, capsys):
    assert judge.main([model, "--n", "3", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "all five right in 0.0% of 3 videos" in said
    lines = [json.loads(line) for line in (tmp_path / "out/judged.json").read_text().splitlines()]
    assert [line["caption"] for line in lines] == judge.draw_captions(3, 0)
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 3
    assert (tmp_path / "out/sheet.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--n", "451"], "--n 451: give 1 to 450"), ([], "nowhere holds no model")]
)
def test_what_cannot_be_judged_is_one_sentence(tmp_path, capsys, arguments, says):
    assert judge.main([str(tmp_path / "nowhere"), *arguments]) == 2
    assert says in capsys.readouterr().err
