"""A recipe: every number and model of a run, in one YAML file, checked before any work starts.

One class a stage, in the order the data flows. Unknown keys and wrong types are errors that name the
key. `load` reads a bundled recipe by name or a file, applies `--set a.b=value` overrides, and returns
a frozen `Recipe`. What changes the measured data (everything but `decide`, `shards` and `resources`)
is covered by `measure_key`: an output folder belongs to one such key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
        4.0, ge=0, description="transnetv2 looks only where the cheap frame difference is above this; 0: everywhere"
    )
    content_threshold: float = Field(25.0, gt=0, description="content: PySceneDetect's ContentDetector threshold")
    min_shot_frames: int = Field(15, ge=1, description="shorter shots are joined to the one before (SUPPRESS)")


class Embedder(Section):
    """Image features."""

    kind: Literal["efficientnet_lite0", "open_clip"] = "efficientnet_lite0"
    model: str = Field("ViT-B-32", description="open_clip architecture")
    pretrained: str = Field("", description="open_clip tag, hf-hub name or weights file")


class Events(Section):
    """Panda-70M's second stage: pieces of shots stitched into semantically coherent events."""

    embedder: Embedder = Embedder()
    piece_s: float = Field(5.0, gt=0, description="long shots are cut into pieces of this length …")
    piece_slack_s: float = Field(2.0, ge=0, description="… while more than piece_s + this remains")
    position: float = Field(0.05, ge=0, lt=0.5, description="a piece is seen at this fraction from each end")
    max_inner: float = Field(1.0, description="drop a piece whose two ends are farther apart (missed cut)")
    max_outer: float = Field(0.6, description="start a new event where neighbouring ends are farther apart")
    min_s: float = Field(2.0, ge=0, description="shorter events are not cut out")
    max_s: float = Field(60.0, gt=0, description="longer events are truncated or split")
    longer: Literal["truncate", "split"] = "split"
    trim: float = Field(0.0, ge=0, lt=0.5, description="fraction taken off each end")


class Cut(Section):
    """Writing the clips."""

    mode: Literal["reencode", "copy"] = Field(
        "reencode", description="copy: stream copy where that is frame-exact, re-encode elsewhere"
    )
    codec: str = Field("libx264", description="any ffmpeg video encoder, e.g. h264_nvenc, libsvtav1")
    preset: str = "veryfast"
    crf: int = Field(18, ge=0, le=63)
    height: int | None = Field(None, description="scale so that the shorter side is this; none: as the source")
    keyframe_s: float = Field(2.0, gt=0, description="longest distance between keyframes")
    audio: bool = Field(False, description="keep the first sound track (AAC)")
    stall_s: float = Field(120.0, gt=0, description="give up when ffmpeg makes no progress for so long")


class Text(Section):
    """On-screen text by OCR."""

    enabled: bool = True
    frames: int = Field(2, ge=1, description="frames a clip to look at")
    size: int = Field(512, ge=64, description="longer side given to the text detector, pixels")


class Aesthetic(Section):
    """Linear head on CLIP image features (LAION)."""

    weights: str = Field("", description="head weights (.pth/.safetensors); empty: no aesthetic score")
    model: str = "ViT-L-14"
    pretrained: str = Field("", description="open_clip tag or weights file")


class Scores(Section):
    motion: bool = True
    picture: bool = Field(True, description="sharpness, exposure, black borders, stillness")
    watermark: bool = True
    text: Text = Text()
    aesthetic: Aesthetic = Aesthetic()


class TagsCaptioner(Section):
    """Baseline: ImageNet tags of the middle frame as a sentence (EfficientNet-Lite0)."""

    kind: Literal["tags"]


class MotionColourCaptioner(Section):
    """Baseline: dominant colours, light and camera motion as a sentence."""

    kind: Literal["colour_motion"]


class TextCaptioner(Section):
    """Baseline: the text read on screen as a sentence."""

    kind: Literal["on_screen_text"]


