"""DiT: diffusion transformers for images and videos (Peebles and Xie 2023).

Latents are cut into patches, a plain transformer turns them into a prediction, and what is known beside them
(noise level, class, caption) shifts, scales and gates every layer: adaLN-Zero, by which each block is the
identity until it is trained. An image is a video of one frame. Over time a block attends to all tokens at
once ("full"), first within frames and then across them ("factorised", model 3 of ViViT), or blocks take turns
("alternating", Latte: Ma et al. 2024).

B: batch; C: channels; T, h, w: of the latents, then of the patches; N: patches a frame; D: dim; L: tokens of
a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Axis, CrossAttention, Mask, SelfAttention, along, kept
from models.denoisers.conditions import (
    Caption,
    input_channels,
    low_level,
    mlp,
    modulate,
    no_text,
    over_time,
    patchify,
    unpatchify,
    with_conditions,
)
from models.diffusion.condition import Condition, LevelEmbedding, sinusoids

SIZES: dict[str, dict[str, Any]] = {
    "XS": {"dim": 192, "depth": 6, "heads": 3},  # small enough for a CPU
    "S": {"dim": 384, "depth": 12, "heads": 6},
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 24, "heads": 16},
    "XL": {"dim": 1152, "depth": 28, "heads": 16},
}
PRESETS: dict[str, dict[str, Any]] = {
    **{f"{name}/{patch}": {**size, "patch": patch} for name, size in SIZES.items() for patch in (2, 4, 8)},
    # XL's heads of 72 suit no kernel; these are of 64 and 128
    "XL/2-h64": {**SIZES["XL"], "patch": 2, "heads": 18},
    "XL/2-h128": {**SIZES["XL"], "patch": 2, "heads": 9},
    "L/2-h128": {**SIZES["L"], "patch": 2, "heads": 8},
    "Latte-XS/2": {**SIZES["XS"], "patch": 2, "attention": "alternating"},
    "Latte-S/2": {**SIZES["S"], "patch": 2, "attention": "alternating"},
    "Latte-B/2": {**SIZES["B"], "patch": 2, "attention": "alternating"},
    "Latte-XL/2": {**SIZES["XL"], "patch": 2, "attention": "alternating"},
}

Attention = Literal["full", "factorised", "alternating"]
Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]


class DiT(nn.Module):
    """A DiT for latents of `channels`, conditioned on text features of `text_width` (None: on no text).

    Args:
        patch, patch_t: latents a token covers along each side and in time.
        attention: how tokens meet over time, see the top of this file.
        conditioning: how level, class and pooled text enter; the paper's four ways (sec. 3.2).
        text: caption as a mean vector beside the level, as tokens to look at (by cross-attention, or in
            context where `conditioning` is), or both.
        qk_norm: RMS norm of queries and keys.
        context: takes `Condition.known` and its mask as channels; upsample: takes `Condition.low`.
        classes: of labels 0 … classes − 1; `classes` itself means none, for guidance.
        learn_sigma: a second set of output channels for the variance (Nichol and Dhariwal 2021).

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        channels: int,
        text_width: int | None = None,
        *,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 2,
        patch_t: int = 1,
        mlp_ratio: float = 4.0,
        attention: Attention = "full",
        conditioning: Conditioning = "adaln_zero",
        text: Literal["pooled", "tokens", "both"] = "both",
        qk_norm: bool = False,
        context: bool = False,
        upsample: bool = False,
        classes: int | None = None,
        learn_sigma: bool = False,
    ):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim={dim}: positions need a multiple of 4")
        if conditioning == "in_context" and attention != "full":
            raise ValueError(f"attention={attention!r}: tokens in context need attention='full'")
        self.dim, self.patch = dim, (patch_t, patch, patch)
        self.attention, self.in_context = attention, conditioning == "in_context"
        block = BLOCKS[conditioning]
        self.modulated = block.vectors > 0  # else level, class and pooled text are tokens
        self.context, self.upsample = context, upsample
        volume = patch_t * patch * patch
        self.embed = nn.Linear(volume * input_channels(channels, context, upsample), dim)
        self.level = LevelEmbedding(dim)
        self.low_level = LevelEmbedding(dim) if upsample else None
        self.label = nn.Embedding(classes + 1, dim) if classes is not None else None
        self.caption = Caption(text_width) if text_width is not None else None
        self.pooled = mlp(text_width, dim, dim) if text_width is not None and text != "tokens" else None
        self.words = mlp(text_width, dim, dim) if text_width is not None and text != "pooled" else None
        prompted = not self.in_context and (not self.modulated or self.words is not None)
        self.blocks = nn.ModuleList(
            block(dim, heads, axes(attention, i), prompted, mlp_ratio, qk_norm) for i in range(depth)
        )
        final = FinalLayer if self.modulated else PlainFinalLayer
        self.final = final(dim, volume * channels * (2 if learn_sigma else 1))
        self._initialise()

    def _initialise(self) -> None:
        """As DiT: Xavier for linear layers, N(0, 0.02²) for embeddings, 0 for all that ends a branch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, LevelEmbedding):
                for layer in module.mlp:
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(module, Block | FinalLayer | PlainFinalLayer):
                module.zero()

    def forward(self, z: Tensor, level: Tensor, condition: Condition, label: Tensor | None = None) -> Tensor:
        """z [B, C, T, h, w], level [B] in 0…1, label int64 [B] → [B, C, T, h, w] (2 C with learn_sigma).

        T, h, w may differ from call to call; they must be multiples of the patch.
        Raises ValueError for a condition that the model was not built for.
        """
        if condition.images and (self.patch[0] > 1 or self.in_context):
            raise ValueError(
                f"condition.images={condition.images}: independent images need patch_t=1 and no tokens in context"
            )
        x = patchify(with_conditions(z, condition, self.context, self.upsample), self.patch)  # B T h w P
        _, t, h, w, _ = x.shape
        x = self.embed(x).flatten(2, 3)  # B T N D
        x = x + space_positions(h, w, self.dim, z.device).to(x.dtype)
        if t > 1:
            x = x + time_positions(t, condition.images, self.dim, z.device).to(x.dtype)

        c, prompt, there = self._conditions(level, condition, label)
        if self.in_context:
            x = self._in_context(x, c, prompt, there)
        else:
            seen = Mask.padding(there)
            mask = Mask.frames(t, condition.images, h * w if self.attention == "full" else 1, z.device)
            for block in self.blocks:
                x = block(x, c, prompt, seen, mask)
        return unpatchify(self.final(x, c).unflatten(2, (h, w)), self.patch)

    def _conditions(
        self, level: Tensor, condition: Condition, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The vector c [B, D], tokens to look at [B, L, D] or None, and where there is one, bool [B, L]."""
        vectors = [self.level(level)]
        if self.low_level is not None:
            vectors[0] = vectors[0] + self.low_level(low_level(level, condition))
        if self.label is not None:
            if label is None:
                label = torch.full_like(level, self.label.num_embeddings - 1, dtype=torch.long)
            vectors.append(self.label(label))
        elif label is not None:
            raise ValueError("label: this model knows no classes; build it with classes=n")

        words, there = None, None
        if self.caption is not None:
            text, mask = self.caption(condition, len(level))  # B L W, B L
            if self.pooled is not None:
                vectors.append(self.pooled(text.sum(1) / mask.sum(1, keepdim=True)))
            if self.words is not None:
                words, there = self.words(text), mask  # B L D
        else:
            no_text(condition)
        if self.modulated:
            return sum(vectors[1:], vectors[0]), words, there
        return vectors[0], *as_tokens(vectors, words, there)

    def _in_context(self, x: Tensor, c: Tensor, prompt: Tensor | None, there: Tensor | None) -> Tensor:
        """Through the blocks with the prompt as further tokens of the sequence, which then are left out."""
        assert prompt is not None
        assert there is not None
        own = x.flatten(1, 2)  # B TN D
        seen = torch.cat([there.new_ones(own.shape[:2]), there], dim=1)
        y, mask = torch.cat([own, prompt.to(x.dtype)], dim=1)[:, None], Mask.padding(seen)  # B 1 TN+L D
        for block in self.blocks:
            y = block(y, c, mask=mask)
        return y[:, 0, : own.shape[1]].view_as(x)


