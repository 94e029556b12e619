"""The shard reader: what a rank sees, in which order, after any interruption, and which pixels."""

import io
import itertools
import json
import pickle
import subprocess
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pyarrow.compute as pc
import pytest

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.recipe import parse
from pipeline.shards.index import read_index
from pipeline.shards.pack import shard
from pipeline.shards.reader import BrokenSample, ShardLoader, ShardReader, decode
from tests.fixtures.run_folder import make_run_folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """11 clips in 4 or so buckets."""
    root = tmp_path_factory.mktemp("reader") / "run"
    recipe = make_run_folder(root, sources=8)
    recipe = parse(recipe.model_dump(mode="json"), ["shards.lengths_s=[4]", "shards.max_clips=3"], "test")
    shard(Store(str(root)), recipe)
    return str(root / "shards")


def keys(samples) -> list[str]:
    return [s["key"] for s in samples]


def read(folder, **options):
    return ShardReader(folder, **({"decode": False} | options))


def same(a, b) -> bool:
    return a["key"] == b["key"] and a["caption"] == b["caption"] and np.array_equal(a["video"], b["video"])


# ------------------------------------------------------------ order


def test_an_epoch_has_every_clip_once_in_another_order_each_time(shards):
    reader, index = read(shards), read_index(shards)
    first, second = keys(reader), keys(reader)
    assert sorted(first) == sorted(second) == sorted(index["clip_id"].to_pylist())
    assert first != second
    assert reader.epoch == 2
    assert keys(read(shards)) == first
    assert keys(read(shards, seed=1)) != first
    assert keys(read(shards, shuffle=False)) == index["clip_id"].to_pylist()


@pytest.mark.parametrize("by_bucket", [False, True])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 1), (2, 2), (3, 2), (5, 4), (40, 1)])
def test_all_ranks_have_as_many_steps_and_together_every_clip(shards, world, batch_size, by_bucket):
    options = {"world": world, "batch_size": batch_size, "by_bucket": by_bucket}
    seen = [keys(read(shards, rank=r, **options)) for r in range(world)]
    assert len({len(s) for s in seen}) == 1
    assert len(seen[0]) == len(read(shards, **options))
    all_ = set(read_index(shards)["clip_id"].to_pylist())
    assert set(itertools.chain(*seen)) == all_


def test_drop_shows_no_clip_twice_and_the_tail_changes(shards):
    readers = [read(shards, rank=r, world=2, batch_size=2, last="drop") for r in range(2)]
    left_out = set()
    for _ in range(6):
        seen = Counter(itertools.chain(*(keys(r) for r in readers)))
        assert max(seen.values()) == 1
        left_out |= {frozenset(set(read_index(shards)["clip_id"].to_pylist()) - set(seen))}
    assert len(left_out) > 1


def test_a_batch_is_of_one_bucket_where_asked_for(shards):
    bucket = dict(read_index(shards).select(["clip_id", "bucket"]).to_pandas().to_numpy().tolist())
    found = keys(read(shards, batch_size=2, by_bucket=True))
    assert all(bucket[a] == bucket[b] for a, b in zip(found[::2], found[1::2], strict=True))
    assert len({bucket[k] for k in found}) > 2


def test_the_order_does_not_depend_on_the_number_of_ranks(shards):
    alone = keys(read(shards, batch_size=2))
    ranks = [keys(read(shards, batch_size=2, rank=r, world=2)) for r in range(2)]
    steps = len(ranks[0]) // 2
    together = [k for s in range(steps) for r in ranks for k in r[2 * s : 2 * s + 2]]
    assert together[: len(alone)] == alone


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_the_order_does_not_depend_on_the_number_of_workers(shards, workers):
    reader = read(shards, batch_size=2, rank=1, world=2)
    expected = keys(read(shards, batch_size=2, rank=1, world=2))
    batches = list(ShardLoader(reader, workers))
    assert [k for b in batches for k in b["key"]] == expected
    assert reader.epoch == 1


def test_it_is_an_iterable_dataset_for_a_plain_dataloader(shards):
    from torch.utils.data import DataLoader, IterableDataset

    reader = read(shards, batch_size=2)
    assert isinstance(reader, IterableDataset)
    found = list(DataLoader(reader, batch_size=2, num_workers=2, collate_fn=keys))
    assert list(itertools.chain(*found)) == keys(read(shards, batch_size=2))


