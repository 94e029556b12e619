"""plain-baseline leads with a subject where the evidence is strong, and only there."""

import numpy as np
import pytest

from pipeline.caption.plain import SUBJECTS, Plain, nouns
from pipeline.recipe_captions import PlainCaptioner
from tests.pipeline.caption.test_captioner import plain, video


class Net:
    """Says the same of every frame."""

    def __init__(self, **found: float):
        self.found = found

    def tags(self, images, top):
        return [[(label.replace("_", " "), p) for label, p in self.found.items()] for _ in images]


def said(net, text=(), **scores):
    captioner = Plain(PlainCaptioner(kind="plain"))
    captioner.net = net
    v = video([plain("808080")] * 2, [(0, 2)])
    v.clips[0].scores, v.clips[0].text = scores, list(text)
    return captioner.caption(v, v.clips[0])


def test_probabilities_of_a_nouns_classes_add_up_to_a_subject_that_leads():
    assert said(Net(beagle=0.3, whippet=0.3, volcano=0.4)) == "A dog in a mostly grey scene."


@pytest.mark.parametrize(
    ("p", "says"), [(0.26, "A mostly grey scene that may show a dog."), (0.2, "A mostly grey scene.")]
)
def test_weak_evidence_is_a_guess_and_weaker_none(p, says):
    assert said(Net(beagle=p, knot=0.3)) == says


def test_a_single_class_is_never_stated():
    assert said(Net(bobsled=0.95)) == "A mostly grey scene that may show a bobsled."


def test_motion_and_text_follow():
    still = {"pan_x": 0.0, "pan_y": 0.0, "zoom": 0.0, "motion": 0.0, "motion_object": 0.0}
    assert said(Net(tabby=0.9), ["SALE  now", "x"], **still) == (
        "A cat in a mostly grey scene; the camera holds still and nothing moves; text on screen reads “SALE now”."
    )
    assert said(Net(tabby=0.9), ["7"]) == "A cat in a mostly grey scene."


def test_a_clip_without_pictures_is_not_described():
    captioner = Plain(PlainCaptioner(kind="plain"))
    captioner.net = Net()
    v = video([plain("808080")], [(0, 1)])
    v.frames.samples = []
    assert captioner.caption(v, v.clips[0]) == ""


def test_no_class_belongs_to_two_nouns_and_all_are_classes():
    classes = [
        n
        for ranges in SUBJECTS.values()
        for part in ranges.split()
        for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    ]
    assert len(classes) == len(set(classes))
    assert all(0 <= n < 1000 for n in classes)
    assert nouns()["tabby"] == "a cat"
    assert np.isin(["golden retriever", "sports car", "seashore"], list(nouns())).all()
