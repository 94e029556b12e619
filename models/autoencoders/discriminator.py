"""Which patches of a video look real: a patch discriminator of 3D convolutions, and its losses.

After PatchGAN (Isola et al. 2017) in 3D, as Video LDM trains its decoder against (Blattmann et al. 2023,
sec. 3.1.1), with the hinge loss and the adaptive weight of VQGAN (Esser et al. 2021). Norms act on single
positions, so a logit depends on its patch alone: not on the rest of the clip, nor on batch-mates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.autoencoders.vae import ChannelNorm


class PatchDiscriminator(nn.Module):
    """[B, 3, T, H, W] in −1…1 → logits [B, 1, T', h, w], above 0 for real; one frame is a video too.

    Args:
        width: features of the first layer, doubled by each of the next up to 8 times.
        layers: that halve height and width; all but the first halve time as well.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        self.smallest = 3 * 2**layers  # pixels that leave one logit
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        self.stem = nn.Conv3d(3, width, (3, 4, 4), (1, 2, 2), padding=1)  # T H/2 W/2
        strides = [(2, 2, 2)] * (layers - 1) + [(1, 1, 1)]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LeakyReLU(0.2),
                nn.Conv3d(a, b, (3, 4, 4), stride, padding=1, bias=False),
                ChannelNorm(b),
            )
            for a, b, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.head = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv3d(widths[-1], 1, (3, 4, 4), padding=1))

    def forward(self, video: Tensor) -> Tensor:
        if min(video.shape[3:]) < self.smallest:
            raise ValueError(
                f"frames of {video.shape[4]}×{video.shape[3]}: the discriminator needs "
                f"{self.smallest}×{self.smallest} pixels at least"
            )
        x = self.stem(video)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss ½ (max(0, 1 − real) + max(0, 1 + fake)) of logits, mean over each sample's patches, [B]."""
    return 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).flatten(1).mean(1)


def generator_loss(fake: Tensor) -> Tensor:
    """−logit, mean over each sample's patches, [B]."""
    return -fake.flatten(1).mean(1)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 1e-6), gradients of the decoder's last layer.

    So the discriminator pulls as hard as the reconstruction, whatever their scales (Esser et al. 2021,
    eq. 7). A detached scalar, at most 1e4; both losses are scalars and their graphs are kept.
    """
    pull, push = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    )
    return (pull / (push + 1e-6)).clamp(max=1e4).detach()
