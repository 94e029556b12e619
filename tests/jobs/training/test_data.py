"""The trainers' loader: order, weight, resuming and images, against counts and draws made by hand."""

import itertools
import json
import pickle
import subprocess
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.training.data.loader import Loader, build_loader, positions_of
from jobs.training.diffusion.recipe import DiffusionRecipe
from jobs.training.distributed import World
from models.autoencoders.latents import BlockDCT
from pipeline.faults import StoreError
from pipeline.shards.buckets import fit, table
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.fixtures.run_folder import make_sharded_run

SHAPES = [(4, 32, 32), (8, 32, 56), (24, 16, 16)]  # at 4 a second: 1, 2 and 6 s
POSITIONS = [4 * 16, 8 * 28, 24 * 4]  # of blocks of 8×8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """17 clips of 2.5, 5.5 and 9.5 s."""
    folder = tmp_path_factory.mktemp("data") / "run"
    return make_sharded_run(folder, sources=8)


def loader(run, *, seed=0, decode=False, shapes=SHAPES, **options):
    reader = ShardReader(f"{run}/shards", fps=4.0, shapes=shapes, seed=seed, layout="CTHW", decode=decode)
    positions = [t * (h // 8) * (w // 8) for t, h, w in shapes]
    return Loader(reader, positions, **({"tokens": 500} | options))


def take(loader, n):
    return [tuple(batch["key"]) for batch in itertools.islice(loader, n)]


# ------------------------------------------------------------ buckets


def brute(clip, shapes, fps):
    """The rule of `fit` in words, one clip at a time; None where it fills no shape."""
    width, height, seconds = clip
    filled = [s for s in shapes if seconds * fps > s[0] - 0.5]

    def kept(s):
        return round(min(width / height / (s[2] / s[1]), s[2] / s[1] / (width / height)), 6)

    near = [s for s in filled if kept(s) >= max(map(kept, filled)) - 0.05]
    longest = [s for s in near if s[0] == max(s[0] for s in near)]
    alike = [s for s in longest if kept(s) == max(map(kept, longest))]
    fits = [s for s in alike if s[1] <= 1.02 * height and s[2] <= 1.02 * width]
    if fits:
        return max(fits, key=lambda s: s[1] * s[2])
    return min(alike, key=lambda s: s[1] * s[2], default=None)


def sizes(clips):
    return pa.table(
        dict(zip(("width", "height", "duration_s"), map(list, zip(*clips, strict=True)), strict=True))
    )


def test_a_clip_goes_to_the_longest_bucket_that_it_fills_and_that_keeps_its_picture():
    shapes = [
        (8, 64, 64),
        (8, 64, 112),
        (8, 128, 224),
        (8, 112, 64),
        (16, 64, 64),
        (16, 64, 112),
        (32, 64, 64),
    ]
    rng = np.random.default_rng(0)
    columns = rng.integers(40, 400, 200), rng.integers(40, 400, 200), rng.uniform(0.2, 6, 200)
    clips = [(int(w), int(h), float(s)) for w, h, s in zip(*columns, strict=True)]
    found = fit(sizes(clips), shapes, 8.0)
    given = dict(zip(found.rows.tolist(), found.bucket.tolist(), strict=True))
    wanted = [brute(clip, shapes, 8.0) for clip in clips]
    assert [shapes[given[i]] if i in given else None for i in range(200)] == wanted
    assert set(wanted) == {*shapes, None}
    assert found.short.tolist() == [i for i, shape in enumerate(wanted) if shape is None]


def test_a_portrait_clip_keeps_its_picture_however_long_it_is():
    shapes = [(17, 256, 256), (33, 192, 336), (33, 336, 192), (65, 192, 336)]
    found = fit(sizes([(1080, 1920, 20.0), (1920, 1080, 20.0), (1080, 1080, 20.0)]), shapes, 16.0)
    assert [shapes[b] for b in found.bucket] == [(33, 336, 192), (65, 192, 336), (17, 256, 256)]
    assert found.kept.min() > 0.97


def test_buckets_of_one_frame_take_a_still_of_every_clip():
    shapes = [(1, 64, 64), (1, 64, 112), (8, 64, 112)]
    found = fit(sizes([(64, 36, 5.0), (40, 40, 5.0), (64, 36, 0.2)]), shapes, 8.0)
    assert list(zip(found.rows.tolist(), found.bucket.tolist(), strict=True)) == [
        (0, 2), (1, 2), (0, 1), (1, 0), (2, 1)
    ]  # fmt: skip
    assert not len(found.short)
    alone = fit(sizes([(64, 36, 5.0)]), shapes[:2], 8.0)
    assert (alone.rows.tolist(), alone.bucket.tolist()) == ([0], [1])


def test_the_table_tells_what_fills_a_bucket_and_what_is_left_out():
    shapes = [(8, 64, 64), (8, 64, 112), (32, 64, 64)]
    clips = sizes([(64, 64, 2.0), (64, 36, 3.5), (640, 640, 3.0), (64, 64, 0.5)])
    lines = table(fit(clips, shapes, 8.0), shapes, 4, 8.0, clips["duration_s"].to_numpy()).splitlines()
    assert lines == [
        "bucket       8×64×64: 2 clips, 100% of the picture kept; 1 s of 2 to 3 s",
        "bucket       8×64×112: 1 clip, 98% of the picture kept; 1 s of 3.5 to 3.5 s",
        "bucket       32×64×64: no clip fills it, so it is never trained",
        "left out     1 of 4 clips, too short for every bucket",
    ]


def test_clips_that_all_are_too_short_are_refused_with_what_is_missing():
    with pytest.raises(
        StoreError, match=r"none of 2 clips fills a bucket: the longest lasts 0.50 s, 8 frames at 8"
    ):
        fit(sizes([(64, 64, 0.5), (64, 64, 0.25)]), [(8, 64, 64)], 8.0)


def test_one_bucket_needs_no_index_and_several_say_what_is_missing():
    bare = pa.table({"clip_id": ["a", "b"]})
    assert fit(bare, [(4, 8, 8)], 8.0).bucket.tolist() == [0, 0]
    with pytest.raises(StoreError, match="no duration_s"):
        fit(bare, [(4, 8, 8), (8, 8, 8)], 8.0)


# ------------------------------------------------------------ order


def test_every_clip_is_seen_once_an_epoch_over_ranks_but_for_what_fills_the_last_batch(run):
    world = 3
    ranks = [loader(run, rank=r, world=world) for r in range(world)]
    total = ranks[0].epoch_length
    steps = -(-total // world)
    seen = [take(r, steps) for r in ranks]
    numbered = [batch for step in zip(*seen, strict=True) for batch in step][:total]
    counts = Counter(itertools.chain(*numbered))
    assert set(counts) == set(read_index(f"{run}/shards")["clip_id"].to_pylist())
    repeated = sum(counts.values()) - len(counts)
    sizes, clips = ranks[0].made.clips, list(ranks[0].buckets.values())
    assert repeated == sum(-n % size for n, size in zip(clips, sizes, strict=True))
    assert min(clips) < max(sizes)  # a bucket smaller than its batch is there and was not left out


def test_uneven_buckets_give_every_rank_as_many_steps_and_no_rank_ends(run):
    alone = take(loader(run), 60)
    for world in (2, 5, 40):  # of 40 ranks most have no clip of their own
        steps = 60 // world
        ranks = [take(loader(run, rank=r, world=world), steps) for r in range(world)]
        assert [len(r) for r in ranks] == [steps] * world
        assert [b for step in zip(*ranks, strict=True) for b in step] == alone[: steps * world]


def test_epochs_differ_and_the_seed_decides(run):
    one = loader(run)
    n = one.epoch_length
    found = take(one, 2 * n)
    assert found[:n] != found[n:]
    assert set(itertools.chain(*found[:n])) == set(itertools.chain(*found[n:]))
    assert take(loader(run), n) == found[:n] != take(loader(run, seed=1), n)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_order(run, workers):
    assert take(loader(run, workers=workers, rank=1, world=2), 7) == take(loader(run, rank=1, world=2), 7)


# ------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("before", "after"), [((1, 0), (1, 2)), ((2, 1), (3, 0)), ((3, 0), (1, 1)), ((2, 2), (2, 0))]
)
@pytest.mark.parametrize("steps", [0, 3, 11])
def test_resumed_with_other_ranks_and_workers_it_goes_on_with_the_next_micro_batch(run, before, after, steps):
    alone = take(loader(run), 60)
    (world, workers), (world2, workers2) = before, after
    ranks = [loader(run, rank=r, world=world, workers=workers) for r in range(world)]
    taken = [take(r, steps) for r in ranks]
    states = [json.loads(json.dumps(r.state_dict())) for r in ranks]
    assert all(state == states[0] for state in states)
    assert states[0]["batches"] == steps * world
    more = (60 - steps * world) // world2
    rest = []
    for r in range(world2):
        again = loader(run, rank=r, world=world2, workers=workers2)
        again.load_state_dict(states[0])
        rest.append(take(again, min(more, 6)))
    numbered = [b for part in (taken, rest) for step in zip(*part, strict=True) for b in step]
    assert numbered == alone[: len(numbered)]


def test_resumed_pixels_and_captions_are_bit_for_bit_those_of_the_undisturbed_run(run):
    def made(**options):
        return loader(run, decode=True, images=1, **options)

    whole = list(itertools.islice(made(), 8))
    first = made(workers=1)
    list(itertools.islice(first, 5))
    again = made(workers=2)
    again.load_state_dict(first.state_dict())
    for a, b in zip(itertools.islice(again, 3), whole[5:], strict=True):
        assert (a["key"], a["caption"], a["image_key"]) == (b["key"], b["caption"], b["image_key"])
        assert torch.equal(a["video"], b["video"])
        assert torch.equal(a["image_video"], b["image_video"])


@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens": 300}, {"images": 1}, {"stills": 2}])
def test_a_state_of_other_data_or_settings_is_refused(run, change):
    with pytest.raises(ValueError, match="use the same"):
        loader(run, **change).load_state_dict(loader(run).state_dict())


def test_it_can_be_sent_to_another_process(run):
    one = loader(run)
    take(one, 3)
    assert take(pickle.loads(pickle.dumps(one)), 2) == take(loader(run), 5)[3:]


# ------------------------------------------------------------ weight


def test_micro_batches_hold_as_many_clips_as_fit_and_more_than_half_of_the_tokens(run):
    for tokens in (224, 300, 500, 999, 4096):
        one = loader(run, tokens=tokens)
        for batch in itertools.islice(one, one.epoch_length):
            rows = [one.readers[0].keys.index(k) for k in batch["key"]]
            bucket = one.readers[0].bucket[rows[0]]
            assert (one.readers[0].bucket[rows] == bucket).all()
            held = len(rows) * POSITIONS[bucket]
            assert tokens / 2 < held <= tokens
            assert held + POSITIONS[bucket] > tokens
        least, most = one.weights
        assert most / least < 2
    least, most = loader(run, tokens=1344).weights  # the least common multiple of 64, 224 and 96
    assert least == most


def test_a_bucket_larger_than_a_micro_batch_is_an_error_with_the_numbers(run):
    with pytest.raises(ValueError, match=r"8×32×56 has 224 latent positions, more than data.tokens 100"):
        loader(run, tokens=100)
    assert {len(k) for k in take(loader(run, tokens=100, batch=3), 5)} == {3}


# ------------------------------------------------------------ samples


def test_pixels_have_the_shape_of_the_bucket(run):
    one = loader(run, decode=True)
    for batch in itertools.islice(one, one.epoch_length):
        b, c, *shape = batch["video"].shape
        assert (b, c) == (len(batch["key"]), 3)
        assert batch["video"].dtype == torch.uint8
        assert tuple(shape) == SHAPES[one.readers[0].bucket[one.readers[0].keys.index(batch["key"][0])]]


def test_images_are_frames_of_other_clips_in_the_clips_size(run):
    one = loader(run, decode=True, images=3)
    every = read_index(f"{run}/shards")["clip_id"].to_pylist()
    drawn = Counter()
    for batch in itertools.islice(one, one.epoch_length):
        *_, height, width = batch["video"].shape
        assert batch["image_video"].shape == (3 * len(batch["key"]), 3, 1, height, width)
        for i, other in enumerate(batch["image_key"]):
            assert other != batch["key"][i // 3]
            drawn[other] += 1
            frame = one.readers[0].read(every.index(other), (1, height, width))
            assert np.array_equal(batch["image_video"][i].numpy(), frame["video"])
            assert batch["image_caption"][i] == frame["caption"]
    assert len(drawn) > len(every) / 2


def test_single_frames_come_first_as_many_as_the_clips_would_have_then_the_clips_as_ever(run):
    areas = [h // 8 * (w // 8) for _, h, w in SHAPES]
    one, plain = loader(run, decode=True, stills=9, areas=areas), loader(run, decode=True)
    every, seen = read_index(f"{run}/shards")["clip_id"].to_pylist(), Counter()
    batches = list(itertools.islice(one, 14))
    for batch in batches[:9]:
        bucket = plain.readers[0].bucket[every.index(batch["key"][0])]
        _, height, width = SHAPES[bucket]
        assert batch["video"].shape == (plain.made.clips[bucket] * SHAPES[bucket][0], 3, 1, height, width)
        assert set(plain.readers[0].bucket[[every.index(k) for k in batch["key"]]]) == {bucket}
        seen.update(batch["key"])
    assert set(seen) == set(every)
    for a, b in zip(batches[9:], plain, strict=False):
        assert a["key"] == b["key"]
        assert torch.equal(a["video"], b["video"])
    again = loader(run, decode=True, stills=9, areas=areas, rank=1, world=2)
    stopped = loader(run, decode=True, stills=9, areas=areas)
    list(itertools.islice(stopped, 7))
    again.load_state_dict(stopped.state_dict())
    for a, b in zip(again, batches[8::2], strict=False):
        assert torch.equal(a["video"], b["video"])


def test_examples_are_one_micro_batch_of_each_shape(run):
    areas = [h // 8 * (w // 8) for _, h, w in SHAPES]
    one, other = (loader(run, decode=True, stills=9, areas=areas) for _ in range(2))
    found = [tuple(batch["video"].shape) for batch in one.examples()]
    seen = {tuple(batch["video"].shape) for batch in itertools.islice(other, 9 + other.epoch_length)}
    assert len(found) == len(set(found)) == 2 * len(np.unique(one.readers[0].bucket))
    assert set(found) == seen
    assert one.state_dict()["batches"] == 0


def test_broken_clips_and_images_are_replaced_and_counted(run, tmp_path):
    subprocess.run(["cp", "-r", run, tmp_path / "run"], check=True)
    index, names = read_index(f"{run}/shards").to_pylist(), set()
    for row in (1, 4):
        with open(tmp_path / "run/shards" / index[row]["tar"], "r+b") as f:
            f.seek(index[row]["offset"])
            f.write(bytes(index[row]["size"]))
        names.add(index[row]["clip_id"])
    one = loader(str(tmp_path / "run"), decode=True, images=2)
    told, n = [], one.epoch_length
    for batch in itertools.islice(one, n):
        assert not names & {*batch["key"], *batch["image_key"]}
        told += batch["skipped"]
    assert set(told) == names
    assert one.skipped == len(told) > 0
    assert one.state_dict()["batches"] == n


# ------------------------------------------------------------ from a recipe


ALONE = World(0, 1, torch.device("cpu"))


def recipe(**data):
    buckets = [{"frames": t, "height": h, "width": w} for t, h, w in SHAPES]
    return DiffusionRecipe.model_validate(
        {
            "name": "t",
            "model": {"kind": "dit"},
            "data": {"fps": 4, "buckets": buckets, "tokens": 500, "workers": 0} | data,
        }
    )


def test_a_recipe_makes_the_same_loader(run):
    made = build_loader(recipe(), run, BlockDCT(8, 2), ALONE)
    assert positions_of(recipe(), BlockDCT(8, 2)) == POSITIONS
    assert positions_of(recipe(images=2), BlockDCT(8, 2)) == [
        p + 2 * p // s[0] for p, s in zip(POSITIONS, SHAPES, strict=True)
    ]
    assert take(made, 9) == take(loader(run), 9)


def test_an_autoencoder_that_joins_frames_takes_no_lone_images():
    class Joined:
        channels, stride, causal = 4, (2, 8, 8), False

    for option in ("images", "stills"):
        with pytest.raises(ValueError, match=rf"data\.{option} 2"):
            positions_of(recipe(**{option: 2}), Joined())


def test_missing_data_is_one_sentence(tmp_path):
    with pytest.raises(StoreError, match="folder of shards"):
        build_loader(recipe(), str(tmp_path), BlockDCT(8, 2), ALONE)
    with pytest.raises(StoreError, match="no finished cache"):
        build_loader(recipe(cache=str(tmp_path)), str(tmp_path), BlockDCT(8, 2), ALONE)
