"""Every bundled recipe, shrunken: on one process, on two with DDP and on two with FSDP2 it trains, is killed, resumes
bit for bit, and what it leaves is sampled in each of its tasks and evaluated."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from jobs import shard
from jobs.training.loop import train
from jobs.training.recipe import TRAINING, load_training
from pipeline.recipe import bundled
from tests.fixtures.run_folder import make_run_folder
from tests.fixtures.shrunken import checkpoints, shrunken
from tests.fixtures.toy_training import Notes, in_ranks, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
NAMES = [*bundled(TRAINING), "video_ldm-frozen"]
RANKS = {"one": 1, "ddp": 2, "fsdp": 2}
STEPS, KILLED = 4, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems") / "run"
    make_run_folder(folder, sources=6)
    assert shard.main([str(folder)]) == 0
    return str(folder)


@pytest.fixture(scope="module")
def at(tmp_path_factory, run):
    """Tiny checkpoints, and a model that toy-frames starts from."""
    found = checkpoints(tmp_path_factory.mktemp("checkpoints"))
    toy = tmp_path_factory.mktemp("toy")
    assert in_ranks(1, rank, "toy", found, run, toy, "one") == [0]
    return found | {"toy": str(toy)}


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


def rank(name, at, run, out, mode, monitor=Notes):
    file = name.removesuffix("-frozen")
    parallel = "fsdp" if mode == "fsdp" else "ddp"
    recipe = load_training(file, [*shrunken(name, at), f"run.steps={STEPS}", f"compute.parallel={parallel}"])
    train(recipe, run, Path(out), device="cpu", monitor=monitor)


def killed_rank(*args):
    rank(*args, monitor=Killed)


@pytest.mark.parametrize("mode", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_is_killed_and_resumes_bit_for_bit(name, mode, run, at, tmp_path):
    ranks = RANKS[mode]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert in_ranks(ranks, rank, name, at, run, whole, mode) == [0] * ranks
    assert in_ranks(ranks, killed_rank, name, at, run, parts, mode) == [-signal.SIGKILL] * ranks
    assert in_ranks(ranks, rank, name, at, run, parts, mode) == [0] * ranks
    a, b, early = weights(whole, STEPS), weights(parts, STEPS), weights(parts, 2)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert any(not torch.equal(x, early[k]) for k, x in b.items() if k.startswith("model/"))
