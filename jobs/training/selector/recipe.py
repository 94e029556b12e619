"""What a selector's recipe has beside the core."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from jobs.training.recipe_core import HeldOut, Measured, TrainRecipe
from pipeline.recipe_schema import Section

UNUSED = ("fps", "buckets", "tokens", "captions", "shuffle", "together", "window", "streams")  # of `data`


class Features(Section):
    """By what a selector knows clips and captions: encoders that are not trained (models/choosing/frozen.py)."""

    video: tuple[str, ...] = Field(
        ("visual_fit",),
        min_length=1,
        description="of a clip, one after another: visual_fit, classes, efficientnet-lite0, clip:MODEL[:WEIGHTS], "
        "vivit:FOLDER, tower:MODEL, FILE.pt",
    )
    text: str = Field("minilm", description="of a caption: minilm, or clip:MODEL[:WEIGHTS]")
    frames: int = Field(8, ge=1, description="of a clip, spread over it")

    @field_validator("video")
    @classmethod
    def _known(cls, video: tuple[str, ...]) -> tuple[str, ...]:
        from models.choosing.frozen import check_video

        for name in video:
            check_video(name)
        return video

    @field_validator("text")
    @classmethod
    def _known_text(cls, text: str) -> str:
        from models.choosing.frozen import check_text

        check_text(text)
        return text


class Loss(Section):
    """What a selector is trained for: the weight of each part's mean over a step's clips."""

    rivals: float = Field(
        1.0, ge=0, description="the chosen caption among the clip's other candidates and those of other clips"
    )
    own: float = Field(1.0, gt=0, description="of rivals: what the clip's own other candidates weigh")
    others: float = Field(0.01, gt=0, description="of rivals: what captions of other clips weigh")
    contrastive: float = Field(1.0, ge=0, description="clips and chosen captions of a step, both ways")
    matching: float = Field(
        1.0,
        ge=0,
        description="a head that sees clip and caption together, on hard negatives; it then has the last word, and "
        "with 0 there is none: cosines decide",
    )

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.rivals or self.contrastive):
            raise ValueError("rivals and contrastive are both 0: give one, by which cosines are learnt")
        return self


class SelectorRecipe(TrainRecipe):
    """From a run's captions, and what people or a rule chose among them, to a judge of captions."""

    trains: Literal["selector"] = "selector"
    features: Features = Features()
    loss: Loss = Loss()
    votes: bool = Field(
        True,
        description="what people voted in the inspector of the run counts in place of the chosen caption; clips of "
        "which all captions are bad are left out",
    )
    held_out: HeldOut = 0.1
    measured: Measured = 256

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        if self.held_out == 0 or self.measured < 2:
            raise ValueError(
                "held_out and measured: a selector is calibrated on clips that it does not learn from: give a share "
                "above 0, and 2 clips or more"
            )
        return self

    @model_validator(mode="after")
    def _used(self) -> Self:
        for name in UNUSED:
            if getattr(self.data, name) != type(self.data).model_fields[name].get_default():
                raise ValueError(
                    f"data.{name}: a selector does not use it; features.frames says what it sees of a clip, and "
                    "data.batch how many clips a micro-batch has"
                )
        if not self.run.sample_every:
            raise ValueError("run.sample_every 0: a selector is calibrated and written when it is looked at")
        return self
