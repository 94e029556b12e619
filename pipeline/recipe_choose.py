"""The part of a recipe that says who judges the captions, and which caption is chosen."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from pipeline.recipe_captions import Looking, ServedModel
from pipeline.recipe_prompts import Prompt
from pipeline.recipe_schema import CODE, MAYBE_PATH, PATH, WORDS, Section


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


class Asked(Section):
    """A judge that asks a model about a caption."""

    question: Prompt = Field(
        'Does this show "{caption}"? Please answer yes or no.',
        description="what it is asked of a caption: words, a bundled prompt's name, or a .txt file",
        json_schema_extra=WORDS,
    )

    @model_validator(mode="after")
    def _of_a_caption(self) -> Self:
        if "{caption}" not in self.question:
            raise ValueError("question has no {caption}, the place of what is asked about")
        return self


class SelectorJudge(Section):
    """`selector`: how likely a text is the clip's own, by what `clipmill train selector` learnt from choices."""

    kind: Literal["selector"] = Field(description="which judge")
    model: str = Field(description="OUT/selector.pt of that training", json_schema_extra=PATH)
    name: str = Field("selector", description="of the score")


class YesJudge(Looking, Asked):
    """`p_yes`: P(yes | frames, 'Does this show "…"?') by a transformers model, one forward pass a text (VQAScore)."""

    kind: Literal["p_yes"] = Field(description="which judge")
    name: str = Field("p_yes", description="of the score")
    sentences: bool = Field(True, description="ask of each sentence too, of captions that have several")


class ServedYesJudge(ServedModel, Asked):
    """`served_yes`: P(yes) of a served model shown the frames and asked 'does this show …?', by its logprobs."""

    kind: Literal["served_yes"] = Field(description="which judge")
    name: str = Field("served_yes", description="of the score")
    frames: int = Field(4, ge=1, description="frames a clip to send")
    sentences: bool = Field(
        False, description="ask of each sentence too, of captions that have several: a request each"
    )


class PythonJudge(Section):
    """A judge of your own, see pipeline/caption/judge.py."""

    kind: Literal["python"] = Field(description="which judge")
    judge: str = Field(description="'file.py:Class' or 'package.module:Class'", json_schema_extra=CODE)
    options: dict[str, Any] = Field({}, description="what its class is made with")


Judge = Annotated[
    VisualFitJudge
    | ClipScoreJudge
    | PacSJudge
    | EMScoreJudge
    | SelectorJudge
    | YesJudge
    | ServedYesJudge
    | ConsensusJudge
    | PythonJudge,
    Field(discriminator="kind"),
]


class Choose(Section):
    """Which caption stands for the clip; all but `judges` is changed freely on a finished run."""

    # `--set 'choose={method: …}'` asks for another choice, not for fewer judges; `--set choose.judges=[]` does
    STAYS: ClassVar[frozenset[str]] = frozenset({"judges"})

    judges: tuple[Judge, ...] = Field(
        (), description="who else scores the captions; `consensus` is always there"
    )
    method: str = Field(
        "consensus",
        description="a score, the highest stands: consensus is what most say, others are the judges'; weights: several "
        "of them; order: the first of `order` that says something",
    )
    weights: dict[str, FiniteFloat] = Field(
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
