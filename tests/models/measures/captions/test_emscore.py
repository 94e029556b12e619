from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.measures.captions.emscore import EMScorer, emscore, inverse_frequencies
from tests.fixtures.clips import noise
from tests.models.measures.test_clip_score import tiny  # noqa: F401


def test_the_formula_by_hand():
    frames, words = np.eye(3)[:2], np.array([[1, 0, 0], [0, 0, 1.0]])
    text = np.array([0.6, 0.8, 0])
    found = emscore(frames, words, text)
    assert found.precision == pytest.approx((1 + 0) / 2)  # the second word is in no frame
    assert found.recall == pytest.approx((1 + 0) / 2)  # nobody speaks of the second frame
    assert found.f == pytest.approx(0.5)
    assert found.coarse == pytest.approx((0.6 + 0.8) / np.sqrt(2))  # of the mean frame
    assert found.full == pytest.approx((found.coarse + 0.5) / 2)
    weighted = emscore(frames, words, text, np.array([3.0, 1.0]))
    assert weighted.precision == pytest.approx(0.75)
    assert weighted.recall == found.recall


def test_rare_pieces_weigh_more():
    weights, unseen = inverse_frequencies([[1, 2, 2], [1, 3]])
    assert weights == pytest.approx({1: 0.0, 2: np.log(3 / 2), 3: np.log(3 / 2)})
    assert unseen == pytest.approx(np.log(3))


def test_what_a_text_leaves_out_lowers_recall_and_what_it_makes_up_precision():
    frames, dog, cat = np.eye(3)[:2], np.eye(3)[:1], np.eye(3)[1:2]
    whole = emscore(frames, np.concatenate([dog, cat]), dog[0])
    half = emscore(frames, dog, dog[0])
    more = emscore(frames, np.eye(3), dog[0])
    assert half.recall < whole.recall == more.recall
    assert more.precision < whole.precision == half.precision


def test_pieces_are_those_of_open_clip_itself_and_the_whole_is_its_text_embedding(tiny):  # noqa: F811
    import open_clip

    net = open_clip.create_model_and_transforms(tiny)[0].eval()
    tokens = open_clip.get_tokenizer(tiny)(["two blue dogs"])
    seen = {}
    net.ln_final.register_forward_hook(lambda _module, _args, out: seen.update(x=out))
    with torch.inference_mode():
        whole = F.normalize(net.encode_text(tokens))[0]
        pieces = F.normalize(seen["x"][0] @ net.text_projection, dim=-1)[:5]  # start, two, blue, dogs, end
    scorer = EMScorer(tiny, "")
    words, text = scorer.embed_text("two blue dogs")
    assert words == pytest.approx(pieces.numpy(), abs=1e-5)
    assert text == pytest.approx(whole.numpy(), abs=1e-5)
    frames = [noise(i) for i in range(3)]
    images = scorer.clip.embed(frames)
    ((found,),) = scorer(frames, [(3, [["two blue dogs", "a cat"]])])
    assert found == pytest.approx(
        [emscore(images, *scorer.embed_text(s)).full for s in ("two blue dogs", "a cat")]
    )
    assert scorer([*frames, noise(9)], [(3, [["a cat"]]), (1, [])]) == [[[found[1]]], []]  # alone as together
