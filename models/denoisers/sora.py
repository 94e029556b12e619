"""A transformer of space–time patches for clips of any duration, resolution and aspect ratio.

After OpenAI 2024, "Video generation models as world simulators", which tells the plan and not the network: a
clip, or an image as a clip of one frame, becomes a sequence of patches that know their place by rotary
positions over (time, row, column); sequences of different lengths lie end to end in one batch, each seeing
itself only, so that nothing is cropped or padded. The block is Wan's (Wan team 2025, sec. 4.2): self-attention
and MLP modulated by adaLN whose linear layer all blocks share (PixArt-α), with cross-attention to the text.

S: sequences; N: tokens of a sequence, or of all where they are packed (then B = 1); D: dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from models.attention import CrossAttention, Kernel, Mask, QKNorm, Rotary, SelfAttention, kept, owners
from models.denoisers import wan
from models.denoisers.conditions import (
    Caption,
    input_channels,
    low_level,
    mlp,
    modulate,
    no_text,
    patchify,
    unpatchify,
    with_conditions,
)
from models.diffusion.condition import Condition, LevelEmbedding

PRESETS: dict[str, dict[str, Any]] = {
    "XS": {"dim": 192, "ffn": 768, "heads": 3, "depth": 6},  # small enough for a CPU
    "S": {"dim": 384, "ffn": 1536, "heads": 6, "depth": 12},
    "B": {"dim": 768, "ffn": 3072, "heads": 12, "depth": 12},
    "L": {"dim": 1024, "ffn": 4096, "heads": 16, "depth": 24},
    # all that the published weights need: `weights` takes them
    "Wan-1.3B": {"dim": 1536, "ffn": 8960, "heads": 12, "depth": 30, **wan.OPTIONS},
}


class Sora(nn.Module):
    """A space–time transformer for latents of `channels` and text features of `text_width` (None: no text).

    Args:
        ffn: width of the MLPs' hidden layer.
        patch: latents a token covers in time and along each side.
        qk_norm: RMS norm of queries and keys, of each head or of all at once.
        flow_time: the network is told rectified flow's time σ/(α + σ) in place of the noise's angle.
        text_length: texts are filled up with zeros to so many tokens, which are looked at too; None: no padding.
        weights: folder of a published Wan transformer to begin with, see `models.denoisers.wan`.
        context: takes `Condition.known` and its mask as channels; upsample: takes `Condition.low`.

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        channels: int,
        text_width: int | None = None,
        *,
        dim: int = 384,
        ffn: int = 1536,
        heads: int = 6,
        depth: int = 12,
        patch: tuple[int, int, int] = (1, 2, 2),
        qk_norm: QKNorm = "head",
        flow_time: bool = False,
        text_length: int | None = None,
        weights: str | None = None,
        context: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        if len(patch) != 3:
            raise ValueError(f"patch={patch}: give three numbers, for time, height and width")
        if dim % (2 * heads):
            raise ValueError(f"dim={dim}, heads={heads}: rotary positions need heads of an even width")
        self.patch, self.head = (patch[0], patch[1], patch[2]), dim // heads
        self.context, self.upsample = context, upsample
        self.flow_time, self.text_length = flow_time, text_length
        volume = patch[0] * patch[1] * patch[2]
        self.embed = nn.Linear(volume * input_channels(channels, context, upsample), dim)
        self.level = LevelEmbedding(dim)
        self.low_level = LevelEmbedding(dim) if upsample else None
        self.ada = nn.Linear(dim, 6 * dim)
        self.caption = Caption(text_width) if text_width is not None else None
        self.words = mlp(text_width, dim, dim) if text_width is not None else None
        self.blocks = nn.ModuleList(
            Block(dim, ffn, heads, qk_norm, text_width is not None) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.table = nn.Parameter(torch.zeros(2, dim))
        self.out = nn.Linear(dim, volume * channels)
        self._initialise()
        if weights is not None:
            wan.load(self, weights)

    def _initialise(self) -> None:
        """Xavier, with 0 for modulation, cross-attention's end and the output: blocks begin as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, CrossAttention):
                nn.init.zeros_(module.proj.weight)
        nn.init.zeros_(self.ada.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, z: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """A batch of one shape: z [B, C, T, h, w], level [B] in 0…1 → [B, C, T, h, w].

        Independent images at its end (`condition.images`) become sequences of their own.
        Raises ValueError for a condition that the model was not built for.
        """
        if not condition.images:
            return self.packed([z], [level], [condition])[0]
        frames = z.shape[2] - condition.images
        if frames < 0:
            raise ValueError(f"condition.images={condition.images}, but there are only {z.shape[2]} frames")
        sizes = [frames] * (frames > 0) + [1] * condition.images
        conditions = _split(replace(condition, images=0), sizes)
        return torch.cat(self.packed(z.split(sizes, dim=2), [level] * len(sizes), conditions), dim=2)

    def packed(
        self, latents: Sequence[Tensor], levels: Sequence[Tensor], conditions: Sequence[Condition]
    ) -> list[Tensor]:
        """Batches of different shapes at once: [Bᵢ, C, Tᵢ, hᵢ, wᵢ], [Bᵢ] and a condition each → as `latents`.

        What becomes of a sample does not depend on its company. Raises ValueError as `forward`.
        """
        if any(condition.images for condition in conditions):
            raise ValueError(
                "condition.images: give packed images as batches of one frame, not at a clip's end"
            )
        parts = [
            patchify(with_conditions(z, condition, self.context, self.upsample), self.patch)  # B T h w P
            for z, condition in zip(latents, conditions, strict=True)
        ]
        grids = [x.shape[:4] for x in parts]
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        turns = [rotary(t, h, w, self.head, parts[0].device, wide) for _, t, h, w in grids]
        texts = [self._text(condition, len(x)) for x, condition in zip(parts, conditions, strict=True)]
        if len(parts) == 1:  # one shape: a plain batch
            x, turn, (text, there) = parts[0].flatten(1, 3), turns[0], texts[0]
            layout = Layout(words=Mask.padding(there))
        else:
            x = torch.cat([x.flatten(0, 3) for x in parts])[None]  # 1 N P
            each = [turn for grid, turn in zip(grids, turns, strict=True) for _ in range(grid[0])]
            turn = Rotary(*(torch.cat(tables) for tables in zip(*each, strict=True)))
            text, layout = _lay_out(grids, texts, x.device)
            layout = layout.prepared(self.kernel, x.shape[1], 0 if text is None else text.shape[1], x.device)

        c = torch.cat([self._level(*told) for told in zip(levels, conditions, strict=True)])  # S D
        ada = self.ada(F.silu(c)).unflatten(-1, (6, -1))  # S 6 D
        words = None if text is None or self.words is None else self.words(text)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, ada, turn, words, layout)
        shift, scale = (layout.spread(m) for m in (self.table + c[:, None]).unbind(1))
        x = self.out(modulate(self.norm(x), shift, scale)).flatten(0, 1)  # N P
        runs = x.split([grid.numel() for grid in grids])
        return [unpatchify(run.unflatten(0, grid), self.patch) for run, grid in zip(runs, grids, strict=True)]

    @property
    def kernel(self) -> Kernel:
        """That `choose_kernel` chose."""
        first: Any = self.blocks[0]
        return first.attention.kernel

    def _level(self, level: Tensor, condition: Condition) -> Tensor:
        """Embedding [B, D] of the noise level, and that of the low-resolution video."""
        c = self.level(wan.flow_time(level) if self.flow_time else level)
        return c if self.low_level is None else c + self.low_level(low_level(level, condition))

    def _text(self, condition: Condition, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """[B, L, W], and which tokens are to be looked at, [B, L]; None: all."""
        if self.caption is None:
            no_text(condition)
            return None, None
        text, mask = self.caption(condition, batch)
        if self.text_length is None:
            return text, mask
        return F.pad(
            text, (0, 0, 0, self.text_length - text.shape[1])
        ), None  # of longer ones the end is left out


class Layout(NamedTuple):
    """How sequences lie: one a batch row, or end to end in one row, and who then may look at whom."""

    owner: Tensor | None = None  # int64 [N], the sequence of each token, where they are packed
    tokens: Mask | None = None
    words: Mask | None = None

    def spread(self, m: Tensor) -> Tensor:
        """A vector a sequence [S, D] for its tokens: [S, 1, D], or [1, N, D] where they are packed."""
        return m[:, None] if self.owner is None else m[self.owner][None]

    def prepared(self, kernel: Kernel, tokens: int, words: int, device: torch.device) -> Layout:
        """With the masks made ready for a kernel, once for all blocks."""
        own, other = (
            mask and mask.prepared(kernel, tokens, keys, device)
            for mask, keys in ((self.tokens, tokens), (self.words, words))
        )
        return self._replace(tokens=own, words=other)


def _lay_out(
    grids: list[torch.Size], texts: list[tuple[Tensor | None, Tensor | None]], device: torch.device
) -> tuple[Tensor | None, Layout]:
    """The texts without their padding, [1, L, W], and where all lies."""
    lengths = [grid[1:].numel() for grid in grids for _ in range(grid[0])]
    owner = owners(lengths, device)
    tokens = Mask.documents(lengths, device=device)
    captions = [(text, mask) for text, mask in texts if text is not None]
    if not captions:
        return None, Layout(owner, tokens)
    kept = [_without_padding(text, mask) for text, mask in captions]
    words = [n for _, each in kept for n in each]
    text = torch.cat([text for text, _ in kept])[None]
    return text, Layout(owner, tokens, Mask.documents(lengths, words, device))


def _without_padding(text: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """[B, L, W] → [tokens, W] and how many each row has, for which it waits for the device.

    On shapes alone (a fake tensor) there is no padding to be known.
    """
    if mask is None or isinstance(mask, FakeTensor):
        return text.flatten(0, 1), [text.shape[1]] * len(text)
    return text[mask], mask.sum(1).tolist()


class Block(nn.Module):
    """Self-attention, cross-attention to the words if there are any, MLP; each added to x."""

    def __init__(self, dim: int, ffn: int, heads: int, qk_norm: QKNorm, worded: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads, qk_norm)
        self.cross_norm = nn.LayerNorm(dim, 1e-6) if worded else None
        self.cross = CrossAttention(dim, heads, qk_norm) if worded else None
        self.norm2 = nn.LayerNorm(dim, 1e-6, elementwise_affine=False)
        self.mlp = mlp(dim, ffn, dim)
        self.table = nn.Parameter(torch.zeros(6, dim))  # this block's own part of the modulation

    def forward(
        self,
        x: Tensor,
        ada: Tensor,
        turn: Rotary,
        words: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """x [B, N, D], ada [S, 6, D], words [B, L, D] → [B, N, D]; B is S, or 1 where the layout packs them."""
        layout = layout or Layout()
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = map(layout.spread, (self.table + ada).unbind(1))
        x = x + gate * self.attention(modulate(self.norm1(x), shift, scale), layout.tokens, turn)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), words, layout.words)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


@kept
@torch.inference_mode(False)  # a sampler's table must also serve a later training step
def rotary(
    frames: int, height: int, width: int, head: int, device: torch.device, dtype: torch.dtype
) -> Rotary:
    """Of the T·h·w patches of a grid, in the order of `patchify`."""
    sides = [torch.arange(n) for n in (frames, height, width)]
    return Rotary.of(torch.cartesian_prod(*sides), head).to(device, dtype)


def _split(condition: Condition, sizes: list[int]) -> list[Condition]:
    """The condition of each run of frames."""

    def runs(x: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(sizes) if x is None else x.split(sizes, dim=2)

    fields = zip(runs(condition.known), runs(condition.known_mask), runs(condition.low), strict=True)
    return [replace(condition, known=known, known_mask=mask, low=low) for known, mask, low in fields]


build = Sora
