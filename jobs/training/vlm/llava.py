"""LLaVA-type models as a kind of vision–language model, see `jobs.training.vlm.kinds`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.training.parallelize import make
from jobs.training.vlm.kinds import Files
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vlm.squares import Squares
from jobs.training.vlm.visuals import Visuals
from models.language import exported, llava
from models.language import tokenizer as tokenizers
from models.language.budget import Sampling
from models.language.by_document import kernel_of
from models.language.chat import Chat
from models.language.exported import IMAGE, VIDEO
from models.language.llava import Llava, Placeholders
from models.language.pixels import Pixels

TYPES = ("llava", "llava_onevision")


def needs(recipe: VLMRecipe) -> Iterator[tuple[str, str, Callable[[], str]]]:
    for part in ("tower", "video_tower", "language"):
        if what := recipe.model.options().get(part):
            yield (
                f"model: {part} {what if isinstance(what, str) else what.get('model_type')}",
                f"model.{part}",
                partial(llava.source, what),
            )


def files(recipe: VLMRecipe, texts: Callable[[], Iterable[str]]) -> dict[str, str]:
    language = recipe.model.options().get("language")
    if isinstance(language, str):
        return tokenizers.files(tokenizers.published(language))
    return tokenizers.files(tokenizers.trained(texts(), recipe.tokenizer))


def network(recipe: VLMRecipe, kept: Files, device: torch.device) -> Llava:
    tokenizer = tokenizers.of_files(kept)
    options = recipe.model.options()
    for part in ("tower", "language"):
        if part not in options:
            raise ValueError(f"model.{part}: must be given: a hub id, a folder or a configuration")
    options.setdefault("attention", kernel_of(recipe.compute.attention, recipe.compute.compile))
    marks = Placeholders(*(tokenizer.convert_tokens_to_ids(name) for name in (IMAGE, VIDEO)))
    torch.manual_seed(recipe.seed)
    model = make(partial(llava.build, marks, **options | {"vocabulary": len(tokenizer)}), device)
    for settings in (model.language.config, model.language.generation_config):  # where answers end
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if settings.bos_token_id is not None and settings.bos_token_id >= len(tokenizer):
            settings.bos_token_id = None
    return model


def chat(kept: Files) -> Chat:
    return Chat(tokenizers.of_files(kept))


def visuals(
    model: Llava, sampling: Sampling, told: str, static: float | None = None, written: int = 0
) -> Visuals:
    return Squares.of(model, sampling, told, static, written=written)


def published(recipe: VLMRecipe, model: Llava) -> tuple[str, ...]:
    options = recipe.model.options()
    found = [
        f"{part}."
        for part in ("tower", "video_tower")
        if isinstance(options.get(part), str) and not _begun(options[part])
    ]
    if isinstance(options["language"], str):
        tables = ("embed", "wte", "lm_head", "embed_out")  # rows are added to these
        base = model.language.base_model_prefix
        parts: Iterable[str] = (name for name, _ in model.language.base_model.named_children())
        found += [f"language.{base}.{name}." for name in parts if not any(table in name for table in tables)]
    return tuple(found)


def _begun(tower: str) -> bool:
    """Whether an open_clip name stands for no weights."""
    return tower.startswith("open_clip:") and tower.count(":") == 1


def save(model: Llava, to: Path, recipe: VLMRecipe, kept: Files) -> tuple[str, str]:
    if recipe.frames.static is not None:
        raise ValueError(
            "export: it was trained without the tokens of what stands still (frames.static), which transformers' "
            "classes always have: train with frames: {static: null}"
        )
    name = exported.kind_of(model)
    exported.save(model, to, tokenizers.of_files(kept))
    return name, "images" if name == "llava" else "video"


def load(folder: str) -> tuple[Llava, Chat, Callable[[Sampling, str], Visuals]]:
    from transformers import AutoProcessor

    model = exported.load(folder)
    processor: Any = AutoProcessor.from_pretrained(folder)
    pictures, template = processor.image_processor, processor.chat_template
    talk = Chat(processor.tokenizer, template) if template else Chat(processor.tokenizer)
    pixels = Pixels(model.tower.size, tuple(pictures.image_mean), tuple(pictures.image_std))
    return model, talk, lambda sampling, told: Squares.of(model, sampling, told, pixels=pixels)
