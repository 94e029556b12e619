"""ViViT: a video vision transformer (Arnab et al. 2021), its four models, and their start from an image ViT.

A clip is cut into tubelets, each embedded by a convolution whose kernel is its stride. The models differ in
how tokens meet over space and time (sec. 3.3):

1. joint: all tokens and a class token in one sequence;
2. factorised encoder: an image ViT for every tubelet's time, then a transformer over their class tokens;
3. factorised self-attention: each block attends within a time, then across times at each place;
4. factorised dot-product: half the heads attend within a time, half across times.

Models 3 and 4 have no class token; their feature is the mean of the tokens. Names of the weights are timm's,
where there is a counterpart. B: batch; T, h, w: tubelets along time, height and width; N = h·w; D: dim.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import SelfAttention, along

PRESETS: dict[str, dict[str, Any]] = {
    "Ti/16x2": {"dim": 192, "depth": 12, "heads": 3, "tubelet": (2, 16, 16)},
    "S/16x2": {"dim": 384, "depth": 12, "heads": 6, "tubelet": (2, 16, 16)},
    "B/16x2": {"dim": 768, "depth": 12, "heads": 12, "tubelet": (2, 16, 16)},
    "L/16x2": {"dim": 1024, "depth": 24, "heads": 16, "tubelet": (2, 16, 16)},
    "L/16x2-FE": {"dim": 1024, "depth": 24, "heads": 16, "tubelet": (2, 16, 16), "model": 2},
}


class Output(NamedTuple):
    features: Tensor  # [B, D], of the clip
    tokens: Tensor  # [B, T, N, D], of its places and times; model 2: before times have met
    logits: Tensor | None  # [B, classes]


class ViViT(nn.Module):
    """[B, 3, F, H, W] in −1…1 → `Output`.

    Args:
        model: 1 to 4, see the top of this file.
        frames, size: of the clips it is made for; others are taken too, with positions interpolated.
        tubelet: frames, rows and columns of a token.
        time_depth: layers over time of model 2 (the paper has 4).
        classes: of the head; None: no head.

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        model: int = 1,
        *,
        frames: int = 16,
        size: int = 224,
        tubelet: tuple[int, int, int] = (2, 16, 16),
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        time_depth: int = 4,
        classes: int | None = None,
    ):
        super().__init__()
        if model not in (1, 2, 3, 4):
            raise ValueError(f"model={model}: ViViT has models 1 to 4")
        if model == 4 and heads % 2:
            raise ValueError(f"heads={heads}: model 4 gives half of them to time; choose an even number")
        self.model, self.tubelet = model, (tubelet[0], tubelet[1], tubelet[2])
        self.grid = t, h, w = self._grid((frames, size, size))
        self.embed = nn.Conv3d(3, dim, self.tubelet, self.tubelet)
        self.space_embed = nn.Parameter(0.02 * torch.randn(h, w, dim))
        # 0, so that a start from an image ViT repeats its positions at all times (sec. 3.4)
        self.time_embed = nn.Parameter(torch.zeros(t, dim))
        self.cls_token = nn.Parameter(0.02 * torch.randn(dim)) if model in (1, 2) else None
        self.time_token = nn.Parameter(0.02 * torch.randn(dim)) if model == 2 else None
        kind = {3: FactorisedBlock, 4: DotProductBlock}.get(model, Block)
        self.blocks = nn.ModuleList(kind(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.time_blocks = nn.ModuleList(Block(dim, heads) for _ in range(time_depth if model == 2 else 0))
        self.time_norm = nn.LayerNorm(dim, 1e-6) if model == 2 else nn.Identity()
        self.head = nn.Linear(dim, classes) if classes is not None else None

    def forward(self, video: Tensor) -> Output:
        """Raises ValueError where the clip does not divide into tubelets."""
        t, h, w = self._grid(tuple(video.shape[2:]))
        x = self.embed(video).flatten(3).permute(0, 2, 3, 1)  # B T N D
        x = x + resized(self.space_embed, h, w).flatten(0, 1)
        times = resized(self.time_embed[:, None], t, 1)  # T 1 D

        if self.model == 1:
            x = with_token(self.cls_token, (x + times).flatten(1, 2))  # B 1+TN D
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
            features, tokens = x[:, 0], x[:, 1:].unflatten(1, (t, -1))
        elif self.model == 2:
            x = with_token(self.cls_token, x.flatten(0, 1))  # BT 1+N D
            for block in self.blocks:
                x = block(x)
            x = self.norm(x).unflatten(0, (-1, t))  # B T 1+N D
            tokens = x[:, :, 1:]
            x = with_token(self.time_token, x[:, :, 0] + times[:, 0])  # B 1+T D
            for block in self.time_blocks:
                x = block(x)
            features = self.time_norm(x)[:, 0]
        else:
            x = x + times  # B T N D
            for block in self.blocks:
                x = block(x)
            tokens = self.norm(x)
            features = tokens.mean(dim=(1, 2))
        return Output(features, tokens, None if self.head is None else self.head(features))

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        t, h, w = (side // step for side, step in zip(shape, self.tubelet, strict=True))
        if (t * self.tubelet[0], h * self.tubelet[1], w * self.tubelet[2]) != shape or not t * h * w:
            sizes, steps = ("×".join(map(str, sides)) for sides in (shape, self.tubelet))
            raise ValueError(
                f"a clip of {sizes} does not divide into tubelets of {steps}: choose sizes that do"
            )
        return t, h, w


def build(
    sizes: tuple[int, int, int],
    *,
    model: int = 1,
    tubelet: tuple[int, int, int] = (2, 16, 16),
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    time_depth: int = 4,
) -> ViViT:
    """As a recipe asks for it. sizes: frames, pixels of a side, classes."""
    frames, size, classes = sizes
    sides = {"tubelet": tubelet, "dim": dim, "depth": depth, "heads": heads, "time_depth": time_depth}
    return ViViT(model, frames=frames, size=size, classes=classes, **sides)  # type: ignore[arg-type]


class Block(nn.Module):
    """A block of an image ViT, on [B, L, D]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FactorisedBlock(Block):
    """Model 3, on [B, T, N, D]: within a time, then across times, then the MLP.

    Attention across times begins at 0, so that the block is the image ViT's at every time (sec. 3.4).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.norm_time = nn.LayerNorm(dim, 1e-6)
        self.attn_time = SelfAttention(dim, heads)
        nn.init.zeros_(self.attn_time.proj.weight)
        nn.init.zeros_(self.attn_time.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + along("space", self.attn, self.norm1(x))
        x = x + along("time", self.attn_time, self.norm_time(x))
        return x + self.mlp(self.norm2(x))


class DotProductBlock(Block):
    """Model 4, on [B, T, N, D]: the block of an image ViT, whose later half of heads looks along time."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.attn = DotProductAttention(dim, heads)


class DotProductAttention(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        b, _, n, _ = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # B T N 3 H d
        space, time = qkv.permute(3, 0, 1, 4, 2, 5).chunk(2, dim=3)[0], qkv.chunk(2, dim=4)[1]
        y = (
            self.attend(*space.flatten(1, 2).unbind()).unflatten(0, (b, -1)).transpose(2, 3)
        )  # BT H/2 N d → B T N H/2 d
        z = self.attend(*time.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind()).unflatten(
            0, (b, n)
        )  # B N H/2 T d
        return self.proj(torch.cat([y, z.permute(0, 3, 1, 2, 4)], dim=3).flatten(3))


def with_token(token: Tensor | None, x: Tensor) -> Tensor:
    """[B, L, D] → [B, 1 + L, D]"""
    assert token is not None
    return torch.cat([token.expand(len(x), 1, -1), x], dim=1)


def resized(table: Tensor, height: int, width: int) -> Tensor:
    """Positions [h, w, D] interpolated to another grid."""
    if table.shape[:2] == (height, width):
        return table
    image = table.permute(2, 0, 1)[None]  # 1 D h w
    return F.interpolate(image, (height, width), mode="bicubic")[0].permute(1, 2, 0)


def central_frame(weight: Tensor, frames: int) -> Tensor:
    """A 2D patch embedding [D, 3, p, q] as a tubelet's [D, 3, F, p, q]: 0 but in the middle (sec. 3.4)."""
    tubelet = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    tubelet[:, :, frames // 2] = weight
    return tubelet


TORCHVISION = (  # its names, and timm's
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)


@torch.no_grad()
def load_image_vit(model: ViViT, state: dict[str, Tensor]) -> None:
    """Starts a video model from the state dict of an image ViT of timm or torchvision (sec. 3.4).

    The embedding sees the middle frame of a tubelet, positions are the same at all times, blocks are copied;
    attention across times (model 3), the encoder of times (model 2) and the head stay as they are. A fresh
    model 3 then gives what the image model gives of the middle frames. Pixels are scaled as that model had
    them: −1…1 for timm's ViTs of mean and deviation 0.5.

    Raises ValueError where a weight is missing or of another shape.
    """
    image = {}
    for name, value in state.items():
        for pattern, timm in TORCHVISION:
            name = re.sub(pattern, timm, name)
        image[name] = value

    def take(name: str, like: Tensor | None = None) -> Tensor:
        if name not in image:
            raise ValueError(
                f"the image model has no weight {name!r}: give the state of a ViT as deep as this one"
            )
        if like is not None and image[name].shape != like.shape:
            here, there = list(like.shape), list(image[name].shape)
            raise ValueError(
                f"{name} is {there} in the image model, {here} in this one: give both the same sizes"
            )
        return image[name]

    weight = take("patch_embed.proj.weight", model.embed.weight[:, :, 0])
    model.embed.weight.copy_(central_frame(weight, model.tubelet[0]))
    assert model.embed.bias is not None
    model.embed.bias.copy_(take("patch_embed.proj.bias", model.embed.bias))

    positions = take("pos_embed")[0]  # (1 +) N D
    if model.cls_token is not None:
        model.cls_token.copy_(take("cls_token")[0, 0] + positions[0])
    if "cls_token" in image:
        positions = positions[1:]
    side = math.isqrt(len(positions))
    model.space_embed.copy_(resized(positions.unflatten(0, (side, -1)), *model.grid[1:]))
    model.time_embed.zero_()

    for name, value in model.state_dict().items():
        if re.match(r"blocks\.\d+\.(norm[12]|attn|mlp)\.|norm\.", name):
            value.copy_(take(name, value))
