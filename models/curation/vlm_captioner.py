"""One adapter for every `transformers` model that answers a prompt about a video or pictures.

Whatever `AutoModelForImageTextToText` can load works by its hub id or folder: Qwen2.5-VL, LLaVA-OneVision,
LLaVA-NeXT-Video, InternVL, SmolVLM, BLIP-2, … A processor with a chat template is given a chat, one without
(BLIP-2) the plain prompt. Code from a model's repository is never run.

The answer is the same every time: no sampling, and a video's frames are the ones given, not resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from models.hub import MissingModel, transformers_weights

Input = Literal["video", "images", "image"]

CLOCK_HZ = 1000  # processors tell time as index ÷ fps; ticks of 1 ms carry any frame's PTS


@dataclass(frozen=True)
class Look:
    """What one answer is made from."""

    frames: list[np.ndarray]  # uint8 [h, w, 3] RGB, all of one size
    times_s: list[float]  # of each frame, seconds from the start of the clip
    duration_s: float  # of the clip
    prompt: str  # used as it is; a processor without chat template may want its picture token in it
    context: str = ""  # what others wrote about the clip; nothing in it can act as a control token


@dataclass(frozen=True)
class Answer:
    text: str  # white space runs are single spaces
    complete: bool  # False: cut off at max_new_tokens
    prompt: str  # prompt and context as the model was given them


class VLMCaptioner:
    """A vision-language model that captions batches of clips.

    Args:
        model: hub id, or folder that `save_pretrained` wrote for model and processor.
        revision: branch, tag or commit on the hub.
        input: 'video' gives the frames with their times, 'images' as separate pictures, 'image' only the
            first.
        dtype: 'auto' (as stored), 'float32', 'bfloat16' or 'float16'.
        beams: width of beam search; 1 is greedy.

    Raises MissingModel when it cannot be loaded or does not take such input.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        input: Input = "video",
        dtype: str = "auto",
        device: str = "cpu",
        max_new_tokens: int = 96,
        beams: int = 1,
    ):
        self.input = input
        self.processor = load_processor(model, revision, input)
        try:
            self.model: Any = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype=dtype, trust_remote_code=False
            )
        except (OSError, ValueError) as e:
            raise MissingModel(f"model {model!r} cannot be loaded: {_line(e)}") from e
        self.model.eval().to(device)

        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # so that every answer starts at the same position
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.eos = _eos_ids(self.model, tokenizer)
        self.generate = {
            "do_sample": False,
            "num_beams": beams,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(self.eos),
            "pad_token_id": tokenizer.pad_token_id,
        }
        # a hub's sampling settings have no meaning without sampling, and are warned about
        self.model.generation_config.update(temperature=None, top_p=None, top_k=None)
        self.control = sorted(
            (
                t.content
                for t in tokenizer.added_tokens_decoder.values()
                if not (t.content.isspace() or t.content.isalnum())
            ),
            key=len,
            reverse=True,
        )

    def __call__(self, looks: Sequence[Look]) -> list[Answer]:
        """An answer for each look; looks of one number and size of frames share a forward pass."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, look in enumerate(looks):
            groups.setdefault((len(look.frames), *look.frames[0].shape), []).append(i)
        answers: dict[int, Answer] = {}
        for group in groups.values():
            answers |= zip(group, self._batch([looks[i] for i in group]), strict=True)
        return [answers[i] for i in range(len(looks))]

    @torch.inference_mode()
    def _batch(self, looks: Sequence[Look]) -> list[Answer]:
        inputs = self.inputs(looks)
        ids = self.model.generate(**inputs, **self.generate)
        given = inputs["input_ids"].shape[1]
        if ids.shape[1] >= given and torch.equal(ids[:, :given], inputs["input_ids"]):
            ids = ids[:, given:]  # decoder-only models repeat the prompt, encoder-decoder models do not
        return [self._answer(row, self._prompt(x)) for row, x in zip(ids.tolist(), looks, strict=True)]

    def inputs(self, looks: Sequence[Look]) -> dict[str, torch.Tensor]:
        """The model's inputs for looks of one number and size of frames, on its device, pixels in its dtype."""
        texts = [self._text(look) for look in looks]
        kwargs: dict[str, Any] = {}
        if self.input == "video":
            kwargs["videos"] = [np.stack(look.frames) for look in looks]  # [t, h, w, 3]
            kwargs["videos_kwargs"] = {
                "do_sample_frames": False,
                "input_data_format": "channels_last",
                "video_metadata": [_metadata(look) for look in looks],
            }
        else:
            shown = 1 if self.input == "image" else None
            kwargs["images"] = [[Image.fromarray(f) for f in look.frames[:shown]] for look in looks]
        bos = self.processor.tokenizer.bos_token
        if bos is not None and texts[0].startswith(bos):
            kwargs["add_special_tokens"] = False  # the chat template wrote it already
        batch = self.processor(text=texts, padding=True, return_tensors="pt", **kwargs)
        return {
            name: x.to(self.model.device, self.model.dtype if name.startswith("pixel_values") else x.dtype)
            for name, x in batch.items()
            if isinstance(x, torch.Tensor)
        }

    def _prompt(self, look: Look) -> str:
        context = look.context
        for token in self.control:
            context = context.replace(token, " ")
        return f"{look.prompt}\n{context}" if context else look.prompt

    def _text(self, look: Look) -> str:
        """The prompt as the processor wants it, with a place for the pictures."""
        prompt = self._prompt(look)
        if not self.processor.chat_template:
            return prompt
        pictures = {"video": [{"type": "video"}], "image": [{"type": "image"}]}.get(
            self.input, [{"type": "image"} for _ in look.frames]
        )
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def _answer(self, ids: list[int], prompt: str) -> Answer:
        end = next((i for i, token in enumerate(ids) if token in self.eos), None)
        text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(" ".join(text.split()), complete=end is not None, prompt=prompt)


