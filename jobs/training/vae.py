"""Training an autoencoder: reconstruction, perceptual distance, KL and, from some step on, a discriminator.

Two phases a step, as VQGAN and latent diffusion train (Esser et al. 2021; Rombach et al. 2022, app. G):

    vae             L1 + perceptual + weight · KL per pixel value + adversarial · λ · (−logit), λ adaptive
    discriminator   hinge loss of videos against their reconstructions

With `train: decoder` the encoder is frozen and the decoder fine-tuned on videos (Video LDM, sec. 3.1.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training.data import build_loader, held_out_of
from jobs.training.distributed import World
from jobs.training.exported import load_model
from jobs.training.parallelize import make, on_meta
from jobs.training.recipe_core import TrainRecipe
from jobs.training.recipe_vae import VAERecipe
from jobs.training.system import to_bytes, to_unit
from jobs.training.task import Batch, Draws, Evaluation, Loader, Losses, Phase, Start, Summed, Task
from models.attention import choose_kernel
from models.autoencoders import perceptual, vae
from models.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from models.autoencoders.latents import BlockDCT, Posterior, latent_shape
from models.measures.quality import psnr, ssim
from pipeline.shards.reader import ShardReader

SHOWN = 2  # clips whose reconstruction is looked at
DCT_PATCH = 8


def build(recipe: TrainRecipe, start: Start) -> tuple[AutoencoderTask, Loader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, VAERecipe)
    if recipe.model.kind != "vae":
        raise ValueError(f"trains: vae needs model.kind vae, not {recipe.model.kind}")
    task = AutoencoderTask(recipe, start.world.device, start.device, fresh=not start.saved)
    task.world = start.world
    loader = build_loader(recipe, start.data, task.vae, start.world, recipe.held_out)
    task.held_out = held_out_of(recipe, start.data, recipe.held_out)
    reader = task.held_out or loader.readers[0]
    task.shown = [torch.from_numpy(reader.sound(row)["video"]) for row in range(min(SHOWN, len(reader.keys)))]
    return task, loader


class AutoencoderTask(Task):
    """shown: uint8 [3, T, H, W] each, the clips of `evaluate`. held_out: clips to measure, if any are.

    Args:
        made_on: see `Start`.
        fresh: it begins with `vae.image`; False where a checkpoint's weights take their place.
    """

    def __init__(
        self,
        recipe: VAERecipe,
        device: torch.device,
        made_on: torch.device | None = None,
        fresh: bool = True,
    ):
        wanted = self.wanted = recipe.vae
        self.measured, self.world = recipe.measured, World(0, 1, device)
        self.held_out: ShardReader | None = None
        self.device, self.micros = device, recipe.data.micro_batches
        self.made_of = {"channels": wanted.channels} | recipe.model.options()
        torch.manual_seed(recipe.seed)
        made_on = made_on or device
        self.vae = make(partial(vae.build, **self.made_of), made_on)
        choose_kernel(self.vae, recipe.compute.attention)
        if wanted.image and fresh and not on_meta(self.vae):
            trained = load_model(Path(wanted.image))
            if "vae" not in trained.weights:
                raise ValueError(f"vae.image {wanted.image} holds no autoencoder: train one, trains: vae")
            vae.inflate(self.vae, trained.weights["vae"])
        if wanted.train == "decoder":
            self.vae.freeze_encoder()
        self.perceptual = None
        if wanted.perceptual != "none" and wanted.perceptual_weight:
            files = (wanted.perceptual_file, wanted.perceptual_heads)
            self.perceptual = perceptual.build(wanted.perceptual, *files).to(device)
        self.phases = [Phase.of("vae", self.vae, recipe.optimizer)]
        if wanted.adversarial:
            self.discriminator = make(partial(PatchDiscriminator, wanted.discriminator_width), made_on)
            self.phases.append(Phase.of("discriminator", self.discriminator, recipe.optimizer, ema=False))
        self.shown: list[Tensor] = []

    def loss(self, phase: str, model: nn.Module, batch: Batch, draws: Draws) -> Losses:
        video = to_unit(batch["video"].to(self.device, non_blocking=True))
        shape = latent_shape(self.vae, *video.shape[2:])
        noise = draws.normal(video.new_empty(len(video), self.vae.channels, *shape))
        judged = draws.micro // self.micros >= self.wanted.adversarial_start
        if phase == "discriminator":
            return self._discriminate(model, video, noise, judged)
        return self._autoencode(model, video, noise, judged and self.wanted.adversarial > 0)

    def _autoencode(self, model: nn.Module, video: Tensor, noise: Tensor, judged: bool) -> Losses:
        made, mean, logvar = model(video, noise)
        made = made.float()
        l1 = (made - video).abs().flatten(1).mean(1)  # [B], as all losses here
        kl = Posterior(mean.float(), logvar.float()).kl() / video[0].numel()
        fit, report = l1, {"l1": l1, "kl": kl, "psnr": psnr(made.clamp(-1, 1), video).mean(1)}
        if self.perceptual is not None:
            report["perceptual"] = self.perceptual(made, video)
            fit = fit + self.wanted.perceptual_weight * report["perceptual"]
        total = fit + self.wanted.kl * kl
        if judged:
            report["adversarial"] = adversarial = self._adversarial(made)
            weight = adaptive_weight(fit.sum(), adversarial.sum(), self.vae.last_layer)
            total = total + self.wanted.adversarial * weight * adversarial
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

    def _discriminate(self, model: nn.Module, video: Tensor, noise: Tensor, judged: bool) -> Losses:
        if not judged:  # nothing to learn from, on no rank
            return Losses({"clips": video.new_zeros(())})
        with torch.no_grad():
            made = self.vae(video, noise)[0].float()
        real, fake = model(torch.cat([video, made])).float().chunk(2)
        loss = discriminator_loss(real, fake)
        return Losses({"clips": loss.sum()}, each=loss.detach())

    def blocks(self, module: nn.Module) -> Iterator[nn.Module]:
        inner = getattr(module, "module", module)  # as DDP wraps it
        return inner.repeated() if isinstance(inner, vae.VAE) else iter(self.discriminator.blocks)

    def tokens(self, batch: Batch) -> int:
        b, _, *sides = batch["video"].shape
        return b * math.prod(latent_shape(self.vae, *sides))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> Evaluation:
        """Original | reconstruction, uint8 [T, H, 2·W, 3]; of held-out clips PSNR and SSIM of the mean latents decoded,
        and of the block DCT of as many numbers."""
        found = Evaluation(scalars=self._measured(model) if self.held_out else {})
        for i, clip in enumerate(self.shown):
            video = to_unit(clip[None].to(self.device))
            found.videos[f"reconstruction-{i}"] = to_bytes(torch.cat([video, model(video)[0]], dim=4))[
                0
            ].cpu()
        return found

    def _measured(self, model: nn.Module) -> dict[str, float]:
        assert self.held_out is not None
        clips = len(self.held_out.keys)
        rows = range(0, clips, -(-clips // self.measured))
        plain = dct_like(self.vae)
        mine: dict[int, dict[str, float]] = {}
        for i in self.world.share(len(rows)):
            video = to_unit(torch.from_numpy(self.held_out.sound(rows[i])["video"])[None].to(self.device))
            again = {"": model(video)[0].float()}
            if not any(side % plain.patch for side in video.shape[3:]):
                again["/dct"] = plain.decode(plain.encode(video).mean)
            mine[i] = {}
            for name, made in again.items():
                seen = made.clamp(-1, 1)
                mine[i][f"held_out/psnr{name}"] = float(psnr(seen, video).mean())
                if min(video.shape[3:]) >= 11:
                    mine[i][f"held_out/ssim{name}"] = float(ssim(seen, video).mean())
        every = {i: x for share in self.world.gather(mine) for i, x in share.items()}
        return {name: sum(x[name] for x in every.values()) / len(every) for name in every[0]}

    def state(self) -> dict[str, Any]:
        """`vae`: what `models.autoencoders.vae.build` takes."""
        return {"vae": self.made_of}


def dct_like(model: vae.VAE) -> BlockDCT:
    """The block DCT of pictures that has as many numbers for a pixel, or a few more."""
    share = model.channels / math.prod(model.stride)
    return BlockDCT(DCT_PATCH, min(DCT_PATCH**2, math.ceil(share * DCT_PATCH**2 / 3)))
