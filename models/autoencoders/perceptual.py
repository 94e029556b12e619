"""How different two videos look to a network that has learnt to see: the LPIPS distance, over a named network.

Zhang et al. 2018, eq. 1: features of both at several depths, each position's channels to unit length, squared
differences weighted by channel, mean over positions, sum over depths. Networks:

    efficientnet_lite0   ImageNet weights of a package that comes with clipmill, all channels weighted 1
    vgg16                torchvision's weights from a file; with the LPIPS heads, the published LPIPS-VGG

Distances of different networks do not compare; name the network with every figure.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build(network: str, weights: str | None = None, heads: str | None = None) -> Perceptual:
    """The distance over that network, frozen.

    Args:
        network: 'efficientnet_lite0' or 'vgg16'.
        weights: vgg16: a file with torchvision's state dict (its 'features.' are enough).
        heads: vgg16: a file with the 'lin0.model.1.weight' … of LPIPS; none: every channel weighs 1.
    Raises ValueError for an unknown network or a file that is missing or something else.
    """
    if network == "efficientnet_lite0":
        if weights or heads:
            raise ValueError("efficientnet_lite0 comes with its weights: leave weights and heads unset")
        return Perceptual(EfficientNetLite0Features())
    if network != "vgg16":
        raise ValueError(f"perceptual network {network!r}: choose efficientnet_lite0 or vgg16")
    if weights is None:
        raise ValueError("vgg16 needs a weights file: give torchvision's vgg16-397923af.pth or the like")
    return Perceptual(VGG16Features(_read(weights)), _read(heads) if heads else None)


class Perceptual(nn.Module):
    """Distance of two videos [B, 3, T, H, W] in −1…1, mean over their frames: [B]. Frozen.

    Args:
        network: frames [n, 3, H, W] → list of feature maps [n, C_i, h_i, w_i]; `widths` gives the C_i.
        heads: weights ≥ 0 of the channels under LPIPS's names, 'lin{i}.model.1.weight' [1, C_i, 1, 1].
    """

    def __init__(
        self, network: VGG16Features | EfficientNetLite0Features, heads: dict[str, Tensor] | None = None
    ):
        super().__init__()
        self.network = network
        for i, width in enumerate(network.widths):
            head = torch.ones(width) if heads is None else heads.get(f"lin{i}.model.1.weight")
            if head is None or head.numel() != width:
                raise ValueError(
                    f"these are not LPIPS heads of this network: lin{i}.model.1.weight of {width}"
                )
            self.register_buffer(f"head{i}", head.reshape(width, 1, 1))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode: batch statistics would make the distance depend on the batch."""
        return super().train(False)

    def forward(self, video: Tensor, reference: Tensor) -> Tensor:
        frames = len(video) * video.shape[2]
        x = torch.cat([video, reference]).transpose(1, 2).flatten(0, 1)  # 2·B·T 3 H W
        distance = video.new_zeros(frames, dtype=torch.float32)
        for i, features in enumerate(self.network(x)):
            a, b = F.normalize(features.float(), dim=1, eps=1e-10).split(frames)  # B·T C h w
            distance = distance + ((a - b).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return distance.view(len(video), -1).mean(1)


class VGG16Features(nn.Module):
    """The last ReLU of each of VGG16's five stages (Simonyan and Zisserman 2015)."""

    widths = (64, 128, 256, 512, 512)
    ends = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    mean: Tensor
    std: Tensor

    def __init__(self, weights: dict[str, Tensor]):
        from torchvision.models import vgg16

        super().__init__()
        with torch.device("meta"):
            self.layers = vgg16().features[: self.ends[-1] + 1]
        own = {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")}
        try:
            self.layers.load_state_dict(own, assign=True)
        except RuntimeError as e:
            raise ValueError(
                "these are not the weights of torchvision's vgg16: expected features.0.weight to features.28.bias"
            ) from e
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        if min(x.shape[2:]) < 16:
            raise ValueError(f"frames of {x.shape[3]}×{x.shape[2]}: vgg16 needs 16×16 pixels at least")
        x, features = ((x + 1) / 2 - self.mean) / self.std, []
        for i, layer in enumerate(self.layers):
            x = (
                F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            )  # torchvision's would overwrite a feature
            if i in self.ends:
                features.append(x)
        return features


class EfficientNetLite0Features(nn.Module):
    """The last block at each of five resolutions, 1/2 to 1/32, of the network of `models.curation.embed`."""

    widths = (16, 24, 40, 112, 320)
    ends = (0, 2, 4, 10, 15)

    def __init__(self) -> None:
        from models.curation.embed import EfficientNetLite0

        super().__init__()
        self.net = EfficientNetLite0().net

    def forward(self, x: Tensor) -> list[Tensor]:
        x, features = (127.5 * x + 0.5) / 128, []  # −1…1 is 0…255, which the network sees as (p − 127) / 128
        net: Any = self.net
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in self.ends:
                features.append(x)
        return features


def _read(file: str) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a missing file, another format: the fix is the same
        raise ValueError(f"{file} is not a weights file that can be read: give a state dict (.pth)") from e
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds {type(state).__name__}: give a state dict (.pth)")
    return state
