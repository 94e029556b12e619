"""The exact reader: right on every combination of attributes, through codec, blur and noise; never by default."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from jobs.videos import write_mp4
from pipeline.toy import reader, world
from pipeline.toy.world import Attributes

NOTHING = Attributes(None, None, None, None, None, None)


def film(attributes: Attributes, seed: int = 0, size: int = 64, frames: int = 16) -> np.ndarray:
    return world.render(world.scene(np.random.default_rng(seed), attributes, (frames, frames)), size)


def small(frames: np.ndarray, size: int = 32) -> np.ndarray:
    return np.stack([cv2.resize(f, (size, size), interpolation=cv2.INTER_AREA) for f in frames])


def noisy(frames: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-10, 11, frames.shape)
    return (frames.astype(int) + noise).clip(0, 255).astype(np.uint8)


def soft(frames: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(f, (0, 0), sigma) for f in frames])


def through_h264(pictures: np.ndarray, path: Path) -> np.ndarray:
    write_mp4(path, pictures, 8, crf=12)
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def wrong(read: list[tuple[Attributes, np.ndarray]]) -> list[tuple[Attributes, Attributes]]:
    found = [(truth, reader.read(frames).attributes) for truth, frames in read]
    return [(truth, seen) for truth, seen in found if truth != seen]


def test_every_combination_is_read_from_rendered_frames():
    assert not wrong([(a, film(a, i, frames=8)) for i, a in enumerate(world.every())])


def test_every_camera_is_read():
    panned = [a for a in world.every(world.PANS[1:]) if a.colour in ("red", "blue")][::4]
    assert len(panned) > 80
    assert not wrong([(a, film(a, i)) for i, a in enumerate(panned)])


def test_every_combination_is_read_after_h264(tmp_path):
    everything = list(world.every())
    films = [film(a, i, frames=8) for i, a in enumerate(everything)]
    # one file: the coder must also get over a cut every 8 frames
    pictures = through_h264(np.concatenate(films), tmp_path / "all.mp4")
    assert not wrong(list(zip(everything, pictures.reshape(-1, 8, *pictures.shape[1:]), strict=True)))


@pytest.mark.parametrize("sigma", [0, 0.6, 1.0])
def test_small_soft_noisy_pictures_are_read(sigma):
    some = list(world.every())[:: 3 if sigma else 5]
    films = [(a, small(film(a, i, frames=8))) for i, a in enumerate(some)]
    assert not wrong([(a, noisy(soft(f, sigma) if sigma else f)) for a, f in films])


@pytest.mark.parametrize("sigma", [1.3, 1.6])
def test_no_shape_is_taken_for_another_where_pictures_are_softer_than_the_corners_of_a_square(sigma):
    read = unread = 0
    for i, a in enumerate(list(world.every())[::3]):
        seen = reader.read(noisy(soft(small(film(a, i, frames=8)), sigma))).attributes
        if seen.count == a.count:  # neighbours may have run together
            assert seen.shape in (a.shape, None)
            read += seen.shape == a.shape
            unread += seen.shape is None
    assert read > 100
    assert unread < 0.1 * read if sigma < 1.5 else unread < 0.5 * read


@pytest.mark.parametrize(("shape", "times"), [("square", 0.886), ("circle", 1.128)])
@pytest.mark.parametrize("sigma", [0, 0.6, 1.0])
def test_a_shape_of_anothers_area_is_not_the_other(monkeypatch, shape, times, sigma):
    """A square with the area of a circle, and the other way round."""
    attributes = Attributes("one", "green", shape, "left", "black")
    monkeypatch.setattr(world, "SIDE", world.SIDE * times)
    for seed in range(10):
        frames = noisy(soft(small(film(attributes, seed, frames=8)), sigma or 0.01))
        assert reader.read(frames).attributes.shape in (shape, None)


def garbage() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8)
    return {
        "noise": rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8),
        "blotches": np.stack([cv2.resize(c, (32, 32), interpolation=cv2.INTER_CUBIC) for c in coarse]),
        "faint noise on grey": (128 + rng.normal(0, 20, (8, 32, 32, 3))).clip(0, 255).astype(np.uint8),
        "all red": np.full((8, 32, 32, 3), world.COLOURS["red"], np.uint8),
        "grey": np.full((8, 32, 32, 3), 128, np.uint8),
    }


@pytest.mark.parametrize("name", garbage())
def test_garbage_is_nothing(name):
    reading = reader.read(garbage()[name])
    assert reading.attributes == NOTHING
    assert set(reading.confidence.values()) == {0.0}
    assert reading.caption() == ""
    assert reader.trajectory(garbage()[name]).shape == (8, 0, 2)


def test_an_empty_scene_has_a_background_and_nothing_else():
    for name, level in world.BACKGROUNDS.items():
        blank = np.full((8, 32, 32, 3), level, np.uint8)
        assert reader.read(blank).attributes == Attributes(None, None, None, None, name, None)
        assert not any(
            v for k, v in reader.judge(blank, world.EXAMPLE.caption()).items() if k != "background"
        )


def alone(attributes: Attributes, x: float) -> np.ndarray:
    """One object on its way up or down the column x."""
    way = world.DIRECTIONS[attributes.direction]
    velocity = (way[0] / 40, way[1] / 40)
    return world.render(world.Scene(attributes, 8, ((x, 0.5 - 3.5 * velocity[1]),), velocity, 0.0, 0.0), 64)


@pytest.mark.parametrize(("name", "other"), [("colour", "blue"), ("shape", "square"), ("direction", "down")])
def test_objects_that_differ_settle_nothing_of_what_they_differ_in(name, other):
    base = Attributes("one", "red", "circle", "up", "black")
    first, second = alone(base, 0.3), alone(replace(base, **{name: other}), 0.7)
    both = np.where(first == world.BACKGROUNDS["black"], second, first)
    assert reader.read(both).attributes == replace(base, **{"count": "two", name: None})


def test_objects_that_come_and_go_are_not_counted():
    one, two = (film(Attributes(n, "red", "circle", "still", "black"), 4) for n in ("one", "two"))
    flicker = np.concatenate([one[:5], two[:5]])
    assert reader.read(flicker).attributes == replace(NOTHING, background="black")


def test_a_path_that_turns_or_slants_has_no_direction():
    right = film(Attributes("one", "red", "circle", "right", "black"), 2, frames=12)
    assert reader.read(np.concatenate([right, right[::-1]])).attributes.direction not in ("left", "right")
    slanted = world.Scene(
        Attributes("one", "red", "circle", "up", "black"), 12, ((0.3, 0.3),), (1 / 40, 1 / 40), 0.0, 0.0
    )
    assert reader.read(world.render(slanted, 64)).attributes.direction is None


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\], not float64 \[8, 32, 32\]"):
        reader.read(np.zeros((8, 32, 32)))


# ---------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def judged() -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    told = [world.story(rng, 1)[0] for _ in range(400)]
    return [(s.attributes.caption(), small(world.render(s, 64)[:8])) for s in told]


def test_the_judge_finds_all_true_of_the_right_caption(judged):
    assert all(all(reader.judge(frames, caption).values()) for caption, frames in judged[:50])


def test_shuffled_captions_score_at_chance(judged):
    seen = [reader.read(frames).attributes for _, frames in judged]
    hits: Counter[str] = Counter()
    for shift in (1, 7, 31):
        for i, (caption, _) in enumerate(judged):
            wanted = asdict(world.parse(caption))
            hits.update(k for k, v in asdict(seen[i - shift]).items() if wanted[k] == v)
    chance = {"count": 1 / 3, "colour": 1 / 5, "shape": 1 / 3, "direction": 1 / 5, "background": 1 / 2}
    assert {k: hits[k] / (3 * len(judged)) for k in chance} == pytest.approx(chance, abs=0.06)


def test_each_attribute_can_fail_alone(judged):
    caption, frames = judged[0]
    truth = world.parse(caption)
    for name, values in {
        "count": world.COUNTS,
        "colour": world.COLOURS,
        "shape": world.SHAPES,
        "direction": world.DIRECTIONS,
        "background": world.BACKGROUNDS,
        "pan": world.PANS,
    }.items():
        other = next(v for v in values if v != getattr(truth, name))
        verdict = reader.judge(frames, replace(truth, **{name: other}).caption())
        assert [k for k, right in verdict.items() if not right] == [name]


# ---------------------------------------------------------------- the motion law


@pytest.mark.parametrize("size", [32, 64])
def test_trajectories_recover_velocities(size):
    """Within 0.2 pixels a frame, through noise; positions within a third of a pixel."""
    rng = np.random.default_rng(2)
    for i in range(40):
        s = world.story(rng, 1)[0]
        frames = world.render(s, 64)
        positions = reader.trajectory(noisy(small(frames) if size == 32 else frames, i))
        truth = s.positions() * size - 0.5
        order = [int(np.abs(truth[0] - p).sum(1).argmin()) for p in positions[0]]
        assert sorted(order) == list(range(truth.shape[1]))
        assert np.abs(positions - truth[:, order]).max() < 1 / 3
        speeds, astray = reader.velocity(positions)
        assert np.abs(speeds - np.array(s.velocity) * size).max() < 0.2
        assert astray.max() < 0.1


def test_the_law_tells_a_bent_path_from_a_straight_one():
    t = np.arange(9.0)
    straight = np.stack([2 * t + 5, -t], 1)[:, None]
    assert reader.velocity(straight)[0] == pytest.approx(np.array([[2, -1]]))
    assert reader.velocity(straight)[1] == pytest.approx([0], abs=1e-9)
    slower = straight.copy()
    slower[5:, 0, 0] = slower[5, 0, 0]  # it stops
    assert reader.velocity(slower)[1][0] > 1
    missing = straight.copy()
    missing[3] = np.nan
    assert reader.velocity(missing)[0] == pytest.approx(np.array([[2, -1]]))


def test_two_frames_prove_no_law():
    assert np.isnan(reader.velocity(np.zeros((2, 1, 2)))[1]).all()
