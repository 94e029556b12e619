"""What `clipmill judge` asks of a trained model, whichever kind it is."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

RATE = 8.0  # of models whose frames have no rate of their own: that of the videos of 'clipmill toy'


@dataclass(frozen=True)
class Judged:
    """A model that draws videos uint8 [T, H, W, 3] of `frames` frames in a size (height, width), `fps` a second.

    draw: captions, seed → a video each. through: a video as its autoencoder gives it again. tell: videos → what it
    writes of each; None: it does not write.
    """

    frames: int
    size: tuple[int, int]
    fps: float
    draw: Callable[[list[str], int], list[np.ndarray]]
    through: Callable[[np.ndarray], np.ndarray]
    tell: Callable[[list[np.ndarray]], list[str]] | None = None

    def clips(self, shards: str, most: int) -> tuple[list[np.ndarray], list[str]]:
        """Clips of a run as the model sees them, and their captions. Raises StoreError, ValueError."""
        from pipeline.shards.reader import ShardReader

        shape = (self.frames, *self.size)
        reader = ShardReader(shards, fps=self.fps, shapes=[shape], window="center", shuffle=False)
        found = [reader.sound(row) for row in range(min(most, len(reader.keys)))]
        return [clip["video"] for clip in found], [clip["caption"] for clip in found]


def load(args: argparse.Namespace, located: Mapping[str, str]) -> Judged:
    """The model of `clipmill judge`'s arguments. Raises what loading raises, one sentence."""
    from jobs.sample_world import is_world

    if is_world(args.model):
        return _world(args, located)
    if args.clips:
        raise ValueError("--clips is for world models: a diffusion model writes no captions")
    return _diffusion(args, located)


def _diffusion(args: argparse.Namespace, located: Mapping[str, str]) -> Judged:
    import torch

    from jobs.training.data.pixels import to_unit
    from jobs.training.diffusion.build import load_trained

    system = load_trained(args.model, args.ema, args.device, located)
    run = system.recipe.run.but(sample_steps=args.steps, guidance=args.guidance)

    @torch.no_grad()
    def draw(captions: list[str], seed: int) -> list[np.ndarray]:
        drawn = system.draw(run=run, seed=seed)
        latents = drawn(system.shape(len(captions)), system.condition(captions))
        return list(system.decode(latents).cpu().numpy())

    @torch.no_grad()
    def through(video: np.ndarray) -> np.ndarray:
        x = to_unit(torch.from_numpy(video)[None].permute(0, 4, 1, 2, 3).to(system.device))
        return system.decode(system.mean(x))[0].cpu().numpy()

    bucket = system.bucket
    return Judged(bucket.frames, (bucket.height, bucket.width), system.recipe.data.fps or RATE, draw, through)


def _world(args: argparse.Namespace, located: Mapping[str, str]) -> Judged:
    import torch

    from jobs.training.world.system import load_world

    if args.steps is not None:
        raise ValueError("--steps is for diffusion models: leave it out")
    system = load_world(args.model, args.ema, args.device, located)
    if system.vq is None:
        raise ValueError(f"{args.model} is a model of text alone, which draws nothing")
    bucket, run = system.bucket, system.recipe.run
    hows: dict[str, Any] = {"first": run.first, "rest": run.rest}
    if args.guidance is not None:
        hows = {name: how.model_copy(update={"guidance": args.guidance}) for name, how in hows.items()}

    def codes(video: np.ndarray) -> torch.Tensor:
        return system.encode(torch.from_numpy(video).permute(0, 3, 1, 2), [len(video)])

    def draw(captions: list[str], seed: int) -> list[np.ndarray]:
        seeds = [seed + i for i in range(len(captions))]
        drawn = system.draw([[caption] for caption in captions], bucket.frames, seeds, **hows)
        return [video.cpu().numpy() for video in drawn]

    def through(video: np.ndarray) -> np.ndarray:
        return system.decode(codes(video)).cpu().numpy()

    def tell(videos: list[np.ndarray]) -> list[str]:
        return system.tell([[codes(video)] for video in videos])

    size = (bucket.height, bucket.width)
    return Judged(bucket.frames, size, system.recipe.data.fps or RATE, draw, through, tell)
