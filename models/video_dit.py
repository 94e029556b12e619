"""A small latent video diffusion transformer: DiT blocks with factorised space–time attention.

Peebles and Xie 2023 (adaLN-Zero blocks), Arnab et al. 2021 (attention over space, then over time),
Liu et al. 2023 (rectified flow). B: batch, T: frames, N: tokens a frame, D: width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import text


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, …, D] scaled and shifted by [B, D] (DiT, section 3.2)."""
    view = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    return x * (1 + scale.view(view)) + shift.view(view)


def noise_level_features(t: Tensor, size: int) -> Tensor:
    """Sinusoids of t in [0, 1]: [B] → [B, size]."""
    freq = torch.exp(-math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2))
    angle = 1000 * t[:, None] * freq[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def zero(layer: nn.Linear) -> nn.Linear:
    """The layer, giving 0 until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention over the middle axis of [B, L, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        )  # B heads L d
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    """Attention within each frame, across time at each place, then an MLP; each gated by adaLN-Zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(3))
        self.space, self.time = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.ada = nn.Sequential(nn.SiLU(), zero(nn.Linear(width, 9 * width)))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts: list[Callable[[Tensor], Tensor]] = [self._space, self._time, self.mlp]
        for part, norm, ada in zip(parts, self.norms, self.ada(c).chunk(3, dim=-1), strict=True):
            shift, scale, gate = ada.chunk(3, dim=-1)  # B D each
            x = x + gate[:, None, None] * part(modulate(norm(x), shift, scale))
        return x

    def _space(self, x: Tensor) -> Tensor:
        b, t, n, d = x.shape
        return self.space(x.reshape(b * t, n, d)).reshape(b, t, n, d)

    def _time(self, x: Tensor) -> Tensor:
        b, t, n, d = x.shape
        return self.time(x.transpose(1, 2).reshape(b * n, t, d)).reshape(b, n, t, d).transpose(1, 2)


class VideoDiT(nn.Module):
    """Velocity of noisy latents at noise level t, given a caption.

    Args:
        channels: of the latents [B, T, C, h, w].
        grid: (T, h, w) it is trained on; sets the position embeddings.
    """

    def __init__(
        self, channels: int, grid: tuple[int, int, int], width: int = 192, depth: int = 4, heads: int = 6
    ):
        super().__init__()
        frames, h, w = grid
        self.width = width
        self.embed, self.read = nn.Linear(channels, width), nn.Embedding(text.VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(1, 1, h * w, width) * 0.02)
        self.moment = nn.Parameter(torch.randn(1, frames, 1, width) * 0.02)
        self.level = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ada = nn.Sequential(nn.SiLU(), zero(nn.Linear(width, 2 * width)))
        self.out = zero(nn.Linear(width, channels))

    def forward(self, z: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """z [B, T, C, h, w], t [B], tokens [B, L] → velocity [B, T, C, h, w]."""
        b, f, c, h, w = z.shape
        x = self.embed(z.permute(0, 1, 3, 4, 2).reshape(b, f, h * w, c)) + self.position + self.moment
        said = (tokens != text.PAD)[..., None]
        words = (self.read(tokens) * said).sum(1) / said.sum(1)  # a bag of bytes: the smallest text encoder
        cond = self.level(noise_level_features(t, 256)) + words
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.ada(cond).chunk(2, dim=-1)
        x = self.out(modulate(self.norm(x), shift, scale))  # B T N C
        return x.reshape(b, f, h, w, c).permute(0, 1, 4, 2, 3)


def flow_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, tokens: Tensor, generator: torch.Generator
) -> Tensor:
    """Rectified flow (Liu et al. 2023, eq. 1): E‖v(z_t, t) − (ε − z)‖², z_t = (1 − t) z + t ε, t uniform."""
    t = torch.rand(len(z), generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    at = t.view(-1, 1, 1, 1, 1)
    return F.mse_loss(model((1 - at) * z + at * noise, t, tokens), noise - z)