# ------------------------------------------------------------ resuming


@pytest.mark.parametrize("k", [0, 1, 4, 7, 11])
def test_resumed_after_k_samples_it_goes_on_bit_for_bit(shards, k):
    options = {
        "frames": 3,
        "fps": 4.0,
        "size": (32, 32),
        "captions": "sample",
        "decode": True,
        "batch_size": 2,
    }
    whole = ShardReader(shards, **options)
    undisturbed = [*whole, *whole]
    reader = ShardReader(shards, **options)
    taken = list(itertools.islice(reader, k))
    state = json.loads(json.dumps(reader.state_dict()))
    again = ShardReader(shards, **options)
    again.load_state_dict(state)
    rest = [*again, *again]
    assert len(taken) + len(rest) == len(undisturbed)
    assert all(same(a, b) for a, b in zip([*taken, *rest], undisturbed, strict=True))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3), (1, 1)])
def test_resumed_with_another_number_of_workers_it_goes_on_bit_for_bit(shards, before, after):
    options = {"frames": 2, "size": (32, 32), "captions": "sample", "decode": True, "batch_size": 3}
    undisturbed = list(ShardLoader(ShardReader(shards, **options)))
    loader = ShardLoader(ShardReader(shards, **options), before)
    taken = list(itertools.islice(loader, 2))
    again = ShardLoader(ShardReader(shards, **options), after)
    again.load_state_dict(loader.state_dict())
    assert len(again) == len(undisturbed) - 2
    rest = list(again)
    for a, b in zip([*taken, *rest], undisturbed, strict=True):
        assert (a["key"], a["caption"]) == (b["key"], b["caption"])
        assert np.array_equal(a["video"], b["video"])


def test_a_state_inside_a_batch_continues_through_workers(shards):
    undisturbed = keys(read(shards, batch_size=4))
    reader = read(shards, batch_size=4)
    list(itertools.islice(reader, 3))
    again = read(shards, batch_size=4)
    again.load_state_dict(reader.state_dict())
    rest = list(ShardLoader(again, 2))
    assert [k for b in rest for k in b["key"]] == undisturbed[3:]
    assert len(rest[0]["key"]) == 1


def test_a_trainer_with_its_own_loader_says_what_it_took(shards):
    undisturbed = keys(read(shards, batch_size=2))
    reader = read(shards, batch_size=2)
    reader.advance(5)
    again = read(shards, batch_size=2)
    again.load_state_dict(reader.state_dict())
    assert keys(again) == undisturbed[5:]


def test_resumed_with_more_ranks_every_batch_is_still_seen_once(shards):
    options = {"batch_size": 1, "last": "drop"}
    two = [read(shards, rank=r, world=2, **options) for r in range(2)]
    taken = [k for r in two for k in keys(itertools.islice(r, 2))]
    rest = []
    for r in range(3):
        reader = read(shards, rank=r, world=3, **options)
        reader.load_state_dict(two[0].state_dict())
        rest.append(keys(reader))
    assert len({len(x) for x in rest}) == 1
    seen = Counter([*taken, *itertools.chain(*rest)])
    assert max(seen.values()) == 1
    assert len(seen) > len(read_index(shards)) - 3


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 3}, {"where": pc.field("duration_s") > 4}])
def test_a_state_of_other_data_or_settings_is_refused(shards, change):
    state = read(shards, batch_size=2).state_dict()
    with pytest.raises(ValueError, match="use the same"):
        read(shards, **({"batch_size": 2} | change)).load_state_dict(state)


def test_it_can_be_sent_to_another_process(shards):
    reader = read(shards)
    list(itertools.islice(reader, 2))
    assert keys(pickle.loads(pickle.dumps(reader))) == keys(read(shards))[2:]


# ------------------------------------------------------------ samples


def test_a_sample_has_its_caption_and_provenance(shards):
    index = {r["clip_id"]: r for r in read_index(shards).to_pylist()}
    for sample in read(shards):
        row = index[sample["key"]]
        assert sample["caption"] == row["caption"]
        assert sample["meta"]["source"] == row["source"]
        assert len(sample["video"]) == row["size"]
        assert sample["skipped"] == []


