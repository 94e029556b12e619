"""Frames of dissolves, fades and wipes belong to no shot; a hard cut loses none."""

import numpy as np
import pytest

from pipeline.recipe import Shots, load
from pipeline.record import Shot
from pipeline.split.shots import ShotStage
from pipeline.split.transitions import find, gradual, without
from tests.fixtures.scenes import scene, steady

N = 60  # frames of each scene


def calm(seed: int) -> np.ndarray:
    """float [N, 27, 48, 3]: a scene that hardly moves."""
    noise = np.random.default_rng(seed).normal(0, 2, (N, 27, 48, 3))
    return (scene(seed, 1).astype(float) + noise).clip(0, 255)


def ends(first: int = 1, second: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return calm(first), calm(second)


def composed(kind: str, frames: int) -> np.ndarray:
    """uint8 [2 N − frames, 27, 48, 3]; `frames` of them mix both scenes, the first of which is N − frames."""
    a, b = ends()
    mix = np.arange(1, frames + 1)[:, None, None, None] / (frames + 1)
    tail, head = a[N - frames :], b[:frames]
    if kind == "dissolve":
        middle = (1 - mix) * tail + mix * head
    elif kind in ("black", "white"):
        colour = 0.0 if kind == "black" else 255.0
        out = np.clip(1 - 2 * mix, 0, 1)
        into = np.clip(2 * mix - 1, 0, 1)
        middle = np.where(mix < 0.5, out * tail + (1 - out) * colour, into * head + (1 - into) * colour)
    else:  # wipe
        x = np.arange(48)[None, None, :, None] / 48
        middle = np.where(x < mix, head, tail)
    return np.concatenate([a[: N - frames], middle, b[frames:]]).round().astype(np.uint8)


@pytest.mark.parametrize("kind", ["black", "white", "wipe"])
@pytest.mark.parametrize("frames", [9, 15, 25])
def test_fades_and_wipes_are_found_to_the_frame_without_a_network(kind, frames):
    [(start, end)] = find(composed(kind, frames), [])
    assert abs(start - (N - frames)) <= 1
    assert abs(end - N) <= 1


def test_hard_cuts_flashes_black_frames_and_still_pictures_are_no_transitions():
    a, b = (x.astype(np.uint8) for x in ends())
    flash = a.copy()
    flash[30] = 255
    black = np.concatenate([a, np.zeros((5, 27, 48, 3), np.uint8), b])
    for thumbs in (np.concatenate([a, b]), flash, black, a, np.zeros_like(a), np.repeat(a[:1], 90, 0)):
        assert find(thumbs, [N], np.zeros(len(thumbs))) == []


def test_a_run_of_the_second_head_is_a_transition_unless_one_step_makes_its_change():
    thumbs = composed("dissolve", 15)
    many = np.zeros(len(thumbs))
    many[N - 15 : N] = 0.3
    assert gradual(many, [N - 7], thumbs) == [(N - 15, N)]
    assert gradual(many, [], thumbs) == []  # neither sure nor bounded
    many[N - 10 : N - 5] = 0.9
    assert gradual(many, [], thumbs) == [(N - 15, N)]
    cut = np.concatenate([x.astype(np.uint8) for x in ends()])
    many = np.zeros(len(cut))
    many[N - 3 : N + 2] = 0.9
    assert gradual(many, [N], cut) == []


def test_shots_are_what_lies_between_cuts_and_transitions():
    assert without([0, 40, 100], []) == [(0, 40), (40, 100)]
    assert without([0, 40, 100], [(35, 45)]) == [(0, 35), (45, 100)]
    assert without([0, 40, 100], [(0, 12), (60, 70)]) == [(12, 40), (40, 60), (70, 100)]
    assert without([0, 40, 100], [(95, 100), (10, 20)][::-1]) == [(0, 10), (20, 40), (40, 95)]
    assert without([0, 100], [(0, 100)]) == []


@pytest.fixture(scope="module")
def network():
    stage = ShotStage(Shots(transitions="trim"))
    stage.setup()
    return stage


def test_the_network_gives_the_frames_of_a_dissolve_and_no_frame_of_a_cut(network):
    dissolve = composed("dissolve", 15)
    cut = np.concatenate([scene(3, N), scene(4, 30)])
    v = steady(10, 25, thumbs=np.concatenate([dissolve, cut]))
    v.frames.pts, v.frames.end_pts = (
        v.frames.pts[: len(v.frames.thumbs)],
        int(v.frames.pts[len(v.frames.thumbs)]),
    )
    [v] = network([v])
    first, second, third, fourth = v.shots
    assert (first.start_frame, second.end_frame) == (0, 2 * N - 15)
    assert N - 18 <= first.end_frame <= N - 14  # the first mixed frame is nearly the first scene's
    assert N - 1 <= second.start_frame <= N + 4
    assert (third, fourth) == (Shot(105, 165), Shot(165, 195))
    assert v.counts["transitions"] == 1
    assert v.counts["transition_frames"] == second.start_frame - first.end_frame


def test_kept_transitions_belong_to_the_shots_around_them():
    thumbs = composed("black", 15)
    v = steady(10, 25, thumbs=thumbs)
    v.frames.pts, v.frames.end_pts = v.frames.pts[: len(thumbs)], int(v.frames.pts[len(thumbs)])
    [v] = ShotStage(Shots(detector="content"))([v])
    assert sum(s.end_frame - s.start_frame for s in v.shots) == len(thumbs)
    assert "transitions" not in v.counts


@pytest.mark.parametrize("name", ["embedded", "panda70m"])
def test_shipped_recipes_trim(name):
    assert load(name).shots.transitions == "trim"
