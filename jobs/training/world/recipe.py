"""What a world model's recipe has beside the core."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from jobs.training.paths import as_written
from jobs.training.recipe_core import Bucket, HeldOut, Measured, Run, TrainRecipe
from pipeline.recipe_schema import MAYBE_PATH, PATH, Section


class Pictures(Section):
    """What makes codes of pictures, and pictures of codes."""

    path: str | None = Field(
        None,
        description="a folder that `clipmill train vq` wrote; null: a model of text alone",
        json_schema_extra=PATH,
    )


class Words(Section):
    """What text is made of."""

    tokenizer: str = Field(
        "bytes",
        description="bytes; bpe: one trained on the captions; or the folder or hub id of one of transformers",
        json_schema_extra=MAYBE_PATH,
    )
    size: int = Field(2048, ge=1, description="of bpe: tokens, at most")


class Documents(Section):
    """Which documents there are, as shares of all of them, made 1 together; and what of them is learnt.

    What a document ends with is always learnt: the video of text → video.
    """

    text_to_video: float = Field(0.5, ge=0, description="caption, then clip")
    video_to_text: float = Field(0.5, ge=0, description="clip, then caption")
    text_to_image: float = Field(0.0, ge=0, description="caption, then one frame of the clip")
    image_to_text: float = Field(0.0, ge=0, description="one frame of the clip, then caption")
    text: float = Field(0.0, ge=0, description="conversations of `chat`, or captions alone")
    needle: float = Field(
        0.0,
        ge=0,
        description="captions as long as the context, a number among them that is asked for at last",
    )
    numbers: int = Field(1, ge=1, le=12, description="hidden in a document of needles, at most")
    chat: str | None = Field(
        None,
        description="a .jsonl file with conversations, or a folder of them; with a VQ autoencoder they may hold "
        "pictures and videos, the user's and the assistant's",
        json_schema_extra=PATH,
    )
    dropped: float = Field(
        0.1, ge=0, lt=1, description="of the captions before videos and images, for guidance"
    )
    prompts: tuple[Literal["text", "vision"], ...] = Field(
        (), description="what is learnt too where it comes first: captions, videos"
    )

    @model_validator(mode="after")
    def _some(self) -> Documents:
        if not sum(self.shares().values()):
            raise ValueError("all shares are 0: give one of text_to_video, video_to_text, … more")
        return self

    def shares(self) -> dict[str, float]:
        """Kind → its share of the documents, but for those that have none."""
        every = {kind: getattr(self, kind) for kind in KINDS}
        total = sum(every.values())
        return {kind: share / total for kind, share in every.items() if share} if total else {}


KINDS = ("text_to_video", "video_to_text", "text_to_image", "image_to_text", "text", "needle")


class Stage(Section):
    """A part of the training with a context of its own, which begins with what the one before it has learnt.

    What is null is as in the recipe.
    """

    context: int = Field(
        ge=8, description="tokens of a document at most; data.tokens are as many, where they are fewer"
    )
    steps: int = Field(ge=1, description="of the optimizer, in place of run.steps")
    theta: float | None = Field(
        None, gt=0, description="base of the rotary rates: the larger, the longer a context they tell apart"
    )
    lr: float | None = Field(None, gt=0, description="in place of optimizer.lr")
    documents: Documents | None = Field(None, description="in place of the recipe's")
    buckets: tuple[Bucket, ...] | None = Field(None, description="in place of data.buckets")


class Drawing(Section):
    """How the codes of a frame are drawn."""

    guidance: float = Field(1.0, ge=0, description="s of u + s (c − u); 1: none")
    temperature: float = Field(1.0, ge=0, description="0: the likeliest")
    top_k: int | None = Field(None, ge=1, description="among how many of the likeliest; null: all")


class WorldRun(Run):
    """And what is sampled whenever it is looked at."""

    prompts: tuple[str, ...] = Field((), description="what to sample; (): captions of the data")
    first: Drawing = Field(Drawing(), description="how a video's first frame is drawn, or a picture")
    rest: Drawing = Field(Drawing(), description="how the frames after it are drawn")


class WorldRecipe(TrainRecipe):
    """From a run's shards, and a VQ autoencoder, to one model that reads and writes text, pictures and videos."""

    SPLITS_SEQUENCES: ClassVar = True

    trains: Literal["world"] = "world"
    vq: Pictures = Pictures()
    text: Words = Words()
    documents: Documents = Documents()
    context: int | None = Field(
        None, ge=8, description="tokens of a document at most; null: data.tokens, which several may share"
    )
    pool: int = Field(32, ge=2, description="sequences that stay open while documents are packed")
    block: int = Field(
        0,
        ge=0,
        description="queries, and keys, that attention looks at together, in memory that grows with the context, not "
        "with its square; 0: a kernel's choice (512 where compute.context shares a sequence)",
    )
    start: str | None = Field(
        None, description="a world model that it begins with: a folder of training", json_schema_extra=PATH
    )
    stages: tuple[Stage, ...] = Field(
        (), description="one after the other, each in a folder of its own, OUT/stage-1 …; (): one training"
    )
    held_out: HeldOut = 0.0
    measured: Measured = 32
    run: WorldRun = WorldRun()

    @property
    def longest(self) -> int:
        """Tokens of a document at most."""
        return self.context or self.data.tokens

    @property
    def makes_vq(self) -> str:
        """The command that makes what vq.path names."""
        name = "toy-vq" if self.name.startswith("toy-") else "vq"
        return f"clipmill train vq RUN --recipe {name} --out {as_written(str(self.vq.path))}"

    @model_validator(mode="after")
    def _fits(self) -> WorldRecipe:
        if self.stages and self.run.steps != Run.model_fields["steps"].default:
            raise ValueError(
                "run.steps and stages: each stage has steps of its own: set those, or stages=[] for one training"
            )
        if self.longest > self.data.tokens:
            raise ValueError(f"context {self.context}: data.tokens hold {self.data.tokens}: raise them")
        if len({(b.height, b.width) for b in self.data.buckets}) > 1:
            raise ValueError("data.buckets: all frames of a world model have as many codes: give one size")
        if self.start and self.model.options().get("weights"):
            raise ValueError("start and model.weights: it cannot begin with both: leave one out")
        seen = [kind for kind in self.documents.shares() if kind not in ("text", "needle")]
        if not self.vq.path and seen:
            raise ValueError(
                f"documents.{seen[0]}: there are no codes without a VQ autoencoder: set vq.path, or this to 0"
            )
        return self

    def of_stage(self, number: int, before: str | None) -> WorldRecipe:
        """The recipe of a stage, counted from 0; before: the folder of the one before it."""
        stage, plain = self.stages[number], self.model_dump()
        changed: dict[str, dict[str, Any]] = {
            "data": {"tokens": max(self.data.tokens, stage.context), "buckets": stage.buckets},
            "model": {"theta": stage.theta},
            "optimizer": {"lr": stage.lr},
            "run": {"steps": stage.steps},
        }
        for section, changes in changed.items():
            plain[section] |= {key: value for key, value in changes.items() if value is not None}
        if before:
            plain["model"].pop("weights", None)  # it has them
        plain |= {
            "name": f"{self.name}, stage {number + 1} of {len(self.stages)}",
            "stages": (),
            "context": stage.context,
            "start": before or self.start,
            "documents": (stage.documents or self.documents).model_dump(),
        }
        return type(self).model_validate(plain)
