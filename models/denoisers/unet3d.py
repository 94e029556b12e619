"""3D U-Nets for video diffusion: factorised space–time (Ho et al. 2022) and fully convolutional in 3D.

Video Diffusion Models (Ho et al. 2022, sec. 3) takes an image U-Net, makes every convolution 1×3×3 and puts
an attention over time, with a relative position bias, after every attention over space. So frames mix in
one place only, which a mask can close: clips and independent images train together. With `full_3d` every
3×3 convolution is 3×3×3 instead, and time is halved from level to level, too (Çiçek et al. 2016; here with residual
blocks).

Inside, a clip is x [B, T, C, h, w]: what is done to each frame sees [B T, C, h, w] at no cost, and an image
is a clip of one frame. Norms are over one frame: a norm over T would leak from frame to frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import AttentionLayer, Mask, join_heads, split_heads
from models.denoisers.conditions import (
    check_text,
    input_channels,
    low_level,
    no_text,
    over_time,
    with_conditions,
)
from models.diffusion.condition import Condition, LevelEmbedding

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"width": 32, "multipliers": (1, 2, 4), "depth": 1},
    "base": {"width": 64, "multipliers": (1, 2, 4, 8), "head_dim": 64, "attention": (1, 2, 3)},
    "vdm-128": {"width": 128, "multipliers": (1, 2, 4, 8), "head_dim": 64, "attention": (1, 2, 3)},
    "vdm-256": {"width": 256, "multipliers": (1, 2, 4, 8), "head_dim": 64, "attention": (1, 2, 3)},
    "plain-3d": {"width": 32, "multipliers": (1, 2, 4), "depth": 1, "attention": (), "full_3d": True},
}

WAVES = 24  # that tell a position its place


class UNet3D(nn.Module):
    """z [B, C, T, h, w], level [B], condition → [B, C, T, h, w]; 0 until it is trained.

    Args:
        channels: C of the latents.
        text_width: features of a text token; None for no text. Text is pooled by attention and added to the
            level's embedding, which scales and shifts every residual block.
        width, multipliers: channels of level i are width · multipliers[i]; each level has half the height
            and width of the one before.
        depth: blocks a level on the way down (one more on the way up).
        attention: levels with attention over space, 0 the finest; None for all. VDM: the levels of 32, 16
            and 8 pixels. time: levels with attention over time; None for the same, as VDM.
        head_dim: channels of an attention head; `width` must be a multiple of it.
        cross_attention: attend to the text's tokens too, after each attention over space.
        places: tell every position its place in space and time as 2 · WAVES more input channels. VDM's time
            attention knows distances between frames alone, so what a caption says of before and after, or of
            left and right, is learned very slowly without.
        full_3d: 3×3×3 convolutions, which mix neighbouring frames, and levels of half as many frames (rounded up); then
            no joint training with images.
        context: take `condition.known` and its mask as C + 1 more input channels.
        upsample: take `condition.low` as C more input channels, and embed its level.

    Raises ValueError for sizes that don't fit together, on building or when called.
    """

    def __init__(
        self,
        channels: int,
        text_width: int | None = None,
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        depth: int = 2,
        attention: Sequence[int] | None = None,
        time: Sequence[int] | None = None,
        head_dim: int = 32,
        cross_attention: bool = False,
        places: bool = False,
        full_3d: bool = False,
        context: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        attended = set(range(len(multipliers)) if attention is None else attention)
        timed = attended if time is None else set(time)
        check_sizes(width, len(multipliers), attended | timed, head_dim)
        if cross_attention and (text_width is None or not attended):
            raise ValueError(
                "cross_attention needs text and a level with attention: give both, or turn it off"
            )
        self.text_width, self.full_3d, self.context, self.upsample = text_width, full_3d, context, upsample

        emb = 4 * width
        self.level = LevelEmbedding(emb)
        self.low_level = LevelEmbedding(emb) if upsample else None
        self.places = SpaceTimeWaves() if places else None
        self.pool = TextPool(text_width, emb, head_dim) if text_width else None

        def block(c_in: int, c_out: int, level: int) -> Block:
            heads = c_out // head_dim
            return Block(
                c_in,
                c_out,
                emb,
                heads if level in attended else 0,
                heads if level in timed else 0,
                text_width if cross_attention else None,
                full_3d,
            )

        inputs = 2 * WAVES * places + input_channels(channels, context, upsample)
        self.unet = UNet(inputs, channels, [width * m for m in multipliers], depth, block, full_3d)

    def repeated(self) -> Iterator[nn.Module]:
        """Its blocks in the order they run."""
        return (block for _, block in self.unet.blocks())

    def forward(self, z: Tensor, level: Tensor, condition: Condition) -> Tensor:
        if self.full_3d and condition.images:
            raise ValueError("independent images mix in 3×3×3 convolutions: set images to 0, or full_3d off")
        x = with_conditions(z, condition, self.context, self.upsample).transpose(1, 2)  # B T C' h w
        text, text_mask = tokens(z, condition, self.text_width)
        emb = self.level(level)  # B E
        if self.pool is not None:
            emb = emb + self.pool(text, text_mask)
        if self.low_level is not None:
            emb = emb + self.low_level(low_level(level, condition))
        if self.places is not None:  # before the rest, which training for more tasks appends to
            x = torch.cat([self.places(x, condition.images), x], dim=2)
        mask = Mask.frames(x.shape[1], condition.images, device=z.device)
        return self.unet(x, emb, text, Mask.padding(text_mask), mask).transpose(1, 2)  # B C T h w


build = UNet3D  # a recipe's options are its arguments


class Block(nn.Module):
    """Residual block, attention over space, cross-attention to text, attention over time.

    Args:
        space, time: heads of attention, 0 for none; where there is none over space there is none to text.
    """

    def __init__(
        self, c_in: int, c_out: int, emb: int, space: int, time: int, text_width: int | None, full_3d: bool
    ):
        super().__init__()
        self.residual = ResBlock(c_in, c_out, emb, full_3d)
        self.space = SpaceAttention(c_out, space) if space else None
        self.cross = CrossAttention(c_out, space, text_width) if space and text_width else None
        self.time = TimeAttention(c_out, time) if time else None

    def forward(
        self,
        x: Tensor,  # B T C h w
        emb: Tensor,  # B E
        text: Tensor | None = None,  # B L D
        text_mask: Mask | None = None,
        frame_mask: Mask | None = None,
    ) -> Tensor:
        x = self.residual(x, emb)
        if self.space is not None:
            x = self.space(x)
        if self.cross is not None:
            x = self.cross(x, text, text_mask)
        if self.time is not None:
            x = self.time(x, frame_mask)
        return x


class UNet(nn.Module):
    """Levels of blocks, halved in height and width from one to the next (`full_3d`: in time, too), and back with skips.

    Args:
        block: makes the block of (channels in, channels out, level); it is called as block(x, *told).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        widths: Sequence[int],
        depth: int,
        block: Callable[[int, int, int], nn.Module],
        full_3d: bool = False,
    ):
        super().__init__()
        if depth < 1 or not widths:
            raise ValueError(
                f"a U-Net of {len(widths)} levels with {depth} blocks each: give at least one of both"
            )
        last = len(widths) - 1
        self.depth = depth
        self.conv_in = conv(c_in, widths[0], full_3d)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        c, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(depth):
                self.down.append(block(c, width, level))
                skips.append(c := width)
            if level < last:
                self.shrink.append((ClipConv if full_3d else FrameConv)(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([block(c, c, last), block(c, c, last)])
        for level in range(last, -1, -1):
            for _ in range(depth + 1):
                self.up.append(block(c + skips.pop(), widths[level], level))
                c = widths[level]
            if level:
                self.grow.append((GrowClip if full_3d else Grow)(c, c, 3, padding=1))
        self.norm_out, self.conv_out = FrameNorm(c), zeroed(conv(c, c_out, full_3d))

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """(level, block) in the order they run."""
        last = len(self.shrink)
        yield from ((i // self.depth, block) for i, block in enumerate(self.down))
        yield from ((last, block) for block in self.middle)
        yield from ((last - i // (self.depth + 1), block) for i, block in enumerate(self.up))

    def forward(self, x: Tensor, *told: Any) -> Tensor:
        """x [B, T, C, h, w] → [B, T, C', h, w]"""
        check_stride(x, 2 ** len(self.shrink))
        shrink, grow = iter(self.shrink), iter(self.grow)
        skips, frames = [x := self.conv_in(x)], [x.shape[1]]
        for i, block in enumerate(self.down, start=1):
            skips.append(x := block(x, *told))
            if i % self.depth == 0 and i < len(self.down):
                skips.append(x := next(shrink)(x))  # B T C h/2 w/2
                frames.append(x.shape[1])
        for block in self.middle:
            x = block(x, *told)
        for i, block in enumerate(self.up, start=1):
            x = block(torch.cat([x, skips.pop()], dim=2), *told)
            if i % (self.depth + 1) == 0 and i < len(self.up):
                frames.pop()
                x = next(grow)(x, frames[-1])  # B T C 2h 2w
        return self.conv_out(F.silu(self.norm_out(x)))


class ResBlock(nn.Module):
    """Two convolutions; the embedding [B, E] scales and shifts between them. The identity at first."""

    def __init__(self, c_in: int, c_out: int, emb: int, full_3d: bool = False):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(c_in), conv(c_in, c_out, full_3d)
        self.modulation = nn.Linear(emb, 2 * c_out)
        self.norm2, self.conv2 = FrameNorm(c_out), zeroed(conv(c_out, c_out, full_3d))
        self.skip = nn.Identity() if c_in == c_out else FrameConv(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # B T C' h w
        scale, shift = self.modulation(F.silu(emb))[:, None, :, None, None].chunk(2, dim=2)  # B 1 C' 1 1
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class SpaceAttention(nn.Module):
    """Each frame's positions see each other: [B, T, C, h, w] → the same. The identity at first."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.norm, self.attention = FrameNorm(channels), Attention(channels, heads)
        zeroed(self.attention.out)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        y = self.norm(x).reshape(b * t, c, h * w).transpose(1, 2)  # (B T) hw C
        return x + self.attention(y).transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Every position of a clip sees the text [B, L, D]: [B, T, C, h, w] → the same. The identity at first."""

    def __init__(self, channels: int, heads: int, text_width: int):
        super().__init__()
        self.norm, self.attention = FrameNorm(channels), Attention(channels, heads, text_width)
        zeroed(self.attention.out)

    def forward(self, x: Tensor, text: Tensor, text_mask: Mask | None = None) -> Tensor:
        b, t, c, h, w = x.shape
        y = self.norm(x).permute(0, 1, 3, 4, 2).reshape(b, t * h * w, c)  # B Thw C
        y = self.attention(y, text, text_mask)
        return x + y.reshape(b, t, h, w, c).permute(0, 1, 4, 2, 3)


class TimeAttention(nn.Module):
    """The frames see each other, place by place: [B, T, C, h, w] → the same. The identity at first.

    A frame's place in time is told by a bias on the logits that depends on the distance j − i alone.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.norm, self.attention = FrameNorm(channels), Attention(channels, heads)
        self.bias = RelativeBias(heads)
        zeroed(self.attention.out)

    def forward(self, x: Tensor, frame_mask: Mask | None = None) -> Tensor:
        return x + over_time(self._branch, x, frame_mask)

    def _branch(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        y = self.norm(x).permute(0, 3, 4, 1, 2).reshape(b * h * w, t, c)  # (B h w) T C
        bias = self.bias(t)
        y = self.attention(y, bias=bias)
        if not b:  # of nothing to look at torch gives a bias no gradient, not even 0
            y = y + bias.sum()
        return y.reshape(b, h, w, t, c).permute(0, 3, 4, 1, 2)


class Attention(AttentionLayer):
    """Multi-head attention of x [N, L, C] to itself, or to `other` [N, M, D]; → [N, L, C]."""

    def __init__(self, channels: int, heads: int, other: int | None = None):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(other or channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, other: Tensor | None = None, mask: Mask | None = None, bias: Tensor | None = None
    ) -> Tensor:
        k, v = self.kv(x if other is None else other).chunk(2, dim=-1)
        q, k, v = (split_heads(y, self.heads) for y in (self.q(x), k, v))  # N H L d
        return self.out(join_heads(self.attend(q, k, v, mask, bias)))


class RelativeBias(nn.Module):
    """T frames → [H, T, T]: what head H adds to the logit of frame i looking at frame j, a function of j − i.

    Distances fall into T5's buckets (Raffel et al. 2020, sec. 2.1): half for the past and half for the
    future; of each, half hold one distance, the rest grow geometrically up to `longest` and beyond.
    """

    def __init__(self, heads: int, buckets: int = 32, longest: int = 32):
        super().__init__()
        self.buckets, self.longest = buckets, longest
        self.table = nn.Embedding(buckets, heads)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, frames: int) -> Tensor:
        i = torch.arange(frames, device=self.table.weight.device)
        return self.table(self.bucket(i[None, :] - i[:, None])).permute(2, 0, 1)  # H T T

    def bucket(self, distance: Tensor) -> Tensor:
        """j − i, any shape → 0…buckets − 1."""
        side = self.buckets // 2
        exact = side // 2
        n = distance.abs()
        far = torch.log(n.clamp(min=1) / exact) / math.log(self.longest / exact) * (side - exact)
        near_or_far = torch.where(n < exact, n, (exact + far.long()).clamp(max=side - 1))
        return near_or_far + side * (distance > 0)


class TextPool(nn.Module):
    """Text [B, L, D] → [B, E]: what one learned query reads of it (VDM's attention pooling)."""

    def __init__(self, text_width: int, emb: int, head_dim: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, emb))
        self.norm, self.attention = nn.LayerNorm(text_width), Attention(emb, emb // head_dim, text_width)
        self.norm_out = nn.LayerNorm(emb)  # an average of words is small beside what it is added to

    def forward(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        query = self.query.to(text.dtype).expand(len(text), -1, -1)
        return self.norm_out(self.attention(query, self.norm(text), Mask.padding(text_mask))[:, 0])


class SpaceTimeWaves(nn.Module):
    """Where every position of x [B, T, C, h, w] is, as [B, T, 2 · WAVES, h, w]: Fourier features (Tancik et al. 2020).

    Sine and cosine of π f·(t, y, x), the middle of the clip 0 and its edges ±1, for random f ~ N(0, 1). Most f
    point into time and space at once: waves that travel, so that a text which scales one of them says which
    way things move. Had time and space features of their own, it would have to learn their product first.
    Independent images, the last so many of the frames, are at t = 0, as a clip of one frame is.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.randn(3, WAVES, generator=torch.Generator().manual_seed(0))
        self.register_buffer("frequencies", drawn)

    def forward(self, x: Tensor, images: int = 0) -> Tensor:
        b, frames, _, h, w = x.shape
        t, *yx = (2 * (torch.arange(n, device=x.device) + 0.5) / n - 1 for n in (frames - images, h, w))
        t = F.pad(t, (0, images))
        angle = (
            math.pi * torch.stack(torch.meshgrid(t, *yx, indexing="ij"), dim=-1) @ self.frequencies.float()
        )
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1).permute(0, 3, 1, 2)  # T 2·WAVES h w
        return waves.to(x.dtype).expand(b, -1, -1, -1, -1)


class FrameNorm(nn.GroupNorm):
    """Group norm of each frame of [B, T, C, h, w], at most 32 groups of at least 4 channels."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels // 4), channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FrameConv(nn.Conv2d):
    """Convolution of each frame of [B, T, C, h, w]: 1×k×k of the clip."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Grow(FrameConv):
    """Each frame of [B, T, C, h, w] to twice the height and width, then the convolution."""

    def forward(self, x: Tensor, frames: int) -> Tensor:  # type: ignore[override]
        y = F.interpolate(x.flatten(0, 1), scale_factor=2.0, mode="nearest")
        return super().forward(y.unflatten(0, x.shape[:2]))


class ClipConv(nn.Conv3d):
    """Convolution of [B, T, C, h, w] over time, height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GrowClip(ClipConv):
    """[B, T, C, h, w] to so many frames and twice the height and width, then the convolution."""

    def forward(self, x: Tensor, frames: int) -> Tensor:  # type: ignore[override]
        size = (frames, 2 * x.shape[3], 2 * x.shape[4])
        return super().forward(F.interpolate(x.transpose(1, 2), size, mode="nearest").transpose(1, 2))


def conv(c_in: int, c_out: int, full_3d: bool) -> nn.Module:
    """3×3 of each frame, or 3×3×3 of the clip."""
    return (ClipConv if full_3d else FrameConv)(c_in, c_out, 3, padding=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, giving 0 until it is trained."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def tokens(z: Tensor, condition: Condition, width: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Text [B, L, D] and where a token is, bool [B, L]; one masked token where there is no text.

    Raises ValueError for text of another width than the model was built for.
    """
    text, mask = condition.text, condition.text_mask
    if width is None:
        no_text(condition)
        return None, None
    if text is None:
        text, mask = z.new_zeros(len(z), 1, width), torch.zeros(len(z), 1, dtype=torch.bool, device=z.device)
    check_text(text, width)
    return text.to(z.dtype), mask


def check_sizes(width: int, levels: int, attended: set[int], head_dim: int) -> None:
    """Raises ValueError where a U-Net cannot be built so."""
    if head_dim % 4 or width % head_dim:
        raise ValueError(
            f"width {width} is no multiple of head_dim {head_dim}, or that none of 4: change one"
        )
    if not attended <= set(range(levels)):
        raise ValueError(f"attention at levels {sorted(attended)}: this U-Net has levels 0 to {levels - 1}")


def check_stride(x: Tensor, stride: int) -> None:
    """Raises ValueError where the height or width of x […, h, w] is no multiple of the stride."""
    h, w = x.shape[-2:]
    if h % stride or w % stride:
        raise ValueError(
            f"latents of {w}×{h}: this U-Net needs width and height that are multiples of {stride}"
        )
