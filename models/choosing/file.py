"""A trained selector as one file (torch.save, plain values and tensors).

It holds the selector's options and weights, the names of its frozen encoders with the hashes of their weights, a ViViT
among them whole, and how it fared on held-out clips.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.language.selector import Selector, build


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
