"""OCR on pictures whose text is known."""

import cv2
import numpy as np
import pytest

from pipeline import recipe
from pipeline.record import Video
from pipeline.score.text import Line, TextStage, covered_share, prominent
from tests.fixtures.moving import record, texture, view


@pytest.fixture(scope="module")
def stage() -> TextStage:
    stage = TextStage(recipe.Text())
    stage.setup()
    return stage


def scene(*lines: tuple[str, int, int, float]) -> tuple[np.ndarray, float]:
    """A picture with lines of (text, x, baseline y, scale) on dark cards, and the share of it under them."""
    picture = np.repeat(cv2.GaussianBlur(view(texture(1)), (0, 0), 6)[..., None], 3, 2)
    area = 0
    for text, x, y, scale in lines:
        (w, h), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
        cv2.rectangle(picture, (x - 6, y - h - 6), (x + w + 6, y + below + 4), (20, 20, 20), -1)
        cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 2, cv2.LINE_AA)
        area += w * (h + below)
    return picture, area / (picture.shape[0] * picture.shape[1])


def film_of(*pictures: np.ndarray) -> Video:
    return record([(n / 2, p) for n, p in enumerate(pictures)])


def test_text_is_read_and_its_area_is_that_of_its_boxes(stage):
    picture, area = scene(("BREAKING NEWS", 60, 90, 1.4), ("weather at six", 80, 230, 0.9))
    video = film_of(picture)
    stage([video])
    clip = video.clips[0]
    assert [t.replace(" ", "").lower() for t in clip.text] == ["breakingnews", "weatheratsix"]
    assert clip.scores["text_area"] == pytest.approx(area, rel=0.35)


def test_the_largest_line_comes_first_wherever_it_stands(stage):
    picture, _ = scene(("small print here", 60, 60, 0.7), ("HUGE", 120, 220, 2.5))
    video = film_of(picture)
    stage([video])
    assert video.clips[0].text[0] == "HUGE"


def test_pictures_without_text_have_none(stage):
    video = film_of(*(np.repeat(view(texture(n))[..., None], 3, 2) for n in (1, 2)))
    stage([video])
    assert video.clips[0].text == []
    assert video.clips[0].scores["text_area"] == 0


def test_text_shown_for_part_of_a_clip_counts_in_full(stage):
    """The frame with most text decides: a training sample with a title card in it is not clean."""
    plain, _ = scene()
    titled, _ = scene(("CHAPTER ONE", 60, 150, 1.5))
    part, whole = film_of(plain, plain, titled, titled), film_of(*[titled] * 4)
    stage([part, whole])
    assert part.clips[0].scores == whole.clips[0].scores
    assert part.clips[0].text == whole.clips[0].text
    assert len(whole.clips[0].text) == 1


def test_a_clip_reads_the_same_in_any_company_and_again(stage):
    pictures = [scene((word, 60, 150, 1.2))[0] for word in ("ALPHA ROMEO", "a very much longer line", "Z")]
    together = [film_of(p) for p in pictures]
    stage(together)
    for picture, video in zip(pictures, together, strict=True):
        alone = film_of(picture)
        stage([alone])
        stage([alone])
        assert alone.clips[0].scores == video.clips[0].scores
        assert alone.clips[0].text == video.clips[0].text


def test_a_clip_without_samples_gets_no_score(stage):
    video = film_of(*[scene()[0]] * 4)
    video.frames.samples = []
    stage([video])
    assert video.clips[0].scores == {}


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 512, 3), (300, 3, 3), (8, 8, 3)])
def test_pictures_of_any_shape_are_survived(stage, shape):
    video = film_of(np.full(shape, 128, np.uint8))
    stage([video])
    assert video.clips[0].scores["text_area"] == 0


def test_overlapping_boxes_count_once():
    def line(x0: int, y0: int, x1: int, y1: int) -> Line:
        return Line("x", np.array([(x0, y0), (x1 - 1, y0), (x1 - 1, y1 - 1), (x0, y1 - 1)], float), 0.1)

    lines = [line(0, 0, 50, 20), line(25, 0, 75, 20), line(80, 50, 100, 100)]
    assert covered_share(lines, (100, 100)) == (75 * 20 + 20 * 50) / 10_000


def test_one_text_read_in_two_frames_is_listed_once_as_its_largest():
    box = np.zeros((4, 2))
    read = [("Hello, you", 0.1), ("other", 0.2), ("HELLO YOU", 0.3), ("Hel1o you", 0.05), ("…", 1.0)]
    assert prominent([Line(text, box, share) for text, share in read]) == ["HELLO YOU", "other"]
