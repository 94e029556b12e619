"""The near-duplicate search against a plain double loop, and what it promises about chains."""

import numpy as np
import pytest

from pipeline.decide import duplicates
from pipeline.decide.duplicates import near_duplicates


def brute_force(vectors, source, within, across):
    """Greedy by definition: keep a row unless an earlier kept row is similar in every kind."""
    repeats = np.full(len(source), -1)
    for i in range(len(source)):
        for j in range(i):
            same = source[i] == source[j]
            least = within if same else across
            if repeats[j] < 0 and all(x[i] @ x[j] >= t for x, t in zip(vectors, least, strict=True)):
                repeats[i] = j
                break
    return repeats


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def clustered(rng, n, d, clusters):
    """Points around random centres, near and far, with a decaying spectrum as real features have."""
    scale = np.arange(1, d + 1) ** -0.7
    centres = rng.normal(size=(clusters, d)) * scale
    spread = rng.choice([0.02, 0.2, 0.6], n)[:, None]
    return unit(centres[rng.integers(clusters, size=n)] + rng.normal(size=(n, d)) * scale * spread)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(duplicates, "ROWS", 32)
    monkeypatch.setattr(duplicates, "COLUMNS", 48)


@pytest.mark.parametrize("sketch", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_double_loop_in_any_number_of_blocks(small_blocks, monkeypatch, sketch, seed):
    monkeypatch.setattr(duplicates, "SKETCH_FROM", 0 if sketch else 1 << 30)
    monkeypatch.setattr(duplicates, "DIRECTIONS", 6)
    rng = np.random.default_rng(seed)
    vectors = [clustered(rng, 300, 24, 60), clustered(rng, 300, 16, 4)]
    source = rng.integers(20, size=300)
    found = near_duplicates(vectors, source, [0.9, -1.0], [0.95, 0.3])
    np.testing.assert_array_equal(found, brute_force(vectors, source, [0.9, -1.0], [0.95, 0.3]))
    assert (found >= 0).any()
    assert (found < 0).any()


def test_the_bound_is_never_below_the_cosine(monkeypatch):
    monkeypatch.setattr(duplicates, "SKETCH_FROM", 0)
    x = clustered(np.random.default_rng(0), 400, 200, 50)
    short = duplicates._bound(x)
    assert short.shape[1] < x.shape[1]
    assert (short @ short.T >= x @ x.T - 1e-5).all()


def test_a_chain_keeps_both_ends():
    angles = np.deg2rad([0, 10, 20])
    x = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    limit = [float(np.cos(np.deg2rad(15)))]
    assert near_duplicates([x], np.arange(3), limit, limit).tolist() == [-1, 0, -1]


def test_every_dropped_clip_is_similar_to_the_kept_clip_it_names():
    rng = np.random.default_rng(1)
    x, source = clustered(rng, 500, 32, 40), np.arange(500)
    found = near_duplicates([x], source, [0.9], [0.9])
    dropped = np.flatnonzero(found >= 0)
    assert (found[found[dropped]] == -1).all()
    assert ((x[dropped] * x[found[dropped]]).sum(1) >= 0.9 - 1e-5).all()
    kept = np.flatnonzero(found < 0)
    assert np.triu(x[kept] @ x[kept].T, 1).max() < 0.9


def test_equal_vectors_reach_a_threshold_of_one():
    x = unit(np.random.default_rng(0).normal(size=(5, 1280)))
    found = near_duplicates([np.concatenate([x, x])], np.arange(10), [1.0], [1.0])
    assert found.tolist() == [-1] * 5 + [0, 1, 2, 3, 4]


def test_each_pair_is_held_to_the_limit_of_its_sources():
    x = unit(np.array([[1, 0], [1, 0.4], [1, 0.4]]))  # cosine 0.928 to the first
    found = near_duplicates([x], np.array([0, 0, 1]), [0.9], [0.95])
    assert found.tolist() == [-1, 0, -1]


def test_no_clips():
    assert len(near_duplicates([np.zeros((0, 4), np.float32)], np.zeros(0, int), [0.9], [0.9])) == 0
