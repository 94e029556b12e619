"""The part of a recipe that says who captions the clips, and which caption is chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.recipe_prompts import Prompt
from pipeline.recipe_schema import CODE, MAYBE_PATH, WORDS, Section


class TagsCaptioner(Section):
    """Baseline `tags-baseline`: ImageNet tags as a sentence (EfficientNet-Lite0, embedded)."""

    kind: Literal["tags"] = Field(description="which captioner")
    frames: int = Field(4, ge=1, description="frames a clip to look at")
    sure: float = Field(0.4, gt=0, lt=1, description="mean probability from which a tag is stated")
    unsure: float = Field(0.15, gt=0, lt=1, description="… and from which it is offered as a guess")


class MotionColourCaptioner(Section):
    """Baseline `colour-motion-baseline`: dominant colours, light and camera motion as a sentence."""

    kind: Literal["colour_motion"] = Field(description="which captioner")
    frames: int = Field(4, ge=1, description="frames a clip to look at")


class TextCaptioner(Section):
    """Baseline `on-screen-text-baseline`: the text read on screen as a sentence (needs scores.text)."""

    kind: Literal["on_screen_text"] = Field(description="which captioner")
    lines: int = Field(4, ge=1, description="most prominent lines to quote")


class PlainCaptioner(Section):
    """Baseline `plain-baseline`: what is really known of a clip without a download, as one sentence (embedded)."""

    kind: Literal["plain"] = Field(description="which captioner")
    frames: int = Field(8, ge=1, description="frames a clip to look at")
    sure: float = Field(
        0.5, gt=0, lt=1, description="mean probability of a subject from which it leads the sentence"
    )
    unsure: float = Field(0.25, gt=0, lt=1, description="… and from which it is offered as a guess")


class GivenCaptioner(Section):
    """`given`: the caption that the list, or a .txt beside the video in its tar, came with."""

    kind: Literal["given"] = Field(description="which captioner")
    column: str = Field("caption", description="of the list")
    pieces: bool = Field(False, description="also of clips that are a piece of what it was written for")


class TransformersCaptioner(Section):
    """Any transformers image- or video-text-to-text model."""

    kind: Literal["transformers"] = Field(description="which captioner")
    model: str = Field(description="hub id or folder", json_schema_extra=MAYBE_PATH)
    name: str | None = Field(None, description="who wrote it, in the output; none: the model")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    prompt: Prompt = Field(
        "Describe the main subject and what happens in this video in one faithful sentence.",
        description="what it is asked: words, a bundled prompt's name, or a .txt file (recipes/prompts)",
        json_schema_extra=WORDS,
    )
    input: Literal["video", "images", "image"] = Field(
        "video", description="images: the frames one by one; image: one random frame of the middle 40 %"
    )
    frames: int = Field(8, ge=1, description="frames a clip to look at (input video or images)")
    context: bool = Field(
        False, description="add the source's title, description and subtitles to the prompt"
    )
    first_sentence: bool = Field(False, description="keep no more than the first sentence")
    max_new_tokens: int = Field(96, ge=1, description="of an answer; a longer one is cut off")
    beams: int = Field(1, ge=1, description="1: greedy")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="numbers that the model computes with; auto: those it is stored in"
    )
    batch: int = Field(8, ge=1, description="clips of one source a forward pass")


class PythonCaptioner(Section):
    """A captioner of your own, see pipeline/caption/captioner.py."""

    kind: Literal["python"] = Field(description="which captioner")
    captioner: str = Field(description="'file.py:Class' or 'package.module:Class'", json_schema_extra=CODE)
    options: dict[str, Any] = Field({}, description="what its class is made with")


Captioner = Annotated[
    TagsCaptioner
    | MotionColourCaptioner
    | TextCaptioner
    | PlainCaptioner
    | GivenCaptioner
    | TransformersCaptioner
    | PythonCaptioner,
    Field(discriminator="kind"),
]


class VisualFitJudge(Section):
    """`visual_fit`: how well a text fits the pictures, by ImageNet's classes and sentence embeddings (embedded)."""

    kind: Literal["visual_fit"] = Field(description="which judge")
    frames: int = Field(8, ge=1, description="frames a clip to compare with")


