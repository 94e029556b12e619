"""Training a world model (`models.language.world`): text, pictures and videos in one sequence of tokens.

Documents (documents.py) are packed into sequences of `data.tokens`, each seeing itself alone and weighing as much as it
would alone. The loss is ½ of the text's and ½ of the visual tokens', each the mean over the documents of the step that
have some to be learnt (Large World Model, Liu et al. 2024, sec. 3.2). A frozen VQ autoencoder makes the codes where the
model is, from the pixels of a batch.

With `compute.context` several processes share each sequence, a part each, and keys and values go around a ring.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training.data.captions import captions_of
from jobs.training.data.loader import held_out_of
from jobs.training.data.sequences import SequenceLoader
from jobs.training.distributed import World as Ranks
from jobs.training.recipe_core import TrainRecipe
from jobs.training.task import Batch, Draws, Evaluation, Losses, Phase, Start, Step, Summed, Task, Told
from jobs.training.world.conversations import Looks
from jobs.training.world.documents import LANES, PLACEMENT, Collate, LaidOut, sources_of
from jobs.training.world.recipe import WorldRecipe
from jobs.training.world.system import WorldSystem, build_world
from models.language import needle
from models.language.layout import Laid
from models.language.loss import Goal
from models.language.world import Goals, Places, Said, World
from models.ring_attention import Ring
from pipeline.shards.reader import ShardReader

BLOCK = 512  # places of a ring's blocks where the recipe has none
SHOWN = 4  # captions and videos that are looked at
STRAW = 10_000  # captions that needles are hidden in


def build(recipe: TrainRecipe, start: Start) -> tuple[WorldTask, SequenceLoader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, WorldRecipe)
    if recipe.model.kind != "world":
        raise ValueError(f"trains: world needs model.kind world, not {recipe.model.kind}")
    if recipe.stages:
        raise ValueError("stages are trained one after the other: see jobs.training.world.stages")
    ranks = start.world
    if recipe.data.tokens % (2 * ranks.context_size):
        raise ValueError(
            f"data.tokens {recipe.data.tokens}: give a multiple of {2 * ranks.context_size}, twice compute.context"
        )
    told = partial(captions_of, recipe, start.data, recipe.held_out)
    words = partial(needle.with_examples, told) if recipe.documents.needle else told
    system = build_world(recipe, ranks.device, start.device, start.saved, words)
    task = WorldTask(recipe, system, ranks)
    if system.vq is not None and recipe.held_out:
        task.held_out = held_out_of(recipe, start.data, recipe.held_out)
    laid = LaidOut(
        recipe.documents,
        system.tokenizer,
        system.layout.codes,
        system.layout.frame,
        1 if system.vq is None else system.vq.stride[0],
        recipe.longest,
        recipe.seed,
        None if system.vq is None else Looks.of(recipe.data),
    )
    if recipe.documents.needle:
        laid.straw = task.straw = [c for c in told(STRAW) if c]
        if not laid.straw:
            raise ValueError(f"documents.needle: no clip of {start.data} has a caption: caption them first")
    loader = SequenceLoader(
        sources_of(recipe, start.data),
        laid,
        tokens=recipe.data.tokens,
        pool=recipe.pool,
        lanes=LANES,
        collate=Collate(system.layout.codes, ranks.context_rank, ranks.context_size),
        rank=ranks.data_rank,
        world=ranks.data_size,
        workers=recipe.data.workers,
        pin=ranks.device.type == "cuda",
    )
    return task, loader


class WorldTask(Task):
    """held_out: clips that captions and losses are measured on, if any are; straw: captions that numbers are hidden in,
    if they are asked for."""

    def __init__(self, recipe: WorldRecipe, system: WorldSystem, ranks: Ranks):
        self.recipe, self.system, self.ranks, self.device = recipe, system, ranks, ranks.device
        self.weights = {"text": 0.5, "vision": 0.5} if system.vq is not None else {"text": 1.0}  # type: ignore[misc]
        self.phases = [Phase.of("world", system.model, recipe.optimizer)]
        self.held_out: ShardReader | None = None
        self.straw: list[str] = []
        self.ring: Ring | None = None
        self.stepping = (
            False  # all ranks are in a step: what it will cost is tried before by the first one alone
        )
        if ranks.context_group is not None and ranks.context_size > 1:
            self.ring = Ring.of(ranks.context_group, PLACEMENT, recipe.block or BLOCK)
        elif recipe.block:
            self.ring = Ring(block=recipe.block)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {kind: batch[f"{kind}_documents"] for kind in self.weights}

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        tokens, vision = self.tokens_of(batch), batch["vision"].to(self.device)
        length = len(tokens)
        places = Places.packed(batch["lengths"], length, self.device)
        ring = self.ring if self.stepping else None
        goals = {kind: self._goal(batch, kind, tokens, ring) for kind in self.weights}
        if ring is not None:
            tokens, vision = ring.split(tokens), ring.split(vision)
            places = Places(ring.split(places.positions), ring.mask(places.mask, length))
        wanted = Goals(goals["text"], goals.get("vision"))
        said: Said = model(tokens[None], vision[None], places, goals=wanted)
        sums = {"text": said.text}
        if said.vision is not None:
            sums["vision"] = said.vision
        used = sum(batch["lengths"]) / length
        return Losses(sums, {"packed": Summed(torch.tensor(used), 1)})

    def _goal(self, batch: Batch, kind: str, tokens: Tensor, ring: Ring | None) -> Goal:
        """What is to be learnt of a whole sequence's tokens, or of this rank's part of them."""
        at, weights = batch[f"{kind}_at"].to(self.device), batch[f"{kind}_weights"].to(self.device)
        targets = tokens[at + 1]  # of a place that counts what comes next in its document
        if ring is None or f"{kind}_mine" not in batch:
            return Goal(at, targets, weights)
        mine = batch[f"{kind}_mine"].to(self.device)
        return Goal(batch[f"{kind}_part"].to(self.device), targets[mine], weights[mine])

    def backward(self, step: Step) -> None:
        self.stepping = True
        try:
            super().backward(step)
        finally:
            self.stepping = False

    def tokens_of(self, batch: Batch) -> Tensor:
        """int64 [L], with the codes of the pixels in their places."""
        tokens: Tensor = batch["tokens"].to(self.device)
        if "pixels" not in batch:
            return tokens
        codes = self.system.encode(batch["pixels"], batch["clips"])
        return tokens.index_copy(0, batch["slots"].to(self.device), codes.flatten())

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        assert isinstance(module, World)
        yield from module.blocks

    def tokens(self, batch: Batch) -> int:
        return sum(batch["lengths"])

    # ------------------------------------------------------------ what is looked at

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """Of held-out clips the caption that the model writes, how many are the clip's own to the letter, and the loss
        both ways; videos of prompts; of needles how many are found. All ranks do the same, pass by pass."""
        assert isinstance(model, World)
        found = Evaluation()
        if self.straw:
            found.scalars["needles/found"] = self._needles(model)
        if self.held_out is None:
            return found
        clips = len(self.held_out.keys)
        rows = range(0, clips, -(-clips // self.recipe.measured))
        read = [self.held_out.sound(row) for row in rows]
        pixels = [torch.from_numpy(clip["video"]).transpose(0, 1) for clip in read]
        codes = [self.system.encode(x, [len(x)]) for x in pixels]
        captions = [clip["caption"] for clip in read]
        told = [self.system.tell([[x]], model=model)[0] for x in codes]
        exact = [a == b for a, b in zip(told, captions, strict=True)]
        found.scalars["captions/exact"] = sum(exact) / len(exact)
        shown = zip(captions[:SHOWN], told[:SHOWN], pixels[:SHOWN], strict=True)
        found.texts = [Told(wanted, said, x.permute(0, 2, 3, 1)) for wanted, said, x in shown]
        losses: dict[str, list[float]] = {"loss/video_to_text": [], "loss/text_to_video": []}
        for x, caption in zip(codes, captions, strict=True):
            losses["loss/video_to_text"].append(self._loss(model, [x.cpu(), caption], False))
            losses["loss/text_to_video"].append(self._loss(model, [caption, x.cpu()], True))
        found.scalars |= {f"held_out/{name}": sum(each) / len(each) for name, each in losses.items()}
        prompts = list(self.recipe.run.prompts) or captions[:SHOWN]
        seeds = list(range(len(prompts)))
        drawn = self.system.draw([[p] for p in prompts], self.system.bucket.frames, seeds, model=model)
        found.videos = {p: x.cpu() for p, x in zip(prompts, drawn, strict=True)}
        return found

    def _loss(self, model: World, parts: list[Any], visual: bool) -> float:
        """Mean cross-entropy of a document's visual tokens, or of its text ones after them."""
        laid: Laid = self.system.layout.lay_out(parts)
        tokens, vision = laid.tokens.to(self.device), laid.vision
        targets = vision[1:] if visual else ~vision[1:] & (vision.cumsum(0)[1:] > 0)
        weights = torch.cat([targets.float() / targets.sum(), torch.zeros(1)])
        goal = Goal.of(laid.tokens.roll(-1), weights).to(self.device)
        nothing = Goal.of(laid.tokens, torch.zeros(laid.length)).to(self.device)
        goals = Goals(nothing, goal) if visual else Goals(goal, nothing)
        said = model(tokens[None], vision[None].to(self.device), goals=goals)
        return float(said.vision if visual else said.text)

    def _needles(self, model: World) -> float:
        """Share of the numbers that are found in documents as long as the context, one in each."""
        import numpy as np

        asked, layout = [], self.system.layout
        for i in range(self.recipe.measured):
            rng = np.random.default_rng([1, self.recipe.seed, i])

            def sentence(rng: np.random.Generator = rng) -> str:
                return self.straw[int(rng.integers(len(self.straw)))]

            asked.append(needle.hidden(sentence, layout.encode, self.recipe.longest - 2, rng))
        right = needle.found(model, layout, asked)
        return sum(map(sum, right)) / sum(map(len, right))

    def state(self) -> dict[str, Any]:
        """See `WorldSystem.state`."""
        return self.system.state()
