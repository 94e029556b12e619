"""What an autoencoder's recipe has beside the core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jobs.training.recipe_core import HeldOut, Measured, TrainRecipe
from jobs.training.recipe_reconstruction import Reconstruction
from pipeline.recipe_schema import PATH


class VAELoss(Reconstruction):
    """What an autoencoder is trained for, and from where."""

    channels: int = Field(16, ge=1, description="of the latents")
    train: Literal["all", "decoder"] = Field("all", description="decoder: the encoder is frozen (Video LDM)")
    image: str | None = Field(
        None,
        description="start from this image VAE of the same widths: a folder that clipmill train wrote",
        json_schema_extra=PATH,
    )
    kl: float = Field(1e-6, ge=0, description="weight of the KL in nats, per pixel value as the L1 loss is")


class VAERecipe(TrainRecipe):
    """From a run's shards to an autoencoder."""

    trains: Literal["vae"] = "vae"
    vae: VAELoss = VAELoss()
    held_out: HeldOut = 0.0
    measured: Measured = 64