def load_processor(model: str, revision: str | None, input: Input) -> Any:
    """The model's processor. Raises MissingModel when it cannot be loaded or does not take such input."""
    try:
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise MissingModel(f"model {model!r}: its processor cannot be loaded: {_line(e)}") from e
    kind = type(processor).__name__
    if getattr(processor, "tokenizer", None) is None:
        raise MissingModel(
            f"model {model!r}: its {kind} takes no text; name a model that takes text and pictures"
        )
    if input == "video" and getattr(processor, "video_processor", None) is None:
        raise MissingModel(
            f"model {model!r} takes no video ({kind}): set input: images to give the frames one by one, "
            "or input: image for a single one"
        )
    if input != "video" and getattr(processor, "image_processor", None) is None:
        raise MissingModel(f"model {model!r} takes no pictures ({kind}): set input: video")
    return processor


def check(model: str, revision: str | None = None, input: Input = "video") -> str:
    """Where the model comes from, made sure of in seconds, without loading or fetching weights.

    Reads configuration and processor too, so that a model of another kind is found out before any work.
    Raises MissingModel: one sentence with the fix.
    """
    where = transformers_weights(model, revision)
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise MissingModel(f"model {model!r}: its configuration cannot be read: {_line(e)}") from e
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise MissingModel(
            f"model {model!r}: transformers has no image-text-to-text class for its type "
            f"{config.model_type!r}; name another model, or its '-hf' conversion"
        )
    load_processor(model, revision, input)
    return where


def _metadata(look: Look) -> dict[str, Any]:
    """What video processors are told about the frames: when each is shown, and of how long a video."""
    h, w = look.frames[0].shape[:2]
    ticks = [round(t * CLOCK_HZ) for t in look.times_s]
    total = max(round(look.duration_s * CLOCK_HZ), ticks[-1] + 1)
    return {
        "total_num_frames": total,
        "fps": float(CLOCK_HZ),
        "duration": look.duration_s,
        "frames_indices": ticks,
        "height": h,
        "width": w,
    }


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: as the model, its text part and its tokenizer have it."""
    text_config = model.config.get_text_config(decoder=True)
    found: set[int] = set()
    for ids in (model.generation_config.eos_token_id, text_config.eos_token_id, tokenizer.eos_token_id):
        found |= set(ids) if isinstance(ids, list) else {ids} if ids is not None else set()
    return found


def _line(e: Exception) -> str:
    """The first line of a message: transformers' go on for paragraphs."""
    return str(e).strip().split("\n")[0][:200]
