"""CLIPScore: how well a text fits pictures, judged by a CLIP model.

Hessel et al. 2021 (arXiv:2104.08718), eq. 1: CLIPScore(I, C) = 2.5 · max(cos(E_I, E_C), 0). For a clip it is
averaged over frames, and for a text of several sentences over those, since CLIP reads 77 tokens only.
torchmetrics gives 100 · max(cos, 0) instead: 40 times as much.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from models.curation.embed import OpenClip

WEIGHT = 2.5


def clip_score(images: np.ndarray, texts: np.ndarray) -> float:
    """2.5 · max(cos, 0), mean over pairs, of unit image [n, d] and unit text [m, d] embeddings; 0 to 2.5."""
    return float(WEIGHT * np.maximum(images.astype(np.float64) @ texts.astype(np.float64).T, 0).mean())


class ClipScorer:
    """Scores texts against the frames of one clip with an open_clip model.

    Args:
        model, pretrained: as for `models.curation.embed.OpenClip`; MissingModel where the weights cannot be had.
    """

    def __init__(self, model: str, pretrained: str, device: str = "cpu"):
        import open_clip

        self.clip = OpenClip(model, pretrained, device)
        self.tokenizer = open_clip.get_tokenizer(model)

    def __call__(self, frames: list[np.ndarray], texts: list[list[str]]) -> list[float]:
        """CLIPScore of every text, given as its sentences, against uint8 RGB [h, w, 3] frames."""
        images = self.clip.embed(frames)
        return [clip_score(images, self.embed_text(sentences)) for sentences in texts]

    @torch.inference_mode()
    def embed_text(self, sentences: list[str]) -> np.ndarray:
        """Unit text embeddings, float32 [n, d]; a sentence is cut at the model's context length."""
        rows = [self.clip.net.encode_text(self.tokenizer([s]).to(self.clip.device)) for s in sentences]
        return F.normalize(torch.cat(rows)).float().cpu().numpy()
