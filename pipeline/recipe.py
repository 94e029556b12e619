"""A recipe: every number and model of a run, in one YAML file, checked before any work starts.

One class a stage, in the order the data flows (captioners in recipe_captions.py, judges and the choice in
recipe_choose.py); recipe_file.py reads the files, and `clipmill recipe explain` prints what is described here. `load`
reads a bundled recipe by name or a file, applies
`--set a.b=value` overrides, and returns a frozen `Recipe`. What changes the measured data (`Recipe.measured`) is
covered by `measure_key`: an output folder belongs to one such key.
"""

from __future__ import annotations

import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline import recipe_file
from pipeline.recipe_captions import Captioner
from pipeline.recipe_choose import Choose
from pipeline.recipe_file import load_as, parse_as
from pipeline.recipe_schema import CODE, MAYBE_PATH, PATH, RecipeError, Section, nearest

__all__ = ["Recipe", "RecipeError", "Section", "bundled", "load", "nearest", "parse"]

RECIPES = Path(__file__).parent.parent / "recipes"


def bundled(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes that come with clipmill."""
    return recipe_file.bundled(folder)


class Decode(Section):
    """One pass over the source that makes everything the later stages look at."""

    sample_fps: float = Field(2.0, gt=0, description="frames a second kept at model size")
    sample_size: int = Field(512, ge=64, description="longer side of a kept frame, pixels (never enlarged)")
    jpeg_quality: int = Field(92, ge=50, le=100, description="of the kept frames")
    grey_fps: float = Field(8.0, gt=0, description="small grey frames a second, for motion")
    grey_size: int = Field(128, ge=32, description="longer side of a grey frame, pixels")
    deinterlace: bool = Field(
        True,
        description="deinterlace frames flagged as interlaced (bwdif, a frame a frame), for models and clips",
    )
    hdr: Literal["tone_map", "keep"] = Field(
        "tone_map",
        description="PQ and HLG: models always see them as BT.709; tone_map: clips are that too; keep: clips are "
        "10-bit HDR with its tags",
    )
    stall_s: float = Field(60.0, gt=0, description="give up when no frame arrives for so long")
    max_pixels: int = Field(8192 * 4320, description="refuse larger pictures")
    max_duration_s: float = Field(6 * 3600.0, gt=0, description="refuse longer sources")
    max_memory_gb: float = Field(8.0, gt=0, description="address space the decoding process may take")


class Shots(Section):
    """Where the camera cuts."""

    detector: Literal["transnetv2", "content", "whole"] = Field(
        "transnetv2",
        description="a network that knows dissolves, colours that jump (PySceneDetect's rule), or none: each video "
        "is one whole clip, neither split nor dropped",
    )
    threshold: float = Field(0.5, description="transnetv2: probability of a boundary", gt=0, lt=1)
    candidate_threshold: float = Field(
        7.0,
        ge=0,
        description="transnetv2 looks where colours move so far in 8 frames (grey levels); 0: everywhere",
    )
    content_threshold: float = Field(
        25.0, gt=0, description="content: PySceneDetect's ContentDetector threshold"
    )
    min_shot_frames: int = Field(
        15, ge=1, description="content: cuts so soon after another are ignored (SUPPRESS)"
    )
    transitions: Literal["keep", "trim"] = Field(
        "keep",
        description="trim: frames of dissolves, fades and wipes belong to no shot; keep: to both neighbours",
    )


class Embedder(Section):
    """Image features by which pieces are compared; also the clips' embedding."""

    kind: Literal["efficientnet_lite0", "open_clip", "none"] = Field(
        "efficientnet_lite0", description="none: every shot is an event of its own"
    )
    model: str = Field("ViT-B-32", description="open_clip architecture")
    pretrained: str = Field(
        "", description="open_clip tag, hf-hub name or weights file", json_schema_extra=MAYBE_PATH
    )


class Events(Section):
    """Panda-70M's second stage: pieces of shots stitched into semantically coherent events.

    Differences are Euclidean distances of unit features, d² = 2 (1 − cosine), so `max_inner` and
    `max_outer` belong to an embedder; the defaults are EfficientNet-Lite0's (recipes/embedded.yaml).
    """

    embedder: Embedder = Field(Embedder(), description="what pieces are compared by")
    piece_s: float = Field(5.0, gt=0, description="long shots are cut into pieces of this length …")
    piece_slack_s: float = Field(2.0, ge=0, description="… while more than piece_s + this remains")
    position: float = Field(0.05, ge=0, lt=0.5, description="a piece is seen at this fraction from each end")
    max_inner: float = Field(1.1, gt=0, description="drop a piece whose two ends differ more (missed cut)")
    max_outer: float = Field(0.95, gt=0, description="start a new event where neighbouring ends differ more")
    min_s: float = Field(2.0, ge=0, description="shorter events are not cut out")
    max_s: float = Field(60.0, gt=0, description="longer events are truncated or split")
    longer: Literal["truncate", "split"] = Field("split", description="what happens to events above max_s")
    trim: float = Field(0.0, ge=0, lt=0.5, description="fraction taken off each end")
    clip_samples: int = Field(16, ge=1, description="kept frames of a clip that later stages may look at")


class Cut(Section):
    """Writing the clips."""

    mode: Literal["reencode", "copy"] = Field(
        "reencode", description="copy: stream copy where that is frame-exact, re-encode elsewhere"
    )
    codec: str = Field("libx264", description="any ffmpeg video encoder, e.g. h264_nvenc, libsvtav1")
    preset: str = Field("veryfast", description="of the encoder: speed against size")
    crf: int = Field(18, ge=0, le=63, description="quality of the encoder; lower is better and larger")
    height: int | None = Field(
        None, description="scale down so that the shorter side is this; none: as the source"
    )
    keyframe_s: float = Field(2.0, gt=0, description="longest distance between keyframes")
    audio: bool = Field(False, description="keep the first sound track (AAC)")
    stills: bool = Field(
        True,
        description="keep the frames that models are shown beside each clip, so that captioners and measures added "
        "later see the very same and nothing is decoded again",
    )
    stall_s: float = Field(120.0, gt=0, description="give up when ffmpeg makes no progress for so long")


class Text(Section):
    """On-screen text by OCR."""

    enabled: bool = Field(True, description="read it at all")
    frames: int = Field(2, ge=1, description="frames a clip to look at")
    size: int = Field(512, ge=64, description="longer side given to the text detector, pixels")
    confidence: float = Field(0.8, ge=0, le=1, description="of the recogniser, for a line to count as text")


class Aesthetic(Section):
    """Linear or MLP head on CLIP image features (LAION)."""

    weights: str = Field(
        "", description="head weights (.pth/.safetensors); empty: no aesthetic score", json_schema_extra=PATH
    )
    model: str = Field("ViT-L-14", description="open_clip architecture the head was trained on")
    pretrained: str = Field(
        "openai", description="open_clip tag or weights file", json_schema_extra=MAYBE_PATH
    )
    frames: int = Field(3, ge=1, description="frames a clip to rate")


class Scores(Section):
    """What is measured of every clip; pipeline/score/stage.py has the table of meanings and units."""

    motion: bool = Field(True, description="motion, motion_object, pan_x, pan_y, zoom, stillness")
    picture: bool = Field(True, description="sharpness, exposure, clipped, black_borders")
    watermark: bool = Field(True, description="overlays that stay put while the content changes")
    text: Text = Field(Text(), description="text_area, and what is read")
    aesthetic: Aesthetic = Field(Aesthetic(), description="how beautiful people would find it")


class OwnStage(Section):
    """A stage of your own, see pipeline/own_stage.py."""

    stage: str = Field(description="'file.py:Class' or 'package.module:Class'", json_schema_extra=CODE)
    after: str = Field("scores", description="the stage that it follows")
    options: dict[str, Any] = Field({}, description="keyword arguments that its class is made with")


class Rule(Section):
    """Keep a clip only while a column says what is asked: a number within bounds, or a text.

    What was not measured, or is no number, passes min and max. A text that is not there is an empty one; capitals
    do not matter.
    """

    column: str = Field(
        description="a column of clips/ (duration_s, score_motion, name, …), meta.KEY of the list's own columns, "
        "text (read on screen), caption (the chosen one), caption_model, or caption.SCORE of it"
    )
    min: float | None = Field(
        None, description="keep from this number on; what was not measured, or is no number, passes"
    )
    max: float | None = Field(None, description="keep up to this number; what has none passes")
    contains: tuple[str, ...] = Field((), description="keep what contains this text, or one of several")
    excludes: tuple[str, ...] = Field((), description="keep what contains none of these texts")
    matches: str | None = Field(None, description="keep what this regular expression finds something in")
    not_matches: str | None = Field(None, description="keep what this regular expression finds nothing in")

    @field_validator("contains", "excludes", mode="before")
    @classmethod
    def _one_or_several(cls, texts: Any) -> Any:
        return (texts,) if isinstance(texts, str) else texts

    @field_validator("contains", "excludes")
    @classmethod
    def _not_empty(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        if any(not t for t in texts):
            raise ValueError("an empty text is in every text")
        return texts

    @field_validator("matches", "not_matches")
    @classmethod
    def _regular(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as e:
            raise ValueError(f"not a regular expression: {e}") from e
        return pattern

    @property
    def textual(self) -> bool:
        """It asks for a text, not for a number."""
        return bool(self.contains or self.excludes) or (self.matches, self.not_matches) != (None, None)

    @model_validator(mode="after")
    def _asks(self) -> Rule:
        bounded = self.min is not None or self.max is not None
        if not bounded and not self.textual:
            raise ValueError(
                "needs a min, a max or both, or for a text contains, excludes, matches or not_matches"
            )
        if bounded and self.textual:
            raise ValueError("min and max are for numbers, the others for texts: make two rules")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}, so no clip could pass")
        return self

    def told(self) -> dict[str, Any]:
        """What it says, without what it leaves open."""
        bounds = {"column": self.column, "min": self.min, "max": self.max}
        return self.model_dump(mode="json", exclude_defaults=True) if self.textual else bounds

    def words(self) -> str:
        """What it asks of a text, e.g. 'contains “dog” or “cat”'; '' where it asks for a number."""
        quoted = {k: " or ".join(f"“{t}”" for t in getattr(self, k)) for k in ("contains", "excludes")}
        parts = [
            f"contains {quoted['contains']}" if self.contains else "",
            f"does not contain {quoted['excludes']}" if self.excludes else "",
            f"matches /{self.matches}/" if self.matches is not None else "",
            f"does not match /{self.not_matches}/" if self.not_matches is not None else "",
        ]
        return " and ".join(filter(None, parts))


class Duplicates(Section):
    """Near-duplicate clips; the best is kept (most pixels, then longest, then sharpest).

    The defaults are for EfficientNet-Lite0. bench/duplicates.py on 87 Panda-70M clips of different videos:
    none of 3741 pairs is called a copy (largest cosine 0.71); of 15 clips all are found when re-encoded at
    CRF 34, at half size, cropped by 5 %, brightened or with a logo, 10 begun 0.5 s later, 9 begun 1 s
    later, 4 with black bars of 10 %.
    """

    enabled: bool = Field(True, description="look for them at all")
    within: float = Field(0.955, gt=0, le=1, description="one source: cosine of redundant clips' embeddings")
    across: float = Field(0.8, gt=0, le=1, description="two sources: cosine of copies' embeddings …")
    signature: float = Field(
        0.75, gt=0, le=1, description="… and of their signatures (pipeline/score/signature.py)"
    )


class Decide(Section):
    """Thresholds over what was measured; changed freely on a finished run."""

    rules: dict[str, Rule] = Field({}, description="by a name of your choice; null switches one off")
    need_caption: bool = Field(
        True, description="drop what no captioner could describe (where the run has captioners)"
    )
    duplicates: Duplicates = Field(Duplicates(), description="copies and near-copies")

    @field_validator("rules")
    @classmethod
    def _names(cls, rules: dict[str, Rule]) -> dict[str, Rule]:
        for name in {"no_caption", "duplicate"} & rules.keys():
            raise ValueError(f"the name {name!r} is clipmill's own, choose another")
        return rules


class Shards(Section):
    """WebDataset tars."""

    max_clips: int = Field(1000, ge=1, description="of a tar")
    max_bytes: int = Field(1 << 30, ge=1 << 16, description="of a tar; a larger clip gets a tar of its own")
    seed: int = Field(0, description="of the shuffle")
    lengths_s: tuple[float, ...] = Field(
        (4.0, 8.0, 16.0, 32.0), description="edges of the length buckets, seconds"
    )
    embeddings: bool = Field(False, description="add key.<name>.npy members")

    @field_validator("lengths_s")
    @classmethod
    def _increasing(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if any(a >= b for a, b in pairwise((0.0, *edges))):
            raise ValueError("the edges must be above 0 and increase")
        return edges


class StageResources(Section):
    """What a worker of a stage takes, and how many workers there may be."""

    cpus: float | None = Field(None, ge=0, description="of a worker")
    gpus: float | None = Field(None, ge=0, description="fractions share a GPU")
    min_workers: int | None = Field(None, ge=1, description="processes that are always there")
    max_workers: int | None = Field(None, ge=1, description="most processes; null: as many as fit")
    batch: int | None = Field(
        None, ge=1, description="pictures a forward pass on a GPU; null: the model's own"
    )


class Limits(Section):
    """How long work may take, seconds; changed freely on a resumed run."""

    source_s: float = Field(
        6 * 3600.0, gt=0, description="all stages together on one source; beyond that it is an error row"
    )
    caption_s: float = Field(
        600.0, gt=0, description="a captioner on one clip or batch; beyond that those captions are errors"
    )
    stall_s: float = Field(
        600.0,
        gt=0,
        description="a stage without progress hangs: its worker is replaced, the source an error row",
    )
    setup_s: float = Field(1800.0, gt=0, description="a worker that loads its models")
    chunk_s: float = Field(
        600.0,
        gt=0,
        description="a longer source goes on in chunks once its clips are known, each committed on its own",
    )


class Recipe(Section):
    """Raw videos to captioned shards."""

    name: str = Field(description="of the recipe; that of its file where none is given")
    decode: Decode = Decode()
    shots: Shots = Shots()
    events: Events = Events()
    cut: Cut = Cut()
    scores: Scores = Scores()
    stages: tuple[OwnStage, ...] = Field((), description="stages of your own")
    captions: tuple[Captioner, ...] = Field((), description="captioners, all of which caption every clip")
    choose: Choose = Choose()
    decide: Decide = Decide()
    shards: Shards = Shards()
    resources: dict[str, StageResources] = Field(
        {}, description="by stage name; what is unset keeps its default"
    )
    limits: Limits = Limits()

    def measured(self) -> dict[str, Any]:
        """Everything that changes what `curate` measures, as plain data."""
        found = self.model_dump(mode="json", exclude=NOT_MEASURED)
        found["captions"] = [what(section) for section in self.captions]
        found["choose"] = {
            "judges": [what(section) for section in self.choose.judges]
        }  # the choice is made later
        if not self.stages:  # so that runs from before there were any go on
            del found["stages"]
        return found

    def measure_key(self) -> str:
        """Hash of everything that changes what `curate` measures."""
        return hashlib.sha256(json.dumps(self.measured(), sort_keys=True).encode()).hexdigest()[:16]


def what(section: Section) -> dict[str, Any]:
    """A section without what says only how and where it is done."""
    return section.model_dump(mode="json", exclude=set(getattr(section, "HOW", ())))


NOT_MEASURED = {"name", "decide", "shards", "resources", "limits"}

# Options that came after folders were made without them: the value that measures as clipmill did before, None
# where no value does. An option that is in no folder's recipe and not here measures by its default as before.
BEFORE: dict[str, Any] = {
    "decode.deinterlace": False,
    "decode.hdr": None,  # HDR was shown to models as it is stored and cut to 8 bits
    "shots.transitions": "keep",
    "cut.stills": False,
}


def load(name_or_file: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of that name or file, with `key=value` overrides (values are YAML).

    Raises RecipeError: one sentence with the key, what is wrong, and the fix.
    """
    return load_as(Recipe, name_or_file, overrides, RECIPES)


def parse(data: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    """Check a recipe given as plain data. Raises RecipeError."""
    return parse_as(Recipe, data, overrides, where)
