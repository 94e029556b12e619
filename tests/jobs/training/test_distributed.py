"""Two processes train as one, keep the same, stop together, and none waits for another that will not come."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from jobs.training import checkpoint
from jobs.training.checkpoint import checkpoints
from jobs.training.distributed import connect
from jobs.training.exported import load_model
from jobs.training.task import Losses
from tests.fixtures.toy_training import Notes, Numbers, Toy, build, in_ranks, recipe, run, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# float32 sums in another order: a few units in the last place of values up to about 3
NEAR = {"rtol": 1e-6, "atol": 1e-6}


def train_rank(out, parallel, steps):
    wanted = {"data": {"micro_batches": 4}, "compute": {"parallel": parallel}}
    run(recipe(run={"steps": steps, "save_every": 100}, **wanted), out)


def near(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **NEAR, msg=lambda said, key=key: f"{key}: {said}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process that accumulates four micro-batches a step, four steps."""
    out = tmp_path_factory.mktemp("alone")
    run(recipe(run={"steps": 4, "save_every": 100}, data={"micro_batches": 4}), out)
    return out


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_that_accumulates_and_one_goes_on(tmp_path, alone, parallel):
    """Micro-batches of 1, 2 and 3 samples, two a rank and step, dropout, a parameter unused at first.

    Two steps on two ranks, then two on one that accumulates: all four equal those of one.
    """
    assert in_ranks(2, train_rank, tmp_path, parallel, 2) == [0, 0]
    meta = json.loads((checkpoints(tmp_path)[2] / "meta.json").read_text())
    assert meta["ranks"] == 2
    assert meta["loader"] == {"batches": 8}
    run(recipe(run={"steps": 4, "save_every": 100}, data={"micro_batches": 4}), tmp_path)
    near(weights(tmp_path, 4), weights(alone, 4))
    near(load_model(tmp_path, ema=0.1).weights["toy"], load_model(alone, ema=0.1).weights["toy"])


def test_one_rank_starts_and_two_go_on_with_shards(tmp_path, alone):
    run(recipe(run={"steps": 2}, data={"micro_batches": 4}), tmp_path)
    assert in_ranks(2, train_rank, tmp_path, "fsdp", 4) == [0, 0]
    near(weights(tmp_path, 4), weights(alone, 4))


class Parts(Toy):
    """Ranks along the context compute every other sample's loss of the batch that they share."""

    def loss(self, phase, model, batch, draws):
        found = super().loss(phase, model, batch, draws)
        mine = torch.arange(len(found.errors)) % self.world.context_size == self.world.context_rank
        error = (
            model(batch["x"] + found.levels[:, None] * draws.normal(batch["x"]), batch["rare"]) - batch["y"]
        )
        return Losses({"clips": (error.square() * mine).sum()})


def parts(recipe, start):
    task, loader = build(recipe, start, task=partial(Parts, dropout=0.0))
    task.world = start.world
    return task, loader


def context_rank(out, parallel, context, steps=4):
    compute = {"parallel": parallel, "context": context}
    wanted = recipe(run={"steps": steps, "save_every": 100}, data={"micro_batches": 4}, compute=compute)
    run(wanted, out, build=parts)
    if os.environ.get("RANK", "0") == "0":
        (out / "rows").write_text(json.dumps(Notes.newest.rows))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("ranks", "context"), [(2, 2), (4, 2)])
def test_ranks_that_share_their_samples_train_as_one(tmp_path, parallel, ranks, context):
    """Dropout is off: the second pass of the net would draw again."""
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    context_rank(tmp_path / "one", parallel, 1)
    assert in_ranks(ranks, context_rank, tmp_path / "many", parallel, context) == [0] * ranks
    near(weights(tmp_path / "many", 4), weights(tmp_path / "one", 4))
    one, many = (json.loads((tmp_path / name / "rows").read_text()) for name in ("one", "many"))
    for step in one:
        assert many[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-5)
        assert many[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-5)


def odd_rank(out):
    try:
        run(recipe(compute={"context": 3}), out)
    except ValueError as e:
        (out / f"said-{os.environ['RANK']}").write_text(str(e))


