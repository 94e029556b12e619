"""A trained selector as one file, and what it says of captions.

    chooser = Chooser.load("model/selector.pt")
    chooser(frames, ["a dog runs", "a cat sleeps"])      # frames uint8 [F, h, w, 3] → probabilities [2]

The file (torch.save, plain values and tensors) holds the selector's options and weights, the names of its frozen
encoders with the hashes of their weights, a ViViT among them whole, and how it fared on held-out clips.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.choosing.frozen import TextFeatures, VideoFeatures
from models.language.selector import Selector, build

T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """What a selector looks at.

    video, text: names in `models.choosing.frozen`. frames: of a clip, spread over it.
    """

    video: tuple[str, ...]
    text: str
    frames: int


@dataclass
class Saved:
    """What a selector's file holds.

    options: of `selector.build`, beside `sizes`. head: whether captions are told apart by the matching head, or by
    cosines. networks: given to `VideoFeatures`. hashes: of all encoders. figures: of held-out clips.
    """

    spec: Spec
    sizes: tuple[int, int]
    options: dict[str, Any]
    weights: dict[str, Tensor]
    head: bool
    networks: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        told = {
            **vars(self),
            "spec": vars(self.spec) | {"video": list(self.spec.video)},
            "sizes": list(self.sizes),
        }
        partial = file.with_name(file.name + ".partial")
        torch.save({"clipmill": "selector", **told}, partial)
        partial.replace(file)

    @classmethod
    def read(cls, file: str | Path) -> Saved:
        """Raises ValueError where the file is no selector's."""
        try:
            told = torch.load(file, map_location="cpu", weights_only=True)
            if told.pop("clipmill") != "selector":
                raise KeyError
            spec = told.pop("spec")
            video, sizes = tuple(spec.pop("video")), tuple(told.pop("sizes"))
            return cls(Spec(video, **spec), sizes, **told)
        except (
            OSError,
            EOFError,
            AttributeError,
            KeyError,
            TypeError,
            RuntimeError,
            pickle.UnpicklingError,
        ) as e:
            raise ValueError(
                f"{file} is no selector: give the selector.pt that 'clipmill train selector' left in its folder"
            ) from e

    def selector(self) -> Selector:
        model = build(self.sizes, **self.options)
        model.load_state_dict(self.weights)
        return model.eval().requires_grad_(False)


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
