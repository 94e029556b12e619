"""Training a variational autoencoder: reconstruction, KL and, from some step on, a discriminator.

What it shares with other autoencoders is in reconstruction.py; here the loss of a reconstruction has beside it

    weight · KL per pixel value

With `train: decoder` the encoder is frozen and the decoder fine-tuned on videos (Video LDM, sec. 3.1.1).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.training.data.loader import build_loader
from jobs.training.exported import load_model
from jobs.training.parallelize import make, on_meta
from jobs.training.recipe_core import TrainRecipe
from jobs.training.reconstruction import Made, ReconstructionTask
from jobs.training.task import Draws, Loader, Start
from jobs.training.vae.recipe import VAERecipe
from models.attention import choose_kernel
from models.autoencoders import vae
from models.autoencoders.latents import BlockDCT, Posterior, latent_shape

DCT_PATCH = 8


def build(recipe: TrainRecipe, start: Start) -> tuple[AutoencoderTask, Loader]:
    """Raises ValueError or StoreError, in one sentence, where recipe and data do not fit."""
    assert isinstance(recipe, VAERecipe)
    if recipe.model.kind != "vae":
        raise ValueError(f"trains: vae needs model.kind vae, not {recipe.model.kind}")
    task = AutoencoderTask(recipe, start.world.device, start.device, fresh=not start.saved)
    loader = build_loader(recipe, start.data, task.vae, start.world, recipe.held_out)
    task.look_at(recipe, start, loader)
    return task, loader


class AutoencoderTask(ReconstructionTask):
    """Args: see `ReconstructionTask`; fresh: it begins with `vae.image`; False where a checkpoint's weights take their
    place."""

    def __init__(
        self,
        recipe: VAERecipe,
        device: torch.device,
        made_on: torch.device | None = None,
        fresh: bool = True,
    ):
        self.wanted = wanted = recipe.vae
        self.made_of = {"channels": wanted.channels} | recipe.model.options()
        torch.manual_seed(recipe.seed)
        self.vae = make(partial(vae.build, **self.made_of), made_on or device)
        choose_kernel(self.vae, recipe.compute.attention)
        if wanted.image and fresh and not on_meta(self.vae):
            trained = load_model(Path(wanted.image))
            if "vae" not in trained.weights:
                raise ValueError(f"vae.image {wanted.image} holds no autoencoder: train one, trains: vae")
            vae.inflate(self.vae, trained.weights["vae"])
        if wanted.train == "decoder":
            self.vae.freeze_encoder()
        super().__init__(recipe, wanted, "vae", self.vae, device, made_on or device)

    def made(self, model: nn.Module, video: Tensor, draws: Draws, learns: bool) -> Made:
        shape = latent_shape(self.vae, *video.shape[2:])
        noise = draws.normal(video.new_empty(len(video), self.vae.channels, *shape))
        made, mean, logvar = model(video, noise)
        kl = Posterior(mean.float(), logvar.float()).kl() / video[0].numel()
        return Made(made, self.wanted.kl * kl, {"kl": kl})

    def beside(self, video: Tensor) -> dict[str, Tensor]:
        """The block DCT of as many numbers."""
        plain = dct_like(self.vae)
        if any(side % plain.patch for side in video.shape[3:]):
            return {}
        return {"/dct": plain.decode(plain.encode(video).mean)}

    def state(self) -> dict[str, Any]:
        """`vae`: what `models.autoencoders.vae.build` takes."""
        return {"vae": self.made_of}


def dct_like(model: vae.VAE) -> BlockDCT:
    """The block DCT of pictures that has as many numbers for a pixel, or a few more."""
    share = model.channels / math.prod(model.stride)
    return BlockDCT(DCT_PATCH, min(DCT_PATCH**2, math.ceil(share * DCT_PATCH**2 / 3)))