def as_tokens(vectors: list[Tensor], words: Tensor | None, there: Tensor | None) -> tuple[Tensor, Tensor]:
    """The paper's other two ways: level, class and pooled text, [B, D] each, as tokens before the words [B, L, D]."""
    first = torch.stack(vectors, dim=1)
    seen = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    if words is None or there is None:
        return first, seen
    return torch.cat([first, words], dim=1), torch.cat([seen, there], dim=1)


def axes(attention: Attention, index: int) -> tuple[Axis, ...]:
    """What the attention layers of block `index` range over."""
    if attention == "full":
        return ("full",)
    if attention == "factorised":
        return "space", "time"
    return ("time" if index % 2 else "space",)


class AxisAttention(SelfAttention):
    """Self-attention of x [B, T, N, D] along one axis."""

    def __init__(self, dim: int, heads: int, axis: Axis, qk_norm: bool):
        super().__init__(dim, heads, "head" if qk_norm else "none")
        self.axis = axis

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:  # type: ignore[override]
        """mask: of frames (along time) or of all tokens; within a frame there is none."""
        if self.axis == "time":
            return over_time(partial(along, "time", super().forward), x, mask)
        return along(self.axis, super().forward, x, None if self.axis == "space" else mask)


class Block(nn.Module):
    """adaLN-Zero: attention along each axis, cross-attention if `prompted`, then an MLP; each added to x."""

    vectors = 3  # that modulate a layer: shift, scale, gate

    def __init__(
        self, dim: int, heads: int, axes: tuple[Axis, ...], prompted: bool, mlp_ratio: float, qk_norm: bool
    ):
        super().__init__()
        layers, affine = len(axes) + 1, not self.vectors
        self.norms = nn.ModuleList(nn.LayerNorm(dim, 1e-6, elementwise_affine=affine) for _ in range(layers))
        self.attentions = nn.ModuleList(AxisAttention(dim, heads, axis, qk_norm) for axis in axes)
        self.cross_norm = nn.LayerNorm(dim, 1e-6) if prompted else None
        self.cross = CrossAttention(dim, heads, "head" if qk_norm else "none") if prompted else None
        self.mlp = mlp(dim, round(mlp_ratio * dim), dim)
        self.ada = nn.Linear(dim, layers * self.vectors * dim) if self.vectors else None

    def zero(self) -> None:
        """Under adaLN-Zero the block becomes the identity; otherwise modulation becomes none."""
        if self.ada is not None:
            nn.init.zeros_(self.ada.weight)
            if self.cross is not None:
                nn.init.zeros_(self.cross.proj.weight)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        prompt: Tensor | None = None,
        seen: Mask | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        """x [B, T, N, D], c [B, D], prompt [B, L, D] → [B, T, N, D]. seen: of the prompt; mask: see `AxisAttention`."""
        ada = self.modulation(c)
        for i, attention in enumerate(self.attentions):
            x = self.residual(x, self.norms[i], partial(attention, mask=mask), ada[i])
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x).flatten(1, 2), prompt, seen).view_as(x)
        return self.residual(x, self.norms[-1], self.mlp, ada[-1])

    def modulation(self, c: Tensor) -> Sequence[Tensor]:
        """Of each layer, [B, vectors, 1, 1, D]."""
        assert self.ada is not None
        return self.ada(F.silu(c)).unflatten(-1, (len(self.norms), self.vectors, 1, 1, -1)).unbind(1)

    @staticmethod
    def residual(x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor], ada: Tensor) -> Tensor:
        shift, scale, gate = ada.unbind(1)
        return x + gate * layer(modulate(norm(x), shift, scale))


