"""The aesthetic stage on a tiny open_clip model with random weights, against open_clip called directly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from pipeline import recipe
from pipeline.record import Video
from pipeline.samples import pictures
from pipeline.score.aesthetic import AestheticStage
from tests.fixtures.moving import film, record, texture, view

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "ViT-tiny-aesthetic.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    weights = folder / "weights.pt"
    torch.save(open_clip.create_model("ViT-tiny-aesthetic").state_dict(), weights)
    return weights


def options(head: Path, clip: Path) -> recipe.Aesthetic:
    return recipe.Aesthetic(weights=str(head), model="ViT-tiny-aesthetic", pretrained=str(clip))


def moving() -> Video:
    grey = film(lambda t: view(texture(), 60 * t), 3)
    return record([(t, np.repeat(p[..., None], 3, 2)) for t, p in grey])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_score_is_the_mean_rating_of_frames_computed_directly(tmp_path, clip_weights, suffix):
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(1)
    head = nn.Linear(32, 1)
    path = tmp_path / f"head.{suffix}"
    if suffix == "pth":
        torch.save(head.state_dict(), path)
    else:
        save_file(head.state_dict(), path)
    stage, video = AestheticStage(options(path, clip_weights)), moving()
    stage.setup()
    stage([video])

    net, _, preprocess = open_clip.create_model_and_transforms(
        "ViT-tiny-aesthetic", pretrained=str(clip_weights)
    )
    images = [preprocess(Image.fromarray(p)) for p in pictures(video, video.clips[0], 3)]
    with torch.inference_mode():
        direct = head(F.normalize(net.eval().encode_image(torch.stack(images)), dim=-1)).mean()
    assert video.clips[0].scores["aesthetic"] == pytest.approx(float(direct), abs=2e-4)


def test_a_clip_is_rated_the_same_in_any_company(tmp_path, clip_weights):
    torch.save(nn.Linear(32, 1).state_dict(), tmp_path / "head.pth")
    stage = AestheticStage(options(tmp_path / "head.pth", clip_weights))
    stage.setup()
    alone, pair = moving(), [moving(), moving()]
    stage([alone])
    stage(pair)
    assert {v.clips[0].scores["aesthetic"] for v in [alone, *pair]} == {alone.clips[0].scores["aesthetic"]}


def test_a_clip_without_samples_gets_no_score(tmp_path, clip_weights):
    torch.save(nn.Linear(32, 1).state_dict(), tmp_path / "head.pth")
    stage, video = AestheticStage(options(tmp_path / "head.pth", clip_weights)), moving()
    assert video.frames is not None
    video.frames.samples = []
    stage.setup()
    stage([video])
    assert video.clips[0].scores == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not a file"),
        (b"not weights", "no aesthetic head"),
        (nn.Linear(16, 1).state_dict(), "features of length 16"),
        (nn.Linear(32, 2).state_dict(), "do not lead from features to one number"),
    ],
)
def test_a_head_that_cannot_be_used_is_one_sentence_before_any_work(tmp_path, clip_weights, content, says):
    path = tmp_path / "head.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(recipe.RecipeError, match=says) as e:
        AestheticStage(options(path, clip_weights)).setup()
    assert "\n" not in str(e.value)
