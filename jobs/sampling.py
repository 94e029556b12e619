"""Videos from trained diffusion models: each task of `clipmill sample`, from a caption and what is given to pixels.

What is given is read as the mill reads its sources and fitted to the shape that the model was trained on. With an
autoencoder that joins frames everything that goes on from frames is encoded anew as the beginning of a clip, since its
latents mean something at their own place in a clip alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.pixels import to_unit
from jobs.training.diffusion.recipe import DiffusionRun
from jobs.training.diffusion.system import System, enlarged, knows_frames
from jobs.training.recipe_core import Bucket
from models.diffusion.condition import Condition
from models.diffusion.generate import (
    Draw,
    cascade,
    extend,
    extend_frames,
    interpolate,
    interpolate_frames,
    key_places,
    upsample,
    with_known,
)
from pipeline.split.opening import DecodeError
from pipeline.split.shown import Shown, Size, read

RECONSTRUCT = 2.0  # weight of reconstruction guidance; 1 is the likelihood's own, larger fits better
CASCADE_NOISE = 0.1  # level of noise in what an upsampler is given, where that was drawn itself
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FPS = 8.0  # of models whose frames have no rate of their own


@dataclass(frozen=True)
class Options:
    """What is asked for, beside the model.

    frames: of the result, or to read of what is given; context: latent frames that are given.
    noise: level of noise in the low-resolution video that is sharpened; times: that frames are put between.
    run: changes to the recipe's.
    """

    video: Path | None
    frames: int | None
    context: int
    noise: float | None
    times: int
    run: dict[str, Any]


class Maker:
    """Draws by one model. Videos are uint8 [1, T, H, W, 3]."""

    def __init__(self, system: System, options: Options):
        self.system, self.options = system, options
        self.run: DiffusionRun = system.recipe.run.but(**options.run)
        self.bucket: Bucket = system.bucket
        self.fps = system.recipe.data.fps or FPS
        self.stride = system.recipe.tasks.stride  # latents from one key frame to the next
        self.joined = system.autoencoder.stride[0]  # frames that a latent joins
        self.reconstruct = 0.0 if knows_frames(system.recipe.tasks) else RECONSTRUCT

    def draw(self, seed: int) -> Draw:
        return self.system.draw(run=self.run, seed=seed, reconstruct=self.reconstruct)

    def shape(self, frames: int | None = None) -> tuple[int, int, int, int, int]:
        return self.system.shape(1, frames, self.bucket)

    def encode(self, video: Tensor) -> Tensor:
        """→ normalised latents [1, C, T', h, w]"""
        return self.system.mean(to_unit(video.to(self.system.device)).permute(0, 4, 1, 2, 3))

    def decode(self, latents: Tensor) -> Tensor:
        return self.system.decode(latents).cpu()

    def given(self, fps: float | None, most: int | None = None, shrink: int = 1) -> Shown:
        """The frames of --video in the shape of the bucket that suits it, which this model draws in from now on.

        Args:
            fps: see `pipeline.split.shown.read`. shrink: the model is to enlarge them by so much.
        """
        path = self.options.video
        assert path is not None

        def fitted(aspect: float) -> Size:
            self.bucket = self.system.bucket_like(aspect)
            return self.bucket.height // shrink, self.bucket.width // shrink

        if path.suffix.lower() in PICTURES:
            return Shown(picture(path, fitted)[None], fps or self.fps)
        try:
            return read(str(path), fitted, fps, most)
        except DecodeError as e:
            raise ValueError(f"--video {path}: {e}") from e

    def used(self) -> dict[str, Any]:
        """What decides a video beside its prompt and seed, as it is really used."""
        b = self.bucket
        return self.system.drawn_with(self.run) | {"trained_at": f"{b.frames}×{b.height}×{b.width}"}

    def rate(self) -> float | None:
        """At which what is given is seen: the data's; every frame of it where clips have none."""
        return self.system.recipe.data.fps


# ---------------------------------------------------------------- the tasks


Drawing = Callable[[str, int], Tensor]  # (prompt, seed) → uint8 [1, T, H, W, 3]


def text(maker: Maker) -> Drawing:
    def drawn(prompt: str, seed: int) -> Tensor:
        shape = maker.shape(maker.options.frames)
        return maker.decode(maker.draw(seed)(shape, maker.system.condition([prompt])))

    return drawn


def image(maker: Maker) -> Drawing:
    return _begun(maker, 1)


def predict(maker: Maker) -> Drawing:
    return _begun(maker, maker.options.context)


def _begun(maker: Maker, context: int) -> Drawing:
    """From the first so many latent frames."""
    autoencoder, options = maker.system.autoencoder, maker.options
    frames = 1 + (context - 1) * maker.joined if autoencoder.causal else context * maker.joined
    given = maker.given(maker.rate(), frames).pictures
    if len(given) < frames:
        raise ValueError(
            f"--video {options.video} has {len(given)} of the {frames} frames that {context} latent frames of context "
            f"take at {maker.fps:g} a second: give a longer one, or a smaller --context"
        )
    shape = maker.shape(options.frames)
    if shape[2] <= context:
        raise ValueError(
            f"{context} latent frames are given and the video is to have {shape[2]}: give a smaller --context, or more "
            "--frames"
        )
    known = maker.encode(torch.from_numpy(given)[None])

    def drawn(prompt: str, seed: int) -> Tensor:
        condition = with_known(maker.system.condition([prompt]), known, range(context), shape[2])
        return maker.decode(maker.draw(seed)(shape, condition))

    return drawn


def extended(maker: Maker) -> Drawing:
    """All of what is given, block after block up to --frames."""
    options, frames = maker.options, maker.options.frames
    assert frames is not None
    given: Tensor | None = None
    if options.video is not None:
        given = torch.from_numpy(maker.given(maker.rate(), frames).pictures)[None]
        if given.shape[1] >= frames:
            raise ValueError(
                f"--video {options.video} has {frames} frames or more at {maker.fps:g} a second, so nothing is to be "
                "drawn: give more --frames"
            )
    block = maker.shape()

    def drawn(prompt: str, seed: int) -> Tensor:
        condition, draw = maker.system.condition([prompt]), maker.draw(seed)
        begin = given
        if maker.joined > 1:
            begin = maker.decode(draw(block, condition)) if begin is None else begin
            code = (maker.encode, maker.decode)
            return extend_frames(draw, *code, begin, frames, block, options.context, maker.joined, condition)
        first = draw(block, condition) if begin is None else maker.encode(begin)
        context = min(options.context, first.shape[2])
        video = maker.decode(extend(draw, first, frames, block[2], context, condition))
        return video if begin is None else torch.cat([begin, video[:, begin.shape[1] :]], dim=1)

    return drawn


def interpolated(maker: Maker) -> Drawing:
    """Frames between those of a file."""
    options = maker.options
    given = maker.given(None, options.frames)
    found, wanted = len(given.pictures), max(2, options.frames or 0)
    if found < wanted:
        raise ValueError(
            f"--video {options.video} has {found} of {wanted} key frames: give one with more, or fewer --frames"
        )
    maker.fps = given.fps * maker.stride * maker.joined
    keys = torch.from_numpy(given.pictures)[None]

    def drawn(prompt: str, seed: int) -> Tensor:
        return between(maker, maker.draw(seed), maker.system.condition([prompt]), keys)

    return drawn


def between(maker: Maker, draw: Draw, condition: Condition, keys: Tensor) -> Tensor:
    """K key frames → stride · (frames a latent joins) · (K − 1) + 1."""
    window = maker.shape()
    if maker.joined == 1:
        return maker.decode(interpolate(draw, maker.encode(keys), maker.stride, window[2], condition))
    code = (maker.encode, maker.decode)
    video = interpolate_frames(draw, *code, keys, maker.stride, window, maker.joined, condition)
    video[:, list(key_places(keys.shape[1], maker.stride * maker.joined))] = keys
    return video


def upsampled(maker: Maker) -> Drawing:
    """A small video in the size the model was trained at."""
    factor = maker.system.recipe.tasks.upsampling
    if not factor:
        raise ValueError("this model was not trained for super-resolution (tasks.upsampling)")
    options = maker.options
    given = maker.given(maker.rate(), options.frames, factor).pictures
    if len(given) < (options.frames or 0):
        raise ValueError(
            f"--video {options.video} has {len(given)} frames at {maker.fps:g} a second: give fewer --frames"
        )
    small = torch.from_numpy(given)[None]
    return lambda prompt, seed: sharpened(maker, small, prompt, seed, options.noise or 0.0)


def sharpened(maker: Maker, small: Tensor, prompt: str, seed: int, noise: float) -> Tensor:
    """In blocks as long as the upsampler was trained at; the last begins earlier rather than be shorter."""
    system, draw, condition = maker.system, maker.draw(seed), maker.system.condition([prompt])
    generator = torch.Generator(system.device).manual_seed(seed)
    factor, block, total = system.recipe.tasks.upsampling, maker.bucket.frames, small.shape[1]
    pixels = to_unit(small.to(system.device)).permute(0, 4, 1, 2, 3)  # 1 3 T H W
    missing = max(0, block - total)
    pixels = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    parts = []
    for start in range(0, total, block):
        first = max(0, min(start, total - block))
        low = system.mean(enlarged(pixels[:, :, first : first + block], factor))
        drawn = maker.decode(upsample(draw, low, condition, level=noise, generator=generator))
        parts.append(drawn[:, start - first : total - first])
    return torch.cat(parts, dim=1)


def latents_of(system: System) -> tuple[dict[str, Any], str | None]:
    """By what two models' latents are told apart: their autoencoders, wherever those lie and however they encode."""
    autoencoder = system.recipe.autoencoder.model_dump(exclude={"path", "precision"})
    return autoencoder, system.encoders.get("autoencoder")


class Cascade:
    """Video LDM end to end (Blattmann et al. 2023, fig. 5); models with the same autoencoder.

    Raises ValueError for models that do not fit each other.
    """

    def __init__(self, keys: Maker, between: Maker, sharp: Maker | None = None):
        self.keys, self.between, self.sharp = keys, between, sharp
        if latents_of(keys.system) != latents_of(between.system):
            raise ValueError(
                "--keyframes and --interpolator have different autoencoders, so their latents differ"
            )
        sides = [m.shape()[3:] for m in (keys, between)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"--keyframes makes latents of {sides[0][1]}×{sides[0][0]}, --interpolator was trained at "
                f"{sides[1][1]}×{sides[1][0]}: train them at one size"
            )
        self.fps = keys.fps * (between.stride * between.joined) ** keys.options.times
        if sharp is None:
            return
        factor, drawn, large = sharp.system.recipe.tasks.upsampling, between.bucket, sharp.bucket
        if not factor:
            raise ValueError("--upsampler was not trained for super-resolution (tasks.upsampling)")
        if (large.height, large.width) != (factor * drawn.height, factor * drawn.width):
            raise ValueError(
                f"--upsampler was trained to make {large.width}×{large.height} of pictures {factor} times smaller, "
                f"--interpolator makes {drawn.width}×{drawn.height}: train them at sizes that fit"
            )

    def __call__(self, prompt: str, seed: int) -> Tensor:
        keys, between_ = self.keys, self.between
        condition, draw = between_.system.condition([prompt]), between_.draw(seed)
        sharpen = None if self.sharp is None else partial(self._sharpen, prompt=prompt, seed=seed)

        def first() -> Tensor:
            """Key frames, as the interpolator's normaliser has them."""
            z = keys.draw(seed)(keys.shape(), keys.system.condition([prompt]))
            return between_.system.normalizer(keys.system.normalizer.inverse(z))

        times = keys.options.times
        if between_.joined > 1:  # frames lie between frames, not between latents
            step = partial(between, between_, draw, condition)
            return cascade(lambda: between_.decode(first()), step, lambda video: video, sharpen, times=times)
        window = between_.shape()[2]
        step = partial(interpolate, draw, factor=between_.stride, window=window, condition=condition)
        return cascade(first, step, between_.decode, sharpen, times=times)

    def _sharpen(self, video: Tensor, prompt: str, seed: int) -> Tensor:
        assert self.sharp is not None
        noise = self.sharp.options.noise
        return sharpened(self.sharp, video, prompt, seed, CASCADE_NOISE if noise is None else noise)


# ---------------------------------------------------------------- what is given


def picture(path: Path, size: Callable[[float], Size]) -> np.ndarray:
    """A picture, upright, scaled to cover a size and cropped, uint8 [H, W, 3]. Raises OSError."""
    from PIL import Image, ImageOps

    with Image.open(path) as stored:
        shown = ImageOps.exif_transpose(stored).convert("RGB")
    height, width = size(shown.width / shown.height)
    return np.array(ImageOps.fit(shown, (width, height), Image.Resampling.BICUBIC))
