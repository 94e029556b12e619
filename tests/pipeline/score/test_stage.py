"""Scores against closed forms: every film here moves in a way known exactly."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import recipe
from pipeline.record import Video
from pipeline.score.motion import MOTION, camera_motion, stillness
from pipeline.score.picture import PICTURE, active_area, decode_grey
from pipeline.score.stage import ScoreStage
from tests.fixtures.moving import SIZE, encode, film, record, texture, view

WORLD = texture()
WIDTH, HEIGHT = SIZE
DIAGONAL = float(np.hypot(WIDTH, HEIGHT))
VIDEOS = Path(__file__).parents[3] / "shared/videos"


def score(video: Video, **options: bool) -> dict[str, float]:
    stage = ScoreStage(recipe.Scores(**options))
    stage.setup()
    stage([video])
    return video.clips[0].scores


def panning(right: float = 0, down: float = 0, seconds: float = 2.0, fps: float = 30.0):
    return film(lambda t: view(WORLD, right * t, down * t), seconds, fps)


# ----------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize(("right", "down"), [(60, 0), (-200, 0), (0, 90), (40, -30), (12, 5)])
def test_pan_is_its_speed_in_picture_sizes_a_second(right, down):
    s = score(record(panning(right, down)), watermark=False)
    assert s["pan_x"] == pytest.approx(right / WIDTH, rel=0.06, abs=0.003)
    assert s["pan_y"] == pytest.approx(down / HEIGHT, rel=0.06, abs=0.003)
    assert s["motion"] == pytest.approx(np.hypot(right, down) / DIAGONAL, rel=0.08)
    assert s["motion_object"] < 0.15 * s["motion"]
    assert abs(s["zoom"]) < 0.01


def test_a_pan_of_half_a_picture_width_a_second_is_still_followed():
    s = score(record(panning(right=0.5 * WIDTH, seconds=1)))
    assert s["pan_x"] == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("rate", [0.15, -0.15, 0.4])
def test_zoom_is_log_scale_a_second(rate):
    s = score(record(film(lambda t: view(WORLD, zoom=np.exp(rate * t)), 2)))
    assert s["zoom"] == pytest.approx(rate, rel=0.1)
    assert abs(s["pan_x"]) < 0.01
    assert abs(s["pan_y"]) < 0.01
    assert s["motion_object"] < 0.2 * s["motion"]


def test_roll_moves_each_pixel_by_its_distance_from_the_centre_and_is_the_cameras():
    speed = 0.3  # radians a second
    s = score(record(film(lambda t: view(WORLD, roll=speed * t), 2)))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    radius = np.hypot(x - (WIDTH - 1) / 2, y - (HEIGHT - 1) / 2).mean()
    assert s["motion"] == pytest.approx(speed * radius / DIAGONAL, rel=0.1)
    assert s["motion_object"] < 0.2 * s["motion"]
    assert abs(s["zoom"]) < 0.01


@pytest.mark.parametrize("camera", [0, 50])
def test_an_object_that_moves_by_itself_is_told_from_the_camera(camera):
    speed, side = 120, 120
    thing = texture(7, 200)

    def at(t: float) -> np.ndarray:
        picture = view(WORLD, right := camera * t)
        left = round(60 + speed * t - right)
        picture[80 : 80 + side, left : left + side] = thing[:side, :side]
        return picture

    s = score(record(film(at, 2)))
    assert s["pan_x"] == pytest.approx(camera / WIDTH, abs=0.012)
    expected = side**2 / (WIDTH * HEIGHT) * speed / DIAGONAL
    assert s["motion_object"] == pytest.approx(expected, rel=0.35)


def test_motion_does_not_depend_on_the_frame_rate():
    rates = {fps: score(record(panning(80, 20, fps=fps))) for fps in (12, 15, 24, 30, 60)}
    for name in ("motion", "pan_x", "pan_y"):
        values = [s[name] for s in rates.values()]
        assert max(values) - min(values) < 0.05 * abs(np.mean(values)), name


def test_motion_uses_the_times_of_frames_not_their_number():
    """The same pan shot with frame times that wander between 60 and 10 frames a second."""
    steps = np.random.default_rng(1).choice([1 / 60, 1 / 30, 1 / 10], 60)
    times = np.concatenate([[0], np.cumsum(steps)])
    s = score(record([(t, view(WORLD, 80 * t, 0)) for t in times]))
    assert s["pan_x"] == pytest.approx(80 / WIDTH, rel=0.05)
    assert s["motion"] == pytest.approx(80 / DIAGONAL, rel=0.07)


def test_motion_does_not_depend_on_the_codec(tmp_path):
    from pipeline.record import Source
    from pipeline.split.decode import DecodeStage

    frames = film(lambda t: view(WORLD, 70 * t, 25 * t, size=(320, 180)), 1.5)
    found = []
    for codec, suffix in (("libx264", "mp4"), ("libvpx-vp9", "webm"), ("mpeg4", "avi")):
        path = encode(tmp_path / f"{codec}.{suffix}", frames, codec)
        video = Video(Source(str(path), path.name), "unit")
        decode = DecodeStage(recipe.Decode())
        decode.setup()
        decode([video])
        assert video.error is None
        assert video.frames is not None
        video.clips = [video.clip(0, len(video.frames.pts))]
        found.append(score(video))
    assert found[0]["pan_x"] == pytest.approx(70 / 320, rel=0.1)
    for name in ("motion", "pan_x", "pan_y"):
        values = [s[name] for s in found]
        assert max(values) - min(values) < 0.05 * abs(np.mean(values)), name


def test_a_cut_is_not_motion():
    other = texture(3, 700)
    frames = film(lambda t: view(WORLD if t < 1 else other), 2)
    s = score(record(frames, cuts=[30]))
    assert (s["motion"], s["pan_x"], s["zoom"]) == (0, 0, 0)


def test_a_brightness_change_is_not_motion():
    s = score(record(film(lambda t: (view(WORLD) * (0.5 + 0.25 * t)).astype(np.uint8), 2)))
    assert s["motion"] < 0.01


def test_camera_motion_recovers_an_exact_similarity_under_outliers():
    """Against numbers put in by hand: pan (3, −2), 4 % zoom, 0.02 rad, a quarter of the field elsewhere."""
    y, x = np.mgrid[:18, :32] * 4.0
    x, y = x - x.mean(), y - y.mean()
    scale, roll = 1.04, 0.02
    z, r = scale * np.cos(roll) - 1, scale * np.sin(roll)
    flow = np.stack([3 + z * x - r * y, -2 + z * y + r * x], -1)
    truth = flow.copy()
    flow[:9, :16] = (11, 6)
    field, travel = camera_motion(flow[None], np.ones((1, 18, 32)))
    np.testing.assert_allclose(travel[0], [3, -2, np.log(scale), roll], atol=0.05)
    np.testing.assert_allclose(field[0], truth, atol=0.3)


# -------------------------------------------------------------------------------------------- stillness


def test_a_still_clip_moves_nowhere_and_is_still_throughout():
    s = score(record(film(lambda t: view(WORLD), 2)))
    assert [s[n] for n in MOTION] == [0, 0, 0, 0, 0, 1]


def test_stillness_is_the_share_of_time_without_change():
    """2 s of pan, 2 s frozen: still once half a second has passed since the last change."""
    s = score(record(film(lambda t: view(WORLD, 60 * min(t, 2)), 4)))
    assert s["stillness"] == pytest.approx(1.5 / 4, abs=0.05)


def test_a_slow_zoom_over_a_photograph_is_not_still():
    assert score(record(film(lambda t: view(WORLD, zoom=1 + 0.03 * t), 3)))["stillness"] < 0.2


def test_animation_on_every_fourth_frame_is_not_still():
    assert score(record(film(lambda t: view(WORLD, 80 * (int(t * 24) // 4) / 6), 2, 24)))["stillness"] == 0


def test_grain_is_not_change():
    rng = np.random.default_rng(0)
    still = view(WORLD).astype(np.float64)
    frames = film(lambda t: np.clip(still + rng.normal(0, 5, still.shape), 0, 255).astype(np.uint8), 2)
    s = score(record(frames))
    assert s["stillness"] == 1
    assert s["motion"] < 0.01


def test_stillness_looks_back_no_further_than_the_shot():
    grey = np.zeros((8, 16, 16), np.uint8)
    grey[4:] = 200
    shot = np.array([0] * 4 + [1] * 4)
    assert stillness(grey, np.arange(8) / 8, shot) == 1


# ---------------------------------------------------------------------------------------- picture quality


def test_sharpness_falls_with_every_blur():
    def blurred(sigma: float):
        return film(lambda t: cv2.GaussianBlur(view(WORLD, 60 * t), (0, 0), sigma), 1)

    values = [score(record(blurred(sigma)))["sharpness"] for sigma in (0.5, 1, 2, 4, 8)]
    assert all(a > 1.2 * b for a, b in itertools.pairwise(values))


def test_sharpness_is_the_variance_of_the_laplacian_of_the_sample_at_256_pixels():
    video = record(panning(60))
    assert video.frames is not None
    by_hand = []
    for sample in video.frames.samples:
        full = cv2.imdecode(np.frombuffer(sample.jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
        small = cv2.resize(full, (256, 144), interpolation=cv2.INTER_AREA).astype(np.float64)
        padded = np.pad(small, 1, mode="reflect")
        around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        by_hand.append((around - 4 * small).var())
    assert score(video)["sharpness"] == pytest.approx(float(np.median(by_hand)), rel=0.15)


@pytest.mark.parametrize("size", [(1024, 576), (640, 360), (500, 281), (200, 112), (90, 160), (3, 2)])
def test_samples_of_any_size_are_measured_at_one_scale(size):
    big = cv2.resize(view(WORLD), size, interpolation=cv2.INTER_AREA)
    video = record([(0, big), (0.5, big)])
    assert video.frames is not None
    pictures = decode_grey(video.frames.samples)
    assert max(pictures.shape[1:]) == 256
    assert pictures.shape[2] / pictures.shape[1] == pytest.approx(size[0] / size[1], rel=0.02)


@pytest.mark.parametrize("level", [40, 128, 230])
def test_exposure_is_mean_luma(level):
    picture = np.full((288, 512), level, np.uint8)
    picture[:, :128] += 20
    s = score(record([(0, picture), (0.5, picture)]))
    assert s["exposure"] == pytest.approx(picture.mean() / 255, abs=0.005)


def test_clipped_is_the_share_of_crushed_and_blown_pixels():
    picture = np.full((288, 512), 128, np.uint8)
    picture[72:144, 128:256], picture[144:216, 256:384] = 0, 255
    assert score(record([(0, picture)]))["clipped"] == pytest.approx(1 / 8, abs=0.01)


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right"), [(36, 36, 0, 0), (0, 0, 64, 64), (20, 60, 32, 0), (0, 0, 0, 0)]
)
def test_black_borders_are_their_exact_area(top, bottom, left, right):
    def at(t: float) -> np.ndarray:
        picture = view(WORLD, 60 * t).clip(40)
        picture[:top], picture[HEIGHT - bottom :] = 0, 0
        picture[:, :left], picture[:, WIDTH - right :] = 0, 0
        return picture

    video = record(film(at, 3))
    s = score(video)
    expected = 1 - (WIDTH - left - right) * (HEIGHT - top - bottom) / (WIDTH * HEIGHT)
    assert s["black_borders"] == pytest.approx(expected, abs=0.006)
    assert s["watermark"] == 0
    bare = score(record(film(lambda t: at(t)[top : HEIGHT - bottom, left : WIDTH - right], 3)))
    assert s["exposure"] == pytest.approx(bare["exposure"], abs=0.01)  # the bars are not part of the picture


def test_a_dark_corner_that_is_lit_once_is_no_border():
    def at(t: float) -> np.ndarray:
        picture = view(WORLD).clip(40)
        if t < 1:
            picture[:60] = 0
        return picture

    assert score(record(film(at, 2)))["black_borders"] == 0


def test_an_all_black_clip_has_an_exposure_and_nothing_that_cannot_be_known():
    s = score(record([(t, np.zeros((288, 512), np.uint8)) for t in (0, 0.5, 1, 1.5, 2)]))
    assert s["exposure"] == 0
    assert not {"sharpness", "clipped", "black_borders", "watermark"} & s.keys()
    assert active_area(np.zeros((2, 9, 9), np.uint8)) is None


# -------------------------------------------------------------------------------------------- watermark


def stamp(picture: np.ndarray, opacity: float = 1.0, text: str = "CLIPMILL") -> np.ndarray:
    """A logo of letters in the lower right corner."""
    mark = picture.copy()
    cv2.putText(mark, text, (330, 265), cv2.FONT_HERSHEY_SIMPLEX, 1.0, 255, 3, cv2.LINE_AA)
    return cv2.addWeighted(mark, opacity, picture, 1 - opacity, 0)


LOGO_AREA = 0.03  # what `stamp` covers, about: 155 × 24 of 512 × 288 pixels


@pytest.mark.parametrize("opacity", [1.0, 0.7])
@pytest.mark.parametrize("seed", [0, 4])
def test_a_logo_over_moving_content_is_found_at_about_its_size(opacity, seed):
    world = texture(seed)
    s = score(record(film(lambda t: stamp(view(world, 90 * t, 40 * t), opacity), 5)))
    assert 0.4 * LOGO_AREA < s["watermark"] < 2 * LOGO_AREA


@pytest.mark.parametrize("seed", range(5))
def test_moving_content_without_a_logo_has_no_watermark(seed):
    world = texture(seed)
    assert score(record(film(lambda t: view(world, 90 * t, 40 * t), 5)))["watermark"] == 0


@pytest.mark.parametrize("rate", [0.1, 0.25, -0.1])
def test_a_zoom_towards_a_fixed_point_has_no_watermark(rate):
    assert score(record(film(lambda t: view(WORLD, zoom=np.exp(rate * t)), 5)))["watermark"] == 0


def test_the_static_background_of_a_moving_subject_is_no_watermark():
    thing = texture(9, 200)

    def at(t: float) -> np.ndarray:
        picture = view(WORLD)
        x, y = int(200 + 120 * np.sin(3 * t)), int(90 + 40 * np.cos(2 * t))
        picture[y : y + 100, x : x + 100] = thing[:100, :100]
        return picture

    assert score(record(film(at, 6))).get("watermark", 0) == 0


def test_a_horizon_under_a_pan_is_no_watermark():
    """A straight edge looks the same everywhere along itself: persistent, but in one direction only."""

    def at(t: float) -> np.ndarray:
        picture = view(WORLD, 90 * t)
        picture[140:150] = 255
        return picture

    assert score(record(film(at, 5)))["watermark"] == 0


def test_in_a_still_shot_a_watermark_cannot_be_known():
    assert "watermark" not in score(record(film(lambda t: stamp(view(WORLD)), 3)))


def test_a_clip_of_too_few_samples_cannot_show_a_watermark():
    assert "watermark" not in score(record(film(lambda t: stamp(view(WORLD, 90 * t)), 1)))


@pytest.mark.parametrize("marked", [True, False])
def test_a_logo_on_still_shots_is_known_by_staying_from_shot_to_shot(marked):
    shots = [view(texture(10 + n, 700)) for n in range(6)]
    shots = [stamp(s) for s in shots] if marked else shots
    video = record(film(lambda t: shots[int(t)], 6, 10), cuts=[10, 20, 30, 40, 50], clips=True)
    ScoreStage(recipe.Scores())([video])
    for clip in video.clips:
        if marked:
            assert 0.4 * LOGO_AREA < clip.scores["watermark"] < 2 * LOGO_AREA
        else:
            assert clip.scores["watermark"] == 0


def test_pieces_of_one_still_shot_are_no_evidence_of_a_watermark():
    video = record(film(lambda t: view(WORLD), 6, 10), cuts=[10, 20, 30, 40, 50], clips=True)
    ScoreStage(recipe.Scores())([video])
    assert not any("watermark" in c.scores for c in video.clips)


def test_a_logo_in_some_shots_is_charged_to_those():
    shots = [view(texture(20 + n, 700)) for n in range(8)]
    shots = [stamp(s) if n != 2 else s for n, s in enumerate(shots)]
    video = record(film(lambda t: shots[int(t)], 8, 10), cuts=[10, 20, 30, 40, 50, 60, 70], clips=True)
    ScoreStage(recipe.Scores())([video])
    shares = [c.scores["watermark"] for c in video.clips]
    assert shares.pop(2) < 0.2 * LOGO_AREA
    assert min(shares) > 0.2 * LOGO_AREA


# ------------------------------------------------------------------------------------------ as a stage


def test_what_the_recipe_leaves_out_is_not_measured():
    video = record(panning(60, seconds=3))
    stage = ScoreStage(recipe.Scores(motion=False, watermark=False))
    assert stage.produces.scores == PICTURE
    stage([video])
    assert sorted(video.clips[0].scores) == sorted(PICTURE)


def test_scored_again_a_video_keeps_its_scores_and_grey_frames_go_no_further():
    video = record(panning(60, seconds=3))
    first = dict(score(video))
    assert set(first) == {*MOTION, *PICTURE, "watermark"}
    assert video.frames is not None
    assert video.frames.grey is None
    assert score(video) == first


def test_a_clip_with_one_frame_or_none_sampled_gets_no_score_it_cannot_have():
    video = record(panning(60))
    video.clips = [video.clip(1, 2)]
    assert score(video) == {}


def test_pictures_of_one_pixel_are_survived():
    assert score(record([(t / 4, np.full((1, 1), 90, np.uint8)) for t in range(8)]))["stillness"] == 1


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="no shared videos beside the repository")
def test_real_logos_are_found_and_real_clean_footage_is_not_flagged():
    from pipeline.record import Source
    from pipeline.split.decode import DecodeStage

    expected = {
        "panda70m/7nxhg1S6BV4.22.mp4": True,
        "panda70m/2jKXlH_ceCo.11.mp4": True,
        "panda70m/8CwuRmhm_PA.2.mp4": False,
        "single_shot/02_cups.mp4": False,
    }
    decode = DecodeStage(recipe.Decode())
    decode.setup()
    for name, marked in expected.items():
        video = Video(Source(str(VIDEOS / name), name), "unit")
        decode([video])
        assert video.frames is not None, video.error
        video.clips = [video.clip(0, len(video.frames.pts))]
        assert (score(video, motion=False, picture=False)["watermark"] > 0) == marked, name