def test_plain_tars_without_an_index_are_read_too(shards, tmp_path):
    for tar in Path(shards).rglob("*.tar"):
        copy = tmp_path / tar.relative_to(shards)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(tar.read_bytes())
    assert all(same(a, b) for a, b in zip(read(str(tmp_path)), read(shards), strict=True))


def test_where_selects_by_any_column_of_the_index(shards):
    index = read_index(shards)
    expected = index.filter(pc.field("score_motion") > 0.3)["clip_id"].to_pylist()
    assert sorted(keys(read(shards, where=pc.field("score_motion") > 0.3))) == sorted(expected)


def test_captions_are_sampled_by_weight_or_chosen_by_a_function(shards):
    told = Counter()
    weights = Counter()
    for epoch in range(150):
        reader = read(shards, captions="sample", shuffle=False)
        reader.epoch = epoch
        sample = next(iter(reader))
        candidates = {c["text"]: json.loads(c["scores"])["consensus"] for c in sample["meta"]["captions"]}
        told[sample["caption"]] += 1
        weights = candidates
    total = sum(weights.values())
    for text, weight in weights.items():
        assert abs(told[text] / 150 - weight / total) < 0.15
    longest = read(shards, captions=lambda meta, rng: max((c["text"] for c in meta["captions"]), key=len))
    sample = next(iter(longest))
    assert len(sample["caption"]) == max(len(c["text"]) for c in sample["meta"]["captions"])


def damaged(shards, tmp_path, *, rows):
    """A copy of the shards with the mp4 of some rows overwritten."""
    subprocess.run(["cp", "-r", shards, tmp_path / "shards"], check=True)
    index, names = read_index(shards).to_pylist(), []
    for r in rows:
        with open(tmp_path / "shards" / index[r]["tar"], "r+b") as f:
            f.seek(index[r]["offset"])
            f.write(bytes(index[r]["size"]))
        names.append(index[r]["clip_id"])
    return str(tmp_path / "shards"), names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_sample_is_replaced_and_told_and_no_batch_shrinks(shards, tmp_path, workers):
    folder, names = damaged(shards, tmp_path, rows=[1, 4])
    reader = ShardReader(folder, frames=2, size=(16, 16), batch_size=2)
    batches = list(ShardLoader(reader, workers))
    assert len(batches) == reader.steps()
    assert all(b["video"].shape == (2, 2, 16, 16, 3) for b in batches)
    assert set(itertools.chain(*(b["skipped"] for b in batches))) == set(names)
    assert not set(names) & {k for b in batches for k in b["key"]}


def test_data_of_broken_samples_only_is_an_error_not_an_endless_loop(shards, tmp_path):
    folder, _ = damaged(shards, tmp_path, rows=range(len(read_index(shards))))
    with pytest.raises(StoreError, match="in a row are broken"):
        next(iter(ShardReader(folder, frames=2)))


def test_a_missing_folder_and_too_little_data_are_clear_errors(tmp_path, shards):
    with pytest.raises(StoreError, match="neither index"):
        read(str(tmp_path / "nothing"))
    with pytest.raises(StoreError, match="not one batch of 100"):
        read(shards, batch_size=100, last="drop")
    with pytest.raises(ValueError, match="rank 2"):
        read(shards, rank=2, world=2)


# ------------------------------------------------------------ pixels


def film(tmp_path, frames=40, fps=10, size="64x48", extra=()):
    """Frame i is grey of level 6 i; returns mp4 bytes with B-frames and two keyframes."""
    width, height = map(int, size.split("x"))
    raw = b"".join(bytes([6 * i]) * (width * height) for i in range(frames))
    path = tmp_path / "film.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "gray"]
    command += ["-s", size, "-r", str(fps), "-i", "-", *extra, "-c:v", "libx264", "-crf", "1", "-g", "20"]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], input=raw, check=True)
    return path.read_bytes()


def levels(video) -> list[int]:
    """Which frame each picture is, by its grey level."""
    return [round(float(p.mean()) / 6) for p in video]


