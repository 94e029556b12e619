"""What a Qwen-VL needs beside its weights: processor, tokenizer, template of conversations, and what its pixels are.

Of a published one all are its own. One begun from nothing has a tokenizer trained on the texts at hand, with the marks
that Qwen's have, and a processor of the real class around it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.hub import MissingModel, transformers_weights
from models.language.exported import CHAT
from models.language.pixels import OwnSize
from models.language.tokenizer import files, trained

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # model types of transformers
OPENING, CLOSING = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
TEMPLATE = CHAT.replace("<video>\n", OPENING + VIDEO + CLOSING).replace(
    "<image>\n", OPENING + IMAGE + CLOSING
)
CONTEXT = 128_000  # tokens, which the reference preprocessing shares among all frames of a video


def published(weights: str) -> Any:
    """The processor of a model, by hub id or folder. Raises MissingModel, one sentence with the fix."""
    from transformers import AutoProcessor

    transformers_weights(weights)  # within seconds, where transformers would try for a minute
    try:
        processor = AutoProcessor.from_pretrained(weights)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MissingModel(
            f"processor of {weights!r} cannot be loaded ({first}): name a Qwen-VL with its processor"
        ) from e
    if not hasattr(processor, "video_processor") or not getattr(processor, "chat_template", None):
        raise MissingModel(
            f"{weights!r} has no processor of pictures, videos and conversations: name a Qwen-VL"
        )
    return processor


def begun(texts: Iterable[str], size: int, config: Mapping[str, Any]) -> Any:
    """A processor around a tokenizer of at most `size` tokens that is trained on the texts.

    Args:
        config: of the model, whose vision part has the size of patches.
    """
    import transformers

    tokenizer = trained(texts, size)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [OPENING, CLOSING, IMAGE, VIDEO]}, replace_extra_special_tokens=False
    )
    vision = config.get("vision_config", {})
    names = ("patch_size", "temporal_patch_size")
    sizes = {name: vision[name] for name in names if name in vision}
    if "spatial_merge_size" in vision:
        sizes["merge_size"] = vision["spatial_merge_size"]
    of: dict[str, tuple[Any, Any]] = {
        "qwen2_vl": (transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen3_vl": (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor),
    }
    whole, video = of[str(config["model_type"])]
    clips = video(**sizes)
    scaled = {"image_mean": clips.image_mean, "image_std": clips.image_std}
    pictures = transformers.Qwen2VLImageProcessor(**{"patch_size": clips.patch_size} | sizes, **scaled)
    return whole(pictures, tokenizer, clips, chat_template=TEMPLATE)


def kept(processor: Any) -> dict[str, str]:
    """What `save_pretrained` writes of it, name → text."""
    return files(processor)


def of_files(texts: Mapping[str, str]) -> Any:
    """The processor that `kept` was told of."""
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text)
        return AutoProcessor.from_pretrained(folder)


def bounded(processor: Any, least: int | None = None, most: int | None = None) -> Any:
    """The same, with so many pixels of a picture and of a frame; and a bound for all frames of a video together.

    That bound is of the reference preprocessing; transformers leaves it out unless it is told. Where the bounds of a
    video are of all its frames (Qwen3-VL), a frame has at most so many tokens instead. Of its own bounds the one gives
    way that is beyond one that is told.

    Raises ValueError for bounds that leave nothing between them, or no token.
    """
    pictures, clips = processor.image_processor, processor.video_processor
    whole, side = _whole(clips), pictures.patch_size * pictures.merge_size
    if most and most < side * side:
        raise ValueError(
            f"model: max_pixels {most} is less than a token of {side}×{side}: give {side * side} or more"
        )
    if least and most and least > most:
        raise ValueError(
            f"model: min_pixels {least} is more than max_pixels {most}: give less, or leave it out"
        )
    if whole and most:
        clips.max_video_tokens = max(1, most // (clips.patch_size * clips.merge_size) ** 2)
    if whole and least:
        clips.size = {"shortest_edge": least, "longest_edge": max(clips.size["longest_edge"], least)}
    for part in [pictures] if whole else [pictures, clips]:
        size = dict(part.size)
        size["shortest_edge"] = least or size["shortest_edge"]
        size["longest_edge"] = most or size["longest_edge"]
        if least:
            size["longest_edge"] = max(size.values())
        size["shortest_edge"] = min(size.values())
        part.size = {name: size[name] for name in ("shortest_edge", "longest_edge")}
    if getattr(clips, "cap_pixels_per_frame", None) is None:
        clips.cap_pixels_per_frame = True
    return processor


def _whole(video_processor: Any) -> bool:
    """Whether its bounds are of all frames of a video together."""
    return type(video_processor).__name__.startswith("Qwen3")


def looks(processor: Any, config: Any) -> OwnSize:
    """How its pictures become pixels. Raises MissingModel where nothing here makes the same."""
    image, video = processor.image_processor, processor.video_processor
    if (tuple(image.image_mean), tuple(image.image_std)) != (tuple(video.image_mean), tuple(video.image_std)):
        raise MissingModel(
            "its processor scales colours of videos otherwise than of pictures: name another model"
        )
    vision = config.vision_config
    both = [(p.patch_size, p.merge_size, p.temporal_patch_size) for p in (image, video)]
    wanted = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    if any(sizes != wanted for sizes in both):
        raise MissingModel(
            f"its processor makes patches of {both[0]}, its tower takes {wanted}: give the processor of this model"
        )
    bounds = [(int(p.size["shortest_edge"]), int(p.size["longest_edge"])) for p in (image, video)]
    capped = getattr(video, "cap_pixels_per_frame", False)
    return OwnSize(
        bounds[0],
        bounds[1],
        tuple(image.image_mean),
        tuple(image.image_std),
        *wanted,
        context=int(getattr(video, "max_video_tokens", CONTEXT)) if capped else None,
        per_second=getattr(vision, "tokens_per_second", None),
        whole=_whole(video),
        spoken=config.model_type == "qwen3_vl",
    )


def filled(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A configuration of a model begun from nothing, with what its tokenizer tells, and M-RoPE as Qwen2-VL has it."""
    text = dict(config.get("text_config", {}))
    text.setdefault("vocab_size", len(tokenizer))
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    text.setdefault("pad_token_id", tokenizer.pad_token_id)
    if "rope_parameters" not in text and {"hidden_size", "num_attention_heads"} <= text.keys():
        pairs = text["hidden_size"] // text["num_attention_heads"] // 2  # of a head, 1 : 1.5 : 1.5
        side = pairs * 3 // 8
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [pairs - 2 * side, side, side],
        }
        if config.get("model_type") == "qwen3_vl":
            text["rope_parameters"]["mrope_interleaved"] = True
    marks = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    marks |= {"vision_start_token_id": OPENING, "vision_end_token_id": CLOSING}
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    return {**config, "text_config": text, **ids}
