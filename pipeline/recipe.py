"""A recipe: every number and model of a run, in one YAML file, checked before any work starts.

One class a stage, in the order the data flows. Unknown keys and wrong types are errors that name the
key. `load` reads a bundled recipe by name or a file, applies `--set a.b=value` overrides, and returns
a frozen `Recipe`. What changes the measured data (everything but `decide`, `shards`, `resources`
and `limits`) is covered by `measure_key`: an output folder belongs to one such key.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

RECIPES = Path(__file__).parent.parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message is one sentence that names the key and the fix."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Decode(Section):
    """One pass over the source that makes everything the later stages look at."""

    sample_fps: float = Field(2.0, gt=0, description="frames a second kept at model size")
    sample_size: int = Field(512, ge=64, description="longer side of a kept frame, pixels (never enlarged)")
    jpeg_quality: int = Field(92, ge=50, le=100)
    grey_fps: float = Field(8.0, gt=0, description="small grey frames a second, for motion")
    grey_size: int = Field(128, ge=32, description="longer side of a grey frame, pixels")
    stall_s: float = Field(60.0, gt=0, description="give up when no frame arrives for so long")
    max_pixels: int = Field(8192 * 4320, description="refuse larger pictures")
    max_duration_s: float = Field(6 * 3600.0, gt=0, description="refuse longer sources")
    max_memory_gb: float = Field(8.0, gt=0, description="address space the decoding process may take")


class Shots(Section):
    """Where the camera cuts."""

    detector: Literal["transnetv2", "content"] = "transnetv2"
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


class Embedder(Section):
    """Image features by which pieces are compared; also the clips' embedding."""

    kind: Literal["efficientnet_lite0", "open_clip", "none"] = "efficientnet_lite0"
    model: str = Field("ViT-B-32", description="open_clip architecture")
    pretrained: str = Field("", description="open_clip tag, hf-hub name or weights file")


class Events(Section):
    """Panda-70M's second stage: pieces of shots stitched into semantically coherent events.

    Differences are Euclidean distances of unit features, d² = 2 (1 − cosine), so `max_inner` and
    `max_outer` belong to an embedder; the defaults are EfficientNet-Lite0's (recipes/embedded.yaml).
    """

    embedder: Embedder = Embedder()
    piece_s: float = Field(5.0, gt=0, description="long shots are cut into pieces of this length …")
    piece_slack_s: float = Field(2.0, ge=0, description="… while more than piece_s + this remains")
    position: float = Field(0.05, ge=0, lt=0.5, description="a piece is seen at this fraction from each end")
    max_inner: float = Field(1.1, gt=0, description="drop a piece whose two ends differ more (missed cut)")
    max_outer: float = Field(0.95, gt=0, description="start a new event where neighbouring ends differ more")
    min_s: float = Field(2.0, ge=0, description="shorter events are not cut out")
    max_s: float = Field(60.0, gt=0, description="longer events are truncated or split")
    longer: Literal["truncate", "split"] = "split"
    trim: float = Field(0.0, ge=0, lt=0.5, description="fraction taken off each end")
    clip_samples: int = Field(16, ge=1, description="kept frames of a clip that later stages may look at")


class Cut(Section):
    """Writing the clips."""

    mode: Literal["reencode", "copy"] = Field(
        "reencode", description="copy: stream copy where that is frame-exact, re-encode elsewhere"
    )
    codec: str = Field("libx264", description="any ffmpeg video encoder, e.g. h264_nvenc, libsvtav1")
    preset: str = "veryfast"
    crf: int = Field(18, ge=0, le=63)
    height: int | None = Field(
        None, description="scale down so that the shorter side is this; none: as the source"
    )
    keyframe_s: float = Field(2.0, gt=0, description="longest distance between keyframes")
    audio: bool = Field(False, description="keep the first sound track (AAC)")
    stall_s: float = Field(120.0, gt=0, description="give up when ffmpeg makes no progress for so long")


class Text(Section):
    """On-screen text by OCR."""

    enabled: bool = True
    frames: int = Field(2, ge=1, description="frames a clip to look at")
    size: int = Field(512, ge=64, description="longer side given to the text detector, pixels")
    confidence: float = Field(0.8, ge=0, le=1, description="of the recogniser, for a line to count as text")


class Aesthetic(Section):
    """Linear or MLP head on CLIP image features (LAION)."""

    weights: str = Field("", description="head weights (.pth/.safetensors); empty: no aesthetic score")
    model: str = Field("ViT-L-14", description="open_clip architecture the head was trained on")
    pretrained: str = Field("openai", description="open_clip tag or weights file")
    frames: int = Field(3, ge=1, description="frames a clip to rate")


