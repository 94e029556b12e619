"""The perceptual distance is LPIPS' formula over the features of the named network."""

import cv2
import numpy as np
import pytest
import torch
from torchvision.models import vgg16

from models.autoencoders import perceptual
from models.curation.embed import EfficientNetLite0
from tests.fixtures.moving import texture

WIDTHS = {"vgg16": (64, 128, 256, 512, 512), "efficientnet_lite0": (16, 24, 40, 112, 320)}


def video(frames: int = 2, size: int = 64) -> np.ndarray:
    """float32 [T, H, W, 3] in 0…1: a texture in three colours."""
    tiles = texture()[: frames * size, : 3 * size].reshape(frames, size, 3, size)
    return tiles.transpose(0, 1, 3, 2).astype(np.float32) / 255


def tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames * 2 - 1).permute(3, 0, 1, 2)[None].contiguous()


def blurred(frames: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(f, (0, 0), sigma) for f in frames])


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """Random weights of VGG16's layers that keep the signal's scale, as torchvision would save them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in vgg16().state_dict().items() if k.startswith("features.")}
    weights = {
        name: torch.randn(shape) * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(weights, path)
    return str(path)


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    heads = {
        f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator)
        for i, w in enumerate(WIDTHS["vgg16"])
    }
    path = tmp_path_factory.mktemp("heads") / "vgg.pth"
    torch.save(heads, path)
    return str(path)


@pytest.fixture(scope="module")
def lite():
    return perceptual.build("efficientnet_lite0")


def features_of(network: str, frames: np.ndarray, vgg_file: str) -> list[np.ndarray]:
    """Maps [T, C, h, w] of the network as its own authors run it, taken by hooks."""
    found: list[np.ndarray] = []
    keep = lambda module, args, out: found.append(out.detach().clone().numpy())  # noqa: E731
    if network == "vgg16":
        with torch.device("meta"):
            net = vgg16().features
        state = torch.load(vgg_file, weights_only=True)
        net.load_state_dict({k.removeprefix("features."): v for k, v in state.items()}, assign=True)
        for i in (3, 8, 15, 22, 29):  # the ReLUs before each pooling, and the last
            net[i].register_forward_hook(keep)
        x = (frames - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    else:
        net = EfficientNetLite0().net
        sizes = [b._depthwise_conv.stride[0] for b in net._blocks]
        last = [i for i in range(len(sizes)) if i + 1 == len(sizes) or sizes[i + 1] == 2]  # of a resolution
        for i in last:
            net._blocks[i].register_forward_hook(keep)
        x = (frames * 255 - 127) / 128
    with torch.no_grad():
        net(torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2))
    return found


@pytest.mark.parametrize(
    ("network", "headed"), [("efficientnet_lite0", False), ("vgg16", False), ("vgg16", True)]
)
def test_the_distance_is_the_formula_of_lpips(network, headed, vgg_file, heads_file):
    files = (vgg_file, heads_file if headed else None) if network == "vgg16" else ()
    a, b = video(), blurred(video(), 1.5)
    distance = perceptual.build(network, *files)(tensor(a), tensor(b))
    heads = torch.load(heads_file, weights_only=True)
    total = np.zeros(len(a))
    layers = zip(features_of(network, a, vgg_file), features_of(network, b, vgg_file), strict=True)
    for i, (f, g) in enumerate(layers):
        assert f.shape[1] == WIDTHS[network][i]
        weights = heads[f"lin{i}.model.1.weight"].numpy().reshape(-1) if headed else np.ones(f.shape[1])
        for t in range(len(a)):
            at = [
                (weights * (f[t, :, y, x] / np.linalg.norm(f[t, :, y, x])
                - g[t, :, y, x] / np.linalg.norm(g[t, :, y, x])) ** 2).sum()
                for y in range(f.shape[2]) for x in range(f.shape[3])
            ]  # fmt: skip
            total[t] += np.mean(at)
    np.testing.assert_allclose(distance.numpy(), [total.mean()], rtol=2e-4)


@pytest.mark.parametrize("network", WIDTHS)
def test_equal_is_zero_and_blur_grows(network, vgg_file):
    measure = perceptual.build(network, vgg_file if network == "vgg16" else None)
    clean = video()
    assert measure(tensor(clean), tensor(clean)).item() == 0
    distances = [measure(tensor(blurred(clean, s)), tensor(clean)).item() for s in (0.5, 1, 2, 4)]
    assert 0 < distances[0] < distances[1] < distances[2] < distances[3]


def test_each_sample_is_measured_alone_and_order_does_not_matter(lite):
    a, b = tensor(video()), tensor(blurred(video(), 2))
    both = lite(torch.cat([a, b]), torch.cat([b, b]))
    assert both.shape == (2,)
    assert both[1] == 0
    torch.testing.assert_close(both[:1], lite(b, a), rtol=1e-5, atol=0)


def test_the_gradient_reaches_the_video_and_not_the_network(lite):
    x = tensor(blurred(video(), 2)).requires_grad_()
    lite.train()
    assert not lite.training
    lite(x, tensor(video())).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in lite.parameters())


@pytest.mark.parametrize(
    ("network", "files", "said"),
    [
        ("resnet", (), "choose efficientnet_lite0 or vgg16"),
        ("vgg16", (), "needs a weights file"),
        ("vgg16", ("nowhere.pth",), "nowhere.pth is not a weights file"),
        ("efficientnet_lite0", ("x.pth",), "comes with its weights"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(network, files, said):
    with pytest.raises(ValueError, match=said):
        perceptual.build(network, *files)


def test_files_of_something_else_are_refused(vgg_file, heads_file):
    with pytest.raises(ValueError, match="not the weights of torchvision's vgg16"):
        perceptual.build("vgg16", heads_file)
    with pytest.raises(ValueError, match="not LPIPS heads"):
        perceptual.build("vgg16", vgg_file, vgg_file)


def test_frames_too_small_for_vgg_are_refused(vgg_file):
    small = torch.zeros(1, 3, 1, 8, 16)
    with pytest.raises(ValueError, match="16×8: vgg16 needs 16×16"):
        perceptual.build("vgg16", vgg_file)(small, small)
