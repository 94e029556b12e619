"""What a selector knows clips and captions by: features of encoders that are not trained, computed once.

    name of a clip's features    what they are                                                          numbers
    visual_fit                   the clip among words, by its ImageNet classes (models.measures)        384
    classes                      √ of the mean probabilities of ImageNet's classes                      1000
    others                       networks of videos by the names of `models.measures.features`:         their own
                                 efficientnet-lite0, clip:MODEL[:WEIGHTS], vivit:FOLDER, FILE.pt
    tower:MODEL                  a vision model of transformers (`models.language.towers`), its patches  2 × its own
                                 and frames pooled

    name of a text's features
    minilm                       a sentence embedding, as visual fit has it                             384
    clip:MODEL[:WEIGHTS]         the text tower of an open_clip model                                   its own

Of several of a clip the numbers follow one another. A ViViT that clipmill trained travels in the selector's file; what
comes with packages or from elsewhere is named there, with the hash of its weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.curation.embed import EfficientNetLite0
from models.encoders import vivit_file
from models.language import towers
from models.measures.clip_score import ClipScorer
from models.measures.features import (
    PooledFrames,
    check_name,
    clip_parts,
    load_features,
    vivit_features,
    weights_hash,
)
from models.measures.visual_fit import Words

VISUAL_FIT, CLASSES, MINILM, VIVIT, TOWER = "visual_fit", "classes", "minilm", "vivit:", "tower:"


def check_video(name: str) -> None:
    """Raises ValueError for a name that is none of a clip's features. Whether a file is there is not looked at."""
    known = name in (VISUAL_FIT, CLASSES) or name.startswith((TOWER, VIVIT)) or name.endswith(".pt")
    if not known:
        try:
            check_name(name)
        except ValueError as e:
            raise ValueError(f"{e}; or visual_fit, classes, tower:MODEL") from e


def check_text(name: str) -> None:
    """Raises ValueError for a name that is none of a text's features."""
    if name != MINILM and not (name.startswith("clip:") and name.removeprefix("clip:")):
        raise ValueError(f"text features {name!r} are neither minilm nor clip:MODEL[:WEIGHTS]")


@functools.cache
def words(device: str) -> Words:
    """It takes seconds to make, and both sides have it."""
    return Words(device)


class VideoFeatures:
    """Clips by several encoders, one after another.

    Args:
        names: see the top of this file.
        given: of the networks that a selector's file brings along, by name: {'options', 'weights'}.

    width: of all together. hashes: of the weights, by name. Raises ValueError and MissingModel.
    """

    def __init__(self, names: Sequence[str], device: str = "cpu", given: Mapping[str, Any] | None = None):
        self.names, self.given = list(names), dict(given or {})
        self.nets: dict[str, Any] = {}
        self.hashes: dict[str, str] = {}
        self.words = words(device) if VISUAL_FIT in self.names else None
        self.classes: EfficientNetLite0 | None = None
        for name in self.names:
            if name in (VISUAL_FIT, CLASSES):
                self.classes = self.classes or EfficientNetLite0(device)
                self.hashes[name] = weights_hash(self.classes.net)
                continue
            if name.startswith(VIVIT):
                if name not in self.given:
                    self.given[name] = vivit_file.read(name.removeprefix(VIVIT))
                found: Any = vivit_features(self.given[name], Path(name).stem, device)
            elif name.startswith(TOWER):
                found = tower_frames(name.removeprefix(TOWER), device)
            else:
                found = load_features(name, device)
            self.nets[name], self.hashes[name] = found, found.hash

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Of a clip's frames, uint8 RGB [F, h, w, 3], float32 [width]."""
        parts: dict[str, np.ndarray] = {}
        if self.classes is not None:
            p = self.classes.probabilities(frames).astype(np.float64).mean(0)
            parts[CLASSES] = np.sqrt(p).astype(np.float32)
            if self.words is not None:
                parts[VISUAL_FIT] = self.words.of_classes(p)
        for name, net in self.nets.items():
            parts[name] = net(torch.from_numpy(np.ascontiguousarray(frames))[None])[0].numpy()
        return np.concatenate([parts[name] for name in self.names]).astype(np.float32)


def tower_frames(model: str, device: str = "cpu") -> PooledFrames:
    """Patches of a vision model's last layer but one, their mean, pooled over time. Raises MissingModel, ValueError."""
    tower = towers.tower(model).eval().to(device)
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (tower.mean, tower.std))

    @torch.inference_mode()
    def frames(pictures: Tensor) -> Tensor:
        x = pictures.to(device).permute(0, 3, 1, 2).float()  # N 3 H W
        x = F.interpolate(x, (tower.size, tower.size), mode="bicubic", antialias=True).clamp(0, 255)
        return tower(((x / 255 - mean) / std)[:, None])[:, 0].mean((1, 2))  # N h w width → N width

    about = f"frames resized to {tower.size}×{tower.size}, bicubic"
    return PooledFrames(f"{TOWER}{model}", weights_hash(tower), about, frames)


class TextFeatures:
    """Texts by one encoder. Args: name: see the top of this file. Raises MissingModel."""

    def __init__(self, name: str, device: str = "cpu"):
        self.name = name
        self.encoder: Any
        if name == MINILM:
            self.encoder = words(device)
            self.hash = weights_hash(self.encoder.encoder.net)
        else:
            self.encoder = ClipScorer(*clip_parts(name.removeprefix("clip:")), device)
            self.hash = weights_hash(self.encoder.clip.net)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, width]."""
        embed = self.encoder.embed if self.name == MINILM else self.encoder.embed_text
        found: np.ndarray = embed(list(texts))
        return found.astype(np.float32)