def test_processes_that_cannot_share_sequences_so_are_told(tmp_path):
    assert in_ranks(2, odd_rank, tmp_path) == [0, 0]
    assert "compute.context 3 does not divide the 2 processes" in (tmp_path / "said-1").read_text()


# ---------------------------------------------------------------- trouble on one rank


class Broken(Numbers):
    def batch(self, number):
        if number == 3:  # rank 1's second
            raise OSError("the disk has gone")
        return super().batch(number)


def broken(recipe, start):
    return build(recipe, start, loader=Broken)


def broken_rank(out):
    try:
        run(recipe(data={"micro_batches": 2}), out, build=broken)
    except (OSError, ValueError) as e:
        (out / f"said-{os.environ['RANK']}").write_text(str(e))


def test_a_rank_that_cannot_read_ends_all_of_them(tmp_path):
    assert in_ranks(2, broken_rank, tmp_path) == [0, 0]
    assert (tmp_path / "said-1").read_text() == "the disk has gone"
    assert "another rank could not read its data" in (tmp_path / "said-0").read_text()


class Infinite(Toy):
    def loss(self, phase, model, batch, draws):
        found = super().loss(phase, model, batch, draws)
        if draws.micro == 5:  # rank 1's third
            found.sums["clips"] = found.sums["clips"] * float("inf")
        return found


def infinite(recipe, start):
    return build(recipe, start, task=Infinite)


def infinite_rank(out):
    try:
        run(recipe(data={"micro_batches": 2}), out, build=infinite)
    except ValueError as e:
        (out / f"said-{os.environ['RANK']}").write_text(str(e))


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_its_clips(tmp_path):
    assert in_ranks(2, infinite_rank, tmp_path) == [0, 0]
    for rank in range(2):
        said = (tmp_path / f"said-{rank}").read_text()
        assert "step 3: the loss" in said
        assert "on the clips clip-5-0, clip-5-1, clip-5-2;" in said
        assert "step 2 is kept" in said
    assert list(checkpoints(tmp_path)) == [2]


def full_rank(out):
    if os.environ["RANK"] == "0":  # which makes the plain files, and gives a checkpoint its name

        def export(partial, out):
            raise OSError(28, "No space left on device")

        checkpoint.export = export
    try:
        run(recipe(data={"micro_batches": 2}), out)
    except ValueError as e:
        (out / f"said-{os.environ['RANK']}").write_text(str(e))


def test_a_checkpoint_that_the_first_rank_cannot_write_ends_all_of_them(tmp_path):
    assert in_ranks(2, full_rank, tmp_path) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "cannot be written, no space is left: make some" in said[0]
    assert list(checkpoints(tmp_path)) == []


class Signalled(Toy):
    def loss(self, phase, model, batch, draws):
        if draws.micro == 3:  # rank 1's second
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(phase, model, batch, draws)


def signalled(recipe, start):
    return build(recipe, start, task=Signalled)


def signalled_rank(out):
    outcome = run(
        recipe(run={"steps": 100, "save_every": 100}, data={"micro_batches": 2}), out, build=signalled
    )
    (out / f"said-{os.environ['RANK']}").write_text(json.dumps([outcome.step, outcome.signal]))


def test_a_signal_to_one_rank_saves_on_all_at_the_same_step(tmp_path):
    assert in_ranks(2, signalled_rank, tmp_path) == [0, 0]
    assert [json.loads((tmp_path / f"said-{r}").read_text()) for r in range(2)] == [[2, 15], [2, 15]]
    assert list(checkpoints(tmp_path)) == [2]


# ---------------------------------------------------------------- who is there


def test_alone_nothing_is_started():
    with connect("cpu") as world:
        assert (world.rank, world.size) == (0, 1)
        assert world.sum(2, True) == [2, True]
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ValueError, match=r"give (--device )?cpu"), connect(name):
        time.sleep(0)


FAULTS = """
import resource, sys, torch
from jobs.training.distributed import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    return [torch.ones(12_000_000) for _ in range(3)]
for _ in range(10):  # until the blocks have found their places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc's malloc is left as it is")
def test_memory_that_a_step_frees_is_there_for_the_next():
    """Pages that are mapped anew in five steps of 144 MB."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    if not faults["leave"]:
        pytest.skip("this kernel counts no page faults")
    assert faults["keep"] < 0.1 * faults["leave"]
