"""Autoencoders of published models, by `diffusers`, under one protocol (`models.autoencoders.latents.Autoencoder`).

vae = load("stable-diffusion-xl/vae")           # a folder with config.json, or a hub id
z = vae.normalizer(vae.encode(video).mean)      # as the model's own diffusion network saw it

                        latents of T frames       frames
AutoencoderKL           T                         one by one (Stable Diffusion, SDXL, SD 3, FLUX)
AutoencoderKLWan        1 + (T − 1) / 4           causal
AutoencoderKLCogVideoX  1 + (T − 1) / 4, odd      see `CogVideoX` below
AutoencoderKLHunyuanVideo  1 + (T − 1) / 4        causal
AutoencoderKLLTXVideo   1 + (T − 1) / 8           causal encoder, the decoder looks ahead
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.autoencoders.latents import Normalizer, Posterior, latent_shape
from models.hub import MissingModel

FRAMES = 16  # that an image autoencoder takes at a time


def load(path: str, dtype: torch.dtype = torch.float32) -> Pretrained:
    """The autoencoder of a folder or hub id, whose config.json names its class; frozen, in evaluation mode.

    Args:
        path: of the autoencoder, or of a whole pipeline that has it in `vae/`.
        dtype: of its weights. float16 overflows in some (SDXL's); bfloat16 does not.
    Raises ValueError for a class that is not known here, MissingModel where diffusers, the folder or the
    hub's files cannot be had.
    """
    try:
        import diffusers
    except ImportError as e:
        raise MissingModel(
            "autoencoders of published models need diffusers: pip install -e '.[diffusers]' in the clone"
        ) from e
    if Path(path).is_dir():
        inner = not (Path(path) / "config.json").is_file() and (Path(path) / "vae" / "config.json").is_file()
        subfolder = "vae" if inner else None
        config = _config(path, subfolder)
    else:
        subfolder, config = _on_hub(path)
    name = str(config.get("_class_name"))
    if name not in CLASSES:
        raise ValueError(f"{path} is a {name}, which is not known here: give one of {', '.join(CLASSES)}")
    try:
        inner_vae = getattr(diffusers, name).from_pretrained(path, subfolder=subfolder, torch_dtype=dtype)
    except OSError as e:
        raise MissingModel(f"{path} has no weights of its {name}: {' '.join(str(e).split())}") from e
    return CLASSES[name](inner_vae)


class Pretrained(nn.Module):
    """A video autoencoder of `diffusers`; subclasses say what theirs does otherwise.

    normalizer: latents to what the model's own diffusion network was trained on, from the scaling, shift
        or statistics in its config.
    """

    causal = True

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.channels, self.stride = self.sizes()
        self.normalizer = _normalizer(vae, self.channels)

    def sizes(self) -> tuple[int, tuple[int, int, int]]:
        """Latent channels and (time, height, width) of a latent."""
        time, space = self.vae.temporal_compression_ratio, self.vae.spatial_compression_ratio
        return self.vae.config.latent_channels, (time, space, space)

    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] → posterior of [B, C, T', h, w]; not normalised. Raises ValueError by its shape."""
        latent_shape(self, *video.shape[2:])
        return self._encode(video.to(self.vae.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, T', h, w], not normalised → [B, 3, T, H, W]."""
        return self._decode(latents.to(self.vae.dtype))

    def _encode(self, video: Tensor) -> Posterior:
        distribution = self.vae.encode(video).latent_dist
        return Posterior(distribution.mean, distribution.logvar)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


class ImageKL(Pretrained):
    """AutoencoderKL: each frame on its own, a few at a time."""

    causal = False

    def sizes(self) -> tuple[int, tuple[int, int, int]]:
        space = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, (1, space, space)

    def _encode(self, video: Tensor) -> Posterior:
        frames = video.transpose(1, 2).flatten(0, 1).split(FRAMES)  # of B·T 3 H W
        parts = [self.vae.encode(x).latent_dist for x in frames]
        mean, logvar = (
            torch.cat(x).unflatten(0, (len(video), -1)).transpose(1, 2)
            for x in zip(*((p.mean, p.logvar) for p in parts), strict=True)
        )
        return Posterior(mean, logvar)

    def _decode(self, latents: Tensor) -> Tensor:
        frames = latents.transpose(1, 2).flatten(0, 1).split(FRAMES)
        video = torch.cat([self.vae.decode(z).sample for z in frames])
        return video.unflatten(0, (len(latents), -1)).transpose(1, 2)


class LTXVideo(Pretrained):
    """AutoencoderKLLTXVideo; a decoder that is told a noise level is told 0."""

    def _decode(self, latents: Tensor) -> Tensor:
        clean = latents.new_zeros(len(latents)) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(latents, temb=clean).sample


class Wan(Pretrained):
    """AutoencoderKLWan."""

    def sizes(self) -> tuple[int, tuple[int, int, int]]:
        config = self.vae.config
        space = config.scale_factor_spatial
        return config.z_dim, (config.scale_factor_temporal, space, space)


class CogVideoX(Pretrained):
    """AutoencoderKLCogVideoX.

    Its decoder turns an even number of latent frames into 4 each, the first included, and so into more
    frames than were encoded: odd numbers only, 1 + a multiple of 8 frames.
    """

    def sizes(self) -> tuple[int, tuple[int, int, int]]:
        config = self.vae.config
        space = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, (int(config.temporal_compression_ratio), space, space)

    def _encode(self, video: Tensor) -> Posterior:
        self._odd(1 + (video.shape[2] - 1) // self.stride[0])
        return super()._encode(video)

    def _decode(self, latents: Tensor) -> Tensor:
        self._odd(latents.shape[2])
        return super()._decode(latents)

    def _odd(self, frames: int) -> None:
        if frames % 2 == 0:
            raise ValueError(
                f"CogVideoX cannot decode {frames} latent frames to as many as were encoded: "
                f"give 1 + a multiple of {2 * self.stride[0]} frames"
            )


CLASSES: dict[str, type[Pretrained]] = {
    "AutoencoderKL": ImageKL,
    "AutoencoderKLWan": Wan,
    "AutoencoderKLCogVideoX": CogVideoX,
    "AutoencoderKLHunyuanVideo": Pretrained,
    "AutoencoderKLLTXVideo": LTXVideo,
}


def _normalizer(vae: Any, channels: int) -> Normalizer:
    """(z − mean) · scaling / std: every convention is a case of it."""

    known = dict(vae.named_buffers()) | {k: v for k, v in vae.config.items() if v is not None}
    mean = known.get("latents_mean", known.get("shift_factor", 0.0))  # in LTX these two are buffers
    std = known.get("latents_std", 1.0)
    wide = torch.ones(channels)
    return Normalizer(
        torch.as_tensor(mean).float().cpu() * wide,
        torch.as_tensor(std).float().cpu() * wide / known.get("scaling_factor", 1.0),
    )


def _config(path: str, subfolder: str | None) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    try:
        config: dict[str, Any] = AutoencoderKL.load_config(path, subfolder=subfolder)
    except (OSError, ValueError) as e:
        raise MissingModel(
            f"{path} has no config.json of an autoencoder here or on the hub: name a folder that "
            f"save_pretrained() wrote, or a hub id that can be reached"
        ) from e
    return config


def _on_hub(path: str) -> tuple[str | None, dict[str, Any]]:
    """(subfolder, config): of the autoencoder alone, else of a pipeline's."""
    try:
        return None, _config(path, None)
    except MissingModel:
        return "vae", _config(path, "vae")
