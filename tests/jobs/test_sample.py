"""clipmill sample end to end: on models of a few steps, every task, the cascade, the files and the errors."""

import json
import shutil

import av
import numpy as np
import pytest
import torch
from PIL import Image

from jobs import sample as job
from jobs.evaluation.diffusion import caption_of
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.loop import train
from jobs.videos import write_mp4
from pipeline.split.shown import read
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.videos import cfr, made, rotated


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
    return make_sharded_run(folder, sources=4)


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
    videos = go(tmp_path, models["plain"], "--prompt", "waves, on a beach", "--prompt", "b", "--n", 2)
    assert [p.name for p in videos] == [
        f"00{i}-{s}.mp4" for i, s in enumerate(["waves-on-a-beach"] * 2 + ["b"] * 2)
    ]
    read = [caption_of(p) for p in videos]  # as clipmill eval does
    assert read == ["waves, on a beach"] * 2 + ["b"] * 2
    with av.open(str(videos[0])) as container:
        assert container.streams.video[0].average_rate == 4
    videos = [frames_of(p) for p in videos]
    assert all(v.shape == (5, 32, 32, 3) for v in videos)
    assert not np.array_equal(videos[0], videos[1])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 4 * 32


def test_the_seed_alone_decides_and_the_last_weights_are_others_than_their_average(models, tmp_path):
    def drawn(name, *options):
        return frames_of(go(tmp_path / name, models["plain"], "--prompt", "x", *options)[0])

    first = drawn("a")
    assert np.array_equal(first, drawn("b"))
    assert np.array_equal(first, drawn("c", "--ema", 0.1))
    assert not np.array_equal(first, drawn("d", "--ema", 0))
    assert not np.array_equal(first, drawn("e", "--seed", 1))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A video and a picture, of 4 frames a second, each frame of its own grey."""
    folder = tmp_path_factory.mktemp("given")
    grey = np.linspace(30, 220, 9).astype(np.uint8)[:, None, None, None] + np.zeros((32, 32, 3), np.uint8)
    write_mp4(folder / "v.mp4", grey, 4)
    Image.fromarray(grey[4]).save(folder / "p.png")
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


@pytest.mark.parametrize("model", ["plain", "known"])
@pytest.mark.parametrize("rate", [1, 8, 25])
def test_the_frames_of_a_file_are_the_key_frames_whatever_its_rate(models, given, tmp_path, model, rate):
    keys = torch.from_numpy(given["grey"][:5]).to(torch.uint8)[:, None, None, None].expand(5, 32, 32, 3)
    write_mp4(tmp_path / "keys.mp4", keys.numpy(), rate)
    for n, options in ((5, []), (3, ["--frames", 3])):
        arguments = ["--task", "interpolate", "--video", tmp_path / "keys.mp4", *options]
        path = go(tmp_path / f"{n}", models[model], *arguments)[0]
        found = frames_of(path)
        assert len(found) == 2 * (n - 1) + 1
        np.testing.assert_allclose(level(found)[::2], given["grey"][:n], atol=4)
        with av.open(str(path)) as container:  # it lasts as long
            assert container.streams.video[0].average_rate == 2 * rate


def test_a_given_video_is_in_its_extension_frame_for_frame(models, given, tmp_path):
    """All nine of its frames, though two are the context, as they were decoded and not as latents have them."""
    made = go(tmp_path / "e", models["known"], "--task", "extend", "--video", given["video"], "--frames", 14)
    found = frames_of(made[0])
    assert len(found) == 14
    np.testing.assert_allclose(level(found)[:9], level(frames_of(given["video"])), atol=1)
    alone = go(tmp_path / "f", models["known"], "--task", "extend", "--prompt", "waves", "--frames", 9)
    assert frames_of(alone[0]).shape == (9, 32, 32, 3)


def test_a_turned_video_is_given_upright_and_in_the_nearest_of_the_shapes_that_were_trained(models, tmp_path):
    shutil.copytree(models["known"], tmp_path / "model")
    state = torch.load(tmp_path / "model/model.pt", weights_only=True)
    buckets = [{"frames": 4, "height": h, "width": w} for h, w in ((32, 64), (64, 32))]
    meta = json.loads((tmp_path / "model/model.json").read_text())
    meta["recipe"]["data"]["buckets"] = buckets
    (tmp_path / "model/model.json").write_text(json.dumps(meta))
    state["trained"] = [[b["frames"], b["height"], b["width"]] for b in buckets]
    torch.save(state, tmp_path / "model/model.pt")
    turned = made(rotated, degrees=90)
    for name, path, size in (("wide", made(cfr), (32, 64)), ("tall", turned, (64, 32))):
        out = go(tmp_path / name, tmp_path / "model", "--task", "image", "--video", path, "--steps", 1)
        assert frames_of(out[0]).shape == (4, *size, 3)
    first = read(str(turned), lambda _: (64, 32), most=1).pictures[0]
    drawn = frames_of(next((tmp_path / "tall").glob("*.mp4")))[0]
    assert np.abs(drawn.astype(int) - first).mean() < 40  # three coefficients a block are left of it
    assert np.abs(drawn[::-1].astype(int) - first).mean() > 60


def test_a_small_video_is_brought_to_the_models_size(models, given, tmp_path):
    made = go(tmp_path / "w", models["sharp"], "--task", "upsample", "--video", given["video"])
    assert frames_of(made[0]).shape == (9, 64, 64, 3)  # all of it, in blocks of 4
    short = go(
        tmp_path / "s", models["sharp"], "--task", "upsample", "--video", given["video"], "--frames", 3
    )
    assert frames_of(short[0]).shape == (3, 64, 64, 3)


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


def test_a_folder_holds_one_sampling(models, tmp_path, capsys):
    """A second is refused, or replaces the first whole; nothing that is not a sampling's is ever touched."""
    out, arguments = tmp_path / "o", [models["plain"], "--steps", "1"]
    go(out, *arguments, "--n", 2, "--prompt", "a")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    again = [*arguments, "--prompt", "b", "--out", str(out), "--device", "cpu"]
    assert job.main(again) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert job.main([*again, "--replace"]) == 0
    assert sorted(p.name for p in out.glob("*.mp4")) == ["000-b.mp4"]
    assert [row["name"] for row in json.loads((out / "samples.json").read_text())] == ["b"]
    (out / "mine.txt").write_text("")
    assert job.main([*again, "--replace"]) == 2
    assert "holds mine.txt, which no sampling wrote" in capsys.readouterr().err
    assert (out / "000-b.mp4").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["o"]  # nothing half written is left


