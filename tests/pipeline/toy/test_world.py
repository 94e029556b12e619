"""The small world: its laws hold, its sentences mean one thing each, its pictures are what its numbers say."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pipeline.toy import world
from pipeline.toy.world import Attributes


def scenes(number: int, pan: float = 0.3) -> list[world.Scene]:
    return [s for i in range(number // 10) for s in world.story(np.random.default_rng([3, i]), 10, pan)]


@pytest.fixture(scope="module")
def many() -> list[world.Scene]:
    return scenes(1000)


def outline(shape: str) -> np.ndarray:
    """Corners of the box around a shape, from its centroid; a triangle's lies a third above its base."""
    up, down = (2 / 3, 1 / 3) if shape == "triangle" else (1 / 2, 1 / 2)
    return world.SIDE * np.array([[-0.5, -up], [0.5, down]])


def test_objects_stay_wholly_in_the_picture_and_never_touch(many):
    for s in many:
        boxes = s.positions()[:, :, None] + outline(s.attributes.shape)  # [T, objects, 2 corners, 2]
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        for a, b in itertools.combinations(range(boxes.shape[1]), 2):
            apart = np.maximum(boxes[:, a, 0] - boxes[:, b, 1], boxes[:, b, 0] - boxes[:, a, 1]).max(-1)
            assert apart.min() >= 4 / 64  # two pixels at half the usual size


def test_velocity_is_constant_along_the_named_direction(many):
    for s in many:
        steps = np.diff(s.positions(), axis=0)
        assert np.ptp(steps, axis=(0, 1)) == pytest.approx([0, 0], abs=1e-12)
        way, speed = np.array(world.DIRECTIONS[s.attributes.direction]), np.linalg.norm(steps[0, 0])
        assert steps[0, 0] == pytest.approx(speed * way, abs=1e-12)
        assert speed == 0 if s.attributes.direction == "still" else speed >= world.SPEEDS[0]


def test_every_attribute_is_drawn_evenly(many):
    for name, values in {
        "count": world.COUNTS,
        "colour": world.COLOURS,
        "shape": world.SHAPES,
        "direction": world.DIRECTIONS,
        "background": world.BACKGROUNDS,
    }.items():
        told = [getattr(s.attributes, name) for s in many]
        share = 1 / len(values)
        four_sd = 4 * (share * (1 - share) / len(many)) ** 0.5
        assert all(abs(told.count(v) / len(many) - share) < four_sd for v in values)


def test_neighbouring_scenes_differ_in_background():
    for seed in range(20):
        told = world.story(np.random.default_rng(seed), 8)
        grounds = [s.attributes.background for s in told]
        assert all(a != b for a, b in itertools.pairwise(grounds))


ATTRIBUTES = ("count", "colour", "shape", "direction", "background")


def shares(without: frozenset[Attributes], together: int) -> list[float]:
    """Of all combinations of so many attributes' values, how much of each is left out."""
    found = []
    for names in itertools.combinations(ATTRIBUTES, together):
        whole, lost = (
            Counter(tuple(getattr(a, name) for name in names) for a in some)
            for some in (world.every(), without)
        )
        found += [lost[values] / number for values, number in whole.items()]
    return found


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_what_is_held_out_takes_nearly_the_same_of_every_attribute_and_of_every_pair(share):
    without = world.held_out(share)
    assert len(without) == round(share * 450)
    assert shares(without, 1) == pytest.approx([share] * 18, abs=0.01)
    assert shares(without, 2) == pytest.approx([share] * 126, abs=0.06)
    assert max(shares(without, 3)) < 1  # any three are shown together, too


def test_what_is_held_out_depends_on_the_share_alone_and_grows_with_it():
    assert world.held_out(0) == frozenset()
    assert world.held_out(0.15) == world.held_out(0.15) < world.held_out(0.2)
    with pytest.raises(ValueError, match=r"a share of 0\.6 cannot be held out: give 0 to 0\.5"):
        world.held_out(0.6)