class Scores(Section):
    """What is measured of every clip; pipeline/score/stage.py has the table of meanings and units."""

    motion: bool = Field(True, description="motion, motion_object, pan_x, pan_y, zoom, stillness")
    picture: bool = Field(True, description="sharpness, exposure, clipped, black_borders")
    watermark: bool = Field(True, description="overlays that stay put while the content changes")
    text: Text = Text()
    aesthetic: Aesthetic = Aesthetic()


class TagsCaptioner(Section):
    """Baseline `tags-baseline`: ImageNet tags as a sentence (EfficientNet-Lite0, embedded)."""

    kind: Literal["tags"]
    frames: int = Field(4, ge=1, description="frames a clip to look at")
    sure: float = Field(0.4, gt=0, lt=1, description="mean probability from which a tag is stated")
    unsure: float = Field(0.15, gt=0, lt=1, description="… and from which it is offered as a guess")


class MotionColourCaptioner(Section):
    """Baseline `colour-motion-baseline`: dominant colours, light and camera motion as a sentence."""

    kind: Literal["colour_motion"]
    frames: int = Field(4, ge=1, description="frames a clip to look at")


class TextCaptioner(Section):
    """Baseline `on-screen-text-baseline`: the text read on screen as a sentence (needs scores.text)."""

    kind: Literal["on_screen_text"]
    lines: int = Field(4, ge=1, description="most prominent lines to quote")


class GivenCaptioner(Section):
    """`given`: the caption that the list, or a .txt beside the video in its tar, came with."""

    kind: Literal["given"]
    column: str = Field("caption", description="of the list")
    pieces: bool = Field(False, description="also of clips that are a piece of what it was written for")


class TransformersCaptioner(Section):
    """Any transformers image- or video-text-to-text model."""

    kind: Literal["transformers"]
    model: str = Field(description="hub id or folder")
    name: str | None = Field(None, description="who wrote it, in the output; none: the model")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    prompt: str = "Describe the main subject and what happens in this video in one faithful sentence."
    input: Literal["video", "images", "image"] = Field(
        "video", description="images: the frames one by one; image: one random frame of the middle 40 %"
    )
    frames: int = Field(8, ge=1)
    context: bool = Field(
        False, description="add the source's title, description and subtitles to the prompt"
    )
    first_sentence: bool = Field(False, description="keep no more than the first sentence")
    max_new_tokens: int = Field(96, ge=1)
    beams: int = Field(1, ge=1, description="1: greedy")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch: int = Field(8, ge=1, description="clips of one source a forward pass")


class PythonCaptioner(Section):
    """A captioner of your own, see pipeline/caption/captioner.py."""

    kind: Literal["python"]
    captioner: str = Field(description="'file.py:Class' or 'package.module:Class'")
    options: dict[str, Any] = {}


Captioner = Annotated[
    TagsCaptioner
    | MotionColourCaptioner
    | TextCaptioner
    | GivenCaptioner
    | TransformersCaptioner
    | PythonCaptioner,
    Field(discriminator="kind"),
]


class Choose(Section):
    """Which caption stands for the clip."""

    method: Literal["consensus", "open_clip"] = "consensus"
    model: str = Field("ViT-B-32", description="open_clip architecture, for method open_clip")
    pretrained: str = Field("", description="open_clip tag or weights file, for method open_clip")
    frames: int = Field(8, ge=1, description="frames a clip to compare with, for method open_clip")


class Rule(Section):
    """Keep a clip only while `min` ≤ column ≤ `max`; a null column passes."""

    column: str = Field(
        description="a numeric column of clips/, e.g. duration_s or score_motion, or a score of the chosen "
        "caption, e.g. caption.consensus"
    )
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Rule:
        if self.min is None and self.max is None:
            raise ValueError("needs a min, a max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}, so no clip could pass")
        return self


class Duplicates(Section):
    """Near-duplicate clips; the best is kept (most pixels, then longest, then sharpest).

    The defaults are for EfficientNet-Lite0. bench/duplicates.py on 87 Panda-70M clips of different videos:
    none of 3741 pairs is called a copy (largest cosine 0.71); of 15 clips all are found when re-encoded at
    CRF 34, at half size, cropped by 5 %, brightened or with a logo, 10 begun 0.5 s later, 9 begun 1 s
    later, 4 with black bars of 10 %.
    """

    enabled: bool = True
    within: float = Field(0.955, gt=0, le=1, description="one source: cosine of redundant clips' embeddings")
    across: float = Field(0.8, gt=0, le=1, description="two sources: cosine of copies' embeddings …")
    signature: float = Field(
        0.75, gt=0, le=1, description="… and of their signatures (pipeline/score/signature.py)"
    )


