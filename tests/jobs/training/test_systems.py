"""Every bundled recipe, shrunken: on one process, on two with DDP and on two with FSDP2 it trains, is killed, resumes
bit for bit, and what it leaves is sampled in each of its tasks and evaluated. What was done is printed as a table."""

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import evaluate, sample
from jobs.training.diffusion.build import build_autoencoder
from jobs.training.diffusion.recipe import Autoencoder
from jobs.training.exported import load_model
from jobs.training.loop import train
from jobs.training.vlm.speaker import load_speaker
from jobs.videos import write_mp4
from models.choosing.chooser import Chooser
from models.measures.features import load_features
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.shrunken import NAMES, checkpoints, load
from tests.fixtures.toy_training import Notes, in_ranks, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RANKS = {"one": 1, "ddp": 2, "fsdp": 2}
STEPS, KILLED = 4, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems") / "run"
    return make_sharded_run(folder, sources=6)


@pytest.fixture(scope="module")
def at(tmp_path_factory, run):
    """Tiny checkpoints, a model that toy-frames starts from, and one that makes a world model's codes."""
    found = checkpoints(tmp_path_factory.mktemp("checkpoints"))
    for name, of in (("toy", "toy"), ("vq", "toy-vq")):
        folder = tmp_path_factory.mktemp(name)
        assert in_ranks(1, rank, of, found, run, folder, "one") == [0]
        found[name] = str(folder)
    return found


class Killed(Notes):
    """Dies of SIGKILL in step 3, on every rank, once step 2 is on the disk."""

    def __init__(self, out, recipe, enabled=True):
        super().__init__(out, recipe, enabled)
        self.out = out

    def scalars(self, step, values):
        if step == KILLED:
            end = time.monotonic() + 30
            while not (self.out / "checkpoints/step-00000002").is_dir() and time.monotonic() < end:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A video that tasks are given, and a quick network of features."""
    folder = tmp_path_factory.mktemp("given")
    grey = np.linspace(30, 220, 9).astype(np.uint8)[:, None, None, None] + np.zeros((32, 32, 3), np.uint8)
    write_mp4(folder / "video.mp4", grey, 8)
    torch.jit.script(Colours()).save(str(folder / "colours.pt"))
    return folder


class Colours(torch.nn.Module):
    """Mean and spread of the colours, [B, 6]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1)


def sampled(model, given, out) -> list[str]:
    """Every task that takes one model, as commands: those that are done."""
    tasks = {
        "text": [],
        "image": ["--video", str(given / "video.mp4")],
        "predict": ["--video", str(given / "video.mp4"), "--context", "1"],
        "extend": ["--video", str(given / "video.mp4"), "--frames", "24", "--context", "1"],
        "interpolate": ["--video", str(given / "video.mp4"), "--frames", "2"],
    }
    options = ["--prompt", "waves", "--steps", "2", "--device", "cpu"]
    for task, own in tasks.items():
        assert sample.main([str(model), "--task", task, *own, *options, "--out", str(out / task)]) == 0
        assert len(list((out / task).glob("*.mp4"))) == 1
    return list(tasks)


def worlds(model, given, out) -> list[str]:
    """Every task of a world model that has codes."""
    if load_model(model).recipe["vq"]["path"] is None:
        return []
    video = ["--video", str(given / "video.mp4")]
    tasks = {
        "text": ["--frames", "1"],
        "image": video,
        "predict": video,
        "extend": [*video, "--frames", "12"],
    }
    for task, own in (tasks | {"caption": video}).items():
        options = ["--task", task, *own, "--top-k", "4", "--device", "cpu", "--out", str(out / task)]
        assert sample.main([str(model), *options, *(["--prompt", "waves"] if task != "caption" else [])]) == 0
        assert len(list((out / task).glob("*.mp4"))) == (task != "caption")
    return [*tasks, "caption"]


def evaluated(model, run, given, out) -> float:
    """The distance to real videos that the command writes."""
    options = ["--n", "2", "--steps", "2", "--features", str(given / "colours.pt"), "--device", "cpu"]
    arguments = ["diffusion", str(model), "--against", f"{run}/shards", *options, "--out", str(out)]
    assert evaluate.main(arguments) == 0
    return next(row["value"] for row in json.loads(out.read_text())["numbers"])


def rank(name, at, run, out, mode, monitor=Notes):
    parallel = "fsdp" if mode == "fsdp" else "ddp"
    recipe = load(name, at, f"run.steps={STEPS}", f"compute.parallel={parallel}")
    train(recipe, run, Path(out), device="cpu", monitor=monitor)


def killed_rank(*args):
    rank(*args, monitor=Killed)


@pytest.mark.parametrize("mode", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_is_killed_resumes_bit_for_bit_is_sampled_and_evaluated(
    name, mode, run, at, given, tmp_path, record_property
):
    ranks = RANKS[mode]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert in_ranks(ranks, rank, name, at, run, whole, mode) == [0] * ranks
    assert in_ranks(ranks, killed_rank, name, at, run, parts, mode) == [-signal.SIGKILL] * ranks
    assert in_ranks(ranks, rank, name, at, run, parts, mode) == [0] * ranks
    a, b, early = weights(whole, STEPS), weights(parts, STEPS), weights(parts, 2)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert any(not torch.equal(x, early[k]) for k, x in b.items() if k.startswith("model/"))
    trained = load_model(parts)
    assert trained.step == STEPS
    done = ["trained", "killed", "resumed"]
    if trained.recipe["trains"] == "diffusion":
        done += sampled(parts, given, tmp_path / "samples")
        assert math.isfinite(evaluated(parts, run, given, tmp_path / "eval.json"))
        done.append("eval")
    if trained.recipe["trains"] == "vae":
        kept = build_autoencoder(Autoencoder(kind="vae", path=str(parts)), torch.device("cpu"))
        video = torch.rand(1, 3, 5, 32, 32)
        assert kept.decode(kept.encode(video).mean).shape == video.shape
        done.append("reconstructs")
    if trained.recipe["trains"] == "vlm":
        speaker = load_speaker(parts)
        clip = speaker.frames(str(given / "video.mp4"))
        (said,) = speaker.answer([[{"role": "user", "content": "What is it?"}]], [[clip]], most=4)
        assert isinstance(said, str)
        done.append("answers")
    if trained.recipe["trains"] == "world":
        done += worlds(parts, given, tmp_path / "samples")
    if trained.recipe["trains"] == "vivit":
        features = load_features(f"vivit:{parts}")(torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8))
        assert features.isfinite().all()
        done.append("features")
    if trained.recipe["trains"] == "selector":
        chooser = Chooser.load(parts / "selector.pt")
        said = chooser([np.zeros((32, 32, 3), np.uint8)], ["a gradient", "a cat"])
        assert [0 < p < 1 for p in said] == [True, True]
        done.append("judges")
    record_property("system", (name, mode, done))
