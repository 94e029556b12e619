"""The pictures and clips of conversations: which frames are looked at, their pixels, the tokens they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.media import Media, as_shown, at_hand
from models.language import times
from models.language.budget import Sampling, moving, table
from models.language.chat import MARKS, Message, Seen
from models.language.exported import kind_of
from models.language.llava import Llava
from models.language.pixels import Pixels
from pipeline.shards.pixels import clock, numbered, picture


@dataclass(frozen=True)
class Planned:
    """A picture or clip, not yet decoded. numbers: of its frames; () of a picture.

    handed: by somebody, from elsewhere: its bytes are no clip of shards, and are looked at as files are.
    """

    media: Media
    numbers: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    duration: float = 0.0
    text: str = ""  # what is written about it
    handed: bool = False

    @property
    def frames(self) -> int:
        return len(self.numbers) or 1


@dataclass(frozen=True)
class Visual:
    """A picture or clip as it is looked at. frames: uint8 [T, 3, S, S]. seconds: of each, () of a picture."""

    frames: Tensor
    seconds: tuple[float, ...] = ()
    duration: float = 0.0
    text: str = ""  # what is written about it


@dataclass
class Visuals:
    """How a model looks at pictures and clips; goes to worker processes.

    places: number of frames → tokens of a clip. one: tokens of a picture.
    as_images: whether a clip is shown as several images, as `transformers`' LLaVA takes it.
    grids: number of frames → (t, h, w) of their tokens, where static ones are left out. static: see `budget.moving`.
    """

    pixels: Pixels
    sampling: Sampling
    places: Mapping[int, int]
    one: int
    as_images: bool
    told: str = "none"
    static: float | None = None
    grids: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    written: int = 0  # tokens of what is written about a clip, at most; 0: none is read

    @classmethod
    def of(
        cls,
        model: Llava,
        sampling: Sampling,
        told: str = "none",
        static: float | None = None,
        pixels: Pixels | None = None,
        written: int = 0,
    ) -> Visuals:
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

    # ------------------------------------------------------------ what is looked at

    def planned(self, media: Media, rng: np.random.Generator | None = None) -> Planned:
        """Of a clip; a generator draws where its frames lie, see `Sampling.of`. Raises BrokenSample."""
        handed = isinstance(media, str)
        media = at_hand(media)
        when = clock(media)
        numbers = self.sampling.of(len(when.seconds), when.rate, None if rng is None else rng.random)
        seconds = tuple(when.seconds[n] for n in numbers)
        return Planned(media, tuple(numbers), seconds, when.duration, handed=handed)

    def loaded(self, what: Planned) -> Visual:
        """Raises BrokenSample."""
        media = at_hand(what.media)
        if not what.numbers:
            frames = picture(media)
        elif isinstance(media, bytes) and not what.handed:
            frames = numbered(media, what.numbers)
        else:
            frames = as_shown(media, what.numbers)
        return Visual(self.pixels.resized(frames), what.seconds, what.duration, what.text)

    def clip(self, media: Media) -> Visual:
        """Of an mp4 or its name. Raises BrokenSample."""
        return self.loaded(self.planned(media))

    def image(self, media: Media) -> Visual:
        return self.loaded(Planned(media))

    def decoded(
        self, frames: np.ndarray | Tensor, seconds: Sequence[float] = (), duration: float | None = None
    ) -> Visual:
        """Of frames [T, H, W, 3] uint8 that are looked at as they are; without their times a picture, or 1 fps."""
        when = tuple(seconds) or (tuple(float(i) for i in range(len(frames))) if len(frames) > 1 else ())
        length = duration if duration is not None else (when[-1] if when else 0.0)
        return Visual(self.pixels.resized(frames), when, length)

    # ------------------------------------------------------------ as tokens and tensors

    def seen(self, what: Planned | Visual, kept: Tensor | None = None) -> Seen:
        """Args: kept: of `kept`."""
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
        """Which tokens of a clip are there, bool [t, h, w]; None: all."""
        if self.static is None or not what.seconds:
            return None
        n = len(what.seconds)
        whole = -(-n // self.grids[n][0]) * self.grids[n][0]
        frames = torch.cat([what.frames, what.frames[-1:].expand(whole - n, -1, -1, -1)])
        return moving(frames.float() / 255, self.grids[n], self.static)

    def counts(self, what: Planned | Visual) -> list[int]:
        """How its frames are given to a model: 0 an image, n a clip of n."""
        if not what.seconds:
            return [0]
        return [0] * len(what.seconds) if self.as_images else [len(what.seconds)]

    def tensors(self, frames: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """uint8 [N, 3, S, S] → images [3, S, S] and clips [n, 3, S, S], scaled."""
        parts = self.pixels.scaled(frames).split([max(n, 1) for n in counts]) if counts else []
        return [part if n else part[0] for part, n in zip(parts, counts, strict=True)]

    def timed(self, messages: Sequence[Message], visuals: Sequence[Planned | Visual]) -> list[dict[str, Any]]:
        """The messages, with the times of the frames in the first thing that the user says, before its words."""
        told = [times.TOLD[self.told](v.seconds, v.duration) for v in visuals if len(v.seconds) > 1]
        before = "\n".join(filter(None, told))
        said = [dict(m) for m in messages]
        first = next((m for m in said if m["role"] == "user"), None)
        if before and first is not None:
            at = max((m.end() for m in MARKS.finditer(first["content"])), default=0)
            first["content"] = f"{first['content'][:at]}{before}\n{first['content'][at:]}"
        return said

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.pixels.size, self.pixels.size


def budget_table(model: Llava, sampling: Sampling, context: int) -> str:
    """What a clip costs as the recipe has it, and with half and twice as many frames."""
    side = model.tower.size
    n = sampling.frames
    several = {
        str(s): (s, side, side)
        for s in (
            sampling,
            *(Sampling(m) for m in (max(1, n // 2), n, 2 * n)),
            Sampling(max(n, 64), 1.0),
        )
    }
    return table(model.tokens, several, context=context)
