from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models import hub
from models.hub import MissingModel
from models.measures.clip_score import ClipScorer, PacScorer, clip_score
from tests.fixtures.clips import noise

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny open_clip model of random weights."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**CONFIG).eval()
    with torch.inference_mode():
        image = model.encode_image(torch.zeros(1, 3, 32, 32))
        text = model.encode_text(open_clip.tokenize(["a dog"]))
        model.text_projection *= torch.sign((image * text).sum())  # so that cosines are not cut off at 0
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def test_the_formula_by_hand():
    images = np.array([[1, 0], [0.6, 0.8]], np.float32)
    assert clip_score(images, np.array([[1, 0]], np.float32)) == pytest.approx(2.5 * (1 + 0.6) / 2)
    assert clip_score(images, np.array([[-1, 0]], np.float32)) == 0  # each pair is cut off at 0 …
    assert clip_score(images, np.array([[0, -1], [0, 1]], np.float32)) == pytest.approx(
        2.5 * 0.8 / 4
    )  # … on its own


def test_it_is_a_fortieth_of_torchmetrics_for_one_frame_and_sentence():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (F.normalize(torch.tensor(rng.normal(size=(1, 8)), dtype=torch.float32)) for _ in range(2))
        theirs = torch.clamp(100 * F.cosine_similarity(a, b), min=0).item()
        assert 40 * clip_score(a.numpy(), b.numpy()) == pytest.approx(theirs, abs=1e-4)


def test_scores_are_those_of_open_clip_itself(tiny):
    import open_clip

    frames = [noise(i, 40, 60) for i in range(3)]
    texts = ["a red square", "two blue dogs run"]
    net, _, preprocess = open_clip.create_model_and_transforms(tiny)
    net.eval()
    with torch.inference_mode():
        images = F.normalize(net.encode_image(torch.stack([preprocess(Image.fromarray(f)) for f in frames])))
        tokens = open_clip.get_tokenizer(tiny)(texts)
        cosine = (images @ F.normalize(net.encode_text(tokens)).T).numpy()  # [3, 2]
    scorer = ClipScorer(tiny, "")
    expected = 2.5 * np.maximum(cosine, 0)
    assert scorer(frames, [(3, [[t] for t in texts])])[0] == [
        [pytest.approx(x, abs=1e-5)] for x in expected.mean(0)
    ]
    assert scorer(frames, [(3, [texts])])[0][0] == pytest.approx(expected.mean(0), abs=1e-5)


def test_pac_s_is_twice_the_cosine_to_a_photo_that_depicts_it(tiny):
    frames = [noise(i, 40, 60) for i in range(3)]
    ((ours,),) = PacScorer(tiny, "")(frames, [(3, [["two blue dogs run"]])])
    ((clip,),) = ClipScorer(tiny, "")(frames, [(3, [["A photo depicts two blue dogs run"]])])
    assert ours == pytest.approx([x * 2 / 2.5 for x in clip])
    assert ours[0] > 0


def test_a_score_is_the_same_to_the_bit_whatever_it_is_compared_with(tiny):
    scorer = ClipScorer(tiny, "")
    frames, texts = [noise(i) for i in range(8)], [["a dog"], ["a cat", "it sits"], ["red"]]
    (together,) = scorer(frames, [(8, texts)])
    assert together == [scorer(frames, [(8, [t])])[0][0] for t in texts]
    clips = [(3, texts[:1]), (0, []), (5, texts[1:])]  # clips scored together, as alone
    assert scorer(iter(frames), clips) == [
        scorer(frames[:3], [(3, texts[:1])])[0],
        [],
        scorer(frames[3:], [(5, texts[1:])])[0],
    ]
    assert max(together)[0] > 0


def test_the_end_of_a_long_caption_counts(tiny):
    scorer = ClipScorer(tiny, "")
    long = ["a dog runs over the grass of a park"] * 20
    a, b = (
        sum(scorer([noise(i) for i in range(8)], [(8, [[*long, last]])])[0][0]) for last in ("a dog", "red")
    )
    assert a != b
    assert max(a, b) > 0


# ---------------------------------------------------------------- weights that can and cannot be had


def test_weights_are_found_without_loading_them(tiny, tmp_path, monkeypatch):
    assert hub.open_clip_weights(tiny, "") == "a folder"
    (tmp_path / "w.pt").touch()
    assert hub.open_clip_weights("ViT-B-32", str(tmp_path / "w.pt")) == "a file"
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: str(tmp_path / "w.pt"))
    assert hub.open_clip_weights("ViT-B-32", "laion2b_s34b_b79k") == "in the local cache"


def test_weights_out_of_reach_are_an_error_that_names_the_fix(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr(hub, "model_info", unreachable)
    with pytest.raises(MissingModel, match="cannot be reached"):
        hub.open_clip_weights("ViT-B-32", "laion2b_s34b_b79k")
