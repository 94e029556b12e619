"""The pixels that a tower sees, made as the processors of `transformers` make them.

uint8 frames of any size → resized (bicubic, antialiased, uint8 again) → (x / 255 − mean) / std. One way for training,
conversation, evaluation and, in `transformers`' own code, for whoever uses an exported model. LLaVA's towers see
squares (`Pixels`), Qwen-VL's each picture at its own size, within bounds (`OwnSize`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from models.language.budget import fitted
from models.language.positions import Grid
from models.language.towers import Tower

CLOCK_HZ = 1000  # times of frames are told in milliseconds, see models/curation/vlm/model.py
SPENT = 0.9  # of `OwnSize.context`, the share that a video may take


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
        return _resized(frames, (self.size, self.size))

    def scaled(self, frames: Tensor) -> Tensor:
        """uint8 [T, 3, S, S] → float32, as the tower takes it."""
        return _scaled(frames, self.mean, self.std)


@dataclass(frozen=True)
class OwnSize:
    """Qwen-VL's dynamic resolution and temporal merging (Wang et al. 2024, sec. 2.1).

    image, video: least and most pixels of a picture, of a frame of a video. mean, std: of colours of 0…1.
    patch: pixels of a patch's side; merge: patches of a side that become one token; pair: frames that become one.
    context: tokens of a sequence of which all frames of a video together take SPENT at most, however many they are;
    none: no such bound.
    per_second: places of a sequence's time that a second is (M-RoPE of Qwen2.5-VL); none: a pair of frames is one.
    """

    image: tuple[int, int]
    video: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 14
    merge: int = 2
    pair: int = 2
    context: int | None = None
    per_second: float | None = None

    def sides(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """What a picture (0 frames) or the frames of a clip are resized to. Raises ValueError for a mere line."""
        least, most = self.video if frames else self.image
        step = self.patch * self.merge
        if frames and self.context is not None:
            whole = int(self.context * step * step * SPENT) * self.pair
            most = max(min(most, whole // frames), int(least * 1.05))
        return fitted(height, width, step, least, most)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the tokens of a picture or clip of such sides."""
        step = self.patch * self.merge
        return -(-max(frames, 1) // self.pair), height // step, width // step

    def times(self, seconds: Sequence[float], duration: float) -> float:
        """Seconds that a step of a clip's time lasts, as processors reckon them: on average, in milliseconds."""
        whole = max(round(duration * CLOCK_HZ), round(seconds[-1] * CLOCK_HZ) + 1)
        return self.pair / (len(seconds) / whole * CLOCK_HZ)

    def placed(self, start: int, frames: int, sides: tuple[int, int], lasts: float = 1.0) -> Grid:
        """Where its tokens stand, the first of them at `start` of a sequence. lasts: see `times`."""
        step = 1.0 if self.per_second is None or not frames else self.per_second * lasts
        return Grid(start, *self.grid(frames, *sides), step)

    def resized(self, frames: np.ndarray | Tensor, sides: tuple[int, int]) -> Tensor:
        """uint8 [T, H, W, 3] → uint8 [T, 3, *sides]."""
        return _resized(frames, sides)

    def scaled(self, frames: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] → float32, as the tower takes it."""
        return _scaled(frames, self.mean, self.std)

    def patches(self, clip: Tensor) -> Tensor:
        """A picture [3, H, W] or clip [T, 3, H, W] as its patches, those of a token one after the other, [n, D].

        Of an odd number of frames the last is seen twice.
        """
        clip = clip if clip.ndim == 4 else clip[None]
        clip = torch.cat([clip, clip[-1:].expand(-len(clip) % self.pair, -1, -1, -1)])
        x = clip.unflatten(3, (-1, self.merge, self.patch)).unflatten(2, (-1, self.merge, self.patch))
        x = x.unflatten(0, (-1, self.pair))  # t pair 3 h m p w m p
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)


def _resized(frames: np.ndarray | Tensor, sides: tuple[int, int]) -> Tensor:
    x = frames if isinstance(frames, Tensor) else torch.from_numpy(np.array(frames))
    x = x.permute(0, 3, 1, 2)
    return resize(x, list(sides), InterpolationMode.BICUBIC, antialias=True).contiguous()


def _scaled(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, by = (
        255 * torch.tensor(x, dtype=torch.float32, device=frames.device)[:, None, None] for x in (mean, std)
    )
    return (frames.float() - shift) / by