class ClipScoreJudge(Section):
    """`clip_score`: how well a text fits the pictures, by an open_clip model (CLIPScore, a sentence at a time)."""

    kind: Literal["clip_score"] = Field(description="which judge")
    model: str = Field("ViT-B-32", description="open_clip architecture")
    pretrained: str = Field("", description="open_clip tag or weights file", json_schema_extra=MAYBE_PATH)
    frames: int = Field(8, ge=1, description="frames a clip to compare with")


class PacSJudge(Section):
    """`pac_s`: CLIPScore with weights tuned on augmented captions, which its makers publish."""

    kind: Literal["pac_s"] = Field(description="which judge")
    model: str = Field("ViT-B-32-quickgelu", description="open_clip architecture that the weights are of")
    pretrained: str = Field(description="weights file", json_schema_extra=MAYBE_PATH)
    frames: int = Field(8, ge=1, description="frames a clip to compare with")


class EMScoreJudge(Section):
    """`emscore`: the words against the frames and the text against the clip, by an open_clip model."""

    kind: Literal["emscore"] = Field(description="which judge")
    model: str = Field("ViT-B-32-quickgelu", description="open_clip architecture")
    pretrained: str = Field(
        "openai", description="open_clip tag or weights file", json_schema_extra=MAYBE_PATH
    )
    frames: int = Field(8, ge=1, description="frames a clip to compare with")


class ConsensusJudge(Section):
    """`consensus_minilm`, `consensus_cider`: mean similarity to what the other captioners said (embedded)."""

    kind: Literal["consensus_by"] = Field(description="which judge")
    by: Literal["minilm", "cider"] = Field(
        "minilm", description="minilm: cosine of sentence embeddings; cider: CIDEr-D of the words"
    )


class PythonJudge(Section):
    """A judge of your own, see pipeline/caption/judge.py."""

    kind: Literal["python"] = Field(description="which judge")
    judge: str = Field(description="'file.py:Class' or 'package.module:Class'", json_schema_extra=CODE)
    options: dict[str, Any] = Field({}, description="what its class is made with")


Judge = Annotated[
    VisualFitJudge | ClipScoreJudge | PacSJudge | EMScoreJudge | ConsensusJudge | PythonJudge,
    Field(discriminator="kind"),
]


class Choose(Section):
    """Which caption stands for the clip; all but `judges` is changed freely on a finished run."""

    judges: tuple[Judge, ...] = Field(
        (), description="who else scores the captions; `consensus` is always there"
    )
    method: str = Field(
        "consensus",
        description="a score, the highest stands: consensus is what most say, others are the judges'; weights: several "
        "of them; order: the first of `order` that says something",
    )
    weights: dict[str, float] = Field(
        {}, description="of scores by name, for method weights; a score that is missing counts 0"
    )
    order: tuple[str, ...] = Field(
        (), description="captioners by name, the preferred first, for method order; the others follow"
    )
    avoid: tuple[str, ...] = Field(
        ("refusal", "loop", "leak", "broken_json", "wrong_language"),
        description="flags with which a caption stands only where none without them does",
    )

    @model_validator(mode="before")
    @classmethod
    def _older(cls, data: Any) -> Any:
        """Recipes and runs of when there was one judge, whose options stood here."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        options = {k: data.pop(k) for k in ("model", "pretrained", "frames") if k in data}
        if data.pop("clip_score", False) or (data.get("method") == "open_clip" and options):
            data["judges"] = [*data.get("judges", ()), {"kind": "clip_score", **options}]
        return data | {"method": "clip_score"} if data.get("method") == "open_clip" else data

    @model_validator(mode="after")
    def _complete(self) -> Choose:
        if self.method == "order" and not self.order:
            raise ValueError("method order needs choose.order, a list of captioners, the preferred first")
        if self.method == "weights" and not self.weights:
            raise ValueError("method weights needs choose.weights, e.g. {clip_score: 1, consensus: 0.5}")
        return self
