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
    whole: `video` bounds all frames of a clip together, and a frame has at most `context` tokens (Qwen3-VL).
    spoken: of when its frames are a clip tells in words before each pair of them, which stand by themselves (Qwen3-VL).
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
    whole: bool = False
    spoken: bool = False

    def sides(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """What a picture (0 frames) or the frames of a clip are resized to. Raises ValueError for a mere line."""
        least, most = self.video if frames else self.image
        step = self.patch * self.merge
        if frames and self.whole:
            return self._together(max(frames, self.pair), height, width)
        if frames and self.context is not None:
            whole = int(self.context * step * step * SPENT) * self.pair
            most = max(min(most, whole // frames), int(least * 1.05))
        return fitted(height, width, step, least, most)

    def _together(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Sides of frames whose pixels are bounded all together, as Qwen3-VL's processor has them."""
        (least, most), step = self.video, self.patch * self.merge
        if self.context is not None:
            share = max(min(self.context * step * step, most // frames), int(least * 1.05))
            most = share * frames
        if min(height, width) < step:
            by = max(step / height, step / width)
            height, width = int(height * by), int(width * by)
        # of an odd number of frames fewer are counted than are seen
        of = round(frames / self.pair) * self.pair
        return fitted(height, width, step, least, most, frames=frames, counted=of)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the tokens of a picture or clip of such sides."""
        step = self.patch * self.merge
        return -(-max(frames, 1) // self.pair), height // step, width // step

    def times(self, seconds: Sequence[float], duration: float) -> float:
        """Seconds that a step of a clip's time lasts, as processors reckon them: on average, in milliseconds."""
        whole = max(round(duration * CLOCK_HZ), round(seconds[-1] * CLOCK_HZ) + 1)
        return self.pair / (len(seconds) / whole * CLOCK_HZ)

    def grids(self, frames: int, sides: Sequence[int], lasts: float = 1.0) -> list[Grid]:
        """Its tokens where they stand by themselves; where these begin is not known. lasts: see `times`."""
        step = 1.0 if self.per_second is None or not frames else self.per_second * lasts
        t, h, w = self.grid(frames, sides[0], sides[1])
        return [Grid(0, 1, h, w)] * t if self.spoken and frames else [Grid(0, t, h, w, step)]

    def told(self, seconds: Sequence[float]) -> list[str]:
        """What is said before each pair of a clip's frames; nothing of others than `spoken`."""
        if not self.spoken:
            return []
        at = [round(s * CLOCK_HZ) / CLOCK_HZ for s in seconds]
        at += at[-1:] * (-len(at) % self.pair)
        pairs = range(0, len(at), self.pair)
        return [f"<{(at[i] + at[i + self.pair - 1]) / 2:.1f} seconds>" for i in pairs]

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
