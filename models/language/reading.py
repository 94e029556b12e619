"""What is written about a clip, as tokens beside what is seen of it: the text branch of Panda-70M's student.

Chen et al. 2024 (Panda-70M), sec. 4.3: the video's tokens, detached, are the queries of a second Q-Former that looks at
the text (title, description, subtitles), so what is read is what the pictures ask for, and the video branch learns from
pictures alone. Both go into the language model, those of the video first.

n: tokens of a clip; m: tokens of its text; D: width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.language.projectors import QBlock


class TextBranch(nn.Module):
    """Args:
    dim: of the language model. A clip of which nothing is written has one learned token for a text.
    """

    def __init__(self, dim: int, *, depth: int = 2, heads: int = 8):
        super().__init__()
        self.nothing = nn.Parameter(0.02 * torch.randn(1, dim))
        self.norm = nn.LayerNorm(dim)
        self.asked = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(QBlock(dim, heads) for _ in range(depth))
        self.out = nn.Linear(dim, dim)

    def forward(self, seen: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
        """Tokens [n, D] of clips and embeddings [m, D] of their texts → [n, D] each; no gradient goes into `seen`."""
        found = []
        for clip, text in zip(seen, texts, strict=True):
            keys = self.norm(torch.cat([self.nothing.to(text.dtype), text]))[None]
            x = self.asked(clip.detach())[None]
            for block in self.blocks:
                x = block(x, keys)
            found.append(self.out(x)[0])
        return found