class AdaLNBlock(Block):
    """The paper's adaLN: no gate."""

    vectors = 2

    @staticmethod
    def residual(x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor], ada: Tensor) -> Tensor:
        return x + layer(modulate(norm(x), *ada.unbind(1)))


class PlainBlock(Block):
    """For conditions that are tokens, to look at or in context: nothing is modulated."""

    vectors = 0

    def modulation(self, c: Tensor) -> Sequence[Tensor]:
        return [c] * len(self.norms)

    @staticmethod
    def residual(x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor], ada: Tensor) -> Tensor:
        return x + layer(norm(x))


BLOCKS: dict[Conditioning, type[Block]] = {
    "adaln_zero": Block,
    "adaln": AdaLNBlock,
    "cross_attention": PlainBlock,
    "in_context": PlainBlock,
}


class FinalLayer(nn.Module):
    """Tokens [B, T, N, D] → patches [B, T, N, P], 0 until trained."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ada = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, size)

    def zero(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.ada.weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm(x), *self.ada(F.silu(c))[:, None, None].chunk(2, dim=-1)))


class PlainFinalLayer(nn.Module):
    """The same without modulation."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim, 1e-6), nn.Linear(dim, size)

    def zero(self) -> None:
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.norm(x))


# Tables of positions follow from the grid, whatever it is, and are no part of a model's state.


@kept
def space_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """[h·w, D]: sin and cos of the column, then of the row (He et al. 2022; DiT)."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.cat([_sin_cos(columns.flatten(), dim // 2), _sin_cos(rows.flatten(), dim // 2)], dim=-1)


@kept
def time_positions(frames: int, images: int, dim: int, device: torch.device) -> Tensor:
    """[T, 1, D]: sin and cos of the frame less those of frame 0, and 0 for independent images.

    So a video of one frame is an image, and image weights serve videos.
    """
    time = torch.arange(frames, device=device)
    table = _sin_cos(time * (time < frames - images), dim)
    return (table - table[:1])[:, None]


def _sin_cos(x: Tensor, size: int) -> Tensor:
    cos, sin = sinusoids(x, size).chunk(2, dim=-1)
    return torch.cat([sin, cos], dim=-1)


build = DiT
