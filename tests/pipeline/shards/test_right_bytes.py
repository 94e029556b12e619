"""One flipped bit, wherever media are copied or read, is named and goes no further; and samples say the same things."""

import hashlib
import json

import pyarrow.parquet as pq
import pytest

from jobs.shard import main
from pipeline.faults import StoreError
from pipeline.io.store import Ranges, Store
from pipeline.shards.pack import shard
from pipeline.shards.reader import BrokenSample, ShardReader
from tests.fixtures.run_folder import flip, make_run_folder


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_bit_flipped_in_a_staging_tar_stops_shard_with_both_names_and_hashes(tmp_path, capsys, place):
    recipe = make_run_folder(tmp_path)
    decisions = shard(Store(str(tmp_path)), recipe).to_pylist()
    kept = {r["clip_id"]: r["shard"] for r in decisions if r["keep"]}
    before = {p: p.read_bytes() for p in (tmp_path / "shards").rglob("*") if p.is_file()}
    clips = pq.read_table(tmp_path / "clips").to_pylist()
    clip = next(c for c in clips if c["clip_id"] in kept)
    at = clip["media_offset"] + int(place * (clip["media_size"] - 1))
    flip(tmp_path / clip["media_tar"], at)
    assert main([str(tmp_path), "--set", "shards.seed=9"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for named in (clip["media_tar"], clip["clip_id"], "shards/", clip["media_sha256"], "damaged"):
        assert named in said
    assert {p: p.read_bytes() for p in (tmp_path / "shards").rglob("*") if p.is_file()} == before
    flip(tmp_path / clip["media_tar"], at)  # the file is good again: the same command goes on
    assert main([str(tmp_path), "--set", "shards.seed=9"]) == 0


@pytest.fixture
def damaged(tmp_path):
    """Shards with one bit flipped in the middle of the first sample's mp4, and its row of the index."""
    recipe = make_run_folder(tmp_path)
    shard(Store(str(tmp_path)), recipe)
    row = pq.read_table(tmp_path / "shards/index.parquet").to_pylist()[0]
    flip(tmp_path / "shards" / row["tar"], row["offset"] + row["size"] // 2)
    return tmp_path, row


@pytest.mark.parametrize("decode", [True, False])
def test_the_reader_names_a_sample_whose_bytes_are_others(damaged, decode):
    root, row = damaged
    reader = ShardReader(str(root / "shards"), shuffle=False, decode=decode, size=(16, 16))
    with pytest.raises(BrokenSample) as e:
        reader.read(0)
    for named in (row["clip_id"], row["tar"], row["media_sha256"]):
        assert named in str(e.value)
    assert next(iter(reader))["skipped"] == [row["clip_id"]]
    unchecked = ShardReader(str(root / "shards"), shuffle=False, decode=False, check=False)
    assert len(unchecked.read(0)["video"]) == row["size"]


def test_a_range_is_read_and_copied_with_its_hash(tmp_path):
    data = bytes(range(256)) * 20_000  # several buffers
    store = Store(str(tmp_path))
    store.write_bytes("a", data)
    part = data[777:4_000_001]
    good, wrong = hashlib.sha256(part).hexdigest(), hashlib.sha256(data).hexdigest()
    ranges = Ranges(store)
    assert ranges.read("a", 777, len(part), good) == part
    with store.writer("b") as f:
        ranges.copy("a", 777, len(part), f, good)
    assert store.read_bytes("b") == part
    with pytest.raises(StoreError, match=rf"a is damaged.*{good}.*not {wrong}"):
        ranges.read("a", 777, len(part), wrong)
    with pytest.raises(StoreError, match=rf"a is damaged.*{good}.*not {wrong}"), store.writer("c") as f:
        ranges.copy("a", 777, len(part), f, wrong)
    assert not store.exists("c")
    for length in (len(data), 10**7):
        with pytest.raises(StoreError, match="shorter than its index says"):
            ranges.read("a", 1, length)


def test_the_index_says_what_the_list_said_and_the_hash_of_every_clip(tmp_path):
    recipe = make_run_folder(tmp_path)
    decisions = shard(Store(str(tmp_path)), recipe).to_pylist()
    index = pq.read_table(tmp_path / "shards/index.parquet").to_pylist()
    clips = {c["clip_id"]: c for c in pq.read_table(tmp_path / "clips").to_pylist()}
    kept = {r["clip_id"]: r for r in decisions if r["keep"]}
    assert {r["clip_id"] for r in index} == set(kept)
    for row in index:
        clip, decision = clips[row["clip_id"]], kept[row["clip_id"]]
        assert row["media_sha256"] == clip["media_sha256"]
        assert dict(row["meta"]) == dict(clip["meta"]) != {}
        for name in ("tar", "shard", "caption", "offset", "size"):
            assert row[name] == decision[name]
        assert (tmp_path / "shards" / row["tar"]).samefile(tmp_path / row["shard"])


def test_every_samples_json_has_the_same_keys_with_values_of_the_same_kind(tmp_path):
    recipe = make_run_folder(tmp_path)
    shard(Store(str(tmp_path)), recipe)

    def kind(value):
        if isinstance(value, dict):
            return {k: kind(v) for k, v in value.items()}
        if isinstance(value, list):
            kinds = {json.dumps(kind(v)) for v in value}
            assert len(kinds) == 1, "an empty list, or one of mixed kinds"
            return [kinds.pop()]
        assert value is not None
        return type(value).__name__

    samples = [s["meta"] for s in ShardReader(str(tmp_path / "shards"), decode=False, shuffle=False)]
    for about in samples:
        about["made_by"].pop("models")  # of the run, not of the sample: the same in all
    kinds = [kind(about) for about in samples]
    assert len(kinds) > 5
    assert all(k == kinds[0] for k in kinds)