def test_what_is_held_out_is_never_drawn_and_all_else_is_as_evenly_as_before():
    without = world.held_out(0.3)
    drawn = [
        s.attributes for i in range(150) for s in world.story(np.random.default_rng([4, i]), 10, 0.3, without)
    ]
    told = [replace(a, pan="none") for a in drawn]
    assert not without & set(told)
    assert {a.pan for a in drawn} == set(world.PANS)
    left = len(set(world.every()) - without)
    assert len(set(told)) > 0.95 * left  # of 1,500 draws, each of 315 is missed by a chance of 1 %
    for colour in world.COLOURS:
        assert sum(a.colour == colour for a in told) / len(told) == pytest.approx(0.2, abs=0.04)


def test_captions_and_attributes_are_one_to_one_and_short():
    everything = list(world.every(world.PANS))
    captions = [a.caption() for a in everything]
    assert len(set(captions)) == len(everything) == 3 * 5 * 3 * 5 * 2 * 3
    assert [world.parse(c) for c in captions] == everything
    assert max(map(len, captions)) <= 62  # with two marks, within the 64 tokens of a byte encoder


def test_captions_are_english():
    assert (
        Attributes("one", "blue", "square", "still", "white").caption()
        == "one blue square stands still on white"
    )
    said = Attributes("three", "red", "circle", "left", "black", "right").caption()
    assert said == "three red circles move left on black, camera pans right"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog runs",
        "one red circles move left on black",
        "two red circles still on black",
        "four red circles",
    ],
)
def test_other_sentences_are_refused(caption):
    with pytest.raises(ValueError, match="none of this world's"):
        world.parse(caption)


def test_what_is_not_known_has_no_caption():
    assert Attributes("one", "red", None, "left", "black").caption() == ""


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
def test_rendered_area_and_centroid_are_the_shapes_own(shape, area):
    s = world.scene(np.random.default_rng(5), Attributes("one", "red", shape, "right", "black"), (6, 6))
    red, ground = world.COLOURS["red"], world.BACKGROUNDS["black"]
    cover = (world.render(s, 128)[..., 0].astype(float) - ground) / (red[0] - ground)
    y, x = (np.mgrid[:128, :128] + 0.5) / 128
    mass = cover.sum((1, 2))
    assert mass / 128**2 == pytest.approx(area * world.SIDE**2, rel=0.02)
    found = np.stack([(cover * x).sum((1, 2)), (cover * y).sum((1, 2))], 1) / mass[:, None]
    assert found == pytest.approx(s.positions()[:, 0], abs=0.1 / 128)


def test_a_camera_that_pans_right_moves_the_background_left():
    s = world.scene(
        np.random.default_rng(1), Attributes("one", "red", "circle", "up", "white", "right"), (8, 8)
    )
    row = world.render(s, 64)[:, 0, :, 0].astype(float)  # above every object

    def shift(a, b):  # to the right by which b follows a, brute force
        tried = np.arange(-6, 7)  # less than half a wave
        return tried[np.argmin([np.abs(np.roll(a, k) - b).mean() for k in tried])]

    assert shift(row[0], row[2]) == round(2 * s.pan * 64) < 0


def test_rendering_is_decided_by_the_seed():
    first, again, other = (world.story(np.random.default_rng(seed), 3, 0.5) for seed in (1, 1, 2))
    assert first == again != other
    assert all(
        np.array_equal(world.render(a, 32), world.render(b, 32)) for a, b in zip(first, again, strict=True)
    )


def test_scenes_too_long_for_the_picture_are_refused():
    with pytest.raises(ValueError, match="2 to 24 frames"):
        world.scene(np.random.default_rng(0), world.EXAMPLE, (16, 40))


def test_one_off_are_all_that_differ_in_one_attribute():
    near = world.one_off(world.EXAMPLE)
    assert len({a.caption() for a in near}) == len(near) == 2 + 4 + 2 + 4 + 1
    for other in near:
        assert sum(getattr(other, n) != x for n, x in vars(world.EXAMPLE).items()) == 1
