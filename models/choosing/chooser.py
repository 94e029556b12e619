"""What a trained selector says of captions.

chooser = Chooser.load("model/selector.pt")
chooser(frames, ["a dog runs", "a cat sleeps"])      # frames uint8 [F, h, w, 3] → probabilities [2]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from models.choosing.file import Saved
from models.choosing.frozen import TextFeatures, VideoFeatures
from models.language.selector import Selector

T = TypeVar("T")


def logits(model: Selector, video: Tensor, texts: Tensor, scale: Tensor, head: bool) -> Tensor:
    """How sure it is of each text of each clip, before `probability`: features [B, D], [B, K, D] → [B, K].

    Args:
        head: by the matching head; else by the cosines, scaled.
    """
    if head:
        return model.match(video[:, None].expand(-1, texts.shape[1], -1), texts)
    return scale * torch.cosine_similarity(video[:, None], texts, dim=-1)


class Chooser:
    """A selector with its encoders. Raises ValueError, MissingModel.

    Args:
        saved: of a file, see `Saved.read`.
    """

    def __init__(self, saved: Saved, device: str = "cpu"):
        self.saved, self.device = saved, torch.device(device)
        self.videos = VideoFeatures(saved.spec.video, device, saved.networks)
        self.texts = TextFeatures(saved.spec.text, device)
        for name, hash in {**self.videos.hashes, saved.spec.text: self.texts.hash}.items():
            if saved.hashes.get(name) != hash:
                raise ValueError(
                    f"{name} has other weights ({hash}) than the selector was trained with ({saved.hashes.get(name)}): "
                    "bring those, or train it anew"
                )
        self.model = saved.selector().to(self.device)

    @classmethod
    def load(cls, file: str | Path, device: str = "cpu") -> Chooser:
        return cls(Saved.read(file), device)

    @property
    def frames(self) -> int:
        return self.saved.spec.frames

    @torch.inference_mode()
    def __call__(self, frames: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        """Of each text how likely it is the clip's own rather than a wrong one.

        Args:
            frames: uint8 RGB [h, w, 3] each, of one clip in order, one at least, of one size.
        """
        if not texts:
            return []
        looked = self.videos(np.stack(evenly(frames, self.frames)))
        video, text = (torch.from_numpy(x).to(self.device) for x in (looked[None], self.texts(texts)[None]))
        v, t, scale = self.model(video, text)
        found: list[float] = self.model.probability(logits(self.model, v, t, scale, self.saved.head))[
            0
        ].tolist()
        return found


def evenly(items: Sequence[T], n: int) -> list[T]:
    """n of the items, each the middle of one of n equal stretches; some again where there are fewer."""
    return [items[int((i + 0.5) * len(items) / n)] for i in range(n)]
