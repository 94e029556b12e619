"""Training a VQ autoencoder (`models.autoencoders.vq`), whose codes a world model reads and writes.

What it shares with other autoencoders is in reconstruction.py; here the loss of a reconstruction has beside it

    weight · (commitment, and where `update` is gradient what moves the vectors)

and after each step the codebook is moved by what all micro-batches and ranks have seen. The page shows how many codes
are in use (`codes/usage`), how many of them, used evenly, would be as hard to guess (`codes/perplexity`), and how many
vectors began again (`codes/again`): a codebook that collapses is seen there before it is seen in pictures.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.training.data.loader import build_loader
from jobs.training.parallelize import make
from jobs.training.recipe_core import TrainRecipe
from jobs.training.reconstruction import Made, ReconstructionTask
from jobs.training.task import Draws, Loader, Losses, Start, Step, Summed
from jobs.training.vq.recipe import VQRecipe
from models.attention import choose_kernel
from models.autoencoders import vq
from models.autoencoders.vq import Codebook, Quantised, Seen, health, strays

MEMORY = 0.9  # of the counts that the page's figures are of, a step


def build(recipe: TrainRecipe, start: Start) -> tuple[VQTask, Loader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, VQRecipe)
    if recipe.model.kind != "vq":
        raise ValueError(f"trains: vq needs model.kind vq, not {recipe.model.kind}")
    if recipe.ema.lengths:
        raise ValueError(
            "ema.lengths: an average of encoders would be read with the codebook of the last: leave it ()"
        )
    if recipe.compute.parallel == "fsdp" and recipe.model.options().get("update") == "gradient":
        raise ValueError(
            "model.update gradient: a codebook that is trained is not sharded: give ema, or compute.parallel ddp"
        )
    task = VQTask(recipe, start.world.device, start.device)
    loader = build_loader(recipe, start.data, task.vq, start.world, recipe.held_out)
    task.look_at(recipe, start, loader)
    return task, loader


class VQTask(ReconstructionTask):
    """Args: see `ReconstructionTask`."""

    def __init__(self, recipe: VQRecipe, device: torch.device, made_on: torch.device | None = None):
        self.wanted, self.seed = recipe.vq, recipe.seed
        self.made_of = {"channels": recipe.vq.channels} | recipe.model.options()
        torch.manual_seed(recipe.seed)
        self.vq = make(partial(vq.build, **self.made_of), made_on or device)
        choose_kernel(self.vq, recipe.compute.attention)
        self.seen: list[tuple[Seen, Tensor]] = []  # of this step's micro-batches, with some of their inputs
        self.counts_lately = torch.zeros(self.vq.codes, device=device)
        self.began_again = 0
        super().__init__(recipe, recipe.vq, "vq", self.vq, device, made_on or device)

    def made(self, model: nn.Module, video: Tensor, draws: Draws, learns: bool) -> Made:
        made, quantised = model(video)
        if learns:
            self.seen.append(self._seen(quantised, draws))
        loss = quantised.loss.flatten(1).mean(1)
        return Made(made, self.wanted.weight * loss, {"codebook": loss})

    def _seen(self, quantised: Quantised, draws: Draws) -> tuple[Seen, Tensor]:
        """What a micro-batch's codes stood for, and as many of its inputs as there are codes, in random order."""
        if isinstance(self.vq.quantiser, Codebook):
            inputs = quantised.inputs.flatten(0, -2)
            some = draws.order(len(inputs), strays(quantised).flatten())[: self.vq.codes]
            return self.vq.quantiser.seen(quantised), inputs[some]
        codes = quantised.codes.flatten()
        counts = torch.zeros(self.vq.codes, device=codes.device)
        none = torch.zeros(0, device=codes.device)
        return Seen(counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype)), none), none

    def backward(self, step: Step) -> None:
        if step.phase.name == "vq":
            self.seen = []  # of this step alone: what it would cost is tried before, too
        super().backward(step)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the codebook by what all micro-batches and ranks have seen, the same on every rank."""
        seen = self.seen[0][0]
        for more, _ in self.seen[1:]:
            seen = seen.plus(more)
        spare = torch.stack([some for _, some in self.seen])  # [micro-batches, inputs, C]
        if self.world.mesh is not None:
            group = self.world.mesh.get_group("data")
            for x in seen:
                dist.all_reduce(x, group=group)
            each = [torch.empty_like(spare) for _ in range(self.world.data_size)]
            dist.all_gather(each, spare, group=group)
            spare = torch.stack(each, dim=1)  # [a rank's micro-batches, ranks, …]: by their numbers
        self.counts_lately.lerp_(seen.counts.to(self.counts_lately), 1 - MEMORY)
        if isinstance(self.vq.quantiser, Codebook):
            spare = spare.flatten(0, -2)
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(spare), generator=generator).to(spare.device)
            self.began_again = self.vq.quantiser.update(seen, spare[order])
        self.seen = []

    def _autoencode(self, model: nn.Module, video: Tensor, draws: Draws, judged: bool) -> Losses:
        losses = super()._autoencode(model, video, draws, judged)
        found = health(self.counts_lately)
        figures = {"usage": found.usage, "perplexity": found.perplexity, "again": float(self.began_again)}
        losses.report |= {f"codes/{k}": Summed(torch.tensor(x), 1) for k, x in figures.items()}
        return losses

    def state(self) -> dict[str, Any]:
        """`vq`: what `models.autoencoders.vq.build` takes."""
        return {"vq": self.made_of}
