"""Latents: what every autoencoder promises, their normalisation, and one autoencoder that needs no weights.

Layout everywhere: videos [B, 3, T, H, W] in −1…1, latents [B, C, T', h, w].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Posterior:
    """The Gaussian that a video is encoded as; logvar is None where the encoder is deterministic."""

    mean: Tensor  # [B, C, T', h, w]
    logvar: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """mean + σ · noise, noise ~ N(0, I) of mean's shape."""
        return self.mean if self.logvar is None else self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL to N(0, I) in nats, [B], summed over all but the batch (Kingma and Welling 2014, app. B)."""
        if self.logvar is None:
            return self.mean.new_zeros(len(self.mean))
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class Strided(Protocol):
    """What latents, or codes, of a video have for a shape.

    stride: pixels that one of them covers along (time, height, width).
    causal: the first frame has one of its own, and T = 1 + n · stride[0] frames make 1 + n;
        where not, T = n · stride[0] frames make n.
    """

    stride: tuple[int, int, int]
    causal: bool


class Autoencoder(Strided, Protocol):
    """What trainers and samplers need of an autoencoder; an nn.Module where it has weights.

    channels: C of the latents.
    """

    channels: int

    def encode(self, video: Tensor) -> Posterior: ...

    def decode(self, latents: Tensor) -> Tensor: ...


def latent_shape(autoencoder: Strided, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(T', h, w) of a video's latents. Raises ValueError where a side is no multiple of the stride."""
    t, y, x = autoencoder.stride
    lone = 1 if autoencoder.causal else 0
    if (frames - lone) % t or frames < 1 or height % y or width % x:
        first = "1 + a multiple" if lone and t > 1 else "a multiple"
        raise ValueError(
            f"{frames} frames of {width}×{height} do not divide into latents: give {first} of {t} frames, "
            f"a height that is a multiple of {y} and a width that is one of {x}"
        )
    return lone + (frames - lone) // t, height // y, width // x


class Normalizer(nn.Module):
    """Latents to zero mean and unit variance a channel, by measured statistics, and back.

    Diffusion assumes unit variance; a VAE's latents have what its KL weight left them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float().reshape(-1))  # [C]
        self.register_buffer("std", std.float().reshape(-1))

    def forward(self, latents: Tensor) -> Tensor:
        return (latents - _channels(self.mean, latents)) / _channels(self.std, latents)

    def inverse(self, latents: Tensor) -> Tensor:
        return latents * _channels(self.std, latents) + _channels(self.mean, latents)


def _channels(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).view(1, -1, *[1] * (like.ndim - 2))


class Statistics:
    """Mean and standard deviation a channel, over any number of batches, in float64."""

    def __init__(self, channels: int):
        self.count = 0
        self.sum, self.squares = torch.zeros(2, channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        x = latents.detach().double().cpu().movedim(1, 0).flatten(1)  # C n
        self.count += x.shape[1]
        self.sum += x.sum(1)
        self.squares += (x**2).sum(1)

    def normalizer(self) -> Normalizer:
        """Raises ValueError where nothing was added."""
        if not self.count:
            raise ValueError("no latents were measured")
        mean = self.sum / self.count
        std = (self.squares / self.count - mean**2).clamp(min=1e-12).sqrt()
        return Normalizer(mean, std)


class BlockDCT:
    """The orthonormal block DCT as a linear autoencoder: the smallest honest stand-in for a trained one.

    Colours become grey, red − blue and green − magenta, which are hardly correlated in pictures as R, G and B
    are; each p×p block of each frame becomes its p² DCT-II coefficients a colour, of which the `keep` lowest
    in zig-zag order are kept. With keep = p² the map is orthonormal, so decoding inverts encoding exactly
    and energy is preserved (Parseval); with fewer it is the best linear code for smooth blocks (Ahmed,
    Natarajan and Rao, 1974). C = 3 · keep. Channels without correlation matter: the normaliser gives each
    unit variance, and of correlated ones what they share would get the weight of all.

    Args:
        patch: block side p in pixels; H and W must be multiples of it.
        keep: coefficients kept a colour channel, at most p².
    """

    causal = False

    def __init__(self, patch: int = 8, keep: int = 8):
        if not 1 <= keep <= patch * patch:
            raise ValueError(f"keep={keep}: a block of {patch}×{patch} has 1 to {patch * patch} coefficients")
        self.patch, self.keep = patch, keep
        self.channels, self.stride = 3 * keep, (1, patch, patch)
        n = torch.arange(patch, dtype=torch.float64)
        basis = torch.cos(math.pi / patch * (n + 0.5)[None, :] * n[:, None]) * math.sqrt(2 / patch)
        basis[0] /= math.sqrt(2)  # [frequency, position], orthonormal rows
        two_d = torch.einsum("ux,vy->uvxy", basis, basis).reshape(patch * patch, patch * patch)
        order = sorted(range(patch * patch), key=lambda i: (i // patch + i % patch, i))
        self.basis = two_d[order[:keep]].float()  # [keep, p²]
        opponents = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
        self.colours = F.normalize(opponents, dim=1)  # [colour, RGB], orthonormal rows

    def encode(self, video: Tensor) -> Posterior:
        """Divided by p, so that a block's mean stays as large as a pixel."""
        latent_shape(self, *video.shape[2:])
        p = self.patch
        x = torch.einsum("kc,bcthw->bkthw", self.colours.to(video), video)
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p))  # B C T h p w p
        x = x.permute(0, 1, 2, 3, 5, 4, 6).flatten(5)  # B C T h w p²
        z = x @ self.basis.to(video).T / p  # B C T h w keep
        return Posterior(z.movedim(5, 2).flatten(1, 2))

    def decode(self, latents: Tensor) -> Tensor:
        p = self.patch
        z = latents.unflatten(1, (-1, self.keep)).movedim(2, 5)  # B C T h w keep
        x = (z @ self.basis.to(latents) * p).unflatten(5, (p, p))  # B C T h w p p
        x = x.permute(0, 1, 2, 3, 5, 4, 6).flatten(5, 6).flatten(3, 4)  # B C T H W
        return torch.einsum("kc,bkthw->bcthw", self.colours.to(x), x)
