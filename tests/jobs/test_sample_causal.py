"""clipmill sample with an autoencoder that joins frames: what is given, at any length and place; cascade in pixels."""

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs import sample as job
from jobs import sampling, shard
from jobs.sampling import Maker, Options
from jobs.training.diffusion.build import build_system
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.videos import write_mp4
from models.autoencoders.latents import Normalizer, Posterior
from tests.fixtures.run_folder import make_run_folder
from tests.jobs.test_cascade import trained
from tests.jobs.test_sample import frames_of, level

VAE = "model={kind: vae, width: 8, multipliers: [1, 1, 1, 1], depth: 1, stride: [2, 8, 8]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("causal")
    make_run_folder(root / "run", sources=4)
    run = str(root / "run")
    assert shard.main([run]) == 0
    shape = "data.buckets=[{frames: 9, height: 32, width: 32}]"
    plain = ["vae.channels=4", "vae.perceptual=none", "vae.adversarial=0"]
    vae = trained(run, root / "vae", "vae", "vae", VAE, shape, *plain)
    changes = [
        f"autoencoder={{kind: vae, path: {vae}}}",
        "model={kind: dit, dim: 32, depth: 1, heads: 2}",
        "text={kind: words, length: 16, width: 16, depth: 1}",
        "tasks={prediction: 0.3, interpolation: 0.3, stride: 2}",
    ]
    return trained(run, root / "model", "diffusion", "small", shape, *changes)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    levels = np.linspace(30, 220, 12).astype(np.uint8)
    write_mp4(folder / "v.mp4", levels[:, None, None, None] + np.zeros((32, 32, 3), np.uint8), 4)
    return folder / "v.mp4", levels.astype(float)


def go(out, *arguments):
    assert job.main([*map(str, arguments), "--out", str(out), "--device", "cpu", "--steps", "2"]) == 0
    (path,) = out.glob("*.mp4")
    return path, frames_of(path)


@pytest.mark.parametrize("frames", [13, 24])
def test_all_of_what_is_extended_is_in_the_result_whatever_its_length(model, grey, tmp_path, frames):
    path, levels = grey
    _, found = go(tmp_path / "o", model, "--task", "extend", "--video", path, "--frames", frames)
    assert len(found) == frames
    np.testing.assert_allclose(level(found)[:12], levels, atol=3)
    assert len(go(tmp_path / "a", model, "--task", "extend", "--frames", frames)[1]) == frames


def test_key_frames_lie_a_stride_of_latents_apart(model, grey, tmp_path):
    path, levels = grey
    out, found = go(tmp_path / "o", model, "--task", "interpolate", "--video", path, "--frames", 6)
    assert len(found) == 2 * 2 * 5 + 1
    np.testing.assert_allclose(level(found)[::4], levels[:6], atol=3)
    with av.open(str(out)) as container:
        assert container.streams.video[0].average_rate == 4 * 4


def test_a_prediction_begins_with_the_frames_that_its_latents_stand_for(model, grey, tmp_path):
    path, _ = grey
    _, found = go(tmp_path / "o", model, "--task", "predict", "--video", path, "--context", 3)
    assert len(found) == 9
    _, one = go(tmp_path / "i", model, "--task", "image", "--video", path)
    assert len(one) == 9


def test_the_cascade_goes_through_pixels(model, tmp_path):
    parts = ["--task", "cascade", "--keyframes", model, "--interpolator", model, "--times", 1]
    path, found = go(tmp_path / "o", *parts)
    assert len(found) == 4 * (9 - 1) + 1
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 4 * 4


class Joining:
    """An autoencoder whose latent is the mean of the frames it joins, and a network that says x is what it knows."""

    causal, channels, stride = True, 3, (2, 8, 8)

    def encode(self, video):
        small = F.avg_pool3d(video, (1, 8, 8))
        return Posterior(torch.cat([small[:, :, :1], F.avg_pool3d(small[:, :, 1:], (2, 1, 1))], dim=2))

    def decode(self, z):
        frames = torch.cat([z[:, :, :1], z[:, :, 1:].repeat_interleave(2, dim=2)], dim=2)
        return F.interpolate(frames, scale_factor=(1, 8, 8))


def test_what_a_block_is_told_is_what_a_clip_that_begins_there_would_encode_to(tmp_path, grey):
    """Of the trained positions: a lone first frame, then pairs, wherever in the video the block begins."""
    recipe = DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": {"fps": 4, "buckets": [{"frames": 5, "height": 32, "width": 32}]},
            "model": {"kind": "dit", "dim": 32, "depth": 1, "heads": 2},
            "tasks": {"prediction": 1},
            "run": {"sample_steps": 1},
        }
    )
    system = build_system(recipe, torch.device("cpu"))
    system.autoencoder, told = Joining(), []
    system.normalizer = Normalizer(torch.zeros(3), torch.ones(3))

    def draw(shape, condition):
        told.append(condition.known[0, 0, :, 0, 0])
        return torch.full(shape, 0.5)

    maker = Maker(system, Options(grey[0], 16, 2, None, 2, {}))
    maker.draw = lambda seed: draw
    maker.shape = lambda frames=None: (1, 3, 3, 4, 4)
    video = sampling.extended(maker)("", 0)
    assert video.shape[1] == 16
    unit = video[0, :, 0, 0, 0].float() / 127.5 - 1
    for begin, known in zip(
        (9, 11, 13), told, strict=False
    ):  # three frames, one and a pair, before each block
        expected = torch.stack([unit[begin], unit[begin + 1 : begin + 3].mean(), torch.tensor(0.0)])
        torch.testing.assert_close(known, expected, atol=1e-5, rtol=0)
    assert len(told) == 2
