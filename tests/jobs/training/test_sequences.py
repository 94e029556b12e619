"""Packed sequences of a mixture: whoever prepares them, after any interruption, the same samples in the same places."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from jobs.training.data.sequences import SequenceLoader
from pipeline.faults import StoreError
from pipeline.shards.chat import ChatReader
from pipeline.shards.mixture import Mixed, Mixture
from pipeline.shards.order import Sequential
from pipeline.shards.reader import BrokenSample, ShardReader
from tests.fixtures.run_folder import make_sharded_run

TOKENS, LANES = 64, 12


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """97 and 23 conversations of 2 to 40 letters."""
    folder = tmp_path_factory.mktemp("talks")
    rng = np.random.default_rng(0)
    for name, count in (("short", 97), ("long", 23)):
        with open(folder / f"{name}.jsonl", "w") as f:
            for i in range(count):
                answer = chr(97 + i % 26) * int(rng.integers(1, 20))
                said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
                f.write(json.dumps({"messages": said, "broken": name == "short" and i == 5}) + "\n")
    return folder


def letters(sample):
    """One token a letter; which letters are learned."""
    if sample["meta"]["broken"]:
        raise BrokenSample("unreadable")
    told = [(m["content"], m["role"] == "assistant") for m in sample["messages"]]
    tokens = np.array([ord(c) for text, _ in told for c in text], np.int32)
    learned = np.array([mine for text, mine in told for _ in text])
    return {"length": len(tokens), "tokens": tokens, "learned": learned}


def loader(talks, process=letters, **options):
    sources = [ChatReader(str(talks / f"{name}.jsonl"), seed=1) for name in ("short", "long")]
    mixed = Mixed(sources, Mixture([0.8, 0.2]))
    return SequenceLoader(mixed, process, **({"tokens": TOKENS, "lanes": LANES, "pool": 3} | options))


def take(loader, n):
    return list(itertools.islice(loader, n))


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one["key"] == other["key"]
        assert one["lengths"] == other["lengths"]
        assert one["skipped"] == other["skipped"]
        assert torch.equal(one["tokens"], other["tokens"])
    return True


def test_every_sample_is_in_one_sequence_in_the_shares_of_the_mixture(talks):
    one = loader(talks, lanes=1)
    seen = Counter(key for batch in take(one, 200) for key in batch["key"])
    state = one.state_dict()["lanes"]["0"]
    still = [n for sequence in state["packer"]["open"] for n, _ in sequence]
    seen.update(one.source.nth(n)["key"] for n in still)
    every = Counter(one.source.nth(n)["key"] for n in range(state["taken"]))
    assert every - seen == Counter({"short.jsonl:6": every["short.jsonl:6"]})  # the broken one
    assert not seen - every
    short, long = (sum(n for key, n in every.items() if key.startswith(name)) for name in ("short", "long"))
    assert abs(short - 0.8 * (short + long)) < 1


def test_a_batch_is_one_sequence_with_the_lengths_of_its_samples(talks):
    for batch in take(loader(talks), 50):
        used = sum(batch["lengths"])
        assert used <= TOKENS
        assert len(batch["key"]) == len(batch["lengths"]) >= 1
        assert batch["tokens"].shape == batch["learned"].shape == (TOKENS,)
        assert (batch["tokens"][:used] > 0).all()
        assert (batch["tokens"][used:] == 0).all()
        starts = np.cumsum([0, *batch["lengths"]])[:-1]
        assert (batch["tokens"][starts] == ord("?")).all()
        assert not batch["learned"][starts].any()
        assert batch["learned"].sum() == used - len(starts)


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 0), (2, 2), (3, 5), (12, 0)])
def test_neither_ranks_nor_workers_change_what_is_in_a_micro_batch(talks, world, workers):
    alone = take(loader(talks), 48)
    ranks = [take(loader(talks, rank=r, world=world, workers=workers), 48 // world) for r in range(world)]
    assert same([batch for step in zip(*ranks, strict=True) for batch in step], alone)


@pytest.mark.parametrize("steps", range(0, 30, 2))
def test_resumed_after_any_step_it_goes_on_bit_for_bit(talks, steps):
    alone = take(loader(talks), 75)
    before = [loader(talks, rank=r, world=2) for r in range(2)]
    taken = [take(one, steps) for one in before]
    assert same([b for step in zip(*taken, strict=True) for b in step], alone[: 2 * steps])
    state = json.loads(json.dumps(before[0].joined([one.state_dict() for one in before])))
    after = [loader(talks, rank=r, world=3) for r in range(3)]
    for one in after:
        one.load_state_dict(state)
    rest = [take(one, 5) for one in after]
    assert same([b for step in zip(*rest, strict=True) for b in step], alone[2 * steps : 2 * steps + 15])


def test_resumed_again_and_again_on_other_ranks_no_sample_is_lost_or_comes_twice(talks):
    alone, state, done = take(loader(talks), 60), None, 0
    for world in (2, 2, 3, 1, 4, 2):
        ranks = [loader(talks, rank=r, world=world) for r in range(world)]
        for one in ranks if state else ():
            one.load_state_dict(state)
        taken = [take(one, 3) for one in ranks]
        steps = [batch for step in zip(*taken, strict=True) for batch in step]
        assert same(steps, alone[done : done + len(steps)])
        done += len(steps)
        state = ranks[0].joined([one.state_dict() for one in ranks])


def test_resumed_through_workers_it_goes_on_bit_for_bit(talks):
    alone = take(loader(talks), 40)
    before = loader(talks, workers=3)
    assert same(take(before, 17), alone[:17])
    after = loader(talks, workers=2)
    after.load_state_dict(before.state_dict())
    assert same(take(after, 10), alone[17:27])
    assert before.waste == loader_after(talks, 17).waste


def loader_after(talks, n):
    one = loader(talks)
    take(one, n)
    return one


def test_waste_is_told_of_what_was_handed_out(talks):
    one = loader(talks)
    batches = take(one, 150)
    held = sum(sum(batch["lengths"]) for batch in batches)
    assert one.waste == pytest.approx(1 - held / (150 * TOKENS))
    assert one.waste < 0.1
    assert one.table().splitlines() == [
        "source       80.0% of the samples: source 1, 97 an epoch",
        "source       20.0% of the samples: source 2, 23 an epoch",
    ]


def test_an_example_is_not_taken_from_the_list(talks):
    one = loader(talks)
    (example,) = one.examples()
    assert same([example], take(one, 1))


# ------------------------------------------------------------ clips and conversations in one mixture


class Bytes:
    """A clip is as many tokens as its caption has letters, and one more; a conversation as `letters` has it."""

    def __call__(self, sample):
        if "messages" in sample:
            return letters(sample)
        tokens = np.array([0, *map(ord, sample["caption"])], np.int32)
        return {"length": len(tokens), "tokens": tokens, "learned": tokens > 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequences") / "run"
    return make_sharded_run(folder, sources=4)


@pytest.mark.parametrize("sequential", [None, Sequential(2, 4, LANES)], ids=["full", "shards"])
def test_clips_and_conversations_share_sequences_and_resume(run, talks, sequential):
    def made(**options):
        clips = ShardReader(f"{run}/shards", decode=False, sequential=sequential)
        together = LANES if sequential else 1
        mixed = Mixed([clips, ChatReader(str(talks))], Mixture([0.4, 0.6], together=together))
        return SequenceLoader(mixed, Bytes(), tokens=300, pool=3, lanes=LANES, **options)

    alone = take(made(), 60)
    keys = [key for batch in alone for key in batch["key"]]
    every = set(ShardReader(f"{run}/shards", decode=False).keys)
    assert every < set(keys)
    before = [made(rank=r, world=2) for r in range(2)]
    taken = [take(one, 15) for one in before]
    after = made(workers=2)
    after.load_state_dict(json.loads(json.dumps(before[0].joined([one.state_dict() for one in before]))))
    assert same([b for step in zip(*taken, strict=True) for b in step] + take(after, 30), alone)


def broken(sample):
    raise BrokenSample("no")


def changed(sample):
    item = letters(sample)
    return {name: value[1:] if name != "length" else value - 1 for name, value in item.items()}


def test_what_is_wrong_is_one_sentence(talks):
    with pytest.raises(StoreError, match=r"samples in a row are broken, the last: \S+:\d+ \(no\)"):
        take(loader(talks, broken), 1)
    with pytest.raises(ValueError, match=r"jsonl:\d+ has \d+ tokens, more than the 10 of a sequence"):
        take(loader(talks, tokens=10), 20)
    with pytest.raises(ValueError, match="5 processes do not divide the 12 lanes"):
        loader(talks, world=5)
    one = loader_after(talks, 20)
    with pytest.raises(ValueError, match="the saved state has pool 3, this loader 4; use the same"):
        loader(talks, pool=4).load_state_dict(one.state_dict())
    other = loader(talks, changed)
    other.load_state_dict(one.state_dict())
    with pytest.raises(StoreError, match="tokens now, and had"):
        take(other, 12)
    gone = loader(talks, broken)
    gone.load_state_dict(one.state_dict())
    with pytest.raises(
        StoreError, match=r"jsonl:\d+ can no longer be read, and could when the state was saved"
    ):
        take(gone, 1)
