"""From a tower's features to the tokens of a language model.

All are called as

    tokens = projector(features)      [B, t, h, w, width] → [B, n, dim]

and know n beforehand: `projector.tokens(t, h, w)`. The order of what happens, each part of which may be left out:

1. `shuffle`: r×r neighbours become one feature r² as wide (pixel shuffle, as nanoVLM, SmolVLM and InternVL);
2. the map itself: one Linear, or Linear–GELU–Linear (LLaVA-1.5), or a Q-Former (BLIP-2);
3. `temporal`: the mean of so many frames that follow each other;
4. `pool`: the grid of a frame becomes ⌈h/pool⌉ × ⌈w/pool⌉, bilinear or by means (LLaVA-NeXT-Video: 27² → 14²);
5. `newline`: a learned token after each row (LLaVA-NeXT-Video: 14 · 15 = 210 tokens a frame), frame or clip
   (LLaVA-OneVision).

Pooling, temporal and newlines are of video; an image, a clip of one frame, keeps its whole grid if `whole_images` is
set, as LLaVA-OneVision's several images do. One projector serves images and video, so that both are united before the
language model (Video-LLaVA).
"""

from __future__ import annotations

import math
from inspect import signature
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import CrossAttention, SelfAttention

Map = Literal["linear", "mlp", "qformer"]
Newline = Literal["none", "row", "frame", "clip"]
Mode = Literal["bilinear", "average"]


