"""One adapter for every `transformers` model that answers a prompt about a video or pictures.

Whatever `AutoModelForImageTextToText` or `AutoModelForMultimodalLM` can load works by its hub id or folder; how the
families differ is the table in `families.py`. A processor with a chat template is given a chat, one without (BLIP-2,
Florence-2) the plain prompt. Code from a model's repository is never run.

A clip's answer depends on the clip, the prompt and the settings: a video's frames are the ones given, not resampled,
and sampling, where it is asked for, draws by the clip's key alone. What else is in the batch changes sums in their
last digits (README, 'Batches'), no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LogitsProcessorList

from models.curation.vlm import loading, reasoning
from models.curation.vlm.families import Input, least_frames
from models.curation.vlm.loading import Wanted
from models.curation.vlm.sampling import OwnChance
from models.hub import MissingModel
from models.language.times import plain

CLOCK_HZ = 1000  # processors tell time as index ÷ fps; ticks of 1 ms carry any frame's PTS
AFFIRMATION, DENIAL = (("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no"))


@dataclass(frozen=True)
class Look:
    """What one answer is made from."""

    frames: list[np.ndarray]  # uint8 [h, w, 3] RGB, all of one size
    times_s: list[float]  # of each frame, seconds from the start of the clip
    duration_s: float  # of the clip
    prompt: str  # used as it is; a processor without chat template may want its picture token in it
    key: str = ""  # what sampling draws by: the clip's id


@dataclass(frozen=True)
class Answer:
    text: str  # white space runs are single spaces
    complete: bool  # False: cut off at max_new_tokens
    prompt: str  # as the model was given it
    raw: str = ""  # with thoughts and what wraps the answer, where there were any
    prompt_tokens: int = 0
    new_tokens: int = 0


class VLM:
    """A vision-language model that answers about batches of clips.

    Args:
        input: 'video' gives the frames with their times, 'images' as separate pictures, 'image' only the first;
            none: what suits the family.
        times: whether the prompt tells when the frames are: 'prompt', 'none', or 'auto' (where pictures are several
            and the processor has no way to tell).
        frames: that a look has at most; with max_pixels it bounds what a clip costs.
        max_pixels: of each frame; none: as the family's reference preprocessing has it.
        tokens: the same said in visual tokens a frame.
        beams: width of beam search; 1 is greedy.
        temperature: of sampling; 0: no sampling.
        seed: of sampling; an answer depends on it and on the look's key.
        thinking: whether a model that can think first may; its thoughts are never in the text.

    Raises MissingModel when it cannot be loaded or does not take such input.
    """

    def __init__(
        self,
        wanted: Wanted,
        *,
        input: Input | None = None,
        times: str = "auto",
        frames: int = 8,
        max_pixels: int | None = None,
        tokens: int | None = None,
        max_new_tokens: int = 96,
        beams: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        thinking: bool = False,
    ):
        self.loaded = loading.load(wanted)
        self.model, self.processor, self.family = self.loaded.model, self.loaded.processor, self.loaded.family
        self.wanted, self.times, self.thinking = wanted, times, thinking
        self.input = loading.input_of(wanted.model, self.processor, self.family, input)
        self.max_pixels, self.tokens = max_pixels, tokens
        self._size(frames)  # raises what it has to say before any work
        tokenizer = self.processor.tokenizer
        self.eos = _eos_ids(self.model, tokenizer)
        self.chance = (seed, temperature, top_p) if temperature > 0 else None
        self.generate: dict[str, Any] = {
            "do_sample": False,
            "num_beams": beams,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(self.eos),
            "pad_token_id": tokenizer.pad_token_id,
        }
        self.control = sorted(
            (
                t.content
                for t in tokenizer.added_tokens_decoder.values()
                if not (t.content.isspace() or t.content.isalnum())
            ),
            key=len,
            reverse=True,
        )

    @property
    def prompt(self) -> str:
        """What the family is asked where nobody says otherwise."""
        return self.family.prompt

    def clean(self, text: str) -> str:
        """A text in which nothing can act as a control token."""
        for token in self.control:
            text = text.replace(token, " ")
        return text

    def __call__(self, looks: Sequence[Look]) -> list[Answer]:
        """An answer for each look; looks of one number and size of frames share a forward pass."""
        return _in_groups(looks, self._answers)

    def yes(self, looks: Sequence[Look]) -> list[float]:
        """P(yes | pictures, question) for each look, its prompt being the question, from one forward pass.

        Σ e^l over the tokens that say yes, ÷ the same over those that say yes or no, l being the logits of the first
        token of the answer (VQAScore: Lin et al., ECCV 2024, arXiv:2404.01291).

        Raises MissingModel where the tokenizer has no token for yes or no.
        """
        yes, no = (self._ids_of(words) for words in (AFFIRMATION, DENIAL))

        def batch(looks: Sequence[Look]) -> list[float]:
            first = self._first_logits(self.inputs(looks))  # [B, V]
            return torch.sigmoid(first[:, yes].logsumexp(1) - first[:, no].logsumexp(1)).tolist()

        return _in_groups(looks, batch)

    @torch.inference_mode()
    def _first_logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 [B, V] of the first token of the answers."""
        once = self.generate | {"max_new_tokens": 1, "num_beams": 1}
        made = self.model.generate(**inputs, **once, return_dict_in_generate=True, output_logits=True)
        return made.logits[0].float()

    def _ids_of(self, words: Sequence[str]) -> list[int]:
        tokenizer = self.processor.tokenizer
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        if found := sorted({i[0] for i in ids if len(i) == 1 and i[0] != tokenizer.unk_token_id}):
            return found
        raise MissingModel(
            f"model {self.wanted.model!r} has no single token for {words[0]!r}: it cannot be a judge"
        )

    @torch.inference_mode()
    def _answers(self, looks: Sequence[Look]) -> list[Answer]:
        inputs = self.inputs(looks)
        chance = {}
        if self.chance:
            chance = {
                "logits_processor": LogitsProcessorList([OwnChance([x.key for x in looks], *self.chance)])
            }
        ids = self.model.generate(**inputs, **self.generate, **chance)
        given = inputs["input_ids"]
        if loading.encodes(self.model.config):
            ids = ids[:, 1:]  # a start token, in some the one that also ends an answer
        elif ids.shape[1] >= given.shape[1] and torch.equal(ids[:, : given.shape[1]], given):
            ids = ids[:, given.shape[1] :]  # most repeat the prompt
        rows = zip(ids.tolist(), looks, inputs["attention_mask"].sum(1).tolist(), strict=True)
        return [self._answer(row, look, int(tokens)) for row, look, tokens in rows]

    def inputs(self, looks: Sequence[Look]) -> dict[str, torch.Tensor]:
        """The model's inputs for looks of one number and size of frames, on its device, pixels in its dtype."""
        texts = [self._text(look) for look in looks]
        kwargs: dict[str, Any] = {}
        if self.input == "video":
            looks = [self._filled(look) for look in looks]
            kwargs["videos"] = [np.stack(look.frames) for look in looks]  # [t, h, w, 3]
            kwargs["videos_kwargs"] = {
                "do_sample_frames": False,
                "input_data_format": "channels_last",
                "video_metadata": [_metadata(look) for look in looks],
            } | self._size(len(looks[0].frames))
        else:
            shown = 1 if self.input == "image" else None
            kwargs["images"] = [[Image.fromarray(f) for f in look.frames[:shown]] for look in looks]
            if size := self._size(len(looks[0].frames)):
                kwargs["images_kwargs"] = size
        bos = self.processor.tokenizer.bos_token
        if bos is not None and texts[0].startswith(bos):
            kwargs["add_special_tokens"] = False  # the chat template wrote it already
        batch = self.processor(text=texts, padding=True, return_tensors="pt", **kwargs)
        return {
            name: x.to(self.model.device, self.model.dtype if name.startswith("pixel_values") else x.dtype)
            for name, x in batch.items()
            if isinstance(x, torch.Tensor)
        }

    def _size(self, frames: int) -> dict[str, Any]:
        """What the processor is told of the size of a look's pictures."""
        return loading.settings(
            self.wanted.model,
            self.processor,
            self.family,
            self.input,
            frames,
            self.max_pixels,
            self.tokens,
        )

    def _filled(self, look: Look) -> Look:
        """A look of as many frames as its processor needs at least: the last one again, at its own time."""
        more = least_frames(self.processor) - len(look.frames)
        if more <= 0:
            return look
        frames, times = look.frames + look.frames[-1:] * more, look.times_s + look.times_s[-1:] * more
        return Look(frames, times, look.duration_s, look.prompt, look.key)

    def asked(self, look: Look) -> str:
        """The prompt, with the times of the pictures where nothing else tells them."""
        several = self.input != "image" and len(look.frames) > 1
        if self.times == "none" or not several or (self.times == "auto" and self.input == "video"):
            return look.prompt
        return f"{plain(look.times_s, look.duration_s)}\n{look.prompt}"

    def _text(self, look: Look) -> str:
        """The prompt as the processor wants it, with a place for the pictures."""
        prompt = self.asked(look)
        loading.check_prompt(self.wanted.model, self.family, prompt)
        if not self.processor.chat_template:
            return prompt
        pictures = {"video": [{"type": "video"}], "image": [{"type": "image"}]}.get(
            self.input, [{"type": "image"} for _ in look.frames]
        )
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}]
        return self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, enable_thinking=self.thinking
        )

    def _answer(self, ids: list[int], look: Look, prompt_tokens: int) -> Answer:
        tokenizer = self.processor.tokenizer
        end = next((i for i, token in enumerate(ids) if token in self.eos), None)
        raw = text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        whole, prompt = tokenizer.decode(ids[:end]), self._text(look)
        if reasoning.thinks(whole, prompt):  # some mark their thoughts by special tokens
            text = reasoning.said(whole, prompt)
            for token in tokenizer.all_special_tokens:
                text = text.replace(token, "")
        text = " ".join(text.split())
        return Answer(
            text,
            complete=end is not None,
            prompt=self.asked(look),
            raw=raw if " ".join(raw.split()) != text else "",
            prompt_tokens=prompt_tokens,
            new_tokens=len(ids) if end is None else end + 1,
        )


def _in_groups(looks: Sequence[Look], do: Any) -> list[Any]:
    """What `do` gives for each look; it is given those of one number and size of frames together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, look in enumerate(looks):
        groups.setdefault((len(look.frames), *look.frames[0].shape), []).append(i)
    found: dict[int, Any] = {}
    for group in groups.values():
        found |= zip(group, do([looks[i] for i in group]), strict=True)
    return [found[i] for i in range(len(looks))]


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
