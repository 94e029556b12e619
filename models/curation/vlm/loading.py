"""Getting a model and its processor, and saying in one sentence why it cannot be had; no weights are read for that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from weakref import WeakValueDictionary

from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from models.curation.vlm.families import Family, Input, family_of, pixels_of_token, size_settings
from models.hub import MissingModel, transformers_weights


@dataclass(frozen=True)
class Wanted:
    """A model, and how it is to be used. Equal ones share their weights in a process."""

    model: str  # hub id, or folder that `save_pretrained` wrote for model and processor
    revision: str | None = None  # branch, tag or commit on the hub
    dtype: str = "auto"  # as stored, or 'float32', 'bfloat16', 'float16'
    device: str = "cpu"
    device_map: str | None = None  # accelerate's; then `device` says nothing


@dataclass(eq=False)
class Loaded:
    """A model that is there."""

    model: Any
    processor: Any
    family: Family


_LOADED: WeakValueDictionary[Wanted, Loaded] = WeakValueDictionary()


def load(wanted: Wanted) -> Loaded:
    """The model, on its device, in evaluation mode; the one that is there already where somebody still holds it.

    Raises MissingModel when it cannot be loaded.
    """
    if (loaded := _LOADED.get(wanted)) is not None:
        return loaded
    config, family = _config(wanted.model, wanted.revision)
    _packages(wanted, family)
    processor = load_processor(wanted.model, wanted.revision)
    multimodal = config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    loader = AutoModelForMultimodalLM if multimodal else AutoModelForImageTextToText
    on = {"device_map": wanted.device_map} if wanted.device_map else {}
    try:
        model: Any = loader.from_pretrained(
            wanted.model, revision=wanted.revision, dtype=wanted.dtype, trust_remote_code=False, **on
        )
    except (OSError, ValueError, ImportError) as e:
        raise MissingModel(f"model {wanted.model!r} cannot be loaded: {_line(e)}") from e
    model = getattr(model, family.part) if family.part else model
    model.eval()
    if not wanted.device_map:
        model.to(wanted.device)
    # a hub's sampling settings have no meaning without sampling, and are warned about
    model.generation_config.update(temperature=None, top_p=None, top_k=None)
    tokenizer = processor.tokenizer
    # so that every answer starts at the same position; an encoder's positions count from the left
    tokenizer.padding_side = "right" if encodes(model.config) else "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded = _LOADED[wanted] = Loaded(model, processor, family)
    return loaded


def encodes(config: Any) -> bool:
    """Whether the text part is an encoder-decoder, whose answers stand alone, after a start token."""
    text: Any = getattr(config, "text_config", config)
    return bool(config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False))


def load_processor(model: str, revision: str | None = None) -> Any:
    """The model's processor. Raises MissingModel when it cannot be loaded or takes no text."""
    try:
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as e:
        raise MissingModel(f"model {model!r}: its processor cannot be loaded: {_line(e)}") from e
    if getattr(processor, "tokenizer", None) is None:
        raise MissingModel(
            f"model {model!r}: its {type(processor).__name__} takes no text; name a model that takes text and pictures"
        )
    return processor


def input_of(model: str, processor: Any, family: Family, input: Input | None) -> Input:
    """What the model is shown. Raises MissingModel where it does not take that.

    Args:
        input: what is asked for; none: what suits the family.
    """
    kind = type(processor).__name__
    video = getattr(processor, "video_processor", None) is not None
    pictures = getattr(processor, "image_processor", None) is not None
    if input is None:
        input = family.input
        if input == "video" and not video:
            input = "images" if processor.chat_template else "image"
    if input == "video" and not video:
        several = "" if family.pictures == 1 else "input: images to give the frames one by one, or "
        raise MissingModel(
            f"model {model!r} takes no video ({kind}): set {several}input: image for a single one"
        )
    if input != "video" and not pictures:
        raise MissingModel(f"model {model!r} takes no pictures ({kind}): set input: video")
    if input == "images" and (family.pictures == 1 or not processor.chat_template):
        raise MissingModel(f"model {model!r} takes one picture at a time ({kind}): set input: image")
    return input


def check(
    wanted: Wanted,
    input: Input | None = None,
    prompt: str | None = None,
    frames: int = 8,
    max_pixels: int | None = None,
    tokens: int | None = None,
) -> str:
    """Where the model comes from, made sure of in seconds, without loading or fetching weights.

    Reads configuration and processor too, so that a model of another kind, a package that is missing and settings
    that it cannot follow are found out before any work. Raises MissingModel: one sentence with the fix.
    """
    where = transformers_weights(wanted.model, wanted.revision)
    _, family = _config(wanted.model, wanted.revision)
    _packages(wanted, family)
    processor = load_processor(wanted.model, wanted.revision)
    input = input_of(wanted.model, processor, family, input)
    settings(wanted.model, processor, family, input, frames, max_pixels, tokens)
    check_prompt(wanted.model, family, prompt)
    return where


def check_prompt(model: str, family: Family, prompt: str | None) -> None:
    """Raises MissingModel where a family knows some tasks only, and the prompt is none of them."""
    if prompt is not None and family.tasks and prompt not in family.tasks:
        raise MissingModel(
            f"model {model!r} knows no words as a prompt, only {', '.join(family.tasks)}: set prompt: "
            f"{family.prompt}, without context"
        )


def settings(
    model: str,
    processor: Any,
    family: Family,
    input: Input,
    frames: int,
    max_pixels: int | None,
    tokens: int | None,
) -> dict[str, Any]:
    """What the processor is told of the size of pictures, see `size_settings`. Raises MissingModel."""
    if tokens is not None:
        per_token = pixels_of_token(processor, input)
        if per_token is None:
            raise MissingModel(
                f"model {model!r}: its pictures have a fixed number of tokens; take tokens away"
            )
        max_pixels = tokens * per_token
    try:
        return size_settings(family, processor, input, frames, max_pixels)
    except ValueError as e:
        raise MissingModel(f"model {model!r}: {e}") from e


def _config(model: str, revision: str | None) -> tuple[Any, Family]:
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as e:
        raise MissingModel(f"model {model!r}: its configuration cannot be read: {_line(e)}") from e
    kind = config.model_type
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        raise MissingModel(
            f"model {model!r}: transformers has no image-text-to-text class for its type {kind!r}; name another "
            "model, or its '-hf' conversion"
        )
    return config, family_of(kind)


def _packages(wanted: Wanted, family: Family) -> None:
    needed = [*family.packages, *(["accelerate"] if wanted.device_map else [])]
    if missing := [name for name in needed if find_spec(name) is None]:
        why = "its processor" if missing[0] in family.packages else "device_map"
        raise MissingModel(
            f"model {wanted.model!r}: {why} needs {' and '.join(missing)}, which is not installed: "
            f"pip install {' '.join(missing)}"
        )


def _line(e: Exception) -> str:
    """The first line of a message: transformers' go on for paragraphs. Of a missing package also the cure."""
    lines = str(e).strip().split("\n") or [""]
    cure = re.search(r"pip install [\w\[\].-]+", str(e)) if isinstance(e, ImportError) else None
    first = next((line for line in lines if line.strip()), "")[:200].strip()
    return f"{first} ({cure[0]})" if cure and cure[0] not in first else first