class Decide(Section):
    """Thresholds over what was measured; changed freely on a finished run."""

    rules: dict[str, Rule] = {}
    need_caption: bool = Field(
        True, description="drop what no captioner could describe (where the run has captioners)"
    )
    duplicates: Duplicates = Duplicates()

    @field_validator("rules")
    @classmethod
    def _names(cls, rules: dict[str, Rule]) -> dict[str, Rule]:
        for name in {"no_caption", "duplicate"} & rules.keys():
            raise ValueError(f"the name {name!r} is clipmill's own, choose another")
        return rules


class Shards(Section):
    """WebDataset tars."""

    max_clips: int = Field(1000, ge=1)
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
    cpus: float | None = Field(None, ge=0)
    gpus: float | None = Field(None, ge=0, description="fractions share a GPU")
    min_workers: int | None = Field(None, ge=1)
    max_workers: int | None = Field(None, ge=1)


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


class Recipe(Section):
    name: str
    decode: Decode = Decode()
    shots: Shots = Shots()
    events: Events = Events()
    cut: Cut = Cut()
    scores: Scores = Scores()
    captions: tuple[Captioner, ...] = ()
    choose: Choose = Choose()
    decide: Decide = Decide()
    shards: Shards = Shards()
    resources: dict[str, StageResources] = Field(
        {}, description="by stage name; what is unset keeps its default"
    )
    limits: Limits = Limits()

    def measure_key(self) -> str:
        """Hash of everything that changes what `curate` measures."""
        measured = self.model_dump(mode="json", exclude={"name", "decide", "shards", "resources", "limits"})
        return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


R = TypeVar("R", bound=Section)


def bundled(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes that come with clipmill."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def load(name_or_file: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of that name or file, with `key=value` overrides (values are YAML).

    Raises RecipeError: one sentence with the key, what is wrong, and the fix.
    """
    return load_as(Recipe, name_or_file, overrides, RECIPES)


def load_as(kind: type[R], name_or_file: str, overrides: list[str] | None, folder: Path) -> R:
    """As `load`, for a recipe of any kind; the bundled ones of that kind are in `folder`."""
    path = folder / f"{name_or_file}.yaml"
    if name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file:
        path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(
            f"recipe {name_or_file!r} not found: name a .yaml file or one of {', '.join(bundled(folder))}"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe {path}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of sections, found {type(data).__name__}")
    return parse_as(kind, {"name": path.stem} | data, overrides or [], str(path))


def parse(data: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    """Check a recipe given as plain data. Raises RecipeError."""
    return parse_as(Recipe, data, overrides, where)


def parse_as(kind: type[R], data: dict[str, Any], overrides: list[str], where: str) -> R:
    """As `parse`, for a recipe of any kind."""
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq:
            raise RecipeError(f"--set {item!r}: write it as key=value, e.g. --set decode.sample_fps=4")
        try:
            _set(data, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError as e:
            raise RecipeError(f"--set {item!r}: the value is not valid YAML") from e
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        raise RecipeError(f"recipe {where}: " + "; ".join(_explain(err, kind) for err in e.errors())) from e


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    """data['a']['b'] = value for key 'a.b'; a number steps into a list."""
    *parents, last = key.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RecipeError(f"--set {key}: {part!r} is not an item of a list of {len(node)}")
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise RecipeError(f"--set {key}: {part!r} lies below a plain value")
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"--set {key}: {last!r} cannot be set there")


def _explain(err: Any, kind: type[Section]) -> str:
    loc = [str(p) for p in err["loc"]]
    key = ".".join(loc)
    if err["type"] != "extra_forbidden":
        said = err["msg"].removeprefix("Value error, ")
        return f"{key}: {said[:1].lower()}{said[1:]} (got {err['input']!r})"
    known = _keys_at(loc[:-1], kind)
    return f"{key}: unknown key" + (f"; known here: {', '.join(known)}" if known else "")


def _keys_at(loc: list[str], kind: type[Section]) -> list[str]:
    model: Any = kind
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = field.annotation
    return list(getattr(model, "model_fields", {}))
