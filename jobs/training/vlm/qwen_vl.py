"""Qwen-VL as a kind of vision–language model, see `jobs.training.vlm.kinds`: published whole, with its processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.training.parallelize import make
from jobs.training.vlm.kinds import Files
from jobs.training.vlm.own_size import OwnSizes
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vlm.visuals import Visuals
from models.hub import transformers_weights
from models.language import qwen_files, qwen_vl
from models.language.budget import Sampling
from models.language.by_document import kernel_of
from models.language.chat import Chat
from models.language.qwen_vl import QwenVL

TYPES = qwen_files.KINDS


def needs(recipe: VLMRecipe) -> Iterator[tuple[str, str, Callable[[], str]]]:
    weights, config = (recipe.model.options().get(name) for name in ("weights", "config"))
    if weights:
        yield f"model: {weights}", "model.weights", lambda: f"{weights} {transformers_weights(weights)}"
    if config:
        kind = config.get("model_type")
        yield f"model: {kind}", "model.config", lambda: f"a {kind} begun from nothing"


def files(recipe: VLMRecipe, texts: Callable[[], Iterable[str]]) -> dict[str, str]:
    options = recipe.model.options()
    weights, config = options.get("weights"), options.get("config")
    qwen_vl.check(weights, config)
    if weights:
        return qwen_files.kept(qwen_files.published(weights))
    return qwen_files.kept(qwen_files.begun(texts(), recipe.tokenizer, config or {}))


def network(recipe: VLMRecipe, kept: Files, device: torch.device) -> QwenVL:
    options = recipe.model.options()
    options.setdefault("attention", kernel_of(recipe.compute.attention, recipe.compute.compile))
    processor = qwen_files.of_files(kept)
    torch.manual_seed(recipe.seed)
    model = make(partial(qwen_vl.build, processor, **options), device)
    if "config" in options:
        settings = model.published.generation_config
        settings.eos_token_id = processor.tokenizer.eos_token_id
        settings.pad_token_id = processor.tokenizer.pad_token_id
    return model


def chat(kept: Files) -> Chat:
    return _chat(qwen_files.of_files(kept))


def _chat(processor: Any) -> Chat:
    marks = (processor.image_token, processor.video_token)
    around = (qwen_files.OPENING, qwen_files.CLOSING)
    return Chat(processor.tokenizer, processor.chat_template, marks, around)


def visuals(
    model: QwenVL, sampling: Sampling, told: str, static: float | None = None, written: int = 0
) -> Visuals:
    if static is not None:
        raise ValueError("frames.static: Qwen-VL sees all tokens of a clip: leave it out")
    marks = (model.config.image_token_id, model.config.video_token_id)
    return OwnSizes(model.looks, sampling, marks, told)


def published(recipe: VLMRecipe, model: QwenVL) -> tuple[str, ...]:
    return ("tower.", "projector.", "language.") if recipe.model.options().get("weights") else ()


def save(model: QwenVL, to: Path, recipe: VLMRecipe, kept: Files) -> tuple[str, str]:
    options = recipe.model.options()
    processor = qwen_files.of_files(kept)
    qwen_files.bounded(processor, options.get("min_pixels"), options.get("max_pixels"))
    qwen_vl.save(model, to, processor)
    return str(model.config.model_type), "video"


def load(folder: str) -> tuple[QwenVL, Chat, Callable[[Sampling, str], Visuals]]:
    processor = qwen_files.published(folder)
    model = qwen_vl.build(processor, weights=folder)
    return model, _chat(processor), lambda sampling, told: visuals(model, sampling, told)
