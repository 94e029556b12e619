"""The selector: which of several captions a clip's is, from features of frozen encoders; small enough for a laptop.

Two encoders bring a clip's features (class probabilities, frame or video embeddings) and a caption's (a sentence
embedding) into one space, in which cosines are compared; a head looks at both together where that is not enough.
Losses: `models.language.contrastive`. Retrieval is by cosine first, and the best are looked at again by the head
(Li et al. 2021, ALBEF, sec. 3.2).

B: pairs; K: captions of a clip; D: dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.language.contrastive import LogitScale

FLATTEST = 0.01  # slope of the probability by logits

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 64, "hidden": 128},
    "base": {"dim": 256, "hidden": 1024},
    "beside": {
        "dim": 384,
        "hidden": 256,
        "residual": True,
    },  # begins as visual_fit, of its features and MiniLM's
}


class Selector(nn.Module):
    """(video, text) → features of both and the scale of their cosines.

    Args:
        video, text: widths of the frozen features.
        dropout: of the encoders' hidden layers.
        residual: what is learnt is added to the first `dim` numbers of the features, whose cosines it begins with.
        texts: whether anything is learnt of texts; else, with `residual`, they stay what they are: of few clips less is
            learnt by heart.

    Raises ValueError where features are narrower than what is added to them.
    """

    platt: Tensor

    def __init__(
        self,
        video: int,
        text: int,
        *,
        dim: int = 256,
        hidden: int = 1024,
        dropout: float = 0.0,
        residual: bool = False,
        texts: bool = True,
    ):
        super().__init__()
        if not (texts or residual):
            raise ValueError(
                "texts: false: features of clips are only comparable with texts as they are if residual: true"
            )
        if residual and min(video, text) < dim:
            raise ValueError(
                f"residual: features of {video} and {text} numbers cannot be added to {dim}: lower dim"
            )
        self.video, self.text = (Encoder(width, hidden, dim, dropout, residual) for width in (video, text))
        if not texts:
            self.text.net.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(4 * dim, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.scale = LogitScale()
        self.register_buffer("platt", torch.tensor([1.0, 0.0]))  # slope and shift of `probability`

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """video [B, video], or [B, F, video] of F frames; text [B, (K,) text] → [B, D], [B, (K,) D], scale."""
        v = self.video(video)
        return (v.mean(1) if v.ndim == 3 else v), self.text(text), self.scale()

    def match(self, video: Tensor, text: Tensor) -> Tensor:
        """Features [n, D] of both → logits [n] that they belong together."""
        v, t = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
        return self.head(torch.cat([v, t, v * t, (v - t).abs()], dim=-1))[..., 0]

    def probability(self, logits: Tensor) -> Tensor:
        """How often pairs of such logits do belong together, after `calibrate`."""
        slope, shift = self.platt
        return torch.sigmoid(slope * logits + shift)

    @torch.no_grad()
    def calibrate(self, logits: Tensor, together: Tensor) -> None:
        """Fit `probability` to held-out pairs (Platt 1999), by Newton's method.

        The order of logits stays: where they tell nothing, or the contrary, the slope is nearly flat (`FLATTEST`).

        Args:
            logits: [n]. together: bool [n], whether the pair does.

        Raises ValueError where all pairs are of one kind, so that nothing can be fitted.
        """
        y = together.double()
        if not 0 < y.sum() < len(y):
            raise ValueError("calibrating needs pairs that belong together and pairs that do not: give both")
        x = torch.stack([logits.double(), torch.ones_like(y)], dim=1)  # n 2
        ridge = 1e-3 * torch.eye(2, dtype=x.dtype, device=x.device)  # pairs that separate have no finite fit
        w = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)
        for _ in range(50):
            p = torch.sigmoid(x @ w)
            step = torch.linalg.solve(x.T * (p * (1 - p)) @ x + ridge, x.T @ (p - y) + ridge @ w)
            w = w - step / max(1.0, float(step.norm()))
        if w[0] < FLATTEST:
            w = w.new_tensor([FLATTEST, 0.0])
            for _ in range(50):
                p = torch.sigmoid(x @ w)
                w[1] -= ((p - y).sum() / (p * (1 - p)).sum().clamp(min=1e-6)).clamp(-1, 1)
        self.platt.copy_(w)

    @torch.no_grad()
    def best(self, video: Tensor, texts: Tensor, again: int = 128) -> Tensor:
        """Of each clip its captions from best to worst, int64 [B, N].

        Args:
            video, texts: features [B, D] and [N, D] of clips and captions, or [B, N, D] of captions of each clip.
            again: so many of the nearest by cosine are put in order by the head; 0: none.
        """
        v, t = F.normalize(video, dim=-1), F.normalize(texts, dim=-1)
        cosine = v @ t.T if t.ndim == 2 else (t @ v[..., None])[..., 0]
        order = cosine.argsort(dim=1, descending=True, stable=True)
        near = order[:, :again]
        if not near.shape[1]:
            return order
        own = (
            texts[near]
            if texts.ndim == 2
            else texts.gather(1, near[..., None].expand(-1, -1, texts.shape[-1]))
        )
        logits = self.match(video[:, None].expand(-1, near.shape[1], -1), own)
        first = near.gather(1, logits.argsort(dim=1, descending=True, stable=True))
        return torch.cat([first, order[:, again:]], dim=1)


class Encoder(nn.Module):
    """[…, width] → […, dim]; residual: begins as the first `dim` of the width."""

    def __init__(self, width: int, hidden: int, dim: int, dropout: float, residual: bool):
        super().__init__()
        self.dim, self.residual = dim, residual
        last = nn.Linear(hidden, dim)
        if residual:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        first = nn.Linear(width, hidden)
        self.net = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), nn.Dropout(dropout), last)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found + x[..., : self.dim] if self.residual else found


def build(
    sizes: tuple[int, int],
    *,
    dim: int = 256,
    hidden: int = 1024,
    dropout: float = 0.0,
    residual: bool = False,
    texts: bool = True,
) -> Selector:
    """sizes: widths of the features of clips and of texts."""
    return Selector(*sizes, dim=dim, hidden=hidden, dropout=dropout, residual=residual, texts=texts)
