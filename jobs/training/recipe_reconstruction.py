"""What recipes of autoencoders share: how far from the pictures a reconstruction is, and who judges it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.recipe_schema import PATH, Section


class Reconstruction(Section):
    """What an autoencoder is trained for beside the L1 distance of its pixels."""

    perceptual: Literal["none", "efficientnet_lite0", "vgg16"] = Field(
        "efficientnet_lite0", description="the network of the perceptual distance"
    )
    perceptual_weight: float = Field(
        0.1, ge=0, description="1 with LPIPS' heads; without them each of five layers adds up to 4"
    )
    perceptual_file: str | None = Field(
        None, description="vgg16: torchvision's weights", json_schema_extra=PATH
    )
    perceptual_heads: str | None = Field(
        None, description="vgg16: LPIPS' linear heads; null: all channels weigh 1", json_schema_extra=PATH
    )
    adversarial: float = Field(0.5, ge=0, description="weight of the discriminator; 0: none")
    adversarial_start: int = Field(10_000, ge=0, description="the step from which it judges and learns")
    discriminator_width: int = Field(64, ge=8, description="features of its first layer")
