"""The small vision-language model (`models/language/small_vlm.py`) as a task of the training loop: video → caption.

`model` is `small_vlm`; its frames and size are those of the one bucket, which is square, its words
`caption_bytes` bytes. The loss is a word's: a batch weighs as many parts as it has caption bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from jobs.training.data import Loader, loader_of
from jobs.training.parallelize import make
from jobs.training.recipe_core import TrainRecipe, import_spec
from jobs.training.recipe_vlm import VLMRecipe
from jobs.training.system import to_unit
from jobs.training.task import Batch, Draws, Losses, Phase, Start, Task
from models.language import text
from models.language.small_vlm import SmallVLM, caption_loss


def build(recipe: TrainRecipe, start: Start) -> tuple[Captioning, Loader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, VLMRecipe)
    if recipe.model.kind != "small_vlm":
        raise ValueError(f"trains: vlm needs model.kind small_vlm, not {recipe.model.kind}")
    if len(recipe.data.buckets) > 1 or recipe.data.buckets[0].height != recipe.data.buckets[0].width:
        raise ValueError("data.buckets: the small VLM takes one bucket, as high as it is wide")
    task = Captioning(recipe, start.world.device, start.device)
    return task, loader_of(recipe, start.data, [task.positions], start.world)


class Captioning(Task):
    """positions: visual tokens and words of a sample.

    Args:
        made_on: see `Start`.
    """

    weights: ClassVar = {"words": 1.0}

    def __init__(self, recipe: VLMRecipe, device: torch.device, made_on: torch.device):
        bucket = recipe.data.buckets[0]
        self.device, self.length = device, recipe.caption_bytes
        options = recipe.model.options()
        if bucket.width % (patch := options.get("patch", 16)):
            raise ValueError(f"data.buckets: {bucket.width} pixels are no multiple of the patches' {patch}")
        torch.manual_seed(recipe.seed)
        sizes = (bucket.frames, bucket.width, self.length)
        build = partial(import_spec(recipe.model.kind).build, sizes, **options)
        model: SmallVLM = make(build, made_on)
        self.positions = model.visual + self.length
        self.phases = [Phase.of("vlm", model, recipe.optimizer)]

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        words = self._words(batch)
        video = to_unit(batch["video"].transpose(1, 2))  # B T 3 S S
        mean = caption_loss(model, video, words.to(self.device, non_blocking=True))
        return Losses({"words": mean * counted(words)})

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"words": counted(self._words(batch))}

    def _words(self, batch: Batch) -> Tensor:
        return text.encode(batch["caption"], self.length)

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(module, SmallVLM)
        yield from module.trunk.layers

    def tokens(self, batch: Batch) -> int:
        return len(batch["key"]) * self.positions


def counted(words: Tensor) -> int:
    """Bytes [B, L] that are predicted: all but the first and the padding."""
    return int((words[:, 1:] != text.PAD).sum())
