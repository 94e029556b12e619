"""Checkpoints: whole or not there, wherever a run is killed; and what `load_model` makes of them."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from jobs.training import checkpoint, exported
from jobs.training.checkpoint import checkpoints, difference, lock
from jobs.training.distributed import World
from jobs.training.exported import CheckpointError, load_model, read_meta
from models.ema import Profile, error, exponent
from tests.fixtures.toy_training import Numbers, Process, Toy, build, in_ranks, recipe, run, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
STEPS = 4


def wanted(**sections):
    return recipe(run={"steps": STEPS, "save_every": 1, "keep": 2}, **sections)


class Late(Numbers):
    """A loader that takes its time, so that there is a moment to be killed in."""

    def batch(self, number):
        time.sleep(0.02)
        return super().batch(number)


def late(recipe, start):
    return build(recipe, start, loader=Late)


def train_late(out):
    run(wanted(), out, build=late)


def train_and_die(out, where):
    """As `train_late`, but killed in the middle of the third checkpoint."""
    calls = itertools.count(1)
    names = {
        "data": (FileSystemWriter, "write_data"),
        "export": (checkpoint, "export"),
        "prune": (checkpoint, "prune"),
    }
    names["name"] = (checkpoint, "publish")
    module, name = names[where]
    real = getattr(module, name)

    def deadly(*args, **options):
        if where == "name" and not args[1].is_dir() and not args[1].name.startswith("step-"):
            return real(*args, **options)
        if next(calls) < 3:
            return real(*args, **options)
        if where == "data":
            (Path(args[0].path) / "__0_0.distcp").write_bytes(b"half")
        if where == "prune":
            old = next(iter(checkpoints(out).values()))
            old.replace(old.with_name(old.name + ".partial"))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("dead")

    setattr(module, name, deadly)
    train_late(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    run(wanted(), out)
    return out


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def is_like(out, whole):
    assert list(checkpoints(out)) == list(checkpoints(whole)) == [STEPS - 1, STEPS]
    same(weights(out, STEPS), weights(whole, STEPS))
    assert not [*out.rglob("*.partial")]
    for kind in ("", "ema/"):
        names = [p.name for p in sorted((whole / kind).glob("*.safetensors"))]
        assert [p.name for p in sorted((out / kind).glob("*.safetensors"))] == names
        for name in names:
            same(load_file(out / kind / name), load_file(whole / kind / name))


def test_killed_at_any_moment_and_started_again_nothing_is_lost(tmp_path, whole):
    """kill -9 at seeded moments, again and again, until a process gets through."""
    draw = random.Random(1)
    kills, last = 0, 0
    while True:
        process = Process(train_late, tmp_path)
        if kills < 3:
            end = time.monotonic() + 30
            while len(list(checkpoints(tmp_path))) < min(1 + kills, 2) and time.monotonic() < end:
                time.sleep(0.005)
                if not process.is_alive():
                    break
            process.join(draw.uniform(0, 0.4))
        else:
            process.join(60)
        process.kill()
        process.join()
        now = max(checkpoints(tmp_path), default=0)
        assert now >= last  # what was once saved is never lost
        last = now
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills
    is_like(tmp_path, whole)


@pytest.mark.parametrize(("where", "left"), [("data", 2), ("export", 2), ("name", 2), ("prune", 3)])
def test_killed_while_a_checkpoint_is_written_the_one_before_is_used(tmp_path, whole, where, left):
    process = Process(train_and_die, tmp_path, where)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert max(checkpoints(tmp_path)) == left
    assert [*tmp_path.rglob("*.partial")]
    run(wanted(), tmp_path)
    is_like(tmp_path, whole)


def test_training_goes_on_while_a_checkpoint_is_written_and_its_content_is_of_its_step(tmp_path, monkeypatch):
    real, began = FileSystemWriter.write_data, []

    def slow(*args, **options):
        began.append(time.perf_counter())
        time.sleep(0.5)
        return real(*args, **options)

    taken = []

    class Timed(Toy):
        def loss(self, phase, model, batch, draws):
            taken.append((draws.micro, time.perf_counter()))
            return super().loss(phase, model, batch, draws)

    def timed(recipe, start):
        return build(recipe, start, task=Timed)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    run(recipe(run={"steps": 4, "save_every": 2}), tmp_path / "slow", build=timed)
    meanwhile = [micro for micro, at in taken if at < began[0] + 0.5]
    assert 3 in meanwhile  # step 4, before whose own checkpoint it waits
    monkeypatch.setattr(FileSystemWriter, "write_data", real)
    run(recipe(run={"steps": 2}), tmp_path / "plain")
    same(weights(tmp_path / "slow", 2), weights(tmp_path / "plain", 2))


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(ValueError, match="cannot be written, no space is left: make some; the same command"):
        run(wanted(), tmp_path)


def test_it_holds_all_that_is_needed_to_go_on(whole):
    meta = read_meta(checkpoints(whole)[STEPS])
    assert meta["step"] == STEPS
    assert meta["loader"] == {"batches": STEPS}
    assert meta["recipe"] == wanted().model_dump(mode="json")
    assert meta["ranks"] == 1
    kinds = {key.split("/")[0] for key in weights(whole, STEPS)}
    assert kinds == {"model", "ema", "optimizer"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr 0.01, this recipe has 0.5"),
        ({"ema": {"lengths": (0.2,)}}, "ema.lengths [0.05, 0.1], this recipe has [0.2]"),
        ({"compute": {"precision": "bf16"}}, "compute.precision 'fp32', this recipe has 'bf16'"),
    ],
)
def test_another_recipe_is_refused_by_the_key_that_differs(tmp_path, change, says):
    run(recipe(run={"steps": 1}), tmp_path)
    before = (checkpoints(tmp_path)[1] / "__0_0.distcp").read_bytes()
    with pytest.raises(CheckpointError) as e:
        run(recipe(run={"steps": 2}, **change), tmp_path)
    assert says in str(e.value)
    assert "another --out" in str(e.value)
    assert (checkpoints(tmp_path)[1] / "__0_0.distcp").read_bytes() == before


def test_how_long_and_on_how_much_hardware_may_differ():
    a = recipe().model_dump(mode="json")
    b = recipe(run={"steps": 9}, data={"workers": 0}, compute={"parallel": "fsdp"})
    assert difference(a, b.model_dump(mode="json")) is None
    assert difference(a, recipe(data={"tokens": 7}).model_dump(mode="json")) == ("data.tokens", 8192, 7)
    adapters = {"rank": 4, "alpha": 8.0}
    for one, other in (({"lora": adapters}, {"lora": None}), ({"lora": None}, {"lora": adapters})):
        assert difference(a | one, a | other) == ("lora", one["lora"], other["lora"])
    assert difference(a | {"lora": adapters}, a) == ("lora", adapters, None)
    assert difference(a | {"lora": adapters}, a | {"lora": adapters | {"rank": 2}}) == ("lora.rank", 4, 2)


def test_another_model_is_refused_by_the_weight_that_differs(tmp_path):
    run(recipe(run={"steps": 1}), tmp_path)

    class Wider(Toy):
        def __init__(self, recipe, device):
            super().__init__(recipe, device)
            module = self.phases[0].module
            module.out = torch.nn.Linear(8, 2)
            self.phases[0].optimizer = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)

    def wider(recipe, start):
        return build(recipe, start, task=Wider)

    with pytest.raises(CheckpointError, match=r"model/toy/out.* of shape \[1"):
        run(recipe(run={"steps": 2}), tmp_path, build=wider)


# ---------------------------------------------------------------- damaged ones


def cut_off(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lost(folder, name):
    (folder / name).unlink()


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (cut_off, "__0_0.distcp"),
        (lost, "__0_0.distcp"),
        (cut_off, ".metadata"),
        (lost, "meta.json"),
        (cut_off, "meta.json"),
        (cut_off, "task.pt"),
    ],
)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_goes_on(tmp_path, whole, harm, name, capsys):
    run(wanted(), tmp_path)
    harm(checkpoints(tmp_path)[STEPS], name)
    run(wanted(), tmp_path)
    said = capsys.readouterr().err
    assert re.search(
        rf"clipmill train: \S*step-0*{STEPS} is damaged: .*; going on from step {STEPS - 1}", said
    )
    assert (tmp_path / "checkpoints" / f"step-{STEPS:08d}.broken").is_dir()
    is_like(tmp_path, whole)


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path):
    run(wanted(), tmp_path)
    for folder in checkpoints(tmp_path).values():
        lost(folder, "meta.json")
    with pytest.raises(
        CheckpointError, match=r"meta.json is missing; none before it is whole: give another --out"
    ):
        run(wanted(), tmp_path)
    assert len(checkpoints(tmp_path)) == 2


# ---------------------------------------------------------------- one training at a time


def train_until_killed(out):
    run(recipe(run={"steps": 10**6, "save_every": 1}), out, build=late)


def test_a_second_training_into_the_same_folder_is_refused_until_the_first_has_died(tmp_path):
    first = Process(train_until_killed, tmp_path)
    end = time.monotonic() + 30
    while not checkpoints(tmp_path) and time.monotonic() < end:
        time.sleep(0.01)
    before = max(checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match=rf"is being trained into by process {first.pid} on .*: wait"):
        run(recipe(run={"steps": 10**6, "save_every": 1}), tmp_path)
    first.kill()
    first.join()
    step = max(checkpoints(tmp_path))
    assert step >= before
    assert run(recipe(run={"steps": step + 1, "save_every": 1}), tmp_path).step == step + 1


def refused_rank(out):
    try:
        run(recipe(data={"micro_batches": 2}), out)
    except CheckpointError as e:
        (out / f"said-{os.environ['RANK']}").write_text(str(e))


def test_all_ranks_of_a_second_training_are_refused(tmp_path):
    with lock(tmp_path, World(0, 1, torch.device("cpu"))):
        assert in_ranks(2, refused_rank, tmp_path) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert f"trained into by process {os.getpid()} on" in said[0]


# ---------------------------------------------------------------- what is frozen


class Published(Toy):
    """Whose frozen parameter is of a file that someone else published."""

    value: ClassVar = 3.0

    def __init__(self, recipe, device):
        super().__init__(recipe, device)
        self.phases[0].module.frozen.data[:] = self.value
        self.phases[0].published = ("frozen",)


def published(recipe, start):
    return build(recipe, start, Published)


def test_what_is_frozen_is_kept_once_and_in_no_checkpoint(whole):
    assert not [key for key in weights(whole, STEPS) if "frozen" in key]
    assert load_file(whole / "frozen.safetensors").keys() == {"toy/frozen"}


def test_a_fine_tune_goes_on_with_what_was_frozen_whatever_is_made_anew(tmp_path):
    class Other(Toy):
        def __init__(self, recipe, device):
            super().__init__(recipe, device)
            self.phases[0].module.frozen.data[:] = 7.0

    made = []

    def other(recipe, start):
        made.append(build(recipe, start, Other)[0])
        return made[-1], Numbers(0, 1)

    run(recipe(run={"steps": 2}), tmp_path)
    run(recipe(run={"steps": 3}), tmp_path, build=other)
    assert made[0].phases[0].module.frozen.item() == 1
    assert load_model(tmp_path).weights["toy"]["frozen"].item() == 1
    (tmp_path / "frozen.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"frozen, which is frozen, is not what it was in training: give back"
    ):
        run(recipe(run={"steps": 4}), tmp_path, build=other)


def test_published_weights_are_not_kept_but_must_be_the_same_again(tmp_path, monkeypatch):
    run(recipe(run={"steps": 2}), tmp_path, build=published)
    assert not (tmp_path / "frozen.safetensors").exists()
    trained = load_model(tmp_path)
    module = Published(wanted(), torch.device("cpu")).phases[0].module
    trained.load_into(module, "toy")
    assert torch.equal(module.out.weight, trained.weights["toy"]["out.weight"])
    monkeypatch.setattr(Published, "value", 3.001)
    with pytest.raises(CheckpointError, match="is not what it was in training"):
        trained.load_into(Published(wanted(), torch.device("cpu")).phases[0].module, "toy")
    with pytest.raises(CheckpointError, match="is not what it was in training"):
        run(recipe(run={"steps": 3}), tmp_path, build=published)


# ---------------------------------------------------------------- models to use


def test_the_newest_weights_load_into_the_module_without_the_run(whole):
    found = load_model(whole)
    assert found.step == STEPS
    assert found.recipe["optimizer"]["lr"] == 0.01
    assert found.state["words"] == ["a", "b"]
    assert torch.equal(found.state["scale"], torch.tensor([0.5]))
    module = Toy(wanted(), torch.device("cpu")).phases[0].module
    module.load_state_dict(found.weights["toy"])
    last = weights(whole, STEPS)
    for name, x in module.state_dict().items():  # what is frozen is beside the checkpoints
        assert torch.equal(x, torch.ones(1) if name == "frozen" else last[f"model/toy/{name}"])


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_an_average_that_was_kept_is_given_exactly(whole, length):
    found, last = load_model(whole, ema=length).weights["toy"], weights(whole, STEPS)
    for name, x in found.items():
        key = f"ema/toy/{length}/{name}"
        assert name == "frozen" or torch.equal(x, last[key] if key in last else last[f"model/toy/{name}"])
    assert torch.equal(found["frozen"], torch.ones(1))


def test_any_other_length_is_near_the_average_over_all_steps(tmp_path):
    raw = []

    class Recorded(Toy):
        def __init__(self, recipe, device):
            super().__init__(recipe, device)
            net, optimizer = self.phases[0].module, self.phases[0].optimizer
            optimizer.register_step_post_hook(lambda *_: raw.append(net.out.weight.detach().double().clone()))

    def recorded(recipe, start):
        return build(recipe, start, task=Recorded)

    steps = 30
    run(recipe(run={"steps": steps, "save_every": 1}), tmp_path, build=recorded)
    spread = torch.stack(raw).std(0).norm()
    for length in (0.07, 0.15, 0.2):
        got = load_model(tmp_path, ema=length).weights["toy"]["out.weight"]
        share = np.diff((np.arange(steps + 1) / steps) ** (exponent(length) + 1))
        exact = sum(w * x for w, x in zip(share, raw, strict=True))
        assert float((got - exact).norm() / spread) < 0.05
        assert float((raw[-1] - exact).norm() / spread) > 0.1  # the weights themselves are not


@pytest.mark.parametrize("saves", [33, 100, 1000])
def test_thinned_snapshots_still_span_every_length(tmp_path, saves):
    (tmp_path / "ema").mkdir()
    for step in range(1, saves + 1):
        (tmp_path / "ema" / f"{step:08d}.safetensors").touch()
        checkpoint.prune(tmp_path, keep=1)
    kept = sorted(int(p.stem) for p in (tmp_path / "ema").iterdir())
    assert len(kept) <= checkpoint.SNAPSHOTS
    assert kept[-1] == saves
    evenly = [max(1, round(saves * (i + 1) / checkpoint.SNAPSHOTS)) for i in range(checkpoint.SNAPSHOTS)]
    thinned, even = ([Profile(t, s) for t in steps for s in (0.05, 0.1)] for steps in (kept, evenly))
    for length, most in ((0.03, 0.025), (0.07, 0.005), (0.15, 0.01), (0.2, 0.01), (0.25, 0.05)):
        assert error(thinned, Profile(saves, length)) < most
        assert error(thinned, Profile(saves, length)) < 2.5 * error(even, Profile(saves, length))


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors: give a folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.json", "model.pt", "ema", "frozen.safetensors", "no model.pt"]
)
def test_a_file_that_was_half_copied_is_named_with_what_to_do(tmp_path, whole, name):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    file = max((copy / "ema").glob("*")) if name == "ema" else copy / name.removeprefix("no ")
    file.write_bytes(file.read_bytes()[:90] if file.exists() else b"0")
    if name.startswith("no "):
        file.unlink()
    with pytest.raises(CheckpointError) as e:
        load_model(copy, 0.1)
    assert str(e.value).startswith(f"{file} cannot be read (")
    assert str(e.value).endswith("): copy it again from where it was trained")
    if name == "ema":
        with pytest.raises(CheckpointError, match="cannot be read"):
            exported.longest_average(copy)


def test_plain_files_made_a_tensor_at_a_time_are_the_same(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(exported, "AT_ONCE", 1)
    exported.export(checkpoints(whole)[STEPS], tmp_path)
    for name in ("model.safetensors", f"ema/{STEPS:08d}.safetensors"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    stored = weights(whole, STEPS)
    model = load_file(tmp_path / "model.safetensors")
    same(
        {f"model/{name}": x for name, x in model.items()},
        {k: x for k, x in stored.items() if k.startswith("model/")},
    )


def test_averages_that_were_not_kept_are_one_sentence(tmp_path):
    run(recipe(run={"steps": 1}, ema={"lengths": ()}), tmp_path)
    assert not (tmp_path / "ema").exists()
    with pytest.raises(CheckpointError, match="no averages were kept"):
        load_model(tmp_path, ema=0.1)


def test_only_the_last_are_kept(tmp_path):
    run(recipe(run={"steps": 5, "save_every": 2, "keep": 2}), tmp_path)
    assert list(checkpoints(tmp_path)) == [4, 5]
    assert json.loads((tmp_path / "model.json").read_text())["step"] == 5


def test_a_half_written_checkpoint_is_never_found(tmp_path):
    for name in ("step-00000003", "step-00000004.partial", "step-x", "step-00000005.partial.1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list(checkpoints(tmp_path)) == [3]
    checkpoint.clean(tmp_path, 3)
    assert not (tmp_path / "checkpoints" / "step-00000004.partial").exists()


def test_a_folder_of_another_trainer_is_told_by_what_it_trains():
    saved, now = {"answer": 64, "trains": "vlm"}, {"features": {"text": "minilm"}, "trains": "selector"}
    assert difference(saved, now) == ("trains", "vlm", "selector")
