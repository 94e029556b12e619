"""CLIPScore: how well a text fits pictures, judged by a CLIP model.

Hessel et al. 2021 (arXiv:2104.08718), eq. 1: CLIPScore(I, C) = 2.5 · max(cos(E_I, E_C), 0). For a clip it is
averaged over frames, and for a text of several sentences over those, since CLIP reads 77 tokens only.
torchmetrics gives 100 · max(cos, 0) instead: 40 times as much.

PAC-S (Sarto et al., CVPR 2023, arXiv:2303.12112) is 2 · max(cos, 0) with weights tuned on augmented captions, the text
read as 'A photo depicts' and the caption. They are published for OpenAI's ViT-B/32 and ViT-L/14
(github.com/aimagelab/pacscore); with other weights it is a CLIPScore of another scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch.nn.functional as F

from models.curation.embed import OpenClip, batched

WEIGHT = 2.5


def clip_score(images: np.ndarray, texts: np.ndarray, weight: float = WEIGHT) -> float:
    """2.5 · max(cos, 0), mean over pairs, of unit image [n, d] and unit text [m, d] embeddings; 0 to 2.5."""
    return float(weight * np.maximum(images.astype(np.float64) @ texts.astype(np.float64).T, 0).mean())


class ClipScorer:
    """Scores texts against the frames of clips with an open_clip model.

    Args:
        model, pretrained, device, batch: as for `models.curation.embed.OpenClip`; MissingModel where the weights
            cannot be had.
    """

    weight, prefix = WEIGHT, ""

    def __init__(self, model: str, pretrained: str, device: str = "cpu", batch: int | None = None):
        import open_clip

        self.clip = OpenClip(model, pretrained, device, batch)
        self.tokenizer = open_clip.get_tokenizer(model)

    def __call__(
        self, frames: Iterable[np.ndarray], clips: Sequence[tuple[int, list[list[str]]]]
    ) -> list[list[list[float]]]:
        """CLIPScore of every sentence of every text of every clip; that of a text is their mean.

        Args:
            frames: uint8 RGB [h, w, 3], those of all clips one after another.
            clips: of each, how many of the frames are its own, and its texts, each given as its sentences.
        """
        images = self.clip.embed(frames)  # [n, d]
        told = self.embed_text(
            [self.prefix + s for _, texts in clips for text in texts for s in text]
        )  # [m, d]
        found, at, said = [], 0, 0
        for n, texts in clips:
            seen, at = images[at : at + n], at + n
            scores = []
            for text in texts:
                its, said = told[said : said + len(text)], said + len(text)
                scores.append([clip_score(seen, sentence[None], self.weight) for sentence in its])
            found.append(scores)
        return found

    def embed_text(self, sentences: list[str]) -> np.ndarray:
        """Unit text embeddings, float32 [n, d]; a sentence is cut at the model's context length."""
        tokens = (self.tokenizer([s])[0] for s in sentences)
        features = batched(
            self.clip.net.encode_text, tokens, self.clip.size, self.clip.device, self.clip.batch
        )
        return F.normalize(features).numpy()


class PacScorer(ClipScorer):
    """PAC-S. Args: pretrained: its weights, a checkpoint as published."""

    weight, prefix = 2.0, "A photo depicts "
