"""PAC-S: CLIPScore with weights tuned on positively augmented captions (Sarto et al., CVPR 2023, arXiv:2303.12112).

PAC-S(I, C) = 2 · max(cos(E_I, E_C), 0), the text read as 'A photo depicts' and the caption. The tuned weights of
ViT-B/32 and ViT-L/14 are published as checkpoints of OpenAI's architectures (github.com/aimagelab/pacscore); without
them this is a CLIPScore of another scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from models.measures.clip_score import ClipScorer

WEIGHT = 2.0
PREFIX = "A photo depicts "


def pac_s(images: np.ndarray, texts: np.ndarray) -> float:
    """2 · max(cos, 0), mean over pairs, of unit image [n, d] and unit text [m, d] embeddings; 0 to 2."""
    return float(WEIGHT * np.maximum(images.astype(np.float64) @ texts.astype(np.float64).T, 0).mean())


class PacScorer:
    """Scores texts against the frames of clips.

    Args:
        model: architecture, 'ViT-B-32-quickgelu' or 'ViT-L-14-quickgelu'.
        weights: checkpoint, PAC-S's `{'state_dict': …}` or a plain one.
    """

    def __init__(self, model: str, weights: str, device: str = "cpu", batch: int | None = None):
        self.scorer = ClipScorer(model, plain(weights), device, batch)

    def __call__(
        self, frames: Iterable[np.ndarray], clips: Sequence[tuple[int, list[list[str]]]]
    ) -> list[list[float]]:
        """As of `ClipScorer`."""
        images = self.scorer.clip.embed(frames)
        told = self.scorer.embed_text([PREFIX + s for _, texts in clips for text in texts for s in text])
        found, at, said = [], 0, 0
        for n, texts in clips:
            seen, at = images[at : at + n], at + n
            found.append([pac_s(seen, told[(a := said) : (said := said + len(text))]) for text in texts])
        return found
