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

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Axis, CrossAttention, SelfAttention, along
from models.diffusion.condition import Condition, LevelEmbedding, frame_mask, sinusoids

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
    "Latte-S/2": {**SIZES["S"], "patch": 2, "attention": "alternating"},
    "Latte-B/2": {**SIZES["B"], "patch": 2, "attention": "alternating"},
    "Latte-XL/2": {**SIZES["XL"], "patch": 2, "attention": "alternating"},
}

Attention = Literal["full", "factorised", "alternating"]
Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]
MODULATIONS = {"adaln_zero": 3, "adaln": 2, "cross_attention": 0, "in_context": 0}  # vectors a layer


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
        self.attention, self.conditioning = attention, conditioning
        self.context, self.upsample = context, upsample
        volume = patch_t * patch * patch
        self.embed = nn.Linear(volume * input_channels(channels, context, upsample), dim)
        self.level = LevelEmbedding(dim)
        self.low_level = LevelEmbedding(dim) if upsample else None
        self.label = nn.Embedding(classes + 1, dim) if classes is not None else None
        self.caption = Caption(text_width) if text_width is not None else None
        self.pooled = mlp(text_width, dim, dim) if text_width is not None and text != "tokens" else None
        self.words = mlp(text_width, dim, dim) if text_width is not None and text != "pooled" else None
        prompted = conditioning == "cross_attention" or (
            conditioning != "in_context" and self.words is not None
        )
        self.blocks = nn.ModuleList(
            Block(dim, heads, axes(attention, i), conditioning, prompted, mlp_ratio, qk_norm)
            for i in range(depth)
        )
        self.final = FinalLayer(dim, volume * channels * (2 if learn_sigma else 1), conditioning)
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
            elif isinstance(module, Block | FinalLayer):
                module.zero()

    def forward(self, z: Tensor, level: Tensor, condition: Condition, label: Tensor | None = None) -> Tensor:
        """z [B, C, T, h, w], level [B] in 0…1, label int64 [B] → [B, C, T, h, w] (2 C with learn_sigma).

        T, h, w may differ from call to call; they must be multiples of the patch.
        Raises ValueError for a condition that the model was not built for.
        """
        if condition.images and (self.patch[0] > 1 or self.conditioning == "in_context"):
            raise ValueError(
                f"condition.images={condition.images}: independent images need patch_t=1 and no tokens in context"
            )
        x = patchify(with_conditions(z, condition, self.context, self.upsample), self.patch)  # B T h w P
        _, t, h, w, _ = x.shape
        x = self.embed(x).flatten(2, 3)  # B T N D
        x = x + space_positions(h, w, self.dim, z.device).to(x.dtype)
        if t > 1:
            x = x + time_positions(t, condition.images, self.dim, z.device).to(x.dtype)

        c, prompt, prompt_mask = self._conditions(level, condition, label)
        mask = frame_mask(t, condition.images, z.device)
        if mask is not None and self.attention == "full":
            mask = mask.repeat_interleave(h * w, 0).repeat_interleave(h * w, 1)  # TN TN

        if self.conditioning == "in_context":
            x, prompt, mask = self._join(x, prompt, prompt_mask)  # B 1 TN+L D
        for block in self.blocks:
            x = block(x, c, prompt, prompt_mask, mask)
        if self.conditioning == "in_context":
            x = x[:, 0, : t * h * w].unflatten(1, (t, h * w))

        return unpatchify(self.final(x, c).unflatten(2, (h, w)), self.patch)

    def _conditions(
        self, level: Tensor, condition: Condition, label: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The vector c [B, D], and tokens to look at [B, L, D] with their mask [B, L] (None: no tokens)."""
        vectors = [self.level(level)]
        if self.low_level is not None:
            low_level = condition.low_level
            vectors[0] = vectors[0] + self.low_level(
                torch.zeros_like(level) if low_level is None else low_level
            )
        if self.label is not None:
            if label is None:
                label = torch.full_like(level, self.label.num_embeddings - 1, dtype=torch.long)
            vectors.append(self.label(label))
        elif label is not None:
            raise ValueError("label: this model knows no classes; build it with classes=n")

        tokens, mask = None, None
        if self.caption is not None:
            text, mask = self.caption(condition, len(level))  # B L W, B L
            if self.pooled is not None:
                vectors.append(self.pooled(text.sum(1) / mask.sum(1, keepdim=True)))
            tokens = None if self.words is None else self.words(text)  # B L D
        elif condition.text is not None:
            raise ValueError("condition.text: this model takes no text; build it with a text_width")

        if MODULATIONS[self.conditioning]:
            return sum(vectors[1:], vectors[0]), tokens, None if tokens is None else mask
        # the paper's other two ways: each vector is a token
        first = torch.stack(vectors, dim=1)
        seen = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
        if tokens is None or mask is None:
            return vectors[0], first, seen
        return vectors[0], torch.cat([first, tokens], dim=1), torch.cat([seen, mask], dim=1)

    def _join(
        self, x: Tensor, prompt: Tensor | None, prompt_mask: Tensor | None
    ) -> tuple[Tensor, None, Tensor]:
        """The prompt as further tokens of the sequence, and which keys are no padding: bool [B, 1, 1, TN + L]."""
        assert prompt is not None
        assert prompt_mask is not None
        x = x.flatten(1, 2)
        seen = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        mask = torch.cat([seen, prompt_mask], dim=1)[:, None, None]
        return torch.cat([x, prompt.to(x.dtype)], dim=1)[:, None], None, mask


def axes(attention: Attention, index: int) -> tuple[Axis, ...]:
    """What the attention layers of block `index` range over."""
    if attention == "full":
        return ("full",)
    if attention == "factorised":
        return "space", "time"
    return ("time" if index % 2 else "space",)


class Block(nn.Module):
    """One attention layer for each axis, cross-attention if `prompted`, then an MLP; each added to x."""

    def __init__(
        self,
        dim: int,
        heads: int,
        axes: tuple[Axis, ...],
        conditioning: Conditioning,
        prompted: bool,
        mlp_ratio: float,
        qk_norm: bool,
    ):
        super().__init__()
        self.axes, self.modulations = axes, MODULATIONS[conditioning]
        layers = len(axes) + 1
        affine = not self.modulations
        self.norms = nn.ModuleList(nn.LayerNorm(dim, 1e-6, elementwise_affine=affine) for _ in range(layers))
        self.attentions = nn.ModuleList(SelfAttention(dim, heads, qk_norm) for _ in axes)
        self.cross_norm = nn.LayerNorm(dim, 1e-6) if prompted else None
        self.cross = CrossAttention(dim, heads, qk_norm) if prompted else None
        self.mlp = mlp(dim, round(mlp_ratio * dim), dim)
        self.ada = nn.Linear(dim, layers * self.modulations * dim) if self.modulations else None

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
        prompt_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, N, D], c [B, D], prompt [B, L, D], prompt_mask bool [B, L] → [B, T, N, D].

        mask: which frames (full attention: which tokens) may see which, as `attend` takes it.
        """
        ada = None
        if self.ada is not None:
            ada = self.ada(F.silu(c)).unflatten(-1, (len(self.norms), self.modulations, 1, 1, -1))
        for i, (axis, attention) in enumerate(zip(self.axes, self.attentions, strict=True)):
            layer = partial(along, axis, attention, mask=None if axis == "space" else mask)
            x = self._residual(x, i, layer, ada)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x).flatten(1, 2), prompt, prompt_mask).view_as(x)
        return self._residual(x, len(self.axes), self.mlp, ada)

    def _residual(self, x: Tensor, i: int, layer: Callable[[Tensor], Tensor], ada: Tensor | None) -> Tensor:
        """x + gate · layer((1 + scale) · norm(x) + shift), as far as the conditioning modulates."""
        y = self.norms[i](x)
        if ada is None:
            return x + layer(y)
        shift, scale, *gate = ada[:, i].unbind(1)  # B 1 1 D each
        y = layer(modulate(y, shift, scale))
        return x + (gate[0] * y if gate else y)


