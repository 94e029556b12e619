"""The pixels that a tower sees, made as the exported processors of `transformers` make them.

uint8 frames of any size → resized to a square (bicubic, antialiased, uint8 again) → (x / 255 − mean) / std. One way for
training, conversation, evaluation and, in `transformers`' own code, for whoever uses an exported model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from models.language.towers import Tower


@dataclass(frozen=True)
class Pixels:
    """size: of a side. mean, std: of colours of 0…1."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, tower: Tower) -> Pixels:
        return cls(tower.size, tuple(tower.mean), tuple(tower.std))

    def resized(self, frames: np.ndarray | Tensor) -> Tensor:
        """uint8 [T, H, W, 3] → uint8 [T, 3, S, S]. What a picture's sides are to each other is not kept."""
        x = frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
        x = x.permute(0, 3, 1, 2)
        return resize(x, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True).contiguous()

    def scaled(self, frames: Tensor) -> Tensor:
        """uint8 [T, 3, S, S] → float32, as the tower takes it."""
        mean, std = (
            255 * torch.tensor(x, dtype=torch.float32, device=frames.device)[:, None, None]
            for x in (self.mean, self.std)
        )
        return (frames.float() - mean) / std
