"""Pictures and clips at their own size, as Qwen-VL looks at them: what they cost is known when their size is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.media import Visual, as_shown, at_hand
from jobs.training.vlm.visuals import Counts, Planned, Visuals
from models.language.budget import Sampling
from models.language.chat import Seen
from models.language.pixels import OwnSize
from models.language.positions import packed
from models.language.qwen_vl import standing
from pipeline.shards.pixels import BrokenSample, size_of_clip, size_of_picture

SIZES = ((360, 640), (720, 1280))  # of the clips whose cost is shown


@dataclass
class OwnSizes(Visuals):
    """See `Visuals`. marks: ids of the tokens in whose places pictures and videos are."""

    pixels: OwnSize
    sampling: Sampling
    marks: tuple[int, int]
    told: str = "none"
    static: float | None = None
    written: int = 0

    def with_sampling(self, model: Any, sampling: Sampling) -> OwnSizes:
        return replace(self, sampling=sampling)

    def sizes(self) -> Sequence[tuple[int, int]]:
        return SIZES

    def measured(self, what: Planned) -> Planned:
        if what.sides is not None:
            return what
        media = at_hand(what.media)
        if not what.numbers:
            size: Sequence[int] = size_of_picture(media)
        elif isinstance(media, bytes) and not what.handed:
            size = size_of_clip(media)
        else:
            size = as_shown(media, what.numbers[:1]).shape[1:3]
        name = f"{media}: " if isinstance(media, str) else ""
        return replace(what, sides=self._sides(len(what.numbers), size, name))

    def resized(
        self, frames: np.ndarray | Tensor, clip: bool, sides: tuple[int, int] | None = None
    ) -> Tensor:
        n = len(frames) if clip else 0
        return self.pixels.resized(frames, sides or self._sides(n, frames.shape[1:3]))

    def _sides(self, frames: int, size: Sequence[int], name: str = "") -> tuple[int, int]:
        try:
            return self.pixels.sides(frames, size[0], size[1])
        except ValueError as e:
            raise BrokenSample(f"{name}{e}") from e

    def seen(self, what: Planned | Visual, kept: Tensor | None = None) -> Seen:
        n = len(what.seconds)
        grids = self.pixels.grids(n, self._shape(what))
        told = self.pixels.told(what.seconds) if n else []
        return Seen(tuple(grid.tokens for grid in grids), n > 0, tuple(told))

    def _shape(self, what: Planned | Visual) -> tuple[int, int]:
        """Height and width of its frames."""
        if isinstance(what, Visual):
            h, w = what.frames.shape[2:]
            return h, w
        return self.measured(what).sides or (0, 0)

    def blank(self, what: Planned) -> Tensor:
        return torch.zeros(what.frames, 3, *self._shape(what), dtype=torch.uint8)

    def counts(self, what: Planned | Visual) -> list[Counts]:
        return [(len(what.seconds), *self._shape(what))]

    def joined(self, frames: Sequence[Tensor]) -> Tensor:
        """uint8, one after the other, as they have several sizes."""
        return torch.cat([x.flatten() for x in frames]) if frames else torch.zeros(0, dtype=torch.uint8)

    def tensors(self, frames: Tensor, counts: Sequence[Counts]) -> list[Tensor]:
        shapes = [(max(n, 1), 3, h, w) for n, h, w in counts]
        parts = frames.split([int(np.prod(shape)) for shape in shapes]) if shapes else []
        scaled = [self.pixels.scaled(part.view(shape)) for part, shape in zip(parts, shapes, strict=True)]
        return [x if n else x[0] for x, (n, _, _) in zip(scaled, counts, strict=True)]

    def timing(self, visuals: Sequence[Planned | Visual]) -> dict[str, Any]:
        return {"seconds": [self.pixels.times(v.seconds, v.duration) for v in visuals if v.seconds]}

    def positions(
        self, tokens: np.ndarray, lengths: Sequence[int], visuals: Sequence[Planned | Visual]
    ) -> Tensor:
        lasting = [self.pixels.times(v.seconds, v.duration) if v.seconds else 1.0 for v in visuals]
        grids = [
            grid
            for v, lasts in zip(visuals, lasting, strict=True)
            for grid in self.pixels.grids(len(v.seconds), self._shape(v), lasts)
        ]
        there = torch.from_numpy(np.isin(tokens, self.marks))
        return packed(lengths, standing(there, grids)[0], len(tokens))
