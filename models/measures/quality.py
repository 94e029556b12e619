"""How close a video is to another of the same shape: PSNR and SSIM, frame by frame.

Both take videos [B, 3, T, H, W] in −1…1 and give [B, T] in float32. Average over frames and videos for the
figures that papers report, and say so: the PSNR of an average error is another number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RANGE = 2.0  # of the values, −1…1


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log₁₀(range² / mean squared error) in dB, [B, T]; inf where equal."""
    error = (video.float() - reference.float()).square().mean(dim=(1, 3, 4))  # B T
    return 10 * torch.log10(RANGE**2 / error)


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity, 1 where equal, [B, T] (Wang, Bovik, Sheikh and Simoncelli 2004).

    With the paper's constants: Gaussian window of 11 × 11 and σ 1.5, K₁ .01, K₂ .03; only windows that lie
    inside the frame. Each colour channel on its own, then their mean. Raises ValueError for frames
    smaller than the window.
    """
    if min(video.shape[3:]) < 11:
        raise ValueError(
            f"frames of {video.shape[4]}×{video.shape[3]}: SSIM needs 11×11 pixels at least, its window"
        )
    b, _, t, h, w = video.shape
    x, y = (v.float().transpose(1, 2).reshape(-1, 1, h, w) for v in (video, reference))  # B·T·3 1 H W
    at = torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    window = torch.softmax(-(at**2) / (2 * 1.5**2), dim=0)  # a Gaussian that sums to 1

    def local(z: Tensor) -> Tensor:
        """Mean under the window, H − 10 by W − 10."""
        return F.conv2d(F.conv2d(z, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    with torch.autocast(x.device.type, enabled=False):  # variances are small differences of squares
        mx, my = local(x), local(y)
        vx, vy, cov = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    similarity = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similarity.mean(dim=(1, 2, 3)).view(b, t, 3).mean(dim=2)
