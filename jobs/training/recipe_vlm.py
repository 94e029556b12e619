"""What a vision-language model's recipe has beside the core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jobs.training.recipe_core import TrainRecipe


class VLMRecipe(TrainRecipe):
    """From a run's shards to a vision-language model."""

    trains: Literal["vlm"] = "vlm"
    caption_bytes: int = Field(64, ge=2, description="of a caption, at most")
