"""How pleasing a clip looks: a LAION aesthetic head on the image features of open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.faults import one_line
from pipeline.recipe import Aesthetic, RecipeError
from pipeline.record import Video
from pipeline.samples import gathered
from pipeline.stages import Produces, Resources


class AestheticStage:
    """Adds `aesthetic`, the mean rating (about 1 to 10) of a few samples spread over the clip."""

    name = "aesthetic"
    resources = Resources(cpus=1.0)
    produces = Produces(scores=["aesthetic"])

    def __init__(self, recipe: Aesthetic):
        self.recipe = recipe
        self._embedder: Any = None
        self._head: Any = None

    def setup(self) -> None:
        """Raises RecipeError when the head's file is missing, unreadable, or made for another model."""
        import pickle

        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from models.curation.aesthetic import AestheticHead
        from models.curation.embed import OpenClip

        device = self.resources.device()
        weights = Path(self.recipe.weights)
        if not weights.is_file():
            raise RecipeError(
                f"scores.aesthetic.weights: {weights} is not a file; give a .pth or .safetensors"
            )
        try:
            if weights.suffix == ".safetensors":
                state = load_file(weights)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            self._head = AestheticHead.from_state_dict(state).float()
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, SafetensorError) as e:
            raise RecipeError(
                f"scores.aesthetic.weights: {weights} is no aesthetic head: {one_line(e)[:200]}"
            ) from e
        self._embedder = OpenClip(self.recipe.model, self.recipe.pretrained, device, self.resources.batch)
        if self._head.width != self._embedder.size:
            raise RecipeError(
                f"scores.aesthetic: the head {weights} expects features of length {self._head.width}, "
                f"{self.recipe.model} gives {self._embedder.size}; name the CLIP it was trained on in "
                f"scores.aesthetic.model"
            )

    def __call__(self, videos: list[Video]) -> list[Video]:
        import torch

        looks, frames = gathered(videos, self.recipe.frames)
        features = torch.from_numpy(self._embedder.embed(frames))  # [n, d]
        with torch.inference_mode():
            # One by one: the size of a batch can change the last bits.
            ratings = iter([float(self._head(f[None])) for f in features])
        for clip, n in looks:
            clip.scores["aesthetic"] = round(sum(next(ratings) for _ in range(n)) / n, 4)
        return videos
