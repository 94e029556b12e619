"""How pleasing a picture looks: LAION's aesthetic heads on CLIP image features.

Two published layouts, told apart by their state dict:
- LAION-Aesthetics V1: one linear layer, `weight` [1, d] and `bias` [1].
- improved-aesthetic-predictor (V2): `layers.0/2/4/6/7`, d → 1024 → 128 → 64 → 16 → 1, with dropout and no
  non-linearity between, so at inference five linear layers in a row.
Both were fitted to human ratings of 1 to 10 and expect unit-length features of the CLIP they were trained
on (ViT-L/14: d = 768, ViT-B/32: d = 512).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

_KEY = re.compile(r"(?:layers\.(\d+)\.)?(weight|bias)")


class AestheticHead(nn.Module):
    """Linear layers `sizes[0]` → … → 1 on L2-normalised image features."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))

    @property
    def width(self) -> int:
        """Length d of the image features it was trained on."""
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        return first.in_features

    def forward(self, features: Tensor) -> Tensor:
        """[n, d] image features of any length → [n] ratings, about 1 (ugly) to 10."""
        return self.layers(F.normalize(features, dim=-1)).squeeze(-1)  # [n, 1] → [n]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> AestheticHead:
        """A head in evaluation mode from either layout.

        Raises ValueError when the names or shapes are neither.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"expected a state dict, found {type(state).__name__}")
        named: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(
                    f"unknown key {key!r}; expected weight and bias, or layers.N.weight and .bias"
                )
            named.setdefault(int(match[1] or 0), {})[match[2]] = value
        layers = [named[i] for i in sorted(named)]
        if not layers or any(layer.keys() != {"weight", "bias"} for layer in layers):
            raise ValueError("every layer needs a weight and a bias")
        shapes = [tuple(layer["weight"].shape) for layer in layers]
        sizes = [shapes[0][-1], *(shape[0] for shape in shapes)]
        if sizes[-1] != 1 or shapes != [(b, a) for a, b in itertools.pairwise(sizes)]:
            raise ValueError(f"layers of shape {shapes} do not lead from features to one number")
        head = cls(sizes)
        for own, layer in zip(head.layers, layers, strict=True):
            own.load_state_dict(layer)
        return head.eval()
