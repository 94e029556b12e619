"""What every autoencoder is trained with: reconstruction, perceptual distance and, from some step on, a discriminator.

Two phases a step, as VQGAN and latent diffusion train (Esser et al. 2021; Rombach et al. 2022, app. G):

    the autoencoder   L1 + perceptual + what it adds itself + adversarial · λ · (−logit), λ adaptive
    discriminator     hinge loss of videos against their reconstructions
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jobs.training.data.loader import Loader as ClipLoader
from jobs.training.data.loader import held_out_of
from jobs.training.data.pixels import to_bytes, to_unit
from jobs.training.distributed import World
from jobs.training.parallelize import make
from jobs.training.recipe_reconstruction import Reconstruction
from jobs.training.task import Batch, Draws, Evaluation, Losses, Phase, Start, Summed, Task
from jobs.training.vae.recipe import VAERecipe
from jobs.training.vq.recipe import VQRecipe
from models.autoencoders import perceptual
from models.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from models.autoencoders.latents import latent_shape
from models.autoencoders.vae import Halves
from models.measures.quality import psnr, ssim
from pipeline.shards.reader import ShardReader

SHOWN = 2  # clips whose reconstruction is looked at


class Made(NamedTuple):
    """Of B videos. video: [B, 3, T, H, W]. loss: [B], what the autoencoder adds to that of the reconstruction.
    report: [B] each."""

    video: Tensor
    loss: Tensor
    report: dict[str, Tensor]


class ReconstructionTask(Task):
    """A subclass has `made` and `state`. shown: uint8 [3, T, H, W] each, the clips of `evaluate`. held_out: clips to
    measure, if any are.

    Args:
        wanted: the recipe's section. name: of the autoencoder's phase. made_on: of the discriminator, see `Start`.
    """

    def __init__(
        self,
        recipe: VAERecipe | VQRecipe,
        wanted: Reconstruction,
        name: str,
        autoencoder: Halves,
        device: torch.device,
        made_on: torch.device,
    ):
        self.reconstruction, self.autoencoder, self.device = wanted, autoencoder, device
        self.micros, self.measured, self.world = (
            recipe.data.micro_batches,
            recipe.measured,
            World(0, 1, device),
        )
        self.held_out: ShardReader | None = None
        self.perceptual = None
        if wanted.perceptual != "none" and wanted.perceptual_weight:
            files = (wanted.perceptual_file, wanted.perceptual_heads)
            self.perceptual = perceptual.build(wanted.perceptual, *files).to(device)
        self.phases = [Phase.of(name, autoencoder, recipe.optimizer)]
        if wanted.adversarial:
            self.discriminator = make(partial(PatchDiscriminator, wanted.discriminator_width), made_on)
            self.phases.append(Phase.of("discriminator", self.discriminator, recipe.optimizer, ema=False))
        self.shown: list[Tensor] = []

    def look_at(self, recipe: VAERecipe | VQRecipe, start: Start, loader: ClipLoader) -> None:
        """Choose the clips that are shown and measured. Raises StoreError, ValueError."""
        self.world = start.world
        self.held_out = held_out_of(recipe, start.data, recipe.held_out)
        reader = self.held_out or loader.readers[0]
        self.shown = [
            torch.from_numpy(reader.sound(row)["video"]) for row in range(min(SHOWN, len(reader.keys)))
        ]

    # ------------------------------------------------------------ what a subclass says

    def made(self, model: nn.Module, video: Tensor, draws: Draws, learns: bool) -> Made:
        """Reconstructions of videos [B, 3, T, H, W] in −1…1; learns: not only to show them to the discriminator."""
        raise NotImplementedError

    def beside(self, video: Tensor) -> dict[str, Tensor]:
        """What held-out videos are measured with as well, by the end of its name."""
        return {}

    # ------------------------------------------------------------ the losses

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        video = to_unit(batch["video"].to(self.device, non_blocking=True))
        judged = draws.micro // self.micros >= self.reconstruction.adversarial_start
        if phase == "discriminator":
            return self._discriminate(model, video, draws, judged)
        return self._autoencode(model, video, draws, judged and self.reconstruction.adversarial > 0)

    def _autoencode(self, model: nn.Module, video: Tensor, draws: Draws, judged: bool) -> Losses:
        found = self.made(model, video, draws, learns=True)
        made = found.video.float()
        l1 = (made - video).abs().flatten(1).mean(1)  # [B], as all losses here
        fit, report = l1, {"l1": l1, **found.report, "psnr": psnr(made.clamp(-1, 1), video).mean(1)}
        if self.perceptual is not None:
            report["perceptual"] = self.perceptual(made, video)
            fit = fit + self.reconstruction.perceptual_weight * report["perceptual"]
        total = fit + found.loss
        if judged:
            report["adversarial"] = adversarial = self._adversarial(made)
            weight = adaptive_weight(fit.sum(), adversarial.sum(), self.autoencoder.last_layer)
            total = total + self.reconstruction.adversarial * weight * adversarial
            report["adaptive_weight"] = weight.expand(len(video))
        each = total.detach()
        said = {k: Summed(v.detach().sum(), len(video)) for k, v in report.items()}
        return Losses({"clips": total.sum()}, said, each)

    def _adversarial(self, made: Tensor) -> Tensor:
        """Generator's loss [B], whose gradient ends at `made`: the discriminator gathers none from it."""
        image = made.detach().requires_grad_()
        loss = generator_loss(self.discriminator(image))
        (slope,) = torch.autograd.grad(loss.sum(), image)
        return loss.detach() + ((made - image.detach()) * slope).flatten(1).sum(1)

    def _discriminate(self, model: nn.Module, video: Tensor, draws: Draws, judged: bool) -> Losses:
        if not judged:  # nothing to learn from, on no rank
            return Losses({"clips": video.new_zeros(())})
        with torch.no_grad():
            made = self.made(self.autoencoder, video, draws, learns=False).video.float()
        real, fake = model(torch.cat([video, made])).float().chunk(2)
        loss = discriminator_loss(real, fake)
        return Losses({"clips": loss.sum()}, each=loss.detach())

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        inner = getattr(module, "module", module)  # as DDP wraps it
        return inner.repeated() if isinstance(inner, Halves) else iter(self.discriminator.blocks)

    def tokens(self, batch: Batch) -> int:
        b, _, *sides = batch["video"].shape
        return b * math.prod(latent_shape(self.autoencoder, *sides))

    # ------------------------------------------------------------ what is looked at

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """Original | reconstruction, uint8 [T, H, 2·W, 3]; of held-out clips PSNR and SSIM of reconstructions, and of
        what is `beside` them."""
        found = Evaluation(scalars=self._measured(model) if self.held_out else {})
        for i, clip in enumerate(self.shown):
            video = to_unit(clip[None].to(self.device))
            found.videos[f"clip {i + 1}, and as reconstructed"] = to_bytes(
                torch.cat([video, model(video)[0]], dim=4)
            )[0].cpu()
        return found

    def _measured(self, model: nn.Module) -> dict[str, float]:
        assert self.held_out is not None
        clips = len(self.held_out.keys)
        rows = range(0, clips, -(-clips // self.measured))
        mine: dict[int, dict[str, float]] = {}
        for i in self.world.share(len(rows)):
            video = to_unit(torch.from_numpy(self.held_out.sound(rows[i])["video"])[None].to(self.device))
            mine[i] = {}
            for name, made in ({"": model(video)[0].float()} | self.beside(video)).items():
                seen = made.clamp(-1, 1)
                mine[i][f"held_out/psnr{name}"] = float(psnr(seen, video).mean())
                if min(video.shape[3:]) >= 11:
                    mine[i][f"held_out/ssim{name}"] = float(ssim(seen, video).mean())
        every = {i: x for share in self.world.gather(mine) for i, x in share.items()}
        return {name: sum(x[name] for x in every.values()) / len(every) for name in every[0]}
