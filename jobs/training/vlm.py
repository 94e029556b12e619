"""The small vision-language model (`models/language/small_vlm.py`) as a task of the training loop: video → caption.

`model` is `small_vlm`; its frames and size are those of the one bucket, which is square, its words
`text.length` bytes. The loss is a word's: a batch weighs as many parts as it has caption bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training.data import Loader, reader_of
from jobs.training.recipe import TrainRecipe, import_spec
from jobs.training.system import to_unit
from jobs.training.task import Batch, Draws, Losses, Phase
from models.language import text
from models.language.small_vlm import SmallVLM, caption_loss


def build(
    recipe: TrainRecipe, data: str, device: torch.device, rank: int = 0, world: int = 1
) -> tuple[Captioning, Loader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    if recipe.model.kind != "small_vlm":
        raise ValueError(f"trains: vlm needs model.kind small_vlm, not {recipe.model.kind}")
    if len(recipe.data.buckets) > 1 or recipe.data.buckets[0].height != recipe.data.buckets[0].width:
        raise ValueError("data.buckets: the small VLM takes one bucket, as high as it is wide")
    if recipe.data.images or recipe.data.stills or recipe.data.cache:
        raise ValueError(
            "the small VLM sees pixels of clips: leave data.cache unset, data.images and data.stills 0"
        )
    task = Captioning(recipe, device)
    loader = Loader(
        reader_of(recipe, data),
        [task.positions],
        tokens=recipe.data.tokens,
        batch=recipe.data.batch,
        rank=rank,
        world=world,
        workers=recipe.data.workers,
        pin=device.type == "cuda",
    )
    return task, loader


class Captioning:
    """A `jobs.training.task.Task`.

    positions: visual tokens and words of a sample.
    """

    def __init__(self, recipe: TrainRecipe, device: torch.device):
        bucket = recipe.data.buckets[0]
        self.device, self.length = device, recipe.text.length
        options = recipe.model.options()
        if bucket.width % (patch := options.get("patch", 16)):
            raise ValueError(f"data.buckets: {bucket.width} pixels are no multiple of the patches' {patch}")
        torch.manual_seed(recipe.seed)
        sizes = (bucket.frames, bucket.width, self.length)
        model: SmallVLM = import_spec(recipe.model.kind).build(sizes, **options).to(device)
        self.positions = model.visual + self.length
        self.phases = [Phase.of("vlm", model, recipe.optimizer)]

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        words = text.encode(batch["caption"], self.length)
        count = int((words[:, 1:] != text.PAD).sum())  # on the host
        video = to_unit(batch["video"].transpose(1, 2))  # B T 3 S S
        mean = caption_loss(model, video, words.to(self.device, non_blocking=True))
        return Losses(mean * count, count)

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(module, SmallVLM)
        yield from module.trunk.layers

    def tokens(self, batch: Batch) -> int:
        return len(batch["key"]) * self.positions

    def samples(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        return {}

    def real(self) -> Iterator[Tensor]:
        raise ValueError("run.frechet: a VLM makes no videos: set it to 0")

    def generate(self, model: nn.Module, which: Iterable[int]) -> Iterator[Tensor]:
        return iter(())

    def state(self) -> dict[str, Any]:
        return {}
