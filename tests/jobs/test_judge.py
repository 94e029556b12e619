"""clipmill judge: true pictures are all right, wrong ones are wrong where they are, and a model is run whole."""

import json

import numpy as np
import pytest

from jobs import judge
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.loop import train
from pipeline.toy import world as toy_world
from pipeline.toy.reader import identity
from tests.fixtures.run_folder import make_sharded_run


def drawn(caption: str) -> np.ndarray:
    scene = toy_world.scene(np.random.default_rng(0), toy_world.parse(caption))
    return toy_world.render(scene, 64)


def test_captions_are_of_all_combinations_none_twice_until_all_were():
    (every,) = judge.asked(450, 0, None).values()
    assert len(set(every)) == 450
    (few,), (other,), (more,) = (
        judge.asked(n, seed, None).values() for n, seed in ((20, 0), (20, 1), (460, 0))
    )
    assert few == every[:20] != other
    assert more == every + every[:10]
    assert {toy_world.parse(c).pan for c in every} == {"none"}


def test_captions_that_were_held_out_are_asked_for_by_themselves(tmp_path):
    held_out = sorted(a.caption() for a in toy_world.held_out(0.15))
    (tmp_path / "held_out.txt").write_text("\n".join(held_out) + "\n")
    seen, never = judge.asked(500, 0, tmp_path / "held_out.txt").values()
    assert set(never) == set(held_out)
    assert set(seen) == {a.caption() for a in toy_world.every()} - set(held_out)
    assert len(seen) == len(never) == 500


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
    rows = {line[:11].strip(): line[11:].split() for line in judge.table(verdicts).splitlines()[1:]}
    wilson = ["15.0%", "to", "85.0%"]  # of two trials in four, as tables have it
    assert rows["direction"] == ["50.0%", *wilson, "25.0%", "25.0%"]
    assert rows["colour"] == ["50.0%", *wilson, "25.0%", "25.0%"]
    assert [rows["count"][i] for i in (0, 4, 5)] == ["75.0%", "0.0%", "25.0%"]
    assert [rows["background"][i] for i in (0, 4, 5)] == ["100.0%", "0.0%", "0.0%"]
    assert rows["mean"][0] == "70.0%"
    assert rows["all five"][0] == "25.0%"


@pytest.mark.parametrize(
    ("size", "step"), [((32, 32), 2.0), ((32, 32), 1.0), ((64, 64), 2.0), ((32, 32), 4.0)]
)
def test_true_videos_of_a_caption_are_read_as_it_says(size, step):
    for caption in judge.asked(60, 1, None)[judge.EVERY]:
        video = judge.scene_of(np.random.default_rng(0), caption, 8, size, step)
        assert video.shape == (8, *size, 3)
        assert all(judge.verdict(video, caption)[a] for a in judge.ATTRIBUTES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    make_sharded_run(folder / "run", sources=2)
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
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("one red circle moves left on black\n")
    args = [model, "--n", "2", "--held-out", str(held_out), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert judge.main(args) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"reader {identity()}: ")
    assert "on 4 true scenes of these captions" in said
    assert "2 videos of combinations seen in training\nattribute" in said
    assert "2 videos of combinations held out\nattribute" in said
    lines = [json.loads(line) for line in (tmp_path / "out/judged.json").read_text().splitlines()]
    captions = judge.asked(2, 0, held_out)
    assert [(line["kind"], line["caption"]) for line in lines] == [
        (k, c) for k, cs in captions.items() for c in cs
    ]
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4
    assert (tmp_path / "out/sheet.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--n", "0"], "--n 0: give 1 or more"),
        (["--held-out", "/dev/null"], "--held-out /dev/null names no caption"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
        (["--out", "/dev/null"], "--out /dev/null: it is there already; give a new or empty folder"),
        (["--locate", "vae=x"], "--locate vae=x: give autoencoder.path=PATH"),
        (["--held-out", "no_such_file"], "No such file or directory: 'no_such_file'"),
        ([], "nowhere holds no model"),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(tmp_path, capsys, arguments, says):
    assert judge.main([str(tmp_path / "nowhere"), *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        (b"a dog\n", "caption 'a dog' is none of this world's"),
        (b"\xff", "can't decode byte"),
        (
            "".join(f"{a.caption()}\n" for a in toy_world.every()).encode(),
            "names all combinations, so none was seen",
        ),
    ],
)
def test_a_file_of_captions_that_cannot_be_judged_by_is_named(tmp_path, capsys, held_out, says):
    (tmp_path / "held_out.txt").write_bytes(held_out)
    assert judge.main([str(tmp_path), "--held-out", str(tmp_path / "held_out.txt")]) == 2
    told = capsys.readouterr().err
    assert f"--held-out {tmp_path / 'held_out.txt'}" in told
    assert says in told
