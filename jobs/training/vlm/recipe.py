"""What a vision–language model's recipe has beside the core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from jobs.training.recipe_core import Data, HeldOut, LoRA, Measured, Mixed, TrainRecipe
from models.language.budget import Sampling
from pipeline.recipe_schema import PATH, Section

PROMPTS = (
    "Describe this video in one sentence.",
    "What happens in this video?",
    "Write a caption for this video.",
    "Describe the main subject and what happens in this video in one faithful sentence.",
)


class Frames(Section):
    """Which frames of a clip are seen, and what is said of them."""

    frames: int = Field(8, ge=1, description="of a clip, at most")
    fps: float | None = Field(None, gt=0, description="frames a second; null: `frames` spread over the clip")
    least: int = Field(1, ge=1, description="of a clip too short for so many at that rate, spread over it")
    ends: bool = Field(
        False,
        description="spread frames include the first and the last; otherwise each is the middle of a part",
    )
    anywhere: bool = Field(
        False, description="in training each of the spread frames lies anywhere in its part, by chance"
    )
    times: Literal["none", "prompt", "llava_next"] = Field(
        "none",
        description="prompt: when the frames are, in the words of the mill's captioner; llava_next: in LLaVA's",
    )
    static: float | None = Field(
        None,
        gt=0,
        description="leave out tokens whose pixels differ from those before by less than this, of 255; null: all "
        "are seen. transformers' own classes see all",
    )

    @model_validator(mode="after")
    def _fits(self) -> Frames:
        self.sampling()
        if self.anywhere and (self.fps or self.ends):
            raise ValueError("anywhere: is of frames spread over a clip: leave fps and ends out")
        return self

    def sampling(self) -> Sampling:
        return Sampling(self.frames, self.fps, self.least, self.ends)


class Parts(Section):
    """What is trained of the network; `optimizer.rates` has their rates: {projector: 1.0e-3, language: 2.0e-5}."""

    tower: Literal["frozen", "full", "lora"] = Field("frozen", description="what sees")
    projector: Literal["frozen", "full"] = Field(
        "full", description="from the tower to the language model; with it the reader"
    )
    language: Literal["frozen", "full", "lora"] = Field("full", description="the language model")


class Written(Section):
    """What is written about a clip, for a model with a `reader` (Panda-70M's student)."""

    columns: tuple[str, ...] = Field(
        ("title", "description", "subtitles"), min_length=1, description="of the list the clips came from"
    )
    dropout: float = Field(
        0.5, ge=0, lt=1, description="of subtitles, and of all else together, how often each is left out"
    )
    length: int = Field(128, ge=1, description="tokens, at most")


class VLMMixed(Mixed):
    """A run with shards, or conversations."""

    data: str = Field(
        description="a run with shards, a .jsonl file of conversations, or a folder with such files",
        json_schema_extra=PATH,
    )
    share: float = Field(ge=1e-4, lt=1, description="of the samples, to a ten-thousandth")


class VLMData(Data):
    """What a vision–language model sees of clips and conversations."""

    batch: int | None = Field(
        None, ge=1, description="packing off: samples a micro-batch, filled up to the longest"
    )
    tokens: int = Field(8192, ge=1, description="of a sequence, text and pictures: a sample has no more")
    mixture: tuple[VLMMixed, ...] = Field(
        (),
        description="other runs or conversations, each with its share; the run that is named to train has the rest",
    )
    packing: bool = Field(
        True, description="samples lie end to end in sequences of `tokens` and do not see each other"
    )
    pool: int = Field(8, ge=2, description="packing: sequences that are open at once, of each lane")
    lanes: int = Field(
        16, ge=1, description="packing: lists of samples packed by themselves; processes must divide it"
    )

    @model_validator(mode="after")
    def _used(self) -> VLMData:
        for name in ("buckets", "fps"):
            if getattr(self, name) != Data.model_fields[name].default:
                raise ValueError(
                    f"{name}: a vision–language model's frames are told by `frames`: leave it out"
                )
        if self.packing and self.batch is not None:
            raise ValueError(
                "batch: packed sequences hold as many samples as fit: set packing: false, or tokens"
            )
        return self


class VLMRecipe(TrainRecipe):
    """From a run's shards and conversations to a vision–language model."""

    trains: Literal["vlm"] = "vlm"
    start: str | None = Field(
        None,
        description="begin with this vision–language model (an earlier stage): a folder that clipmill train wrote",
        json_schema_extra=PATH,
    )
    data: VLMData = VLMData()
    frames: Frames = Frames()
    tokenizer: int = Field(
        512,
        ge=261,
        description="tokens of the tokenizer that is trained on the captions for a language model begun from nothing",
    )
    written: Written | None = Field(None, description="for a model with a reader; null: nothing is read")
    prompts: tuple[str, ...] = Field(
        PROMPTS, min_length=1, description="how captions are asked for, one drawn for each sample"
    )
    train: Parts = Parts()
    lora: LoRA | None = Field(None, description="the adapters of parts that are trained with `lora`")
    held_out: HeldOut = 0.05
    measured: Measured = 32
    answer: int = Field(64, ge=1, description="tokens of an answer, at most")

    @field_validator("prompts")
    @classmethod
    def _said(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not all(p.strip() for p in prompts):
            raise ValueError("an empty prompt asks for nothing")
        return prompts

    @model_validator(mode="after")
    def _adapters(self) -> VLMRecipe:
        asked = [name for name in ("tower", "language") if getattr(self.train, name) == "lora"]
        if asked and self.lora is None:
            raise ValueError(f"train.{asked[0]}: lora, but there is no section lora: add lora: {{rank: 16}}")
        if self.lora is not None and not asked:
            raise ValueError("lora: no part of `train` is trained with it: set train.language: lora")
        if (self.written is None) != (self.model.options().get("reader") is None):
            raise ValueError(
                "written and model.reader go together: give both, {} where all is as it is, or none"
            )
        if all(how == "frozen" for how in self.train.model_dump().values()):
            raise ValueError("train: every part is frozen, so there is nothing to train")
        return self
