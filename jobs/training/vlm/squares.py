"""Pictures and clips as squares of one size, as LLaVA-type models look at them: what they cost is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.media import Visual
from jobs.training.vlm.visuals import Counts, Planned, Visuals
from models.language.budget import Sampling, moving
from models.language.chat import Seen
from models.language.exported import kind_of
from models.language.llava import Llava
from models.language.pixels import Pixels


@dataclass
class Squares(Visuals):
    """See `Visuals`.

    places: number of frames → tokens of a clip. one: tokens of a picture.
    as_images: whether a clip is shown as several images, as `transformers`' LLaVA takes it.
    grids: number of frames → (t, h, w) of their tokens, where static ones are left out.
    """

    pixels: Pixels
    sampling: Sampling
    places: Mapping[int, int]
    one: int
    as_images: bool
    told: str = "none"
    static: float | None = None
    grids: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    written: int = 0

    @classmethod
    def of(
        cls,
        model: Llava,
        sampling: Sampling,
        told: str = "none",
        static: float | None = None,
        pixels: Pixels | None = None,
        written: int = 0,
    ) -> Squares:
        """Raises ValueError where static tokens cannot be left out."""
        side = model.tower.size
        counts = range(1, sampling.frames + 1)
        try:
            as_images = static is None and kind_of(model) == "llava"
        except ValueError:
            as_images = False
        return cls(
            pixels or Pixels.of(model.tower),
            sampling,
            {n: model.tokens(n, side, side) for n in counts},
            model.tokens(1, side, side),
            as_images,
            told,
            static,
            {} if static is None else {n: model.grid(n, side, side) for n in counts},
            written,
        )

    def with_sampling(self, model: Any, sampling: Sampling) -> Squares:
        return Squares.of(model, sampling, self.told, self.static, self.pixels, self.written)

    def sizes(self) -> Sequence[tuple[int, int]]:
        return [(self.pixels.size, self.pixels.size)]

    def resized(
        self, frames: np.ndarray | Tensor, clip: bool, sides: tuple[int, int] | None = None
    ) -> Tensor:
        return self.pixels.resized(frames)

    def blank(self, what: Planned) -> Tensor:
        return torch.zeros(what.frames, 3, self.pixels.size, self.pixels.size, dtype=torch.uint8)

    def seen(self, what: Planned | Visual, kept: Tensor | None = None) -> Seen:
        if not what.seconds:
            return Seen((self.one,))
        n = len(what.seconds)
        if self.as_images:
            return Seen((self.one,) * n)
        return Seen((self._places(n) if kept is None else int(kept.sum()),), video=True)

    def _places(self, n: int) -> int:
        if n not in self.places:
            raise ValueError(f"{n} frames, but the model looks at {max(self.places)} at most: give fewer")
        return self.places[n]

    def kept(self, what: Visual) -> Tensor | None:
        if self.static is None or not what.seconds:
            return None
        n = len(what.seconds)
        whole = -(-n // self.grids[n][0]) * self.grids[n][0]
        frames = torch.cat([what.frames, what.frames[-1:].expand(whole - n, -1, -1, -1)])
        return moving(frames.float() / 255, self.grids[n], self.static)

    def counts(self, what: Planned | Visual) -> list[Counts]:
        """0 an image, n a clip of n."""
        if not what.seconds:
            return [0]
        return [0] * len(what.seconds) if self.as_images else [len(what.seconds)]

    def joined(self, frames: Sequence[Tensor]) -> Tensor:
        """uint8 [N, 3, S, S]."""
        side = self.pixels.size
        return torch.cat(list(frames)) if frames else torch.zeros(0, 3, side, side, dtype=torch.uint8)

    def tensors(self, frames: Tensor, counts: Sequence[Counts]) -> list[Tensor]:
        parts = self.pixels.scaled(frames).split([max(n, 1) for n in counts]) if counts else []
        return [part if n else part[0] for part, n in zip(parts, counts, strict=True)]
