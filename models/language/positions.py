"""Where the tokens of a sequence stand for a language model that turns by time, row and column: M-RoPE of Qwen-VL.

Wang et al. 2024 (Qwen2-VL), sec. 2.1: a text token has the same number three times, a visual token (time, row, column)
of its clip, so a clip of many tokens takes few places. What follows begins max(rows, columns) places on, as in the
published models' own code (`get_rope_index` of transformers), though times may reach further; the paper has the
greatest number plus 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.language.loss import Lengths, with_padding


@dataclass(frozen=True)
class Grid:
    """Visual tokens at `start` of a sequence, of a picture or clip: t·h·w of them.

    step: places between two of its times; Qwen2.5-VL takes so many for each second of them (`tokens_per_second`).
    """

    start: int
    t: int
    h: int
    w: int
    step: float = 1.0

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w


def multimodal(length: int, grids: Sequence[Grid] = ()) -> Tensor:
    """int64 [3, L]: time, row, column of each token of one document.

    Args:
        grids: in their order; all between them is text, newlines too.

    Raises ValueError where they overlap or go beyond the end.
    """
    parts, at, place = [], 0, 0  # tokens done, the next free place
    for grid in grids:
        if grid.start < at or grid.start + grid.tokens > length:
            raise ValueError(
                f"{grid} overlaps what is before it, or ends after the {length} tokens of the document"
            )
        parts.append(_text(grid.start - at, place))
        place += grid.start - at
        times = (torch.arange(grid.t) * grid.step).long()
        parts.append(torch.cartesian_prod(times, torch.arange(grid.h), torch.arange(grid.w)).T + place)
        place, at = place + max(grid.h, grid.w), grid.start + grid.tokens
    parts.append(_text(length - at, place))
    return torch.cat(parts, dim=1)


def packed(lengths: Lengths, grids: Sequence[Grid], length: int) -> Tensor:
    """int64 [3, length] of documents that lie end to end, each from 0 on, then padding.

    Args:
        grids: of all of them, `start` counted from the beginning of the sequence.
    """
    (row,) = with_padding(lengths, length)
    parts, begin = [], 0
    for n in row:
        own = [Grid(g.start - begin, g.t, g.h, g.w, g.step) for g in grids if begin <= g.start < begin + n]
        parts.append(multimodal(n, own))
        begin += n
    return torch.cat(parts, dim=1)


def _text(n: int, place: int) -> Tensor:
    return torch.arange(place, place + n).expand(3, -1)
