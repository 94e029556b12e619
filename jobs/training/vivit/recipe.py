"""What a video classifier's recipe has beside the core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from jobs.training.recipe_core import HeldOut, Measured, TrainRecipe
from pipeline.recipe_schema import Section


class Labels(Section):
    """What captions say of a clip, group by group; a caption that names none of a group says nothing of it."""

    groups: dict[str, tuple[str, ...]] = Field(
        {},
        description="name → words or phrases (a plural's s may follow), one of which a caption names at best",
    )
    words: int = Field(
        0, ge=0, description="a group more, of the commonest words of the captions that say something"
    )

    @model_validator(mode="after")
    def _some(self) -> Labels:
        if not self.groups and self.words < 2:
            raise ValueError("give groups of phrases, or words: 2 or more")
        for name, phrases in self.groups.items():
            if name == "words":
                raise ValueError("groups: 'words' is the name of the group of common words; choose another")
            if len(set(phrases)) < 2:
                raise ValueError(f"groups.{name}: give two or more phrases, which differ")
        return self


class ViViTRecipe(TrainRecipe):
    """From a run's shards to a network that tells clips' labels, whose features measure distances."""

    trains: Literal["vivit"] = "vivit"
    labels: Labels = Field(description="what it learns to tell")
    held_out: HeldOut = 0.1
    measured: Measured = 256
