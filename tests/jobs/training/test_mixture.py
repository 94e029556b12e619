"""Training on several runs in set shares: each is read as it is alone, and a killed training goes on bit for bit."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from jobs import encode
from jobs.training.data.loader import Loader
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.diffusion.task import build, measure, mixed_normalizer
from jobs.training.loop import train
from jobs.training.needs import models
from jobs.training.recipe import load_training
from jobs.training.recipe_core import Data
from models.autoencoders.latents import Statistics
from pipeline.faults import StoreError
from pipeline.recipe import RecipeError
from pipeline.shards.order import Sequential
from pipeline.shards.reader import ShardReader
from tests.fixtures.run_folder import make_sharded_run
from tests.fixtures.toy_training import Notes, start, weights

SHAPES = [(4, 32, 32), (8, 32, 56)]
POSITIONS = [4 * 16, 8 * 28]
SHARES = [0.55, 0.45]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of 6 and 3 sources."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, sources in (("many", 6), ("few", 3)):
        make_sharded_run(folder / name, sources=sources, seed=sources)
    return [str(folder / name) for name in ("many", "few")]


def reader(run, **options):
    return ShardReader(f"{run}/shards", fps=4.0, shapes=SHAPES, layout="CTHW", decode=False, **options)


def loader(runs, shares=SHARES, sequential=None, **options):
    readers = [reader(run, sequential=sequential) for run in runs]
    return Loader(readers, POSITIONS, shares=shares, **({"tokens": 300} | options))


def take(loader, n):
    return [tuple(batch["key"]) for batch in itertools.islice(loader, n)]


@pytest.mark.parametrize("packed", [False, True])
def test_each_run_has_its_share_of_the_micro_batches_and_is_read_as_it_is_alone(runs, packed):
    mixed, alone = loader(runs, packed=packed), [loader([r], [1.0], packed=packed) for r in runs]
    n = 2 * mixed.epoch_length
    source = [mixed.clips.index(mixed.at(i)[0]) for i in range(n)]
    found = take(mixed, n)
    for s, one in enumerate(alone):
        mine = [keys for keys, of in zip(found, source, strict=True) if of == s]
        assert mine == take(one, len(mine))
        assert np.abs(np.cumsum(np.array(source) == s) - SHARES[s] * np.arange(1, n + 1)).max() < 1
        assert len(mine) >= one.epoch_length
    assert "55.0% of the micro-batches" in mixed.table()


def test_in_streams_each_run_gives_as_many_micro_batches_in_a_row_as_there_are_streams(runs):
    how = Sequential(together=2, window=4, streams=3)
    mixed, alone = loader(runs, sequential=how), [loader([r], [1.0], how) for r in runs]
    source = np.array([mixed.clips.index(mixed.at(i)[0]) for i in range(60)]).reshape(-1, 3)
    assert (source == source[:, :1]).all()
    assert np.abs(np.cumsum(source[:, 0] == 1) - SHARES[1] * np.arange(1, 21)).max() < 1
    found = take(mixed, 60)
    for s, one in enumerate(alone):
        mine = [keys for keys, of in zip(found, source.ravel(), strict=True) if of == s]
        assert mine == take(one, len(mine))
        epoch = mine[: len(one.clips[0].order)]
        assert set(itertools.chain(*epoch)) == set(one.readers[0].keys)
    assert "streams" not in mixed.table()
    assert "data.streams 3 is no multiple of 4" in loader(runs, sequential=how, world=2, workers=2).table()
    with pytest.raises(ValueError, match="the saved state has sequential None"):
        mixed.load_state_dict(loader(runs).state_dict())


@pytest.mark.parametrize("sequential", [None, Sequential(2, 4, 6)], ids=["full", "shards"])
@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 2)])
def test_ranks_and_workers_share_one_list_and_resume_in_it(runs, world, workers, sequential):
    options = {"stills": 4, "sequential": sequential}
    alone = take(loader(runs, **options), 18)
    before = loader(runs, **options)
    assert take(before, 6) == alone[:6]
    state = json.loads(json.dumps(before.state_dict()))
    ranks = [loader(runs, rank=r, world=world, workers=workers, **options) for r in range(world)]
    for one in ranks:
        one.load_state_dict(state)
    rest = [take(one, 12 // world) for one in ranks]
    assert [keys for step in zip(*rest, strict=True) for keys in step] == alone[6:]


def test_a_state_of_other_shares_or_of_another_run_is_refused_by_name(runs):
    state = loader(runs).state_dict()
    with pytest.raises(
        ValueError, match=r"the saved state has shares \[11, 9\], this loader \[3, 2\]; use the"
    ):
        loader(runs, [0.6, 0.4]).load_state_dict(state)
    with pytest.raises(ValueError, match=f"{runs[1]}/shards has other clips than training began with"):
        loader(runs).load_state_dict(loader([runs[0], runs[0]]).state_dict())


def test_clips_of_a_bucket_are_taken_from_each_run_in_its_share(runs):
    one = loader(runs)
    found = one.of_shape(SHAPES[0], 1000, 3)
    counts = [int((r.bucket == 0).sum()) for r in one.readers]
    assert len(set(found)) == len(found) == sum(counts) == one.buckets[SHAPES[0]]
    assert one.of_shape(SHAPES[0], 4, 3) == found[:4]
    first = one.of_shape(SHAPES[1], 4, 3)
    assert [one.readers.index(r) for r, _ in first] == [one.mixture.at(i)[0] for i in range(4)]
    alone = loader([runs[0]], [1.0])
    rows = np.flatnonzero(alone.readers[0].bucket == 0)
    wanted = np.random.default_rng(3).permutation(rows).tolist()
    assert [row for _, row in alone.of_shape(SHAPES[0], 1000, 3)] == wanted


# ------------------------------------------------------------ diffusion


def recipe(runs, **sections):
    buckets = [{"frames": 4, "height": 32, "width": 32}]
    data = {"fps": 4, "buckets": buckets, "batch": 2, "workers": 0, "micro_batches": 2}
    data |= {"mixture": [{"data": runs[1], "share": 0.4}]} | sections.pop("data", {})
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "data": data,
            "autoencoder": {"kind": "dct", "patch": 8, "keep": 3},
            "text": {"kind": "words", "length": 16, "width": 16, "depth": 1},
            "model": {"kind": "dit", "dim": 32, "depth": 1, "heads": 2},
            "optimizer": {"warmup": 2},
            "run": {"steps": 4, "save_every": 2, "log_every": 1, "sample_every": 0} | sections.pop("run", {}),
        }
        | sections
    )


def trained(made, runs, out):
    train(made, runs[0], out, device="cpu", monitor=Notes)
    return weights(out, made.run.steps)


def test_diffusion_trains_on_the_caches_of_two_runs_and_resumes_bit_for_bit(runs, tmp_path):
    for name, run in zip("ab", runs, strict=True):
        encode.encode(run, recipe(runs), str(tmp_path / name))
    mixture = [{"data": runs[1], "share": 0.4, "cache": str(tmp_path / "b")}]
    data = {"cache": str(tmp_path / "a"), "mixture": mixture, "shuffle": "shards", "streams": 2}
    whole = trained(recipe(runs, data=data), runs, tmp_path / "whole")
    trained(recipe(runs, data=data, run={"steps": 2}), runs, tmp_path / "parts")
    parts = trained(recipe(runs, data=data), runs, tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_diffusion_trains_on_the_pixels_of_two_runs_and_the_second_has_its_part_in_it(runs, tmp_path):
    steps = {"steps": 1, "sample_every": 0}
    both = trained(recipe(runs, run=steps), runs, tmp_path / "both")
    alone = trained(recipe(runs, data={"mixture": []}, run=steps), runs, tmp_path / "alone")
    assert any(not torch.equal(both[name], alone[name]) for name in both)


def test_the_normaliser_of_several_caches_is_that_of_their_latents_in_their_shares():
    rng = torch.Generator().manual_seed(0)
    latents = [torch.randn(3, 4, 2, 5, 5, generator=rng) * (i + 1) + i for i in range(2)]
    found = []
    for each in (*latents, torch.cat([latents[0]] * 3 + [latents[1]])):
        measured = Statistics(4)
        measured.add(each)
        found.append(measured.normalizer())
    told = [{"mean": n.mean.tolist(), "std": n.std.tolist()} for n in found]
    mixed = mixed_normalizer(told[:2], [0.75, 0.25])
    torch.testing.assert_close(mixed.mean, found[2].mean)
    torch.testing.assert_close(mixed.std, found[2].std)
    assert torch.equal(mixed_normalizer(told[:1], [1.0]).std, found[0].std)


# ------------------------------------------------------------ what is wrong, in one sentence


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"mixture": [{"data": "x", "share": 0.7}, {"data": "y", "share": 0.3}]},
            "the shares add up to 1: leave",
        ),
        ({"mixture": [{"data": "x", "share": 0}]}, "greater than or equal to 0.0001"),
        ({"mixture": [{"data": "x", "share": 0.5}], "cache": "c"}, "mixture: x has no cache"),
        (
            {"mixture": [{"data": "x", "share": 0.5, "cache": "c"}]},
            "the run that is named to train has no cache",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_where_it_is_read(runs, data, told):
    with pytest.raises(ValidationError, match=told):
        recipe(runs, data=data)


def test_a_run_of_the_mixture_without_clips_is_named(runs, tmp_path):
    def beside(name):
        return recipe(runs, data={"mixture": [{"data": str(tmp_path / name), "share": 0.5}]})

    with pytest.raises(StoreError, match=f"data.mixture {tmp_path}/nothing: .* holds neither index.parquet"):
        build(beside("nothing"), start(runs[0]))
    short = pa.table({"clip_id": ["a"], "duration_s": [0.1], "width": [64], "height": [64]})
    (tmp_path / "short/shards").mkdir(parents=True)
    pq.write_table(short, tmp_path / "short/shards/index.parquet")
    with pytest.raises(StoreError, match=f"data.mixture {tmp_path}/short: none of 1 clips fills a bucket"):
        build(beside("short"), start(runs[0]))


def test_what_a_mixture_names_is_looked_for_before_any_work(runs):
    mixture = [{"data": runs[1], "share": 0.3, "cache": "b"}, {"data": "nowhere", "share": 0.3, "cache": "c"}]
    wanted = dict(models(recipe(runs, data={"mixture": mixture, "cache": "a"})))
    assert wanted[f"data: {runs[1]}"]() == "a folder"
    with pytest.raises(RecipeError, match=r"data\.mixture\.1\.data: nowhere is not there; it comes from"):
        wanted["data: nowhere"]()
    with pytest.raises(
        RecipeError, match=r"data\.mixture\.0\.cache: b is not there; it comes from clipmill encode"
    ):
        wanted["data: b"]()


def test_paths_of_a_mixture_are_found_from_the_folder_of_the_recipe(runs, tmp_path):
    (tmp_path / "r.yaml").write_text("base: toy\ndata:\n  mixture: [{data: more, share: 0.25}]\n")
    made = load_training(str(tmp_path / "r.yaml"))
    assert made.data.mixture[0].data == str(tmp_path / "more")
    assert made.data.shares() == [0.75, 0.25]
    assert Data().shares() == [1.0]


def test_the_largest_share_leaves_the_run_that_is_named_the_smallest(runs):
    mixture = [{"data": runs[1], "share": 0.9999}]
    _, made = build(recipe(runs, data={"mixture": mixture}), start(runs[0]))
    assert made.mixture.parts == [1, 9999]


def test_the_normaliser_is_measured_on_all_runs_where_each_gives_micro_batches_in_a_row(runs):
    data = {"shuffle": "shards", "streams": 40}  # of which one row has more clips than are measured
    task, loader = build(recipe(runs, data=data), start(runs[0]))
    seen = set()
    loader.batch, taken = lambda n: seen.add(loader.mixture.at(n)[0]) or taken(n), loader.batch
    measure(task.system, loader)
    assert seen == {0, 1}
