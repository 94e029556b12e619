"""Visual fit: how well a text fits pictures, with no weights but those that installed packages carry.

ConSE (Norouzi et al. 2014, arXiv:1312.5650): a picture is placed among words by the words of the classes it is likely
to be. With p the softmax of EfficientNet-Lite0 over ImageNet's 1000 classes, mean of a clip's frames, L the MiniLM
embeddings of the bare labels, μ their mean, and unit(x) = x / |x|:

    d_c = unit(L_c − μ)    v = unit(Σ √p_c d_c)    t = unit(MiniLM(text) − μ)    visual fit = v · t, −1 to 1

Without μ all texts would be close to all pictures; the root lets the classes below the first have a say. v needs no
text and t no picture, so v is kept of each clip (`emb_visual_words`), and any words find clips by one product.

It sees what ImageNet has a word for. Direction and who does what to whom it cannot see, action and number hardly: a
wrong subject moves the score 2 to 3 times as far (bench/results/captions.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from models.curation.embed import EfficientNetLite0
from models.encoders.sentence import MiniLM


class Words:
    """The side of the texts, which is all that a search needs."""

    def __init__(self, device: str = "cpu"):
        from torchvision.models import EfficientNet_B0_Weights

        self.encoder = MiniLM(device)
        self.labels = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
        # a batch of equally many tokens or so: these are always the same
        order = sorted(range(len(self.labels)), key=lambda i: len(self.labels[i]))
        found = self.encoder.embed([self.labels[i] for i in order], batch=50).astype(np.float64)
        embedded = found[np.argsort(order)]  # [1000, 384]
        self.mean = embedded.mean(0)
        self.directions = unit(embedded - self.mean)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """t of each text, float32 [n, 384], of unit length."""
        return unit(self.encoder.embed(texts).astype(np.float64) - self.mean).astype(np.float32)

    def of_classes(self, probabilities: np.ndarray) -> np.ndarray:
        """v of class probabilities [1000], float32 [384], of unit length."""
        return unit(np.sqrt(probabilities.astype(np.float64)) @ self.directions).astype(np.float32)


class VisualFit:
    """Both sides: clips by their frames, and texts."""

    def __init__(self, device: str = "cpu", batch: int | None = None):
        self.words = Words(device)
        self.net = EfficientNetLite0(device, batch)

    def clips(self, frames: Iterable[np.ndarray], counts: Sequence[int]) -> list[np.ndarray | None]:
        """v of each clip, float32 [384]; None of one without frames.

        Args:
            frames: uint8 RGB [h, w, 3], those of all clips one after another.
            counts: how many of them are each clip's.
        """
        p = self.net.probabilities(frames).astype(np.float64)  # [n, 1000]
        ends = np.cumsum((0, *counts))
        return [self.words.of_classes(p[a:b].mean(0)) if b > a else None for a, b in pairwise(ends)]


def fits(clips: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """v · t of every clip and text: [n, 384] and [m, 384] → float64 [n, m]."""
    return clips.astype(np.float64) @ texts.astype(np.float64).T


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
