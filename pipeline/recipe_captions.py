"""The part of a recipe that says who captions the clips."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, field_validator, model_validator

from pipeline.recipe_prompts import Context, Prompt
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


class Looking(Section):
    """What a model of transformers is, and what it is shown."""

    model: str = Field(description="hub id or folder", json_schema_extra=MAYBE_PATH)
    name: str | None = Field(None, description="who wrote it, in the output; none: the model")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    input: Literal["auto", "video", "images", "image"] = Field(
        "auto",
        description="images: the frames one by one; image: one random frame of the middle 40 %; auto: video where the "
        "model takes that",
    )
    times: Literal["auto", "prompt", "none"] = Field(
        "auto",
        description="whether the prompt tells when each frame is; auto: of images, where nothing else tells it",
    )
    frames: int = Field(8, ge=1, description="frames a clip to look at (input video or images)")
    max_pixels: int | None = Field(
        None,
        ge=1,
        description="of each frame, in families that look at sizes; none: the family's own preprocessing",
    )
    tokens: int | None = Field(None, ge=1, description="max_pixels, said in visual tokens a frame")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="numbers that the model computes with; auto: those it is stored in"
    )
    device_map: str | None = Field(
        None, description="accelerate's, e.g. auto: a model larger than one GPU over all that its worker has"
    )
    batch: int = Field(
        8, ge=1, description="clips a forward pass, of any sources; frames of one number and size"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.max_pixels and self.tokens:
            raise ValueError("max_pixels and tokens say the same; keep one")
        return self


class TransformersCaptioner(Looking):
    """Any transformers image- or video-text-to-text model."""

    kind: Literal["transformers"] = Field(description="which captioner")
    prompt: Prompt | None = Field(
        None,
        description="what it is asked: words, a bundled prompt's name, or a .txt file (recipes/prompts); none: what "
        "suits the model's family, mostly one sentence on the main subject and what happens",
        json_schema_extra=WORDS,
    )
    context: Context = Field(
        None,
        validate_default=True,
        description="which of the source's title, description and subtitles it is told; none: those that its prompt "
        "names; true: all three",
    )
    first_sentence: bool = Field(False, description="keep no more than the first sentence")
    max_new_tokens: int = Field(96, ge=1, description="of an answer; a longer one is cut off")
    beams: int = Field(1, ge=1, description="1: greedy")
    temperature: float = Field(0.0, ge=0, description="of sampling; 0: the likeliest words")
    top_p: float = Field(
        1.0, gt=0, le=1, description="of sampling: share of the probability that is drawn from"
    )
    seed: int = Field(0, description="of sampling: a caption depends on it and on the clip's id")
    thinking: bool = Field(
        False,
        description="let a model that can think do so first, within max_new_tokens; never in the caption",
    )

    @model_validator(mode="after")
    def _one_search(self) -> Self:
        if self.beams > 1 and self.temperature:
            raise ValueError("beams search for the likeliest words and temperature draws by chance; keep one")
        return self


class ServedModel(Section):
    """A model behind an OpenAI-compatible server, and how it is asked."""

    # How it is asked and where changes nothing of what is measured: a run may go on with another server of the model.
    HOW: ClassVar[frozenset[str]] = frozenset(
        {
            "url",
            "key_env",
            "key_header",
            "concurrency",
            "per_minute",
            "tries",
            "timeout_s",
            "overall_s",
            "batch",
        }
    )

    url: str = Field(description="of its API, e.g. http://localhost:8000/v1")
    model: str = Field(description="what the server calls it")
    name: str | None = Field(None, description="who wrote it, in the output; none: the model")
    key_env: str | None = Field(None, description="environment variable that holds the API key")
    key_header: str = Field(
        "Authorization", description="header that takes the key; Authorization: as 'Bearer KEY'"
    )
    parameters: dict[str, Any] = Field(
        {},
        description="fields of the request, sent as they are, and no others: max_tokens, temperature, seed, …",
    )
    concurrency: int = Field(
        16, ge=1, description="requests at once, of each worker (one, unless resources say more)"
    )
    per_minute: float | None = Field(
        None, gt=0, description="requests started a minute at most; none: no limit"
    )
    tries: int = Field(
        8, ge=1, description="of a request, where the moment is at fault (408, 429, 5xx, a broken line)"
    )
    timeout_s: float = Field(180.0, gt=0, description="one try may take so long")
    overall_s: float = Field(900.0, gt=0, description="all tries of a request and the waits between them")
    usd_in: float = Field(0.0, ge=0, description="price of a million prompt tokens, USD, for the account")
    usd_out: float = Field(0.0, ge=0, description="price of a million tokens of answers, USD")

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            named = False
        if not named:
            raise ValueError(f"{url!r} is no address of a server; write http://HOST:PORT/v1")
        secret = {"key", "api_key", "apikey", "api-key", "token", "access_token"}
        if "@" in parts.netloc or secret & {k.lower() for k in parse_qs(parts.query)}:
            raise ValueError(
                "holds a secret, and recipes are kept with the run: put it into key_env's variable"
            )
        return url

    @field_validator("parameters")
    @classmethod
    def _theirs(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        if ours := {"model", "messages", "stream"} & parameters.keys():
            raise ValueError(f"{', '.join(sorted(ours))}: not to be set here, clipmill writes it")
        if parameters.get("n", 1) != 1:
            raise ValueError("n: more than one answer would be paid for, and one is read")
        for name, value in parameters.items():
            try:
                json.dumps(value, allow_nan=False, sort_keys=True)
            except (TypeError, ValueError) as e:
                raise ValueError(f"{name}: {value!r} cannot be sent as JSON ({e})") from e
        return parameters


class ServedCaptioner(ServedModel):
    """Any model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, hosted ones."""

    kind: Literal["served"] = Field(description="which captioner")
    prompt: Prompt = Field(
        "Describe the main subject and what happens in this video in one faithful sentence.",
        description="what it is asked: words, a bundled prompt's name, or a .txt file (recipes/prompts)",
        json_schema_extra=WORDS,
    )
    input: Literal["images", "video", "jpegs"] = Field(
        "images",
        description="images: the frames, their times in words; video: the clip's mp4; jpegs: the frames as a video "
        "with exact times (vLLM with --trust-request-mm-kwargs)",
    )
    frames: int = Field(8, ge=1, description="frames a clip to send (input images or jpegs)")
    detail: Literal["low", "high", "auto"] | None = Field(
        None, description="of each image, for servers that know it; none: not sent"
    )
    context: Context = Field(
        None,
        validate_default=True,
        description="which of the source's title, description and subtitles it is told; none: those that its prompt "
        "names; true: all three",
    )
    structured: bool = Field(
        False,
        description="ask for a JSON object of subjects, action, scene, style, shot, lighting and camera; its text is "
        "the caption, the camera in it is what was measured (prompt: structured, where none is given)",
    )
    enforce: bool = Field(
        False,
        description="send the JSON schema as response_format, for servers that hold the model to it; the answer is "
        "checked in any case",
    )
    batch: int = Field(64, ge=1, description="clips in work together, of any sources")

    @model_validator(mode="before")
    @classmethod
    def _asks_for_json(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("structured") is True and "prompt" not in data:
            return data | {"prompt": "structured"}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ServedCaptioner:
        if self.enforce and not self.structured:
            raise ValueError(
                "enforce needs structured: true; another schema goes into parameters.response_format"
            )
        if self.enforce and "response_format" in self.parameters:
            raise ValueError("parameters.response_format and enforce: choose one")
        if self.input == "jpegs" and "media_io_kwargs" in self.parameters:
            raise ValueError("parameters.media_io_kwargs: input jpegs writes it")
        return self


class FuseCaptioner(ServedModel):
    """One text from what other captioners said of a clip, by any served model; after them in the recipe."""

    kind: Literal["fuse"] = Field(description="which captioner")
    of: tuple[str, ...] = Field((), description="names of the captioners; none: all before it")
    fields: bool = Field(
        False,
        description="from the fields of a structured caption (prompt: fuse-fields, where none is given)",
    )
    prompt: Prompt = Field(
        "fuse",
        description="what it is asked, with {captions} where they come",
        json_schema_extra=WORDS,
        validate_default=True,
    )
    batch: int = Field(64, ge=1, description="clips in work together, of any sources")

    @model_validator(mode="before")
    @classmethod
    def _of_fields(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("fields") is True and "prompt" not in data:
            return data | {"prompt": "fuse-fields"}
        return data

    @model_validator(mode="after")
    def _placed(self) -> FuseCaptioner:
        if "{captions}" not in self.prompt:
            raise ValueError("prompt: has no {captions}, where what the others said comes")
        return self


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
    | ServedCaptioner
    | FuseCaptioner
    | PythonCaptioner,
    Field(discriminator="kind"),
]
