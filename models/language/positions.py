"""Where the tokens of a sequence stand for a language model that turns by time, row and column: M-RoPE of Qwen-VL.

Wang et al. 2024 (Qwen2-VL), sec. 2.1: a text token has the same number three times, a visual token (time, row, column)
of its clip, and what follows begins at the greatest number before it plus 1. So a clip of many tokens takes few places.

transformers 5.23 begins after max(h, w) instead, though times may reach further: behind a clip of more times than rows
and columns its text has numbers that lie within the clip. Ours are the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.language.loss import Lengths, with_padding


@dataclass(frozen=True)
class Grid:
    """Visual tokens at `start` of a sequence, of a picture or clip: t·h·w of them.

    step: places between two of its times; Qwen2.5-VL takes 2 for each second of them (`tokens_per_second`).
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
        place, at = int(parts[-1].max()) + 1, grid.start + grid.tokens
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


class MRotary(nn.Module):
    """The rotary embedding of a language model, which also takes three positions a token.

    Of the D/2 pairs of a head the first `sections[0]` turn with time, then so many with the row, then with the column.

    Args:
        rotary: the language model's own: (x, positions [B, L]) → cos, sin [B, L, D] in two equal halves.
    """

    def __init__(self, rotary: nn.Module, sections: Sequence[int]):
        super().__init__()
        self.rotary, self.sections = rotary, tuple(sections)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [B, L], or [3, B, L]."""
        if positions.ndim == 2:
            return self.rotary(x, positions)
        tables = [self.rotary(x, each) for each in positions]  # of time, row and column
        cos, sin = (self._joined([table[i] for table in tables]) for i in range(2))
        return cos, sin

    def _joined(self, tables: Sequence[Tensor]) -> Tensor:
        """Three [B, L, D] → one."""
        halves = zip(*(table.split([*self.sections] * 2, dim=-1) for table in tables), strict=True)
        return torch.cat([each[i % 3] for i, each in enumerate(halves)], dim=-1)


def turn_by_three(language: Any, sections: Sequence[int] | None = None) -> None:
    """From now on the language model takes positions [3, B, L] too. A text alone gives what it gave before.

    Args:
        sections: see `MRotary`; none: as Qwen2-VL splits a head, 1 : 1.5 : 1.5.

    Raises ValueError where it has no rotary embedding, or sections do not add up.
    """
    base, config = language.base_model, language.config
    if getattr(base, "rotary_emb", None) is None:
        raise ValueError(f"language model {config.model_type} has no rotary positions: set positions: plain")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    side = size // 2 * 3 // 8
    sections = sections or (size // 2 - 2 * side, side, side)
    if sum(sections) != size // 2:
        raise ValueError(f"sections {list(sections)} do not add up to {size // 2}, half a head's width")
    base.rotary_emb = MRotary(base.rotary_emb, sections)
