"""Neighbours read in one request: fewer requests on a real object store, the same bytes, whoever reads."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from pipeline.shards.order import Sequential
from pipeline.shards.reader import ShardLoader, ShardReader
from tests.fixtures import packed
from tests.fixtures.object_store import Proxy, environment

CLIPS, HOW = 480, Sequential(together=16, window=64, streams=4)


def write(address, clips=CLIPS, **options):
    return packed.write(address, np.random.default_rng(0).integers(200, 900, clips), **options)


def reader(folder, **options):
    return ShardReader(folder, **({"decode": False, "batch_size": 4, "sequential": HOW} | options))


def keys(samples):
    return [s["key"] for s in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_on_an_object_store_a_request_brings_many_clips_and_every_byte_is_right(object_store, workers):
    address = f"{object_store.bucket()}/shards"
    with Proxy(object_store.address) as proxy, environment(object_store.environment(proxy.address)):
        found = write(address)

        def epoch(sequential):
            one = reader(address, sequential=sequential)
            proxy.sound()
            seen = dict(
                itertools.chain(*(zip(b["key"], b["video"], strict=True) for b in ShardLoader(one, workers)))
            )
            assert seen == found
            return sum(".tar" in request for request in proxy.requests)

        apart, together = epoch(None), epoch(HOW)
    assert (
        CLIPS <= apart <= CLIPS + 3 * max(workers, 1)
    )  # a clip's files in one, and a look at each tar's size
    assert together * 8 <= CLIPS


def test_an_epoch_has_every_clip_once_and_memory_is_given_back(tmp_path):
    found = write(str(tmp_path))
    one = reader(str(tmp_path))
    first, second = {}, {}
    most = 0
    for seen in (first, second):
        for sample in one:
            assert sample["key"] not in seen
            seen[sample["key"]] = sample["video"]
            most = max(most, len(one._files().held))
        assert seen == found
    assert list(first) != list(second)
    assert most <= 4 * (64 + 2 * 64)  # of each stream a window, and what another's end or beginning left
    plain = reader(str(tmp_path), sequential=None)
    assert sum(map(bool, plain)) == CLIPS
    assert plain.requests == CLIPS
    assert one.requests <= 2 * CLIPS / 12  # of two epochs


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 2), (4, 1), (3, 2)])
def test_the_order_depends_on_the_streams_not_on_who_reads(tmp_path, world, workers):
    write(str(tmp_path))
    alone = keys(reader(str(tmp_path)))
    ranks = [reader(str(tmp_path), rank=r, world=world) for r in range(world)]
    batches = [[b["key"] for b in ShardLoader(one, workers)] for one in ranks]
    together = [key for step in zip(*batches, strict=True) for batch in step for key in batch]
    assert together[: len(alone)] == alone
    other = reader(str(tmp_path), sequential=Sequential(16, 64, streams=8))
    assert keys(other) != alone


@pytest.mark.parametrize("k", [0, 1, 7, 100, 479, 480, 700])
def test_resumed_after_k_samples_it_goes_on_bit_for_bit(tmp_path, k):
    write(str(tmp_path))
    whole = reader(str(tmp_path))
    undisturbed = keys([*whole, *whole])
    one = reader(str(tmp_path))
    taken = keys(itertools.islice(itertools.chain(one, one), k))
    again = reader(str(tmp_path))
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    rest = keys([*again, *again])
    assert (taken + rest)[: len(undisturbed)] == undisturbed


def test_what_lies_far_apart_is_not_read_through_and_a_damaged_clip_is_one_alone(tmp_path):
    found = write(str(tmp_path), clips=24, tars=2, gap=2 << 20)
    one = reader(str(tmp_path), sequential=Sequential(4, 8, streams=1))
    assert {s["key"]: s["video"] for s in one} == found
    assert one.requests == 24
    row = 5
    place = one.place(row)
    with open(tmp_path / place.tar, "r+b") as f:
        f.seek(place.begin)
        f.write(b"\0\1\2\3")
    again = reader(str(tmp_path), sequential=Sequential(4, 8, streams=1))
    seen = Counter(keys(again))
    assert one.keys[row] not in seen
    assert again.skipped == [one.keys[row]]
    assert sum(seen.values()) == 24
