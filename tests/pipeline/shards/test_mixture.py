"""Mixtures: shares are held at every sample, whoever asks for which part, and each source goes through its epochs."""

from collections import Counter

import numpy as np
import pytest

from pipeline.shards.mixture import Mixed, Mixture


def random_shares(seed):
    rng = np.random.default_rng(seed)
    parts = rng.dirichlet(rng.choice([0.2, 1.0, 20.0]) * np.ones(rng.integers(1, 9)))
    parts = np.maximum((parts * 10_000).astype(int), 1)
    parts[0] += 10_000 - parts.sum()
    return [p / 10_000 for p in parts] if parts[0] > 0 else [0.5, 0.3, 0.2]


@pytest.mark.parametrize("seed", range(25))
def test_after_any_number_of_samples_every_source_is_within_one_of_its_share(seed):
    shares = random_shares(seed)
    mixture, n = Mixture(shares), 2 * 10_000 + 7
    turns = np.array([mixture.at(i)[0] for i in range(n)])
    given = np.cumsum(turns[:, None] == np.arange(len(shares)), 0)
    wanted = np.arange(1, n + 1)[:, None] * np.array(shares)
    assert np.abs(given - wanted).max() < 1


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.7, 0.3], [0.33, 0.33, 0.33], [0.0001, 0.9999]])
def test_each_source_gives_its_samples_one_after_the_other_none_left_out(shares):
    mixture, seen = Mixture(shares), [0] * len(shares)
    for n in range(30_000):
        source, own = mixture.at(n)
        assert own == seen[source]
        seen[source] += 1
    assert min(seen) > 0


def test_any_sample_is_found_by_its_number_alone():
    mixture = Mixture([0.6, 0.25, 0.15])
    far = 10**15 + 3
    source, own = mixture.at(far)
    assert abs(own - far * mixture.shares[source]) < 1


def test_sources_read_in_streams_give_a_sample_of_each_stream_in_a_row():
    mixture, plain = Mixture([0.6, 0.4], together=4), Mixture([0.6, 0.4])
    for n in range(100):
        source, own = mixture.at(n)
        assert (source, own // 4) == plain.at(n // 4)
        assert own % 4 == n % 4
    assert mixture.epoch([24, 16]) == 40
    assert mixture.epoch([25, 16]) > 40


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([0.7, 0.2], r"the shares of a mixture are 0.7 \+ 0.2 = 0.9: make them 1 together"),
        ([], "make them 1 together"),
        ([1.2, -0.2], "toys: a share lies between 0.0001 and 1, not at 1.2"),
        ([1.0, 0.0], "films: a share lies between 0.0001 and 1, not at 0"),
    ],
)
def test_bad_shares_are_one_sentence(shares, told):
    with pytest.raises(ValueError, match=told):
        Mixture(shares, ["toys", "films"][: len(shares)])


class Letters:
    """A source of so many samples, which it shuffles by rotating them each epoch."""

    def __init__(self, name, count):
        self.name, self.count = name, count

    @property
    def samples(self):
        return self.count

    def nth(self, number):
        epoch, place = divmod(number, self.count)
        return {"key": f"{self.name}{(place + epoch) % self.count}", "epoch": epoch, "skipped": []}

    def identity(self):
        return f"{self.name}{self.count}"


def test_every_source_goes_through_its_own_epochs():
    mixed = Mixed([Letters("a", 5), Letters("b", 30)], Mixture([0.5, 0.5]))
    assert mixed.samples == 60
    samples = [mixed.nth(n) for n in range(60)]
    for name, source, epochs in (("a", 0, 6), ("b", 1, 1)):
        mine = [s for s in samples if s["source"] == source]
        assert {s["key"][0] for s in mine} == {name}
        assert set(Counter(s["key"] for s in mine).values()) == {epochs}
        assert Counter(s["epoch"] for s in mine) == dict.fromkeys(range(epochs), len(mine) // epochs)
    assert mixed.identity() != Mixed(mixed.sources, Mixture([0.6, 0.4])).identity()
    assert mixed.identity() != Mixed([Letters("a", 5), Letters("b", 31)], mixed.mixture).identity()