def test_what_is_really_used_is_printed_and_kept(models, tmp_path, capsys):
    more = ["--sampler", "ancestral", "--sampler-option", "gamma=0.7", "--guidance-interval", "0.2", "0.8"]
    rest = ["--guidance", "2", "--guidance-rescale", "0.5", "--spacing", "logsnr", "--ema", "0"]
    go(tmp_path / "o", models["plain"], "--seed", 5, "--steps", 2, *more, *rest)
    out = capsys.readouterr().out
    how = "step 20, ema 0.0, sampler ancestral, gamma 0.7, steps 2, spacing logsnr, guidance 2.0"
    assert f"{how}, guidance_interval 0.2…0.8, guidance_rescale 0.5, trained_at 5×32×32, seed 5" in out
    (used,) = json.loads((tmp_path / "o/sampling.json").read_text())["models"].values()
    assert (used["step"], used["ema"], used["steps"], used["gamma"]) == (20, 0, 2, 0.7)


def test_the_noise_level_of_an_upsampler_is_told_and_put_into_what_it_is_given(models, given, tmp_path):
    def drawn(name, *options):
        return frames_of(
            go(tmp_path / name, models["sharp"], "--task", "upsample", "--video", given["video"], *options)[0]
        )

    assert np.array_equal(drawn("a"), drawn("b", "--noise-level", 0))
    assert not np.array_equal(drawn("c"), drawn("d", "--noise-level", 0.5))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "clipmill train"),
        ([], "name the MODEL"),
        (["plain", "--sampler", "magic"], "sampler 'magic'"),
        (
            ["plain", "--sampler", "ddim", "--sampler-option", "gamma=1"],
            "has no option 'gamma': it has only eta",
        ),
        (["plain", "--sampler-option", "eta"], "--sampler-option eta: give NAME=NUMBER"),
        (["plain", "--guidance-interval", "1", "0"], "the lower one first"),
        (["plain", "--steps", "0"], "--steps"),
        (["plain", "--task", "image"], "--video FILE"),
        (["plain", "--video", "video"], "--task text has no use for --video"),
        (["plain", "--context", "3"], "--task text has no use for --context"),
        (["plain", "--noise-level", "0.1"], "--task text has no use for --noise-level"),
        (["plain", "--times", "1"], "it is for cascade"),
        (["plain", "--task", "predict", "--video", "no.mp4"], "no such file"),
        (["plain", "--task", "predict", "--video", "text"], "text"),
        (["plain", "--task", "predict", "--video", "picture"], "has 1 of the 2 frames"),
        (["plain", "--task", "predict", "--video", "video", "--context", "5"], "smaller --context"),
        (["plain", "--task", "extend"], "--frames"),
        (["plain", "--task", "extend", "--video", "video", "--frames", "9"], "give more --frames"),
        (["plain", "--task", "interpolate", "--video", "picture"], "has 1 of 2 key frames"),
        (["plain", "--task", "interpolate", "--video", "video", "--frames", "12"], "has 9 of 12 key frames"),
        (["plain", "--task", "upsample", "--video", "video"], "super-resolution"),
        (["sharp", "--task", "upsample", "--video", "video", "--frames", "12"], "has 9 frames"),
        (
            ["sharp", "--task", "upsample", "--video", "video", "--noise-level", "0.6"],
            "trained with 0 to 0.5",
        ),
        (["plain", "--ema", "0.5"], "0.28"),
        (["--task", "cascade", "--keyframes", "plain"], "--interpolator"),
        (["--task", "cascade", "--keyframes", "plain", "--interpolator", "sharp"], "one size"),
        (["plain", "--task", "cascade", "--keyframes", "plain", "--interpolator", "known"], "has no use for"),
        (
            ["--task", "cascade", "--keyframes", "plain", "--interpolator", "known", "--noise-level", "0.1"],
            "name it too",
        ),
        (
            ["--task", "cascade", "--keyframes", "plain", "--interpolator", "known", "--frames", "9"],
            "no use for --frames",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(models, given, tmp_path, capsys, arguments, says):
    (tmp_path / "text").write_text("not a video")
    paths = models | {name: str(given[name]) for name in ("video", "picture")}
    paths |= {"text": str(tmp_path / "text"), "nothing": str(tmp_path)}
    assert (
        job.main([paths.get(a, a) for a in arguments] + ["--out", str(tmp_path / "o"), "--device", "cpu"])
        == 2
    )
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipmill sample: ")]
    assert len(told) == 1
    assert says in told[0]
