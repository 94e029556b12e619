"""The signature stays with a copy and leaves with another moment."""

from fractions import Fraction

import cv2
import numpy as np
import pytest

from pipeline.record import Frames, Sample, Source, Video
from pipeline.score.signature import MOMENTS, NAME, SIZE, SignatureStage, moments, signature


def noise(seed: int) -> np.ndarray:
    """A smooth picture, uint8 [90, 160]."""
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (6, 8)).astype(np.uint8), (160, 90), interpolation=cv2.INTER_CUBIC)


def clip_of(seed: int) -> list[np.ndarray]:
    return [noise(100 * seed + i) for i in range(MOMENTS)]


COPIES = {
    "scaled": lambda p: cv2.resize(p, (80, 45), interpolation=cv2.INTER_AREA),
    "brighter": lambda p: np.clip(p * 0.8 + 30, 0, 255).astype(np.uint8),
    "re-encoded": lambda p: cv2.imdecode(cv2.imencode(".jpg", p, [1, 15])[1], 0),
    "cropped": lambda p: np.ascontiguousarray(p[3:-3, 5:-5]),
    "with a logo": lambda p: cv2.rectangle(p.copy(), (130, 5), (155, 15), 255, -1),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_closer_than_the_default_limit_and_others_are_farther(how):
    for seed in range(5):
        original = signature(clip_of(seed))
        assert signature([COPIES[how](p) for p in clip_of(seed)]) @ original > 0.75
        assert signature(clip_of(seed + 50)) @ original < 0.75


def test_it_is_a_unit_vector_and_a_single_tone_is_nothing():
    assert signature(clip_of(0)).shape == (SIZE,)
    assert np.linalg.norm(signature(clip_of(0))) == pytest.approx(1, abs=1e-4)
    assert not signature([np.full((9, 16), 7, np.uint8)] * MOMENTS).any()


def film(n: int) -> Video:
    video = Video(Source("/v", "v"), "u", "ab" * 32)
    pts = np.arange(n, dtype=np.int64)
    video.time_base = Fraction(1, 10)
    samples = [Sample(i, cv2.imencode(".jpg", noise(i))[1].tobytes()) for i in range(0, n, 5)]
    video.frames = Frames(pts, n, None, samples, None, np.zeros(0, np.int64))
    return video


def test_moments_are_spread_over_the_clip():
    video = film(100)
    assert [s.frame for s in moments(video, video.clip(0, 80))] == [10, 30, 50, 70]
    assert [s.frame for s in moments(video, video.clip(4, 8))] == [5] * MOMENTS
    assert moments(video, video.clip(6, 9)) == []


def test_the_stage_marks_clips_that_hold_a_sample_and_repeats_itself():
    video = film(100)
    video.clips = [video.clip(0, 50), video.clip(51, 54)]
    stage = SignatureStage()
    stage.setup()
    stage([video])
    first = video.clips[0].embeddings[NAME].copy()
    stage([video])
    assert np.array_equal(first, video.clips[0].embeddings[NAME])
    assert NAME not in video.clips[1].embeddings
    assert stage.produces.embeddings == {NAME: len(first)}
