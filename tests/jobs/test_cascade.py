"""Video LDM whole, from a run's clips by commands alone: autoencoder, its decoder, three diffusion models, a video."""

import json

import av
import pytest

from jobs import sample, shard, train
from tests.fixtures.run_folder import make_run_folder

SHORT = [
    "run.sample_every=0",
    "run.steps=2",
    "run.save_every=2",
    "data.workers=0",
    "data.batch=2",
    "data.fps=4",
]
TEXT = "text={kind: words, length: 16, width: 16, depth: 1}"
NET = "model={kind: video_ldm, width: 8, multipliers: [1, 2], depth: 1, head_dim: 4}"
SHARP = "model={kind: dit, dim: 32, depth: 1, heads: 2}"  # Video LDM's layers take no low-resolution video
VAE = "kind: vae, width: 8, multipliers: [1, 1, 1, 1], depth: 1, stride: [1, 8, 8]"


def trained(run, out, what: str, recipe: str, *changes: str) -> str:
    changed = [part for change in (*SHORT, *changes) for part in ("--set", change)]
    arguments = [what, run, "--recipe", recipe, "--out", str(out), "--device", "cpu", *changed]
    assert train.main(arguments) == 0
    return str(out)


def bucket(frames: int, side: int) -> str:
    return f"data.buckets=[{{frames: {frames}, height: {side}, width: {side}}}]"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("cascade")
    make_run_folder(root / "run", sources=4)
    run = str(root / "run")
    assert shard.main([run]) == 0
    plain = ["vae.channels=4", "vae.perceptual=none", "vae.adversarial=0"]
    image = trained(run, root / "image", "vae", "vae", f"model={{{VAE}}}", bucket(1, 32), *plain)
    video = f"model={{{VAE}, temporal_decoder: true}}"
    decoder = ["vae.train=decoder", f"vae.image={image}", *plain]
    tuned = trained(run, root / "decoder", "vae", "vae", video, bucket(4, 32), *decoder)
    latents = f"autoencoder={{kind: vae, path: {tuned}}}"
    schedule = "objective={schedule: linear, prediction: eps}"
    keys = [TEXT, NET, latents, schedule, bucket(3, 32)]
    between = [TEXT, NET, latents, schedule, bucket(5, 32), "tasks={interpolation: 0.6, stride: 2}"]
    sharp = [TEXT, SHARP, latents, bucket(4, 64), "tasks={upsampling: 2}"]
    return {
        name: trained(run, root / name, "diffusion", "video_ldm", *changes, "compute.precision=fp32")
        for name, changes in (("keys", keys), ("between", between), ("sharp", sharp))
    }


def test_key_frames_become_a_sharp_video_of_four_times_the_rate_in_one_command(models, tmp_path):
    parts = [
        "--keyframes",
        models["keys"],
        "--interpolator",
        models["between"],
        "--upsampler",
        models["sharp"],
    ]
    options = ["--prompt", "waves", "--steps", "2", "--noise-level", "0.2", "--device", "cpu"]
    assert sample.main(["--task", "cascade", *parts, *options, "--out", str(tmp_path / "o")]) == 0
    (path,) = (tmp_path / "o").glob("*.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        assert (stream.width, stream.height, frames) == (64, 64, 4 * (3 - 1) + 1)
        assert stream.average_rate == 4 * 2 * 2
    used = json.loads((tmp_path / "o/sampling.json").read_text())["models"]
    assert list(used) == [models[name] for name in ("keys", "between", "sharp")]
    assert all(how["step"] == 2 for how in used.values())
