"""Which frames of a clip a vision–language model sees, how large, and how many tokens that costs.

    frames      spread over the clip, or so many a second with a cap
    size        a fixed one, or the clip's own within bounds (Qwen2-VL's dynamic resolution)
    tokens      of those what moves only (VideoLLaMA3's static patches are dropped)

`table` shows a person what clips of several lengths cost under several settings, before any training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tokens = Callable[[int, int, int], int]  # frames, height, width → visual tokens, as `Seeing.tokens`


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken.

    frames: at most. fps: a second, from the first on; none: `frames` spread over the clip. least: where a clip is too
    short for so many at that rate, they are spread. ends: spread frames include the first and the last, as Video-LLaVA
    and LLaVA-NeXT have it; otherwise each is the middle of one of n equal stretches, as the mill's captioner has it.
    """

    frames: int = 8
    fps: float | None = None
    least: int = 1
    ends: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.frames:
            raise ValueError(f"frames={self.frames}, least={self.least}: give 1 ≤ least ≤ frames")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps={self.fps}: give a rate above 0")

    def of(self, available: int, rate: float, anywhere: Callable[[int], Any] | None = None) -> list[int]:
        """Numbers of the frames taken, of a clip of so many at `rate` frames a second; each at most once.

        Args:
            anywhere: n → so many numbers of 0 to 1, where in its part each of n spread frames lies, in training (Wang
                et al. 2016, temporal segment networks); none: in the middle.
        """
        if anywhere is not None and self.fps is None and available > self.frames and not self.ends:
            at = zip(range(self.frames), anywhere(self.frames), strict=True)
            return sorted({min(int((i + u) * available / self.frames), available - 1) for i, u in at})
        if self.fps is None or self.fps >= rate:
            return self._spread(available, self.frames)
        each = math.ceil(available / rate * self.fps - 1e-9)
        if not self.least <= each <= self.frames:
            return self._spread(available, min(max(each, self.least), self.frames))
        return [min(round(i * rate / self.fps), available - 1) for i in range(each)]

    def _spread(self, available: int, n: int) -> list[int]:
        n = min(n, available)
        if self.ends and n > 1:
            return [i * (available - 1) // (n - 1) for i in range(n)]
        return [int((i + 0.5) * available / n) for i in range(n)]

    def __str__(self) -> str:
        return f"{self.frames} frames" if self.fps is None else f"{self.fps:g} fps ≤ {self.frames}"


def fitted(
    height: int, width: int, step: int, least: int, most: int, frames: int = 1, counted: int | None = None
) -> tuple[int, int]:
    """Sides nearest to those of a picture that are multiples of `step`, with `least` to `most` pixels (Qwen2-VL).

    Args:
        step: pixels of a side behind one token: of a patch, times what the projector joins.
        frames: which have so many pixels together. counted: of them, to see whether they do (Qwen3-VL); none: all.

    Raises ValueError for a picture more than 200 times as long as wide, or bounds that leave no token.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"a picture of {height}×{width} pixels: one side is more than 200 times the other")
    if not step * step <= most or least > most:
        raise ValueError(f"{least} to {most} pixels: give room for at least one token of {step}×{step}")
    h, w = (round(side / step) * step for side in (height, width))
    pixels, whole = h * w * (counted or frames), height * width * frames
    if pixels > most:
        by = math.sqrt(whole / most)
        h, w = (max(step, math.floor(side / by / step) * step) for side in (height, width))
    elif pixels < least:
        by = math.sqrt(least / whole)
        h, w = (math.ceil(side * by / step) * step for side in (height, width))
    return h, w


def moving(clip: Tensor, grid: tuple[int, int, int], threshold: float = 0.1, least: int = 1) -> Tensor:
    """Which tokens of a clip show something new, bool [t, h, w]; the others are static patches (VideoLLaMA3, sec. 2.2).

    A cell of a frame is kept if its pixels differ from those of the same cell a step of time before by more than
    `threshold` of 255 on average; all of the first frame are, and at least `least` of each.

    Args:
        clip: [T, 3, H, W], scaled for the tower. grid: of its tokens, T a multiple of t.
    """
    t, h, w = grid
    frames = clip.unflatten(0, (t, -1))[:, 0]  # t 3 H W, the first of each step of time
    cells = frames.unflatten(3, (w, -1)).unflatten(2, (h, -1))  # t 3 h p w q
    change = (cells[1:] - cells[:-1]).abs().float().mean((1, 3, 5)) * 255
    kept = torch.cat([torch.ones_like(change[:1], dtype=torch.bool), change > threshold]) if t > 1 else None
    if kept is None:
        return torch.ones(grid, dtype=torch.bool, device=clip.device)
    flat = kept.flatten(1)
    flat[flat.sum(1) < least, :least] = True
    return flat.view(t, h, w)


def table(
    tokens: Tokens,
    settings: Mapping[str, tuple[Sampling, int, int]],
    seconds: Sequence[float] = (2, 10, 60),
    rate: float = 30.0,
    context: int = 8192,
) -> str:
    """What clips cost, for a person: a line for each setting.

    Args:
        tokens: `Seeing.tokens` of a model.
        settings: name → frames, height and width.
        seconds: lengths of clips. rate: their frames a second.
        context: tokens of a sequence, of which it is said how many clips of the middle length fit.
    """
    middle = sorted(seconds)[len(seconds) // 2]
    head = ["setting", "pixels", *(f"{s:g} s" for s in seconds), f"{middle:g} s clips in {context:,}"]
    rows = [head]
    for name, (sampling, height, width) in settings.items():
        each = {s: _cost(tokens, sampling, s, rate, height, width) for s in seconds}
        costs = [f"{n:,} ({frames} fr.)" for frames, n in each.values()]
        rows.append([name, f"{height}×{width}", *costs, f"{context // each[middle][1]:,}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = (
        "  ".join(
            x.ljust(n) if i == 0 else x.rjust(n) for i, (x, n) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(lines)


def _cost(
    tokens: Tokens, sampling: Sampling, seconds: float, rate: float, height: int, width: int
) -> tuple[int, int]:
    """Frames and visual tokens of a clip."""
    frames = len(sampling.of(max(1, round(seconds * rate)), rate))
    return frames, tokens(frames, height, width)
