"""The pictures and clips of conversations: which frames are looked at, their pixels, the tokens they take.

squares.py    all of one size, whatever they cost is known beforehand (LLaVA)
own_size.py   each at its own size (Qwen-VL)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from jobs.training.data.media import Media, Visual, as_shown, at_hand
from models.language import times
from models.language.budget import Sampling, table
from models.language.chat import MARKS, Message, Seen
from pipeline.shards.pixels import clock, numbered, picture

# how the frames of a batch are divided: 0 an image, n a clip of n; with height and width where these are their own
Counts = Any


@dataclass(frozen=True)
class Planned:
    """A picture or clip, not yet decoded. numbers: of its frames; () of a picture.

    handed: by somebody, from elsewhere: its bytes are no clip of shards, and are looked at as files are.
    sides: height and width of its frames as they are looked at, once they are known.
    """

    media: Media
    numbers: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    duration: float = 0.0
    text: str = ""  # what is written about it
    handed: bool = False
    sides: tuple[int, int] | None = None

    @property
    def frames(self) -> int:
        return len(self.numbers) or 1


class Visuals:
    """How a model looks at pictures and clips; goes to worker processes.

    pixels: how it scales them. told: of the times, see `models.language.times`. static: see `budget.moving`. written:
    tokens of what is written about a clip, at most; 0: none is read.
    """

    pixels: Any
    sampling: Sampling
    told: str
    static: float | None
    written: int

    def with_sampling(self, model: Any, sampling: Sampling) -> Visuals:
        """The same of the same model, which looks at other frames."""
        raise NotImplementedError

    def sizes(self) -> Sequence[tuple[int, int]]:
        """Heights and widths of clips whose cost is shown before training."""
        raise NotImplementedError

    # ------------------------------------------------------------ what is looked at

    def planned(self, media: Media, rng: np.random.Generator | None = None) -> Planned:
        """Of a clip; a generator draws where its frames lie, see `Sampling.of`. Raises BrokenSample."""
        handed = isinstance(media, str)
        media = at_hand(media)
        when = clock(media)
        numbers = self.sampling.of(len(when.seconds), when.rate, None if rng is None else rng.random)
        seconds = tuple(when.seconds[n] for n in numbers)
        return Planned(media, tuple(numbers), seconds, when.duration, handed=handed)

    def measured(self, what: Planned) -> Planned:
        """With the sides of its frames, where these are told by its own. Raises BrokenSample."""
        return what

    def loaded(self, what: Planned) -> Visual:
        """Raises BrokenSample."""
        media = at_hand(what.media)
        if not what.numbers:
            frames = picture(media)
        elif isinstance(media, bytes) and not what.handed:
            frames = numbered(media, what.numbers)
        else:
            frames = as_shown(media, what.numbers)
        pixels = self.resized(frames, bool(what.numbers), what.sides)
        return Visual(pixels, what.seconds, what.duration, what.text)

    def resized(
        self, frames: np.ndarray | Tensor, clip: bool, sides: tuple[int, int] | None = None
    ) -> Tensor:
        """uint8 [T, H, W, 3] of a clip or a picture → uint8 [T, 3, H, W] of the sides that are given, or are told by
        its own. Raises BrokenSample."""
        raise NotImplementedError

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
        return Visual(self.resized(frames, bool(when)), when, length)

    def blank(self, what: Planned) -> Tensor:
        """Black frames in place of those that cannot be read, uint8 [T, 3, H, W]."""
        raise NotImplementedError

    # ------------------------------------------------------------ as tokens and tensors

    def seen(self, what: Planned | Visual, kept: Tensor | None = None) -> Seen:
        """The places it takes. Args: kept: of `kept`."""
        raise NotImplementedError

    def kept(self, what: Visual) -> Tensor | None:
        """Which tokens of a clip are there, bool [t, h, w]; None: all."""
        return None

    def counts(self, what: Planned | Visual) -> list[Counts]:
        """How its frames are given to a model."""
        raise NotImplementedError

    def joined(self, frames: Sequence[Tensor]) -> Tensor:
        """Frames of several pictures and clips as one tensor, uint8."""
        raise NotImplementedError

    def tensors(self, frames: Tensor, counts: Sequence[Counts]) -> list[Tensor]:
        """Of `joined` frames images [3, H, W] and clips [n, 3, H, W], scaled."""
        raise NotImplementedError

    def timing(self, visuals: Sequence[Planned | Visual]) -> dict[str, Any]:
        """What `generate` and `following` of a model take of the times of these."""
        return {}

    def positions(
        self, tokens: np.ndarray, lengths: Sequence[int], visuals: Sequence[Planned | Visual]
    ) -> Tensor | None:
        """Positions of a row of tokens [L], int64 [3, L]; None: the model counts them itself.

        Args:
            lengths: of the documents in it. visuals: of all of them.
        """
        return None

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


def budget_table(model: Any, visuals: Visuals, context: int) -> str:
    """What a clip costs as the recipe has it, and with half and twice as many frames."""
    n, sizes = visuals.sampling.frames, visuals.sizes()
    samplings = (
        visuals.sampling,
        *(Sampling(m) for m in (max(1, n // 2), n, 2 * n)),
        Sampling(max(n, 64), 1.0),
    )
    several = {
        f"{s} of {w}×{h}" if len(sizes) > 1 else str(s): (s, h, w) for s in samplings for h, w in sizes
    }
    return table(model.tokens, several, context=context)
