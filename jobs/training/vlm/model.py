"""A vision–language model and its tokenizer, made from a recipe, or from what training left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.training import lora
from jobs.training.exported import Trained, load_model, longest_average
from jobs.training.parallelize import make, on_meta
from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vlm.visuals import Visuals
from models.language import llava
from models.language.by_document import DOCUMENTS
from models.language.exported import IMAGE, VIDEO
from models.language.llava import Llava, Placeholders
from models.language.tokenizer import of_files

KERNELS = {"auto": DOCUMENTS, "plain": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}


def network(recipe: VLMRecipe, tokenizer: Any, device: torch.device) -> Llava:
    """As the recipe has it, before anything is trained, frozen or adapted. Raises ValueError, MissingModel."""
    options = recipe.model.options()
    for part in ("tower", "language"):
        if part not in options:
            raise ValueError(f"model.{part}: must be given: a hub id, a folder or a configuration")
    kernel = KERNELS.get(recipe.compute.attention, "sdpa")
    if kernel == DOCUMENTS and recipe.compute.compile:  # it would be compiled anew for each packing
        kernel = "sdpa"
    options.setdefault("attention", kernel)
    marks = Placeholders(*(tokenizer.convert_tokens_to_ids(name) for name in (IMAGE, VIDEO)))
    torch.manual_seed(recipe.seed)
    model = make(partial(llava.build, marks, **options | {"vocabulary": len(tokenizer)}), device)
    ends(model, tokenizer)
    return model


def ends(model: Llava, tokenizer: Any) -> None:
    """Answers end where the tokenizer says."""
    for settings in (model.language.config, model.language.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if settings.bos_token_id is not None and settings.bos_token_id >= len(tokenizer):
            settings.bos_token_id = None


def visuals_of(model: Llava, recipe: VLMRecipe) -> Visuals:
    """How it looks at clips. Raises ValueError."""
    frames, written = recipe.frames, recipe.written
    return Visuals.of(
        model,
        frames.sampling(),
        frames.times,
        frames.static,
        written=0 if written is None else written.length,
    )


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a tower or language model."""
    lists = [list(m) for m in part.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def set_trained(model: Llava, recipe: VLMRecipe) -> None:
    """Freeze and adapt the parts as the recipe has it. Raises ValueError."""
    how: dict[str, list[nn.Module]] = {
        recipe.train.tower: [x for x in (model.tower, model.video_tower) if x is not None]
    }
    how.setdefault(recipe.train.language, []).append(model.language)
    how.setdefault(recipe.train.projector, []).append(model.projector)
    if model.reader is not None:
        how[recipe.train.projector].append(model.reader)
    for module in how.get("frozen", []):
        module.requires_grad_(False)
    for module in how.get("lora", []):
        assert recipe.lora is not None
        lora.adapt(module, blocks_of(module), recipe.lora, recipe.seed)


@torch.no_grad()
def begin_with(model: Llava, folder: str, kept: Mapping[str, str]) -> None:
    """Give a new model the averaged weights of a trained one, adapters folded in.

    Args:
        kept: files of the new one's tokenizer.

    Raises ValueError where it is another model.
    """
    try:
        trained = trained_at(folder)
    except ValueError as e:
        raise ValueError(f"start: {e}") from e
    if trained.state["tokenizer"] != dict(kept):
        raise ValueError(
            f"start {folder} was trained with another tokenizer: use the same, or leave start out"
        )
    if on_meta(model):  # weights come from the first rank
        return
    given, own = model_of(trained)[0].state_dict(), model.state_dict()
    for name in sorted(given.keys() ^ own.keys()):
        raise ValueError(f"start {folder}: one has {name}, the other not: use the same options of model")
    for name, x in given.items():
        if own[name].shape != x.shape:
            raise ValueError(f"start {folder} has another {name}: use the same options of model")
        own[name].copy_(x)


def trained_at(folder: str) -> Trained:
    """With its longest average, where one was kept. Raises ValueError."""
    try:
        trained = load_model(Path(folder), longest_average(Path(folder)) or None)
    except OSError as e:
        raise ValueError(f"{folder}: {e}") from e
    if trained.recipe.get("trains") != "vlm":
        raise ValueError(
            f"{folder} is a {trained.recipe.get('trains')} model: name one of clipmill train vlm"
        )
    return trained


def model_of(trained: Trained) -> tuple[Llava, Any, VLMRecipe]:
    """(model with its adapters folded in, tokenizer, recipe). Raises ValueError, CheckpointError, MissingModel."""
    recipe = VLMRecipe.model_validate(trained.recipe)
    tokenizer = of_files(trained.state["tokenizer"])
    model = network(recipe, tokenizer, torch.device("cpu"))
    if recipe.lora:
        set_trained(model, recipe)
    trained.load_into(model, "vlm")
    for part in (model.tower, model.video_tower, model.language):
        if recipe.lora and part is not None:
            lora.merge(part)
    model.requires_grad_(False)
    return model.eval(), tokenizer, recipe


def published(recipe: VLMRecipe, model: Llava) -> tuple[str, ...]:
    """Beginnings of names of weights that files of others give again, while they are frozen."""
    if recipe.start:
        return ()
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
