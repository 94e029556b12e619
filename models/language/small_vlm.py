"""A small vision-language model in LLaVA's form: patches → projector → causal transformer → words.

Liu et al. 2023 (LLaVA): visual tokens go before the text in one causal sequence, and the loss counts
the answer's tokens only. B: batch, T: frames, V: visual tokens, L: text tokens, D: width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language import text

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"width": 48, "depth": 2, "heads": 4},
    "small": {"width": 192, "depth": 4, "heads": 6},
}


class SmallVLM(nn.Module):
    """Next-token logits of a caption given a video.

    Args:
        frames, size: video [B, frames, 3, size, size] in −1…1.
        patch: side of the square patches that become visual tokens.
        length: most text tokens.
    """

    def __init__(
        self,
        frames: int,
        size: int,
        patch: int = 16,
        length: int = 128,
        width: int = 192,
        depth: int = 4,
        heads: int = 6,
    ):
        super().__init__()
        self.visual = frames * (size // patch) ** 2
        self.see = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))
        self.project = nn.Sequential(
            nn.GELU(), nn.Linear(width, width)
        )  # with `see`: the two-layer projector
        self.read = nn.Embedding(text.VOCABULARY, width)
        self.position = nn.Parameter(torch.randn(1, self.visual + length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.trunk = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, text.VOCABULARY)

    def forward(self, video: Tensor, tokens: Tensor) -> Tensor:
        """video [B, T, 3, S, S], tokens [B, L] → logits [B, L, vocabulary]; logits[:, i] sees tokens ≤ i."""
        seen = self.project(self.see(video.transpose(1, 2)).flatten(2).transpose(1, 2))  # B V D
        x = torch.cat([seen, self.read(tokens)], dim=1)
        x = x + self.position[:, : x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.out(self.trunk(x, mask=mask, is_causal=True)[:, self.visual :])


def caption_loss(model: nn.Module, video: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next caption token, padding left out."""
    logits = model(video, tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=text.PAD)


def build(
    sizes: tuple[int, int, int], *, patch: int = 16, width: int = 192, depth: int = 4, heads: int = 6
) -> SmallVLM:
    """sizes: (frames, side in pixels, text tokens), from a recipe's data and text; the rest it may choose."""
    frames, size, length = sizes
    return SmallVLM(frames, size, patch, length, width, depth, heads)
