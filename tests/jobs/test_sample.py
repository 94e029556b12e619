"""clipmill sample end to end: on models of a few steps, every task, the cascade, the files and the errors."""

import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image

from jobs import sample as job
from jobs import shard
from jobs.evaluate import caption_of
from jobs.training.loop import train
from jobs.training.recipe import DiffusionRecipe
from tests.fixtures.run_folder import make_run_folder


class Silent:
    """A monitor that keeps nothing."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name):
        return lambda *args: None


def recipe(side=32, frames=5, **tasks) -> DiffusionRecipe:
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": {
                "fps": 4,
                "buckets": [{"frames": frames, "height": side, "width": side}],
                "batch": 2,
                "workers": 0,
            },
            "autoencoder": {"kind": "dct", "patch": 8, "keep": 3},
            "text": {"kind": "words", "length": 16, "width": 16, "depth": 1},
            "model": {"kind": "dit", "dim": 32, "depth": 1, "heads": 2},
            "tasks": {"stride": 2} | tasks,
            "run": {"steps": 20, "save_every": 20, "sample_every": 0, "sample_steps": 3},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "run"
    make_run_folder(folder, sources=4)
    assert shard.main([str(folder)]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def models(run, tmp_path_factory):
    """Plain; told known frames; key frames to larger pictures."""
    root = tmp_path_factory.mktemp("models")
    known = {"first_frame": 0.2, "prediction": 0.2, "interpolation": 0.4}
    wanted = {"plain": recipe(), "known": recipe(**known), "sharp": recipe(side=64, frames=4, upsampling=2)}
    for name, r in wanted.items():
        train(r, run, root / name, monitor=Silent, device="cpu")
    return {name: str(root / name) for name in wanted}


def frames_of(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def go(out, *arguments) -> list:
    assert job.main([*map(str, arguments), "--out", str(out), "--device", "cpu"]) == 0
    return sorted(out.glob("*.mp4"))


def test_a_caption_becomes_so_many_videos_and_a_sheet(models, tmp_path):
    made = go(tmp_path, models["plain"], "--prompt", "waves, on a beach", "--prompt", "b", "--n", 2)
    assert [p.name for p in made] == [
        f"00{i}-{s}.mp4" for i, s in enumerate(["waves-on-a-beach"] * 2 + ["b"] * 2)
    ]
    videos = [frames_of(p) for p in made]
    assert all(v.shape == (5, 32, 32, 3) for v in videos)
    assert not np.array_equal(videos[0], videos[1])
    with av.open(str(made[0])) as container:
        assert container.streams.video[0].average_rate == 4
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 4 * 32
    read = [caption_of(p) for p in made]  # as clipmill eval does
    assert read == ["waves, on a beach"] * 2 + ["b"] * 2


def test_the_seed_alone_decides_and_the_last_weights_are_others_than_their_average(models, tmp_path):
    def drawn(name, *options):
        return frames_of(go(tmp_path / name, models["plain"], "--prompt", "x", *options)[0])

    first = drawn("a")
    assert np.array_equal(first, drawn("b"))
    assert np.array_equal(first, drawn("c", "--ema", 0.1))
    assert not np.array_equal(first, drawn("d", "--ema", 0))
    assert not np.array_equal(first, drawn("e", "--seed", 1))


def test_a_file_has_every_frame_once_in_order_nearly_unchanged(tmp_path):
    ramp = torch.linspace(40, 200, 7).to(torch.uint8)[:, None, None, None].expand(7, 48, 64, 3)
    job.encode(tmp_path / "ramp.mp4", ramp, 7.5)
    found = frames_of(tmp_path / "ramp.mp4")
    assert found.shape == (7, 48, 64, 3)
    assert np.abs(found.astype(int) - ramp.numpy().astype(int)).max() <= 3
    job.encode(tmp_path / "odd.mp4", ramp[:, :47, :63], 7.5)
    assert frames_of(tmp_path / "odd.mp4").shape == (7, 47, 63, 3)
    with av.open(str(tmp_path / "ramp.mp4")) as container:
        times = [float(p.pts * p.time_base) for p in container.demux(video=0) if p.pts is not None]
    np.testing.assert_allclose(sorted(times), np.arange(7) / 7.5, atol=1e-3)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A video and a picture, of 4 frames a second, each frame of its own grey."""
    folder = tmp_path_factory.mktemp("given")
    grey = torch.linspace(30, 220, 9).to(torch.uint8)[:, None, None, None].expand(9, 32, 32, 3)
    job.encode(folder / "v.mp4", grey, 4)
    Image.fromarray(grey[4].numpy().copy()).save(folder / "p.png")
    return {"video": folder / "v.mp4", "picture": folder / "p.png", "grey": np.linspace(30, 220, 9)}


def level(frames) -> list[float]:
    return frames.reshape(len(frames), -1).mean(1).tolist()


