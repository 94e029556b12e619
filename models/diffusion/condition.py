"""What a video denoiser is told beside the noisy latents: a text, known frames, how the frames belong together.

Every denoiser of this package is called as

    model(z, level, condition) → prediction

    z          [B, C, T, h, w]  noisy latents
    level      [B]              angle of the noise, 0…1 (`models.diffusion.noise.level`)
    condition  Condition        below; every field may be None
    prediction [B, C, T, h, w]  of ε, x, v or the flow: `models.diffusion.objective` knows which, the model does not

so that models, objectives and samplers combine freely. A model raises ValueError for a field that it was
not built to take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Condition:
    """Of a batch; all tensors on the latents' device.

    text: [B, L, D] features of a text encoder; a row of all zeros in text_mask is 'no text' (the
        unconditional half of guidance, or a dropped caption).
    text_mask: bool [B, L], True where there is a token.
    pooled: [B, P] features of the whole text, where a network takes them (SDXL).
    no_text, no_pooled: [B, L, D] and [B, P], the encoding that stands for 'no text' in networks that were trained with
        one; none: an empty row of text_mask does.
    known: [B, C, T, h, w] clean latents of frames that are given, 0 elsewhere.
    known_mask: [B, 1, T, 1, 1] (broadcastable to h, w), 1 where `known` is given: 0, 1 or 2 context
        frames of Video LDM, every k-th frame for interpolation.
    held: as known_mask, 1 where the result is `known` itself; none: wherever it is given. A key frame of an autoencoder
        that joins frames is known by a latent of its own, the latent at its place is to be found.
    low: [B, C, T, h, w] a low-resolution video brought to the latents' size, for super-resolution.
    low_level: [B] angle of the noise that was added to `low` (noise-conditioned upsampling), 0…1.
    images: the last so many of the T frames are independent images that may see only themselves
        (joint image–video training, Ho et al. 2022); 0 for plain videos.
    """

    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    no_text: Tensor | None = None
    no_pooled: Tensor | None = None
    known: Tensor | None = None
    known_mask: Tensor | None = None
    held: Tensor | None = None
    low: Tensor | None = None
    low_level: Tensor | None = None
    images: int = 0

    def without_text(self, rows: Tensor | None = None) -> Condition:
        """The same with 'no text' in the given rows (bool [B]; none: in all)."""
        if self.text is None or self.text_mask is None:
            return self
        rows = torch.ones_like(self.text_mask[:, 0]) if rows is None else rows
        if self.no_text is None:
            return replace(self, text_mask=self.text_mask & ~rows[:, None])
        text = torch.where(rows[:, None, None], self.no_text, self.text)
        pooled = self.pooled
        if pooled is not None and self.no_pooled is not None:
            pooled = torch.where(rows[:, None], self.no_pooled, pooled)
        return replace(self, text=text, text_mask=self.text_mask | rows[:, None], pooled=pooled)

    @property
    def settled(self) -> Tensor | None:
        """[B, 1, T, 1, 1], 1 where the result is known and nothing is to be found; none: nowhere."""
        return self.known_mask if self.held is None else self.held


def sinusoids(x: Tensor, size: int, longest: float = 10_000.0) -> Tensor:
    """[…] → […, size]: cos and sin of x at `size`/2 rates from 1 down to 1/longest (Vaswani et al. 2017)."""
    rates = torch.exp(-math.log(longest) * torch.arange(size // 2, device=x.device) / (size // 2))
    angle = x[..., None].float() * rates
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class LevelEmbedding(nn.Module):
    """Noise level [B] in 0…1 → [B, width]: sinusoids of 1000 × level, then two linear layers (DiT)."""

    def __init__(self, width: int, features: int = 256):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        return self.mlp(sinusoids(1000 * level, self.features).to(next(self.mlp.parameters()).dtype))