class FinalLayer(nn.Module):
    """Tokens [B, T, N, D] → patches [B, T, N, P], 0 until trained."""

    def __init__(self, dim: int, size: int, conditioning: Conditioning):
        super().__init__()
        modulated = MODULATIONS[conditioning] > 0
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=not modulated)
        self.ada = nn.Linear(dim, 2 * dim) if modulated else None
        self.linear = nn.Linear(dim, size)

    def zero(self) -> None:
        nn.init.zeros_(self.linear.weight)
        if self.ada is not None:
            nn.init.zeros_(self.ada.weight)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.norm(x)
        if self.ada is not None:
            x = modulate(x, *self.ada(F.silu(c))[:, None, None].chunk(2, dim=-1))
        return self.linear(x)


class Caption(nn.Module):
    """Text features as a network wants them: padding 0, and a learned token where there is no text."""

    def __init__(self, width: int):
        super().__init__()
        self.null = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, condition: Condition, batch: int) -> tuple[Tensor, Tensor]:
        """[B, L, W] and bool [B, L], True where a token is: at least one in every row."""
        text, mask = condition.text, condition.text_mask
        if text is None:
            null = self.null.expand(batch, 1, -1)
            return null, torch.ones(null.shape[:2], dtype=torch.bool, device=null.device)
        if text.shape[-1] != len(self.null):
            raise ValueError(
                f"condition.text has {text.shape[-1]} features a token, the model was built for {len(self.null)}: "
                "use the text encoder it was trained with"
            )
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        # in the first place of rows without a token; no shape depends on the data
        stand_in = (~mask.any(dim=1, keepdim=True)) & (torch.arange(text.shape[1], device=text.device) == 0)
        text = torch.where(stand_in[..., None], self.null.to(text.dtype), text)
        mask = mask | stand_in
        return torch.where(mask[..., None], text, 0.0), mask


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU("tanh"), nn.Linear(hidden, outputs))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def input_channels(channels: int, context: bool, upsample: bool) -> int:
    """Of what `with_conditions` returns."""
    return channels + (channels + 1) * context + channels * upsample


