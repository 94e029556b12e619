"""EMScore: a text against a clip as a whole, and its words against the frames.

Shi et al., CVPR 2022 (arXiv:2111.08919). With unit CLIP embeddings of frames f_i, word pieces w_j and the whole text s:

    coarse  = cos(unit(mean f_i), s)
    P = Σ_j a_j max_i w_j · f_i    R = mean_i max_j w_j · f_i    F = 2PR / (P + R)      a_j: weights that add up to 1
    EMScore = (coarse + F) / 2

P asks whether each word is seen somewhere, R whether each frame is spoken of, so unlike CLIPScore it notices what a
text leaves out. Word pieces include the marks of start and end, as there; each text is scored alone, since padding
would take part in the maxima.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from models.curation.embed import OpenClip


@dataclass(frozen=True)
class EMScore:
    """Of one text and one clip; all −1 to 1."""

    full: float  # (coarse + f) / 2
    coarse: float
    precision: float
    recall: float
    f: float


def emscore(
    frames: np.ndarray, words: np.ndarray, text: np.ndarray, weights: np.ndarray | None = None
) -> EMScore:
    """EMScore of unit embeddings.

    Args:
        frames: [n, d].
        words: of the text's pieces, [m, d].
        text: of the whole, [d].
        weights: of the pieces [m], e.g. inverse document frequencies; none: all alike.
    """
    frames, words, text = (x.astype(np.float64) for x in (frames, words, text))
    mean = frames.mean(0)
    coarse = float(mean @ text / np.linalg.norm(mean))
    cosines = words @ frames.T  # [m, n]
    a = np.full(len(words), 1 / len(words)) if weights is None else weights / weights.sum()
    precision, recall = float(a @ cosines.max(1)), float(cosines.max(0).mean())
    f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return EMScore((coarse + f) / 2, coarse, precision, recall, f)


def inverse_frequencies(texts: Sequence[Sequence[int]]) -> tuple[dict[int, float], float]:
    """ln((N + 1) / (df + 1)) of the word pieces of N texts, and that of a piece in none of them: ln(N + 1)."""
    counts = Counter(piece for text in texts for piece in set(text))
    n = len(texts)
    return {piece: math.log((n + 1) / (df + 1)) for piece, df in counts.items()}, math.log(n + 1)


class EMScorer:
    """Scores texts against the frames of clips with an open_clip model that reads texts from left to right.

    Args:
        model, pretrained, device, batch: as for `models.curation.embed.OpenClip`; the paper's is ViT-B-32, openai.
    """

    def __init__(self, model: str, pretrained: str, device: str = "cpu", batch: int | None = None):
        import open_clip

        self.clip = OpenClip(model, pretrained, device, batch)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.tower = getattr(self.clip.net, "text", self.clip.net)
        if not all(hasattr(self.tower, part) for part in ("ln_final", "attn_mask", "text_projection")):
            raise ValueError(
                f"open_clip {model}: EMScore needs a text tower as of CLIP, this one is of another kind"
            )

    def __call__(
        self, frames: Iterable[np.ndarray], clips: Sequence[tuple[int, list[list[str]]]]
    ) -> list[list[list[float]]]:
        """As of `models.measures.clip_score.ClipScorer`: EMScore of every sentence."""
        images = self.clip.embed(frames)
        found, at = [], 0
        for n, texts in clips:
            seen, at = images[at : at + n], at + n
            found.append([[self.sentence(seen, s).full for s in text] for text in texts])
        return found

    def sentence(self, frames: np.ndarray, text: str) -> EMScore:
        """Of one sentence and unit frame embeddings [n, d]."""
        words, whole = self.embed_text(text)
        return emscore(frames, words, whole)

    @torch.inference_mode()
    def embed_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Unit embeddings of a text's pieces, start to end [m, d], and of the whole [d], which is that of the end."""
        net: Any = self.tower
        tokens = self.tokenizer([text]).to(self.clip.device)  # [1, t]
        end = int(tokens.argmax(-1))  # the mark of the end has the highest number
        x = net.token_embedding(tokens) + net.positional_embedding[: tokens.shape[1]]
        x = net.ln_final(net.transformer(x, attn_mask=net.attn_mask))[0, : end + 1]  # [m, w]
        projection = net.text_projection
        x = projection(x) if isinstance(projection, torch.nn.Module) else x @ projection
        unit = F.normalize(x.float(), dim=-1).cpu().numpy()
        return unit, unit[-1]
