"""How much noise at which time: schedules of z = α(t) x + σ(t) ε for t from 0 (data) to 1 (noise).

λ = log(α²/σ²) is the log signal-to-noise ratio of VDM (Ho et al. 2022; Kingma et al. 2021). A network is
not told t but the *level*, the angle of the noise (2/π) arctan(σ/α) in 0…1: it means the same under every
schedule, so a network trained under one may be sampled under another. For the unclipped cosine schedule
the level is t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """α and σ of t, both of t's shape and type; t in 0…1, any shape, at least float32."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Cosine:
    """VDM's cosine log-SNR: λ(t) = −2 log tan(a t + b), λ(0) = λ_max, λ(1) = λ_min (Ho et al. 2022, sec. 2).

    Args:
        shift: added to λ/2, i.e. log of a factor on the SNR's square root; < 0 is more noise, as higher
            resolutions need (Hoogeboom et al. 2023, eq. 4: log(64 / resolution) for images).
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    shift: float = 0.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        b = math.atan(math.exp(-self.logsnr_max / 2))
        a = math.atan(math.exp(-self.logsnr_min / 2)) - b
        return from_logsnr(-2 * torch.log(torch.tan(a * t + b)) + 2 * self.shift)


@dataclass(frozen=True)
class Linear:
    """DDPM's linear β in continuous time: log α = −¼ t² (β₁ − β₀) − ½ t β₀ (Song et al. 2021, eq. 33).

    With β₀ = 0.1 and β₁ = 20 it is the limit of DDPM's 1000 steps of 1e-4…0.02, which DiT trains with.
    t = 0 is moved to `eps`, where σ is not yet 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    eps: float = 1e-5

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = self.eps + (1 - self.eps) * t
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))


@dataclass(frozen=True)
class Flow:
    """The straight path of rectified flow: α = 1 − t′, σ = t′ (Liu et al. 2023; Lipman et al. 2023).

    Args:
        shift: t′ = s t / (1 + (s − 1) t); s > 1 spends more of the time at high noise, as more tokens
            need (Esser et al. 2024, eq. 23; Open-Sora 2: s linear in tokens · √frames).
    """

    shift: float = 1.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = shifted(t, self.shift)
        return 1 - t, t


@dataclass(frozen=True)
class ScaledLinear:
    """Stable Diffusion's √β, linear in time from √0.85 to √12, in continuous time (Rombach et al. 2022's code).

    log α = −½ ∫ β, the limit of its 1000 steps of 0.00085…0.012. t = 0 is moved to `eps`, where σ is not yet 0.
    """

    beta_min: float = 0.85
    beta_max: float = 12.0
    eps: float = 1e-5

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = self.eps + (1 - self.eps) * t
        low, high = math.sqrt(self.beta_min), math.sqrt(self.beta_max)
        log_alpha = -((low + (high - low) * t) ** 3 - low**3) / (6 * (high - low))
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))


def shifted(t: Tensor, shift: float) -> Tensor:
    """t′ = s t / (1 + (s − 1) t): σ/α of the straight path, s times as large (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def shift_of(frames: int, height: int, width: int) -> float:
    """The shift for latents of T × h × w, as Open-Sora 2 has it.

    √T times what is linear in the tokens of a frame, of 2×2 latents each: 1 for 256 of them, 3 for 4096.
    """
    return math.sqrt(frames) * (1 + 2 * (height * width / 4 - 256) / (4096 - 256))


def from_logsnr(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(α, σ) of a variance-preserving process: α² = sigmoid(λ), σ² = sigmoid(−λ)."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def logsnr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """λ = 2 log(α/σ)."""
    return 2 * (torch.log(alpha) - torch.log(sigma))


def level(alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network is told: (2/π) arctan(σ/α), 0 for clean data, 1 for pure noise."""
    return torch.atan2(sigma, alpha) * (2 / math.pi)


def over(x: Tensor, like: Tensor) -> Tensor:
    """x [B] as [B, 1, …], to scale a tensor of like's number of axes."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