@pytest.mark.parametrize("model", ["plain", "known"])
def test_frames_that_are_given_are_in_the_video(models, given, tmp_path, model):
    """Told to the network, or led to by reconstruction guidance."""
    image = go(tmp_path / "i", models[model], "--task", "image", "--video", given["picture"])
    np.testing.assert_allclose(level(frames_of(image[0]))[0], given["grey"][4], atol=4)
    two = go(tmp_path / "p", models[model], "--task", "predict", "--video", given["video"], "--context", 2)
    np.testing.assert_allclose(level(frames_of(two[0]))[:2], given["grey"][:2], atol=4)
    keys = go(
        tmp_path / "k", models[model], "--task", "interpolate", "--video", given["video"], "--frames", 4
    )
    found = frames_of(keys[0])
    assert len(found) == 2 * 3 + 1
    np.testing.assert_allclose(level(found)[::2], given["grey"][:8:2], atol=4)  # keys at half the rate


def test_a_video_is_extended_to_any_length(models, given, tmp_path):
    made = go(tmp_path / "e", models["known"], "--task", "extend", "--video", given["video"], "--frames", 13)
    found = frames_of(made[0])
    assert len(found) == 13
    np.testing.assert_allclose(level(found)[:2], given["grey"][:2], atol=4)
    alone = go(tmp_path / "f", models["known"], "--task", "extend", "--prompt", "waves", "--frames", 9)
    assert frames_of(alone[0]).shape == (9, 32, 32, 3)


def test_a_small_video_is_brought_to_the_models_size(models, given, tmp_path):
    made = go(tmp_path, models["sharp"], "--task", "upsample", "--video", given["video"])
    assert frames_of(made[0]).shape == (4, 64, 64, 3)


def test_the_cascade_makes_key_frames_the_frames_between_twice_and_larger_pictures(models, tmp_path):
    parts = ["--task", "cascade", "--keyframes", models["plain"], "--interpolator", models["known"]]
    small = frames_of(go(tmp_path / "s", *parts, "--prompt", "waves")[0])
    assert small.shape == (4 * (5 - 1) + 1, 32, 32, 3)  # T → 2 T − 1, twice
    keys = frames_of(go(tmp_path / "k", *parts, "--prompt", "waves", "--times", 0)[0])
    assert np.abs(level(small[::4]) - np.array(level(keys))).max() < 4
    path = go(tmp_path / "l", *parts, "--upsampler", models["sharp"], "--prompt", "waves")[0]
    assert frames_of(path).shape == (17, 64, 64, 3)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 4 * 2 * 2


def test_key_frames_keep_their_own_normalisation_on_the_way_to_the_interpolator(models, tmp_path):
    """Without interpolating, the cascade is what the first model draws alone, however that one normalises."""
    keys = tmp_path / "keys"
    shutil.copytree(models["plain"], keys)
    state = torch.load(keys / "model.pt", weights_only=True)
    state["normalizer"]["std"] = [2 * x for x in state["normalizer"]["std"]]
    torch.save(state, keys / "model.pt")
    alone = frames_of(go(tmp_path / "a", keys, "--prompt", "waves")[0])
    cascade = ["--task", "cascade", "--keyframes", keys, "--interpolator", models["known"], "--times", 0]
    both = frames_of(go(tmp_path / "b", *cascade, "--prompt", "waves")[0])
    assert np.abs(alone.astype(int) - both.astype(int)).mean() < 1
    other = frames_of(go(tmp_path / "c", models["plain"], "--prompt", "waves")[0])
    assert np.abs(alone.astype(int) - other.astype(int)).mean() > 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "clipmill train"),
        ([], "name the MODEL"),
        (["plain", "--sampler", "magic"], "sampler 'magic'"),
        (["plain", "--steps", "0"], "--steps"),
        (["plain", "--task", "image"], "--video FILE"),
        (["plain", "--task", "predict", "--video", "no.mp4"], "no such file"),
        (["plain", "--task", "predict", "--video", "text"], "text"),
        (["plain", "--task", "extend"], "--frames"),
        (["plain", "--task", "upsample", "--video", "video"], "super-resolution"),
        (["plain", "--ema", "0.5"], "0.28"),
        (["--task", "cascade", "--keyframes", "plain"], "--interpolator"),
        (["--task", "cascade", "--keyframes", "plain", "--interpolator", "sharp"], "one size"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(models, given, tmp_path, capsys, arguments, says):
    (tmp_path / "text").write_text("not a video")
    paths = models | {"video": str(given["video"]), "text": str(tmp_path / "text"), "nothing": str(tmp_path)}
    assert (
        job.main([paths.get(a, a) for a in arguments] + ["--out", str(tmp_path / "o"), "--device", "cpu"])
        == 2
    )
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipmill sample: ")]
    assert len(told) == 1
    assert says in told[0]
