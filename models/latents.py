"""Latents without weights: the orthonormal block DCT as a linear autoencoder.

The smallest honest stand-in for a trained VAE: each p×p block of each frame becomes its p² DCT-II
coefficients a channel, of which the `keep` lowest in zig-zag order are kept. With keep = p² the map is
orthonormal, so decoding inverts encoding exactly and energy is preserved (Parseval); with fewer it is
the best linear code for smooth blocks (Ahmed, Natarajan and Rao, 1974).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class BlockDCT:
    """Video [B, T, 3, H, W] in −1…1 ↔ latents [B, T, 3·keep, H/p, W/p].

    Args:
        patch: block side p in pixels; H and W must be multiples of it.
        keep: coefficients kept a colour channel, at most p².
    """

    def __init__(self, patch: int = 8, keep: int = 8):
        if not 1 <= keep <= patch * patch:
            raise ValueError(f"keep={keep}: a block of {patch}×{patch} has 1 to {patch * patch} coefficients")
        self.patch, self.keep = patch, keep
        n = torch.arange(patch, dtype=torch.float64)
        basis = torch.cos(math.pi / patch * (n + 0.5)[None, :] * n[:, None]) * math.sqrt(2 / patch)
        basis[0] /= math.sqrt(2)  # [frequency, position], orthonormal rows
        two_d = torch.einsum("ux,vy->uvxy", basis, basis).reshape(patch * patch, patch * patch)
        order = sorted(range(patch * patch), key=lambda i: (i // patch + i % patch, i))
        self.basis = two_d[order[:keep]].float()  # [keep, p²]

    @property
    def channels(self) -> int:
        return 3 * self.keep

    def encode(self, video: Tensor) -> Tensor:
        """Divided by p, so that a block's mean, which spans −1…1, stays in −1…1."""
        b, t, c, h, w = video.shape
        p = self.patch
        if h % p or w % p:
            raise ValueError(f"a video of {w}×{h} does not divide into blocks of {p}")
        x = video.reshape(b, t, c, h // p, p, w // p, p).permute(0, 1, 2, 3, 5, 4, 6)  # B T C h w p p
        z = x.reshape(b, t, c, h // p, w // p, p * p) @ self.basis.to(video).T / p  # B T C h w keep
        return z.permute(0, 1, 2, 5, 3, 4).reshape(b, t, c * self.keep, h // p, w // p)

    def decode(self, latents: Tensor) -> Tensor:
        b, t, ck, h, w = latents.shape
        p = self.patch
        z = latents.reshape(b, t, ck // self.keep, self.keep, h, w).permute(
            0, 1, 2, 4, 5, 3
        )  # B T C h w keep
        x = (z @ self.basis.to(latents) * p).reshape(b, t, -1, h, w, p, p)
        return x.permute(0, 1, 2, 3, 5, 4, 6).reshape(b, t, -1, h * p, w * p)