class Projector(nn.Module):
    """Linear or MLP, see the top of this file.

    Args:
        width: of the features; dim: of the language model.
        mode: how `pool` makes one of several: 'bilinear' or 'average'.

    Raises ValueError for options that are out of range.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        map: Map = "mlp",
        shuffle: int = 1,
        pool: int = 1,
        mode: Mode = "bilinear",
        temporal: int = 1,
        newline: Newline = "none",
        whole_images: bool = False,
    ):
        super().__init__()
        if min(shuffle, pool, temporal) < 1:
            raise ValueError(
                f"shuffle={shuffle}, pool={pool}, temporal={temporal}: give numbers of 1 or more"
            )
        self.width, self.dim, self.map = width, dim, map
        self.shuffle, self.pool, self.mode, self.temporal = shuffle, pool, mode, temporal
        self.line, self.whole_images = newline, whole_images
        wide = width * shuffle**2
        self.linear_1 = nn.Linear(wide, dim)
        self.linear_2 = nn.Linear(dim, dim) if map == "mlp" else None
        self.newline = nn.Parameter(torch.randn(dim) / dim**0.5) if newline != "none" else None

    def forward(self, features: Tensor) -> Tensor:
        """Raises ValueError where the grid does not divide by `shuffle`."""
        x = self.linear_1(pixel_shuffle(features, self.shuffle))  # B t h w D
        if self.linear_2 is not None:
            x = self.linear_2(F.gelu(x))
        if not self._whole(x.shape[1]):
            x = shrunken(mean_of_frames(x, self.temporal), self.pool, self.mode)
        return with_newlines(x, self.newline, self.line)

    def tokens(self, t: int, h: int, w: int) -> int:
        """n, of features [t, h, w]."""
        t, h, w = self._grid(t, h, w)
        return t * h * w + {"none": 0, "row": t * h, "frame": t, "clip": 1}[self.line]

    def grid(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """Of the tokens. Raises ValueError where newlines stand between them."""
        if self.line != "none":
            raise ValueError(f"newline {self.line}: tokens have places of a grid with newline: none only")
        return self._grid(t, h, w)

    def _grid(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        h, w = h // self.shuffle, w // self.shuffle
        return (
            (t, h, w) if self._whole(t) else (-(-t // self.temporal), -(-h // self.pool), -(-w // self.pool))
        )

    def _whole(self, frames: int) -> bool:
        return self.whole_images and frames == 1


def pixel_shuffle(x: Tensor, r: int) -> Tensor:
    """[B, t, h, w, C] → [B, t, h/r, w/r, r²·C], neighbours row by row. Raises ValueError where r does not divide."""
    if r == 1:
        return x
    h, w = x.shape[2:4]
    if h % r or w % r:
        raise ValueError(f"shuffle={r} does not divide the grid of {h}×{w} features: choose a divisor")
    x = x.unflatten(3, (w // r, r)).unflatten(2, (h // r, r))  # B t h/r r w/r r C
    return x.transpose(3, 4).flatten(4)


def mean_of_frames(x: Tensor, n: int) -> Tensor:
    """[B, t, …] → [B, ⌈t/n⌉, …]; the last mean is of what is left."""
    return x if n == 1 else torch.stack([part.mean(1) for part in x.split(n, dim=1)], dim=1)


def shrunken(x: Tensor, n: int, mode: Mode) -> Tensor:
    """[B, t, h, w, D] → [B, t, ⌈h/n⌉, ⌈w/n⌉, D]; a mean at the edge is of what is there."""
    if n == 1:
        return x
    image = x.flatten(0, 1).permute(0, 3, 1, 2)  # Bt D h w
    if mode == "bilinear":
        sides = [math.ceil(side / n) for side in image.shape[2:]]
        image = F.interpolate(image, sides, mode="bilinear")
    else:
        image = F.avg_pool2d(image, n, ceil_mode=True)
    return image.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def with_newlines(x: Tensor, newline: Tensor | None, where: Newline) -> Tensor:
    """[B, t, h, w, D] → [B, n, D] with `newline` [D] after each row, frame or clip."""
    if newline is None or where == "none":
        return x.flatten(1, 3)
    axis = {"row": 3, "frame": 2, "clip": 1}[where]  # the one that gets a place more
    x = x.flatten(axis, 3)
    return torch.cat([x, newline.to(x.dtype).expand(*x.shape[:axis], 1, -1)], dim=axis).flatten(1, -2)


class QFormer(nn.Module):
    """Queries that look at the features, then at each other (Li et al. 2023, BLIP-2), → `queries` tokens a clip.

    The features of a video know their frame by a learned position, which is 0 at the beginning of training.

    Args:
        queries: tokens of a clip, or of each frame where `per_frame` is set.
        frames: at most.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        queries: int = 32,
        depth: int = 2,
        heads: int = 8,
        hidden: int | None = None,
        frames: int = 256,
        per_frame: bool = False,
    ):
        super().__init__()
        hidden = hidden or dim
        self.width, self.dim = width, dim
        self.queries = nn.Parameter(0.02 * torch.randn(queries, hidden))
        self.frames, self.time = frames, None if per_frame else nn.Parameter(torch.zeros(frames, hidden))
        self.linear_1, self.norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(QBlock(hidden, heads) for _ in range(depth))
        self.out = nn.Linear(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Raises ValueError for more frames than there are positions."""
        b, t = features.shape[:2]
        keys = self.linear_1(features).flatten(2, 3)  # B t hw D
        if self.time is None:
            keys = keys.flatten(0, 1)
        elif t <= self.frames:
            keys = (keys + self.time[:t, None]).flatten(1, 2)
        else:
            raise ValueError(
                f"{t} frames, but the Q-Former has positions for {self.frames}: raise projector.frames"
            )
        keys = self.norm(keys)
        x = self.queries.expand(len(keys), -1, -1)
        for block in self.blocks:
            x = block(x, keys)
        return self.out(x).reshape(b, -1, self.dim)

    def tokens(self, t: int, h: int, w: int) -> int:
        return len(self.queries) * (t if self.time is None else 1)

    def grid(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        raise ValueError("tokens of a Q-Former have no places: use map: linear or mlp")


class QBlock(nn.Module):
    """Self-attention, cross-attention, MLP; each after a norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attention, self.cross = SelfAttention(dim, heads), CrossAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        x = x + self.cross(self.norms[1](x), keys)
        return x + self.mlp(self.norms[2](x))


def projector(width: int, dim: int, options: dict[str, object] | None = None) -> Projector | QFormer:
    """As a recipe asks for it: options of `Projector`, or of `QFormer` with {'map': 'qformer'}. Raises ValueError."""
    options = dict(options or {})
    for name, known in (("map", get_args(Map)), ("newline", get_args(Newline)), ("mode", get_args(Mode))):
        if options.get(name, known[0]) not in known:
            raise ValueError(f"projector.{name} {options[name]!r}: give {', '.join(known)}")
    kind = QFormer if options.get("map") == "qformer" else Projector
    takes = [*signature(kind).parameters][2:]
    if unknown := [name for name in options if name not in (*takes, "map")]:
        raise ValueError(
            f"projector takes no {unknown[0]!r}; it takes {', '.join(dict.fromkeys(['map', *takes]))}"
        )
    if kind is QFormer:
        options.pop("map")
        return QFormer(width, dim, **options)  # type: ignore[arg-type]
    return Projector(width, dim, **options)  # type: ignore[arg-type]
