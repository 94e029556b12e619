"""The networks that are trained as vision–language models, and where they differ, each in a file of its own.

llava     jobs/training/vlm/llava.py     made of parts; its tokenizer is the language model's
qwen_vl   jobs/training/vlm/qwen_vl.py   published whole; it comes with a processor
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from jobs.training.vlm.recipe import VLMRecipe
from jobs.training.vlm.visuals import Visuals
from models.language.budget import Sampling
from models.language.chat import Chat
from models.language.seeing import Seeing

Files = Mapping[str, str]  # name → text, of a tokenizer or processor: what a trained model is used with
KINDS = ("llava", "qwen_vl")


class Kind(Protocol):
    """A module of these functions. All raise ValueError or MissingModel, one sentence with the fix."""

    TYPES: tuple[str, ...]  # model types of transformers, of published or exported folders that it loads

    def needs(self, recipe: VLMRecipe) -> Iterator[tuple[str, str, Callable[[], str]]]:
        """What the network is made from: what it is, the recipe's key, and a call that says where it is."""

    def files(self, recipe: VLMRecipe, texts: Callable[[], Iterable[str]]) -> dict[str, str]:
        """Of the tokenizer or processor: a published one's, or one that is trained on the texts."""

    def network(self, recipe: VLMRecipe, kept: Files, device: torch.device) -> Seeing:
        """As the recipe has it, before anything is trained, frozen or adapted."""

    def chat(self, kept: Files) -> Chat:
        """How conversations become tokens."""

    def visuals(
        self, model: Any, sampling: Sampling, told: str, static: float | None = None, written: int = 0
    ) -> Visuals:
        """How it looks at pictures and clips."""

    def published(self, recipe: VLMRecipe, model: Any) -> tuple[str, ...]:
        """Beginnings of names of weights that files of others give again, while they are frozen."""

    def save(self, model: Any, to: Path, recipe: VLMRecipe, kept: Files) -> tuple[str, str]:
        """Write it as transformers loads it; (name of the class, 'images' or 'video': how a captioner shows clips)."""

    def load(self, folder: str) -> tuple[Seeing, Chat, Callable[[Sampling, str], Visuals]]:
        """What `save` wrote, or a published folder or hub id."""


def kind(name: str) -> Kind:
    """By `model.kind` of a recipe. Raises ValueError."""
    if name not in KINDS:
        raise ValueError(f"trains: vlm needs model.kind {' or '.join(KINDS)}, not {name}")
    return cast(Kind, import_module(f"jobs.training.vlm.{name}"))


def kind_of_folder(folder: str) -> Kind:
    """Of a folder or hub id in the layout of transformers. Raises MissingModel."""
    from transformers import AutoConfig

    from models.hub import MissingModel, transformers_weights

    transformers_weights(folder)
    try:
        found = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError, KeyError) as e:
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise MissingModel(f"model {folder!r} cannot be loaded: {first}") from e
    every = [kind(name) for name in KINDS]
    for one in every:
        if found in one.TYPES:
            return one
    known = [t for one in every for t in one.TYPES]
    raise MissingModel(f"model {folder!r} is a {found}: name a {', '.join(known[:-1])} or {known[-1]}")
