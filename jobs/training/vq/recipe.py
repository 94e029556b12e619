"""What a VQ autoencoder's recipe has beside the core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jobs.training.recipe_core import EMA, HeldOut, Measured, TrainRecipe
from jobs.training.recipe_reconstruction import Reconstruction


class VQLoss(Reconstruction):
    """What a VQ autoencoder is trained for; how it quantises is a matter of the model."""

    channels: int = Field(64, ge=1, description="of the vectors that codes stand for")
    weight: float = Field(1.0, ge=0, description="of the codebook's own loss, commitment and all")


class VQRecipe(TrainRecipe):
    """From a run's shards to a VQ autoencoder, whose codes a world model reads and writes."""

    trains: Literal["vq"] = "vq"
    vq: VQLoss = VQLoss()
    held_out: HeldOut = 0.0
    measured: Measured = 64
    # An average of encoders would be read with the codebook of the last.
    ema: EMA = Field(EMA(lengths=()), description="averages of the weights; of a VQ autoencoder none")
