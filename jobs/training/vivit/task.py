"""Training a ViViT to tell what captions say of clips, from whose features distances between videos are measured.

A clip has labels in groups: phrases that the recipe lists, and common words of the captions. A group's loss is the
cross-entropy of a softmax over its labels with an even distribution over those that the caption names (of words:
Joulin et al. 2016; Mahajan et al. 2018, sec. 2.2); a group of which it names none does not count. Clips of some sources
are held out, and how often the likeliest label is one of the caption's is measured on them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.training.data.captions import captions_of
from jobs.training.data.loader import Loader, held_out_of, loader_of
from jobs.training.data.pixels import to_unit
from jobs.training.parallelize import make
from jobs.training.recipe_core import TrainRecipe
from jobs.training.task import Batch, Draws, Evaluation, Losses, Phase, Start, Summed, Task, Told
from jobs.training.vivit.recipe import ViViTRecipe
from models.attention import choose_kernel
from models.encoders import vivit
from pipeline.caption.text import words
from pipeline.shards.reader import ShardReader

WORDS = "words"  # the group of common words
TOO_COMMON = 0.5  # share of the captions in which a word tells little
TOGETHER = 8  # held-out clips at a time


def build(recipe: TrainRecipe, start: Start) -> tuple[Classification, Loader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, ViViTRecipe)
    if recipe.model.kind != "vivit":
        raise ValueError(f"trains: vivit needs model.kind vivit, not {recipe.model.kind}")
    if len(recipe.data.buckets) > 1 or recipe.data.buckets[0].height != recipe.data.buckets[0].width:
        raise ValueError("data.buckets: ViViT takes one bucket, as high as it is wide")
    if start.saved is None:
        captions = captions_of(recipe, start.data, recipe.held_out)
        labels = labels_of(recipe, captions)
        check_named(labels, captions)
    else:
        labels = start.saved["labels"]
    task = Classification(recipe, start, labels)
    task.held_out = held_out_of(recipe, start.data, recipe.held_out)
    return task, loader_of(recipe, start.data, [task.positions], start.world, recipe.held_out)


# ---------------------------------------------------------------- labels


def labels_of(recipe: ViViTRecipe, captions: list[str]) -> dict[str, list[str]]:
    """Group → labels. Raises ValueError where captions have too few words."""
    labels = {name: list(phrases) for name, phrases in recipe.labels.groups.items()}
    if recipe.labels.words:
        found = Counter(word for caption in captions for word in set(words(caption)))
        common = sorted(
            (word for word, n in found.items() if 2 <= n <= max(2, TOO_COMMON * len(captions))),
            key=lambda word: (-found[word], word),
        )
        if len(common) < 2:
            raise ValueError(
                f"labels.words: {len(captions)} captions share too few words to tell them apart: caption more clips, "
                "or give groups"
            )
        labels[WORDS] = common[: recipe.labels.words]
    return labels


def check_named(labels: Mapping[str, list[str]], captions: list[str]) -> None:
    """Raises ValueError where no caption names a label of a group."""
    names = Names(labels)
    for group, phrases in labels.items():
        if not any(bool(names.named(caption)[group].any()) for caption in captions):
            raise ValueError(f"labels.groups.{group}: no caption names one of {', '.join(phrases)}")


class Names:
    """Finds labels in captions. labels: group → phrases."""

    def __init__(self, labels: Mapping[str, Iterable[str]]):
        self.labels = {group: list(phrases) for group, phrases in labels.items()}
        self.patterns = {
            phrase: re.compile(rf"\b{re.escape(phrase)}s?\b", re.IGNORECASE)
            for group, phrases in self.labels.items()
            if group != WORDS
            for phrase in phrases
        }

    def named(self, caption: str) -> dict[str, Tensor]:
        """Group → float32 [labels], 1 where the caption names one."""
        said = set(words(caption))
        return {
            group: torch.tensor(
                [
                    float(p in said if group == WORDS else self.patterns[p].search(caption) is not None)
                    for p in phrases
                ]
            )
            for group, phrases in self.labels.items()
        }

    def targets(self, captions: list[str]) -> dict[str, Tensor]:
        """Group → float32 [B, labels]."""
        each = [self.named(caption) for caption in captions]
        return {group: torch.stack([x[group] for x in each]) for group in self.labels}


# ---------------------------------------------------------------- the task


class Classification(Task):
    """labels: group → labels; their logits follow one another in the head. held_out: clips to measure, if any are."""

    weights: ClassVar = {"labels": 1.0}

    def __init__(self, recipe: ViViTRecipe, start: Start, labels: dict[str, list[str]]):
        bucket, self.world = recipe.data.buckets[0], start.world
        self.device, self.measured = start.world.device, recipe.measured
        self.labels, self.names = labels, Names(labels)
        self.held_out: ShardReader | None = None
        torch.manual_seed(recipe.seed)
        classes = sum(map(len, labels.values()))
        options = recipe.model.options()
        sizes = bucket.frames, bucket.width, classes
        model = make(partial(vivit.build, sizes, **options), start.device)
        self.made_of = options | {"frames": bucket.frames, "size": bucket.width, "classes": classes}
        choose_kernel(model, recipe.compute.attention)
        t, h, w = model.grid
        self.positions = t * h * w
        self.phases = [Phase.of("vivit", model, recipe.optimizer)]

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"labels": sum(int(x.any(1).sum()) for x in self.names.targets(batch["caption"]).values())}

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        targets = self.names.targets(batch["caption"])
        logits = self._logits(model, batch["video"])
        each = torch.zeros(len(batch["key"]), device=self.device)
        report: dict[str, Summed] = {}
        for group, target in targets.items():
            target = target.to(self.device)
            errors = label_loss(logits[group].float(), target)
            each = each + errors
            told = int(target.any(1).sum())
            if told:
                report[group] = Summed(errors.detach().sum(), told)
        return Losses({"labels": each.sum()}, report, each.detach())

    def _logits(self, model: nn.Module, video: Tensor) -> dict[str, Tensor]:
        """Group → [B, labels], of uint8 [B, 3, T, H, W]."""
        found = model(to_unit(video.to(self.device, non_blocking=True))).logits
        parts = found.split([len(phrases) for phrases in self.labels.values()], dim=1)
        return dict(zip(self.labels, parts, strict=True))

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(module, vivit.ViViT)
        yield from module.blocks
        yield from module.time_blocks

    def tokens(self, batch: Batch) -> int:
        return len(batch["key"]) * self.positions

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """Of held-out clips, by group: how often the likeliest label is named, and the one that most of them name."""
        if self.held_out is None:
            return Evaluation()
        rows = range(0, len(self.held_out.keys), -(-len(self.held_out.keys) // self.measured))
        batches = [rows[i : i + TOGETHER] for i in range(0, len(rows), TOGETHER)]
        mine: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        texts: list[Told] = []
        for number in self.world.share(len(batches)):
            clips = [self.held_out.sound(row) for row in batches[number]]
            logits = self._logits(model, torch.stack([torch.from_numpy(clip["video"]) for clip in clips]))
            targets = self.names.targets([clip["caption"] for clip in clips])
            mine[number] = {group: (x.argmax(1).cpu(), targets[group]) for group, x in logits.items()}
            if number == 0:
                texts = [
                    Told(
                        clip["caption"],
                        self._said(logits, i),
                        torch.from_numpy(clip["video"]).permute(1, 2, 3, 0),
                    )
                    for i, clip in enumerate(clips)
                ]
        every = {n: found for share in self.world.gather(mine) for n, found in share.items()}
        scalars = {}
        for group in self.labels:
            guessed, target = (torch.cat([every[n][group][k] for n in sorted(every)]) for k in (0, 1))
            told = target.any(1)
            if told.any():
                right = target.gather(1, guessed[:, None])[told]
                scalars[f"accuracy/{group}"] = float(right.mean())
                scalars[f"accuracy/{group}/commonest"] = float(target[told].mean(0).max())
        return Evaluation(scalars=scalars, texts=self.world.gather(texts)[0])

    def _said(self, logits: dict[str, Tensor], i: int) -> str:
        return ", ".join(self.labels[group][int(x[i].argmax())] for group, x in logits.items())

    def state(self) -> dict[str, Any]:
        """What `models.measures.features` makes the network from, beside its weights; and what it tells."""
        return {"vivit": self.made_of, "labels": self.labels}


def label_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with an even distribution over the labels that are named, [B]; 0 where none is.

    Args:
        logits: [B, labels]. target: [B, labels], 1 where a label is named.
    """
    share = target / target.sum(1, keepdim=True).clamp(min=1)
    return -(share * F.log_softmax(logits, dim=1)).sum(1)