class TransformersCaptioner(Section):
    """Any transformers image- or video-text-to-text model."""

    kind: Literal["transformers"]
    model: str = Field(description="hub id or folder")
    revision: str | None = None
    prompt: str = "Describe the main subject and what happens in this video in one faithful sentence."
    input: Literal["video", "image"] = Field("video", description="image: one random frame of the middle 40 %")
    frames: int = Field(8, ge=1)
    context: bool = Field(False, description="add the source's title, description and subtitles to the prompt")
    max_new_tokens: int = Field(96, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch: int = Field(8, ge=1, description="clips a forward pass")


Captioner = Annotated[
    TagsCaptioner | MotionColourCaptioner | TextCaptioner | TransformersCaptioner, Field(discriminator="kind")
]


class Choose(Section):
    """Which caption stands for the clip."""

    method: Literal["consensus", "open_clip"] = "consensus"
    model: str = Field("ViT-B-32", description="open_clip architecture, for method open_clip")
    pretrained: str = ""


class Rule(Section):
    """Keep a clip only while `min` ≤ column ≤ `max`; a null column passes."""

    column: str = Field(description="a column of clips/, e.g. duration_s or score_motion")
    min: float | None = None
    max: float | None = None


class Duplicates(Section):
    """Near-duplicate clips, by cosine of the clip embeddings."""

    enabled: bool = True
    within: float = Field(0.955, gt=0, le=1, description="same source: cosine at or above is a duplicate")
    across: float = Field(0.97, gt=0, le=1, description="different sources: cosine at or above is a duplicate")


class Decide(Section):
    """Thresholds over what was measured; changed freely on a finished run."""

    rules: dict[str, Rule] = {}
    duplicates: Duplicates = Duplicates()


class Shards(Section):
    """WebDataset tars."""

    max_clips: int = Field(1000, ge=1)
    max_bytes: int = Field(1 << 30, ge=1 << 16)
    seed: int = 0
    lengths_s: tuple[float, ...] = Field((4.0, 8.0, 16.0, 32.0), description="edges of the length buckets")
    embeddings: bool = Field(False, description="add key.<name>.npy members")


class StageResources(Section):
    cpus: float | None = Field(None, ge=0)
    gpus: float | None = Field(None, ge=0, description="fractions share a GPU")
    min_workers: int | None = Field(None, ge=1)
    max_workers: int | None = Field(None, ge=1)


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
    resources: dict[str, StageResources] = Field({}, description="by stage name; what is unset keeps its default")

    def measure_key(self) -> str:
        """Hash of everything that changes what `curate` measures."""
        measured = self.model_dump(mode="json", exclude={"name", "decide", "shards", "resources"})
        return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


def bundled() -> list[str]:
    """Names of the recipes that come with clipmill."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load(name_or_file: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe of that name or file, with `key=value` overrides (values are YAML).

    Raises RecipeError: one sentence with the key, what is wrong, and the fix.
    """
    path = RECIPES / f"{name_or_file}.yaml"
    if name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file:
        path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(
            f"recipe {name_or_file!r} not found: name a .yaml file or one of {', '.join(bundled())}"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise RecipeError(f"recipe {path}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {path}: expected a mapping of sections, found {type(data).__name__}")
    return parse({"name": path.stem} | data, overrides or [], str(path))


def parse(data: dict[str, Any], overrides: list[str], where: str) -> Recipe:
    """Check a recipe given as plain data. Raises RecipeError."""
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq:
            raise RecipeError(f"--set {item!r}: write it as key=value, e.g. --set decode.sample_fps=4")
        try:
            _set(data, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError as e:
            raise RecipeError(f"--set {item!r}: the value is not valid YAML") from e
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise RecipeError(f"recipe {where}: " + "; ".join(_explain(err) for err in e.errors())) from e


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


def _explain(err: Any) -> str:
    loc = [str(p) for p in err["loc"]]
    key = ".".join(loc)
    if err["type"] != "extra_forbidden":
        return f"{key}: {err['msg'][:1].lower()}{err['msg'][1:]} (got {err['input']!r})"
    known = _keys_at([p for p in loc[:-1]])
    return f"{key}: unknown key" + (f"; known here: {', '.join(known)}" if known else "")


def _keys_at(loc: list[str]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = field.annotation
    return list(getattr(model, "model_fields", {}))
