"""Under FSDP networks are made whole on one rank at most, and every rank has the weights of that one in its shards."""

import os
from importlib import import_module

import pytest
import torch
from torch import nn

from jobs.training.distributed import World, connect
from jobs.training.loop import train
from jobs.training.parallelize import made_on, make, on_meta, parallelize
from jobs.training.recipe_core import Compute
from jobs.training.task import Start
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.shrunken import NAMES, checkpoints, load
from tests.fixtures.toy_training import Notes, in_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    return make_sharded_run(folder, sources=6)


@pytest.fixture(scope="module")
def at(tmp_path_factory, run):
    """Tiny checkpoints, a model that toy-frames starts from, and the codes of world models."""
    found = checkpoints(tmp_path_factory.mktemp("checkpoints"))
    for name in ("toy", "vq"):
        out = tmp_path_factory.mktemp(name)
        assert in_ranks(1, trained, name, found, run, out, 2) == [0]
        found[name] = str(out)
    return found


def recipe_of(name, at, *more):
    looked = (
        [] if name.endswith("selector") else ["run.sample_every=0"]
    )  # a selector is written when it is looked at
    return load(name, at, "compute.parallel=fsdp", *looked, *more)


def trained(name, at, run, out, steps, build=None):
    train(recipe_of(name, at, f"run.steps={steps}"), run, out, device="cpu", monitor=Notes, build=build)


# ---------------------------------------------------------------- new weights


def compared(names, at, run, out):
    """Writes which ranks had weights before sharding, and names of tensors that differ from those made whole."""
    with connect("cpu") as world:
        for name in names:
            recipe = recipe_of(name, at)
            build = import_module(f"jobs.training.{recipe.trains}.task").build
            whole, _ = build(recipe, Start(run, out, world))
            task, _ = build(recipe, Start(run, out, world, made_on=made_on(recipe.compute, world, False)))
            for phase, plain in zip(task.phases, whole.phases, strict=True):
                met = [p.is_meta for p in phase.module.parameters()]
                assert all(met) if world.rank else not any(met)
                blocks = task.blocks(phase.module)
                parallelize(phase.module, blocks, phase.optimizer, recipe.compute, world, [])
                same(phase.module, plain.module)
                own = dict(phase.module.named_parameters())
                shards = {id(p) for p in own.values() if p.requires_grad}
                assert {id(p) for g in phase.optimizer.param_groups for p in g["params"]} == shards
        (out / f"done-{world.rank}").write_text(" ".join(names))


def same(module: nn.Module, plain: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        mine, wanted = (dict(getattr(m, kind)()) for m in (module, plain))
        assert mine.keys() == wanted.keys()
        for name, x in mine.items():
            full = x.full_tensor() if hasattr(x, "full_tensor") else x
            assert full.dtype == wanted[name].dtype
            assert torch.equal(full, wanted[name]), name
            if kind == "named_parameters":
                assert x.requires_grad == wanted[name].requires_grad
                assert x.to_local().numel() <= -(-x.shape[0] // 2) * max(x[0].numel(), 1)


@pytest.mark.parametrize("names", [NAMES[i::4] for i in range(4)], ids=" ".join)
def test_networks_have_the_weights_that_they_have_when_every_rank_makes_them_whole(names, run, at, tmp_path):
    assert in_ranks(2, compared, names, at, run, tmp_path) == [0, 0]
    assert [(tmp_path / f"done-{rank}").read_text() for rank in range(2)] == [" ".join(names)] * 2


# ---------------------------------------------------------------- resumed


def with_shapes_alone(recipe, start):
    task, loader = import_module(f"jobs.training.{recipe.trains}.task").build(recipe, start)
    assert all(p.is_meta for phase in task.phases for p in phase.module.parameters())
    return task, loader


def test_a_resumed_run_makes_no_weights_on_any_rank(run, at, tmp_path):
    """That it goes on as if it had not stopped is for test_systems.py."""
    assert in_ranks(2, trained, "small", at, run, tmp_path, 2) == [0, 0]
    assert in_ranks(2, trained, "small", at, run, tmp_path, 4, with_shapes_alone) == [0, 0]


# ---------------------------------------------------------------- one rank fails


def failing(at, run, out):
    """'weights' that are none: the first rank alone reads them."""
    recipe = recipe_of("sora", at, f"model.weights={at['unet']}")
    try:
        train(recipe, run, out / "out", device="cpu", monitor=Notes)
    except ValueError as e:
        (out / f"said-{os.environ['RANK']}").write_text(str(e))
        raise SystemExit(3) from e


def test_what_the_first_rank_cannot_read_is_said_by_all(run, at, tmp_path):
    assert in_ranks(2, failing, at, run, tmp_path) == [3, 3]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "holds a UNet2DConditionModel" in said[0]


# ---------------------------------------------------------------- the parts


def test_only_fsdp_on_several_ranks_makes_networks_elsewhere():
    alone = World(0, 1, torch.device("cpu"))
    assert made_on(Compute(parallel="fsdp"), alone, True) == torch.device("cpu")


class Forgotten(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(3), persistent=False)


def test_a_buffer_that_no_checkpoint_keeps_is_refused_where_it_would_have_no_value():
    assert not on_meta(make(Forgotten, torch.device("cpu")))
    with pytest.raises(ValueError, match="Forgotten: no checkpoint keeps its buffer table"):
        make(Forgotten, torch.device("meta"))