def with_conditions(z: Tensor, condition: Condition, context: bool, upsample: bool) -> Tensor:
    """z and what is known of the video, as further channels: [B, C (+ C + 1) (+ C), T, h, w].

    Without known frames those channels are 0, as for a text-to-video sample of a model that knows both.
    """
    parts = [z]
    if condition.known is not None and not context:
        raise ValueError("condition.known: this model takes no known frames; build it with context=True")
    if condition.low is not None and not upsample:
        raise ValueError(
            "condition.low: this model takes no low-resolution video; build it with upsample=True"
        )
    if context and condition.known is not None:
        if condition.known_mask is None:
            raise ValueError("condition.known is without condition.known_mask: say which frames are known")
        parts += [condition.known, condition.known_mask.expand(-1, -1, *z.shape[2:])]
    elif context:
        parts.append(z.new_zeros(z.shape[0], z.shape[1] + 1, *z.shape[2:]))
    if upsample:
        if condition.low is None:
            raise ValueError(
                "condition.low is missing: this model upsamples; give it the low-resolution video"
            )
        parts.append(condition.low)
    return torch.cat([part.to(z.dtype) for part in parts], dim=1) if len(parts) > 1 else z


def patchify(z: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, T, h, w] → [B, T/p, h/q, w/r, p·q·r·C] for patch (p, q, r)."""
    if any(size % side for size, side in zip(z.shape[2:], patch, strict=True)):
        shape, sides = ("×".join(map(str, sizes)) for sizes in (z.shape[2:], patch))
        raise ValueError(f"latents of {shape} do not divide into patches of {sides}: choose sizes that do")
    p, q, r = patch
    z = z.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))  # B C T p h q w r
    return z.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4)


def unpatchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Undoes `patchify`."""
    x = x.unflatten(4, (*patch, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6)  # B C T p h q w r
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


# Tables of positions follow from the grid, whatever it is, and are no part of a model's state.


@lru_cache(maxsize=32)
def space_positions(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """[h·w, D]: sin and cos of the column, then of the row (He et al. 2022; DiT)."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.cat([_sin_cos(columns.flatten(), dim // 2), _sin_cos(rows.flatten(), dim // 2)], dim=-1)


@lru_cache(maxsize=32)
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
