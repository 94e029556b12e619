"""The latent cache: what is written is what is read, whole or not at all, and measured as numpy measures it."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from pipeline.faults import StoreError
from pipeline.io.store import Store
from pipeline.shards import latents
from pipeline.shards.index import read_index
from pipeline.shards.latents import Encoded, LatentReader, Part
from pipeline.shards.reader import BrokenSample
from tests.fixtures.run_folder import flip

SHAPES = [(4, 16, 16), (8, 16, 24)]


def clips(n, bucket, variance, seed=0):
    rng = np.random.default_rng([seed, bucket])
    t, h, w = (x // 8 if i else x for i, x in enumerate(SHAPES[bucket]))
    for i in range(n):
        mean = rng.normal(1, 2, (3, t, h, w)).astype(np.float32)
        logvar = rng.normal(-1, 1, (3, t, h, w)).astype(np.float32) if variance else None
        yield Encoded(
            f"clip{bucket}{i}", f"caption {i} “ü”", mean, logvar, rng.normal(size=(i, 5)).astype(np.float32)
        )


def parts_of():
    names = ["4x16x16/4x16x16-000000", "4x16x16/4x16x16-000001", "8x16x24/8x16x24-000000"]
    return [Part(name, SHAPES[b], np.arange(3), "of these") for name, b in zip(names, (0, 0, 1), strict=True)]


def made(folder, variance=True):
    """A cache of 3 tars."""
    store, parts = Store(str(folder)), parts_of()
    latents.begin(store, {"clips": "a", "fps": 8})
    for i, part in enumerate(parts):
        bucket = SHAPES.index(part.shape)
        own = [
            Encoded(f"p{i}{c.key}", c.caption, c.mean, c.logvar, c.text)
            for c in clips(3, bucket, variance, i)
        ]
        latents.write(store, part, own, ["broken"] if i == 1 else [])
    return store, parts


@pytest.mark.parametrize("variance", [False, True])
def test_what_is_read_is_what_was_written_in_half_precision(tmp_path, variance):
    store, parts = made(tmp_path, variance)
    latents.finish(store, parts)
    reader = LatentReader(str(tmp_path), SHAPES, length=4)
    assert reader.bucket.tolist() == [0] * 6 + [1] * 3
    expected = [c for i, b in enumerate((0, 0, 1)) for c in clips(3, b, variance, i)]
    for row, clip in enumerate(expected):
        sample = reader.read(row)
        assert sample["key"].endswith(clip.key)
        assert sample["caption"] == clip.caption
        assert np.array_equal(sample["mean"], clip.mean.astype(np.float16))
        if variance:
            assert np.array_equal(sample["logvar"], clip.logvar.astype(np.float16))
        else:
            assert sample["logvar"] is None
        n = len(clip.text)
        assert sample["text_mask"].tolist() == [True] * n + [False] * (4 - n)
        assert np.array_equal(sample["text"][:n], clip.text.astype(np.float16))


@pytest.mark.parametrize("what", ["", "text_"])
def test_a_flipped_bit_of_latents_or_text_is_a_broken_sample(tmp_path, what):
    store, parts = made(tmp_path)
    row = latents.finish(store, parts).to_pylist()[2]
    flip(tmp_path / row["tar"], row[f"{what}offset"] + row[f"{what}size"] - 1)
    reader = LatentReader(str(tmp_path), SHAPES, length=4)
    reader.read(1)
    with pytest.raises(BrokenSample, match=rf"{row['clip_id']}.*damaged"):
        reader.read(2)


def test_any_webdataset_reader_finds_the_members(tmp_path):
    made(tmp_path)
    with tarfile.open(tmp_path / "4x16x16/4x16x16-000000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["p0clip00.latents.npy", "p0clip00.text.npy", "p0clip00.json"]
        stored = np.load(io.BytesIO(tar.extractfile("p0clip00.latents.npy").read()))
        about = json.loads(tar.extractfile("p0clip00.json").read())
    assert stored.shape == (2, 3, 4, 2, 2)
    assert stored.dtype == np.float16
    assert about == {"caption": "caption 0 “ü”", "frames": 4, "height": 16, "width": 16}


def test_statistics_are_numpys_of_the_latents_as_they_are_drawn(tmp_path):
    store, parts = made(tmp_path)
    latents.finish(store, parts)
    found = latents.statistics(str(tmp_path))
    every = [c for i, b in enumerate((0, 0, 1)) for c in clips(3, b, True, i)]
    mean = np.concatenate([c.mean.astype(np.float16).astype(float).reshape(3, -1) for c in every], 1)
    logvar = np.concatenate([c.logvar.astype(np.float16).astype(float).reshape(3, -1) for c in every], 1)
    assert found["count"] == mean.shape[1]
    np.testing.assert_allclose(found["mean"], mean.mean(1), rtol=1e-12)
    np.testing.assert_allclose(found["std"], np.sqrt(mean.var(1) + np.exp(logvar).mean(1)), rtol=1e-10)
    assert found["broken"] == ["broken"]
    drawn = mean[None] + np.exp(0.5 * logvar) * np.random.default_rng(0).normal(size=(2000, *mean.shape))
    np.testing.assert_allclose(found["std"], drawn.std((0, 2)), rtol=5e-3)


def test_statistics_without_variance_are_those_of_the_latents(tmp_path):
    store, parts = made(tmp_path, variance=False)
    latents.finish(store, parts)
    every = [
        c.mean.astype(np.float16).astype(float)
        for i, b in enumerate((0, 0, 1))
        for c in clips(3, b, False, i)
    ]
    flat = np.concatenate([x.reshape(3, -1) for x in every], 1)
    np.testing.assert_allclose(latents.statistics(str(tmp_path))["std"], flat.std(1), rtol=1e-10)


def test_a_tar_appears_whole_and_its_rows_after_it(tmp_path):
    store, part = Store(str(tmp_path)), parts_of()[0]

    def killed():
        yield next(clips(1, 0, True))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.write(store, part, killed(), [])
    assert not latents.is_done(store, part)
    assert not list(tmp_path.rglob("*.tar"))
    assert not list(tmp_path.rglob("*.partial"))


def test_there_is_no_index_before_every_tar_is_there(tmp_path):
    store, parts = made(tmp_path)
    (tmp_path / f"{parts[1].name}.parquet").unlink()
    assert latents.finish(store, parts) is None
    with pytest.raises(StoreError, match="no finished cache"):
        latents.made_of(str(tmp_path))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e5])
def test_latents_that_half_precision_cannot_hold_are_refused_by_name(tmp_path, bad):
    clip = next(clips(1, 0, False))
    clip.mean[0, 0, 0, 0] = bad
    with pytest.raises(StoreError, match="clip00"):
        latents.write(Store(str(tmp_path)), parts_of()[0], [clip], [])
    assert not list(tmp_path.rglob("*.tar"))


def test_another_cache_is_not_overwritten(tmp_path):
    store, _ = made(tmp_path)
    latents.begin(store, {"clips": "a", "fps": 8})
    with pytest.raises(StoreError, match="fps was 8, not 4"):
        latents.begin(store, {"clips": "a", "fps": 4})


def test_of_other_clips_a_cache_is_unfinished_and_only_their_tars_are_to_do(tmp_path):
    store, parts = made(tmp_path)
    assert not latents.begin(store, {"clips": "a"})
    latents.finish(store, parts)
    assert latents.begin(store, {"clips": "b"})
    with pytest.raises(StoreError, match="no finished cache"):
        latents.made_of(str(tmp_path))
    now = [replace(parts[0], of="of others"), *parts[1:-1]]
    assert [latents.is_done(store, part) for part in now] == [False, *[True] * (len(now) - 1)]
    latents.write(store, now[0], [], [])
    latents.finish(store, now)
    assert not (tmp_path / f"{parts[-1].name}.tar").exists()  # what the run no longer has
    assert set(read_index(str(tmp_path))["tar"].to_pylist()) == {f"{p.name}.tar" for p in now[1:]}


def test_a_damaged_sample_is_broken(tmp_path):
    store, parts = made(tmp_path)
    index = latents.finish(store, parts).to_pylist()
    with open(tmp_path / index[2]["tar"], "r+b") as f:
        f.seek(index[2]["offset"])
        f.write(bytes(index[2]["size"]))
    reader = LatentReader(str(tmp_path), SHAPES, length=4)
    with pytest.raises(BrokenSample, match=index[2]["clip_id"]):
        reader.read(2)
    assert reader.sound(2)["skipped"] == [index[2]["clip_id"]]
