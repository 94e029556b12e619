"""Pictures as files have them, and as networks see them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit(video: Tensor) -> Tensor:
    """uint8 0…255 → float32 −1…1."""
    return video.float() / 127.5 - 1


def to_bytes(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in −1…1 → uint8 [B, T, H, W, 3]."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