def test_frames_are_those_seen_at_the_wanted_times(tmp_path):
    mp4 = film(tmp_path)
    assert levels(decode(mp4, 5, 10.0, None, 0.0)) == [0, 1, 2, 3, 4]
    assert levels(decode(mp4, 4, 5.0, None, 0.0)) == [0, 2, 4, 6]
    assert levels(decode(mp4, 4, 20.0, None, 0.0)) == [0, 0, 1, 1]
    assert levels(decode(mp4, 5, 10.0, None, 1.0)) == [35, 36, 37, 38, 39]
    assert levels(decode(mp4, 4, None, None, 0.3)) == [5, 15, 25, 35]


def test_a_clip_shorter_than_the_window_repeats_its_last_frame(tmp_path):
    mp4 = film(tmp_path, frames=4)
    assert levels(decode(mp4, 6, 10.0, None, 0.7)) == [0, 1, 2, 3, 3, 3]


def test_variable_frame_rate_follows_the_clock(tmp_path):
    mp4 = film(tmp_path, extra=["-vf", "setpts='if(lt(N,20),N,20+(N-20)*3)/(10*TB)'", "-fps_mode", "vfr"])
    with av.open(io.BytesIO(mp4)) as container:
        times = [f.time for f in container.decode(video=0)]
    video = decode(mp4, 30, 4.0, None, 0.0)
    expected = [max(i for i, t in enumerate(times) if t <= k / 4 + 1e-6) for k in range(30)]
    assert levels(video) == expected


def test_the_picture_covers_the_size_and_keeps_its_shape(tmp_path):
    """A white square on black stays a square, whatever the size asked for."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i"]
    draw = "color=black:s=160x96:r=10,drawbox=x=64:y=32:w=32:h=32:color=white:t=fill,format=yuv420p"
    for sar in ("1", "2"):
        path = tmp_path / f"box{sar}.mp4"
        subprocess.run([*command, f"{draw},setsar={sar}", "-frames:v", "5", str(path)], check=True)
        for size in ((48, 48), (96, 64), (40, 120)):
            image = decode(path.read_bytes(), 1, None, size, 0.0)[0]
            assert image.shape == (*size, 3)
            inside = image.mean(2) > 128
            height, width = inside.any(1).sum(), inside.any(0).sum()
            scale = max(Fraction(size[0], 96), Fraction(size[1], 160 * int(sar)))
            assert abs(height - 32 * scale) <= 2
            assert abs(width - min(size[1], 32 * int(sar) * scale)) <= 2


@pytest.mark.parametrize("along", ["X", "Y"])
def test_colours_are_as_sharp_across_as_down(tmp_path, along):
    """Stripes one colour sample wide, at half the size one pixel wide, differ as much either way."""
    stripes = f"nullsrc=s=64x64:r=10,format=yuv420p,geq=lum=128:cb=128:cr='128+60*(1-2*mod({along},2))'"
    path = tmp_path / "stripes.mkv"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", stripes]
    subprocess.run([*command, "-frames:v", "3", "-c:v", "ffv1", str(path)], check=True)
    red = decode(path.read_bytes(), 1, None, (32, 32), 0.0)[0, 4:-4, 4:-4, 0].astype(int)
    assert np.abs(np.diff(red, axis=1 if along == "X" else 0)).min() > 100


def test_layout_and_stacking(shards):
    reader = ShardReader(shards, frames=2, size=(24, 32), layout="CTHW", batch_size=2)
    batch = next(iter(ShardLoader(reader)))
    assert tuple(batch["video"].shape) == (2, 3, 2, 24, 32)
    own = next(iter(ShardLoader(ShardReader(shards, frames=2, batch_size=3))))  # several shapes: a list
    assert len(own["video"]) == 3


@pytest.mark.parametrize("data", [b"", b"not a video", bytes(1000)])
def test_what_is_no_video_is_a_broken_sample(data):
    with pytest.raises(BrokenSample):
        decode(data, 2, None, None, 0.0)


def test_a_truncated_video_is_broken_or_shows_what_is_left(tmp_path):
    mp4 = film(tmp_path, extra=["-movflags", "+faststart"])
    with pytest.raises(BrokenSample):
        decode(mp4[: len(mp4) // 8], 2, None, None, 0.0)
