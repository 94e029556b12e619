"""Everything between a caption and a video, made from a recipe: what training and sampling share.

captions ─ text encoder ─┐
noise ───────── network(z, level, condition) ─ sampler ─ normaliser⁻¹ ─ autoencoder ─ pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.training.data.pixels import to_bytes
from jobs.training.diffusion.network import Network
from jobs.training.diffusion.recipe import DiffusionRecipe, DiffusionRun, Tasks
from jobs.training.recipe_core import Bucket
from models.autoencoders.latents import Autoencoder, Normalizer, Posterior, latent_shape
from models.diffusion.condition import Condition
from models.diffusion.generate import Draw, drawer
from models.diffusion.noise import shift_of, shifted
from models.diffusion.objective import Process
from models.diffusion.samplers import named
from models.encoders.pipeline_text import PipelineText
from models.encoders.text import PretrainedText
from models.measures.features import weights_hash
from pipeline.shards.buckets import Shape

LOW_NOISE = 0.5  # highest level of noise in the low-resolution videos of super-resolution


@dataclass
class System:
    """Everything between a caption and a video. Made by `build.build_system` or `build.load_system`.

    text: the frozen text encoder; None where there is none, or one in the network.
    """

    recipe: DiffusionRecipe
    autoencoder: Autoencoder
    normalizer: Normalizer
    text: PretrainedText | PipelineText | None
    network: Network
    device: torch.device
    trained: list[Shape] = field(default_factory=list)  # buckets that clips fill
    step: int = 0  # of training, of loaded weights
    ema: float = 0.0  # σ_rel of their average; 0: the last themselves

    @property
    def process(self) -> Process:
        return self.network.process

    def condition(self, texts: list[str], network: nn.Module | None = None) -> Condition:
        """A condition with the texts' features; empty texts are 'no text'. `network`: as it is wrapped, or its own."""
        network = network or self.network
        if self.text is not None:
            return self.read(texts)
        if self.network.text is None:
            return Condition()
        features, mask = network(Network.read, texts)
        return Condition(text=features, text_mask=mask)

    def read(self, texts: list[str]) -> Condition:
        """What the frozen text encoder makes of them."""
        assert self.text is not None
        if not isinstance(self.text, PipelineText):
            features, mask = self.text(texts)
            return Condition(text=features.float(), text_mask=mask)
        features, pooled = self.text.encode(texts)
        mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        told = Condition(
            text=features.float(), text_mask=mask, pooled=None if pooled is None else pooled.float()
        )
        return self.with_nothing(told)

    def with_nothing(self, condition: Condition) -> Condition:
        """With the encoding of 'no text', where the image model was trained with one."""
        if not isinstance(self.text, PipelineText):
            return condition
        assert condition.text is not None
        rows = len(condition.text)
        features, pooled = (
            None if x is None else x.float().expand(rows, *x.shape[1:]) for x in self.text.nothing
        )
        return replace(condition, no_text=features, no_pooled=pooled)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] in −1…1 → what the autoencoder says of it, float32, not normalised.

        Under autocast where the recipe says so (autoencoder.precision), not where the step around it is.
        """
        bf16 = self.recipe.autoencoder.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            posterior = self.autoencoder.encode(video)
        logvar = None if posterior.logvar is None else posterior.logvar.float()
        return Posterior(posterior.mean.float(), logvar)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, T, h, w] → uint8 [B, T, H, W, 3]."""
        with torch.autocast(self.device.type, enabled=False):
            videos = [self.autoencoder.decode(z) for z in self.normalizer.inverse(latents.float()).split(1)]
        return to_bytes(torch.cat(videos))

    def draw(
        self,
        network: nn.Module | None = None,
        *,
        run: DiffusionRun | None = None,
        seed: int = 0,
        reconstruct: float = 0.0,
    ) -> Draw:
        """(shape, condition) → latents, as `models.diffusion.generate` takes it.

        Args:
            network: as it is wrapped, or its own.
            run: sampler, steps and guidance, in place of the recipe's.
            reconstruct: weight of reconstruction guidance, for a network that was trained without known
                frames; one that was trained with them is told them as well.
        """
        run = run or self.recipe.run
        return drawer(
            partial(network or self.network, Network.predict),  # type: ignore[arg-type]
            self.process,
            sampler=named(run.sampler, run.sampler_options),
            steps=run.sample_steps,
            spacing=run.spacing,
            guidance=run.guidance,
            interval=run.guidance_interval,
            rescale=run.guidance_rescale,
            tell_known=knows_frames(self.recipe.tasks),
            reconstruct=reconstruct,
            retime=self.shifted,
            generator=torch.Generator(self.device).manual_seed(seed),
            device=self.device,
        )

    def drawn_with(self, run: DiffusionRun) -> dict[str, Any]:
        """What decides a sample beside its condition, shape and seed, with its names and numbers in words."""
        low, high = run.guidance_interval
        return {
            "step": self.step,
            "ema": self.ema,
            "sampler": "dpmpp_2m" if run.sampler == "auto" else run.sampler,
            **run.sampler_options,
            "steps": run.sample_steps,
            "spacing": run.spacing,
            "guidance": run.guidance,
            **({"guidance_interval": f"{low:g}…{high:g}"} if (low, high) != (0, 1) else {}),
            **({"guidance_rescale": run.guidance_rescale} if run.guidance_rescale else {}),
        }

    def shifted(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """Times of latents [B, C, T, h, w] as objective.shift auto has them, float32 at least."""
        return shifted(t, shift_of(*shape[2:])) if self.recipe.objective.shift == "auto" else t

    @property
    def bucket(self) -> Bucket:
        """The longest that it was trained on: what is sampled."""
        return max(self.filled, key=lambda b: b.frames)

    @property
    def filled(self) -> list[Bucket]:
        """The buckets that it was trained on."""
        every = self.recipe.data.buckets
        return [b for b in every if (b.frames, b.height, b.width) in self.trained] or list(every)

    def bucket_like(self, aspect: float) -> Bucket:
        """The longest of those that are nearest in shape to pictures of an aspect, width ÷ height.

        Where it was trained on videos, one of theirs, though pictures beside them have that very shape.
        """
        videos = [b for b in self.filled if b.frames > 1] or self.filled
        return min(videos, key=lambda b: (abs(math.log(b.width / b.height / aspect)), -b.frames))

    def shape(
        self, count: int, frames: int | None = None, bucket: Bucket | None = None
    ) -> tuple[int, int, int, int, int]:
        """[B, C, T, h, w] of so many videos of a bucket (`bucket`); `frames`: of pixels, in place of its own."""
        b = bucket or self.bucket
        t, h, w = latent_shape(self.autoencoder, frames or b.frames, b.height, b.width)
        return count, self.autoencoder.channels, t, h, w

    def mean(self, video: Tensor) -> Tensor:
        """[B, 3, T, H, W] in −1…1 → normalised latents [B, C, T, h, w], without drawing."""
        return self.normalizer(self.encode(video).mean)

    @cached_property
    def weights(self) -> dict[str, str]:
        """Hashes of the frozen encoders' weights, by whose latents and features a network is trained."""
        return {f"{name}_weights": weights_hash(m) for name, m in self._frozen.items()}

    @cached_property
    def encoders(self) -> dict[str, str]:
        """The same by the recipe's sections, and whatever the type that the weights have on this device."""
        return {name: weights_hash(m, torch.bfloat16) for name, m in self._frozen.items()}

    @property
    def _frozen(self) -> dict[str, nn.Module]:
        parts = {"autoencoder": self.autoencoder, "text": self.text}
        return {name: m for name, m in parts.items() if isinstance(m, nn.Module)}

    def state(self) -> dict[str, Any]:
        """What `load_system` needs beside the network's weights; plain values."""
        return {
            "trains": "diffusion",
            "encoders": self.encoders,
            "trained": [list(shape) for shape in self.trained],
            "normalizer": {"mean": self.normalizer.mean.tolist(), "std": self.normalizer.std.tolist()},
        }


def knows_frames(tasks: Tasks) -> bool:
    return tasks.first_frame + tasks.prediction + tasks.interpolation > 0


def blurred(video: Tensor, factor: int) -> Tensor:
    """[B, C, T, H, W] seen at 1/factor of its size and enlarged again, as super-resolution is given it."""
    return enlarged(F.avg_pool3d(video, (1, factor, factor)), factor)


def enlarged(video: Tensor, factor: int) -> Tensor:
    """[B, C, T, h, w] → [B, C, T, h · factor, w · factor], linearly between pixels."""
    return F.interpolate(video, scale_factor=(1, factor, factor), mode="trilinear", align_corners=False)
