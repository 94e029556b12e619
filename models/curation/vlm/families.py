"""How the families of vision-language models differ, a row each; a family without a row gets `OTHER`.

What a row need not say, because it is the same for all: pictures go in as they are (no resampling in time), a video
of fewer frames than its processor packs into one token has its last one repeated, the pixel cap is that of the
family's reference preprocessing, and a chat template is told that no thoughts are wanted.

Sources: the processors of transformers 5.23, and each family's model card for its prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

Input = Literal["video", "images", "image"]
Budget = Literal["frame", "clip", "soft", "tiles", "fixed"]

SENTENCE = "Describe the main subject and what happens in this video in one faithful sentence."


@dataclass(frozen=True)
class Family:
    """What sets the models of one `model_type` apart."""

    example: str = ""
    input: Input = "video"  # what it is shown where a recipe leaves that open
    pictures: int | None = None  # at most so many in one prompt; none: any number
    times: str = ""  # how its processor tells when the frames of a video are; '': not at all
    # What bounds the pixels of a picture. 'frame': size.longest_edge is height · width; 'clip': it is frames · height ·
    # width; 'soft': max_soft_tokens; 'tiles': pictures are cut into max_patches squares, video is not; 'fixed': all
    # pictures become one size.
    budget: Budget = "fixed"
    counts: int = 1  # of frames that a single picture is, in that bound
    prompt: str = SENTENCE  # where a recipe has none
    tasks: tuple[str, ...] = ()  # the only prompts it knows
    packages: tuple[str, ...] = ()  # that it needs beyond transformers, by the name pip knows
    part: str = ""  # of a model that also speaks: what answers in text


_QWEN2 = Family("Qwen/Qwen2.5-VL-7B-Instruct", times="seconds a grid step (mrope)", budget="frame")
_QWEN3 = Family("Qwen/Qwen3-VL-8B-Instruct", times="<0.5 seconds> before each two frames", budget="clip")
_GLM = Family("zai-org/GLM-4.6V-Flash", times="0.0 seconds after each two frames", budget="clip", counts=2)
_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
_BLIP = Family("Salesforce/blip2-opt-2.7b", input="image", pictures=1, prompt="a photo of")

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "glm4v": replace(_GLM, example="zai-org/GLM-4.1V-9B-Thinking", times="0 after each two frames, seconds"),
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "video_llama_3": Family("lkhl/VideoLLaMA3-2B-Image-HF", times="Time 0.0s:", budget="frame"),
    "internvl": Family("OpenGVLab/InternVL3-8B-hf", budget="tiles"),  # 'Frame1:', no time
    "llava_onevision": Family("llava-hf/llava-onevision-qwen2-7b-ov-hf"),
    "llava_next_video": Family("llava-hf/LLaVA-NeXT-Video-7B-hf"),
    "video_llava": Family("LanguageBind/Video-LLaVA-7B-hf"),
    "smolvlm": Family(
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        times="Frame from 00:01: before each frame, and how many there are in words",
        packages=("num2words",),
    ),
    "gemma3": Family("google/gemma-3-12b-it", input="images"),
    "gemma3n": Family("google/gemma-3n-E4B-it", input="images", packages=("timm",)),
    "gemma4": Family("google/gemma-4-E4B-it", times="00:01 before each frame", budget="soft"),
    "perception_lm": Family("facebook/Perception-LM-1B", packages=("timm",)),
    "blip": _BLIP,
    "blip-2": _BLIP,
    "instructblip": Family("Salesforce/instructblip-vicuna-7b", input="image", pictures=1),
    "florence2": Family(
        "florence-community/Florence-2-large", input="image", pictures=1, prompt=_TASKS[2], tasks=_TASKS
    ),
    # Models of the classes that also hear and speak
    "qwen2_5_omni": replace(_QWEN2, example="Qwen/Qwen2.5-Omni-7B", part="thinker"),
}
OTHER = Family()


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type, OTHER)


def least_frames(processor: Any) -> int:
    """Frames that its processor packs into one step of time: a video of fewer is an error in some families."""
    return int(getattr(getattr(processor, "video_processor", None), "temporal_patch_size", None) or 1)


def pixels_of_token(processor: Any, input: Input) -> int | None:
    """Pixels of a frame behind one visual token, as far as a processor says so."""
    part = processor.video_processor if input == "video" else processor.image_processor
    side = getattr(part, "patch_size", None)
    merged = getattr(part, "merge_size", None) or getattr(part, "pooling_kernel_size", None)
    return int(side * merged) ** 2 if isinstance(side, int) and isinstance(merged, int) else None


def size_settings(
    family: Family, processor: Any, input: Input, frames: int, max_pixels: int | None
) -> dict[str, Any]:
    """What a processor is told of the size of pictures.

    Args:
        frames: that a video holds.
        max_pixels: of each frame; none: as the family's reference preprocessing has it.

    Raises ValueError, one sentence, where the family has no such choice.
    """
    part = processor.video_processor if input == "video" else processor.image_processor
    knows = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
    # What qwen-vl-utils does: a frame's share of the clip's budget, which transformers leaves out unless told
    settings: dict[str, Any] = {"cap_pixels_per_frame": True} if "cap_pixels_per_frame" in knows else {}
    if max_pixels is None:
        return settings
    if family.budget == "soft":
        per_token = pixels_of_token(processor, input) or 1
        fitting = [n for n in (70, 140, 280, 560, 1120) if n * per_token <= max_pixels]
        if not fitting:
            raise ValueError(f"max_pixels: {max_pixels} is too little; its least is {70 * per_token}")
        return settings | {"max_soft_tokens": fitting[-1]}
    if family.budget == "tiles" and input != "video":
        side = part.size["height"] * part.size["width"]
        return settings | {"min_patches": 1, "max_patches": max(1, max_pixels // side)}
    if family.budget not in ("frame", "clip"):
        raise ValueError("its pictures have one size, whatever is asked for; take max_pixels away")
    steps = frames if input == "video" else family.counts
    whole = max_pixels * (steps if family.budget == "clip" else 1)
    # the cap of each frame never goes below 1.05 times the shortest edge
    least = min(int(part.size["shortest_edge"]), math.floor(max_pixels / 1.05))
    return settings | {"size": {"shortest_edge": least, "longest_edge": whole}}
