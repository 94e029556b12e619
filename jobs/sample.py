"""clipmill sample: videos from a trained diffusion model, as mp4 files and a contact sheet."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.training.system import System
    from models.diffusion.generate import Draw

EPILOG = """
examples
  clipmill sample model/ --prompt "waves on a beach" --n 4
  clipmill sample model/ --task image --video first.png --prompt "the boat sails away"
  clipmill sample model/ --task extend --video start.mp4 --frames 128
  clipmill sample model/ --task interpolate --video slow.mp4
  clipmill sample model/ --task upsample --video small.mp4
  clipmill sample --task cascade --keyframes keys/ --interpolator between/ --upsampler sharp/ --prompt "waves"

tasks
  text         caption → video
  image        the first frame is given (a picture, or a video's first frame)
  predict      the first --context latent frames are given
  extend       block after block up to --frames, from --video or from the caption
  interpolate  the video's frames are key frames; --frames of them (default: as many as fit at once)
  upsample     a small video → the size the model was trained at
  cascade      Video LDM whole: key frames, frames between them twice, and larger pictures

A model that was not trained with known frames is led to them by reconstruction guidance.
"""

TASKS = ["text", "image", "predict", "extend", "interpolate", "upsample", "cascade"]
NEED_VIDEO = {"image", "predict", "interpolate", "upsample"}
RECONSTRUCT = 2.0  # weight of reconstruction guidance; 1 is the likelihood's own, larger fits better
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FPS = 8.0  # of models whose frames have no rate of their own


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill sample",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder that 'clipmill train diffusion' wrote"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="a caption, or a structured one as JSON; may be given several times",
    )
    parser.add_argument("--n", type=int, default=1, help="videos a prompt (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples/")
    parser.add_argument("--task", choices=TASKS, default="text", help="default: text")
    parser.add_argument("--video", type=Path, metavar="FILE", help="what is given: a video or a picture")
    parser.add_argument("--frames", type=int, metavar="N", help="default: as the model was trained")
    parser.add_argument(
        "--context", type=int, default=2, metavar="K", help="latent frames that are given (2)"
    )
    parser.add_argument("--sampler", help="ancestral, ddim, euler, heun, dpmpp_2m … (default: the recipe's)")
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the recipe's)")
    parser.add_argument("--guidance", type=float, metavar="W", help="by the caption (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="video i is drawn with seed + i")
    parser.add_argument(
        "--ema",
        type=float,
        metavar="L",
        help="σ_rel of the averaged weights (default: the longest); 0: the last",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    parser.add_argument("--keyframes", metavar="MODEL", help="cascade: makes key frames from the caption")
    parser.add_argument(
        "--interpolator", metavar="MODEL", help="cascade: makes the frames between, used --times"
    )
    parser.add_argument("--upsampler", metavar="MODEL", help="cascade: makes larger pictures")
    parser.add_argument(
        "--times", type=int, default=2, metavar="N", help="cascade: interpolations (default: 2)"
    )
    args = parser.parse_args(argv)

    from jobs.training.exported import CheckpointError
    from models.hub import MissingModel
    from pipeline.io.ffmpeg import FFmpegError
    from pipeline.shards.reader import BrokenSample

    try:
        check(args)
        videos, fps = sample(args)
        write(args.out, videos, fps)
    except (ValueError, CheckpointError, MissingModel, BrokenSample, FFmpegError, OSError) as e:
        print(f"clipmill sample: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that do not go together."""
    if args.task == "cascade" and not (args.keyframes and args.interpolator):
        raise ValueError("--task cascade needs --keyframes MODEL and --interpolator MODEL")
    if args.task != "cascade" and not args.model:
        raise ValueError("name the MODEL: a folder that 'clipmill train diffusion' wrote")
    if args.task in NEED_VIDEO and args.video is None:
        raise ValueError(f"--task {args.task} needs --video FILE")
    if args.task == "extend" and args.frames is None:
        raise ValueError("--task extend needs --frames N, how long the video is to be")
    if args.video is not None and not args.video.is_file():
        raise ValueError(f"--video {args.video}: no such file")
    if args.n < 1 or args.context < 1 or args.times < 0 or (args.steps is not None and args.steps < 1):
        raise ValueError("--n, --context and --steps must be at least 1, --times at least 0")


# ---------------------------------------------------------------- drawing


def sample(args: argparse.Namespace) -> tuple[dict[str, Tensor], float]:
    """Name → uint8 [T, H, W, 3] of every video, and their frames a second."""
    import torch

    from jobs.training.system import load_trained
    from pipeline.caption.structured import told

    if args.task == "cascade":
        maker: Any = Cascade(args)
    else:
        maker = Maker(load_trained(args.model, args.ema, args.device), args)
    videos: dict[str, Tensor] = {}
    for prompt in map(told, args.prompt or [""]):
        for _ in range(args.n):
            number = len(videos)
            with torch.no_grad():
                video = maker(prompt, args.seed + number)
            videos[f"{number:03d} {prompt}".strip()] = video[0].cpu()
            print(f"{number + 1} of {args.n * max(1, len(args.prompt))}", flush=True)
    return videos, maker.fps


class Maker:
    """(prompt, seed) → uint8 [1, T, H, W, 3] by one model, for every task but the cascade."""

    def __init__(self, system: System, args: argparse.Namespace):
        from jobs.training.system import knows_frames

        self.system, self.args = system, args
        self.fps = system.recipe.data.fps or FPS
        self.stride = system.recipe.tasks.stride
        self.reconstruct = 0.0 if knows_frames(system.recipe.tasks) else RECONSTRUCT
        self.given = self._given() if args.video else None

    def __call__(self, prompt: str, seed: int) -> Tensor:
        return self.system.decode(self.latents(prompt, seed))

    def draw(self, seed: int) -> Draw:
        a = self.args
        return self.system.draw(
            sampler=a.sampler, steps=a.steps, guidance=a.guidance, seed=seed, reconstruct=self.reconstruct
        )

    def latents(self, prompt: str, seed: int) -> Tensor:
        """[1, C, T, h, w]"""
        from models.diffusion.generate import extend, interpolate, upsample, with_known

        args, system, draw = self.args, self.system, self.draw(seed)
        told = system.condition([prompt])
        if args.task == "extend":
            block = system.shape(1)
            first = draw(block, told) if self.given is None else self.given
            context = min(args.context, first.shape[2])
            return extend(draw, first, system.shape(1, args.frames)[2], block[2], context, told)
        if args.task == "interpolate":
            assert self.given is not None
            return interpolate(draw, self.given, self.stride, system.shape(1)[2], told)
        if args.task == "upsample":
            assert self.given is not None
            return upsample(draw, self.given, told, level=0.0)
        shape = system.shape(1, args.frames)
        if self.given is not None and args.task in ("image", "predict"):
            told = with_known(told, self.given, range(self.given.shape[2]), shape[2])
        return draw(shape, told)

    def _given(self) -> Tensor:
        """Normalised latents of what is given, [1, C, K, h, w]."""
        from jobs.training.system import enlarged
        from models.autoencoders.latents import latent_shape

        system, task = self.system, self.args.task
        autoencoder, bucket = system.autoencoder, system.bucket
        t = autoencoder.stride[0]
        size = (bucket.height, bucket.width)
        if task == "upsample":
            factor = system.recipe.tasks.upsampling
            if not factor:
                raise ValueError("this model was not trained for super-resolution (tasks.upsampling)")
            small = (size[0] // factor, size[1] // factor)
            low = enlarged(self._pixels(self.args.frames or bucket.frames, small), factor)
            return system.mean(low)
        if task == "interpolate":
            if t > 1:
                raise ValueError(
                    f"interpolation puts frames between frames, but this autoencoder joins {t}: "
                    "use a model with an image autoencoder"
                )
            keys = (system.shape(1)[2] - 1) // self.stride + 1
            return system.mean(self._pixels(self.args.frames or keys, size))
        count = 1 if task == "image" else self.args.context
        frames = 1 + (count - 1) * t if autoencoder.causal else count * t
        latent_shape(autoencoder, frames, *size)
        return system.mean(self._pixels(frames, size))

    def _pixels(self, frames: int, size: tuple[int, int]) -> Tensor:
        """The first frames of --video at the model's rate, [1, 3, T, H, W] in −1…1 on its device."""
        import torch

        from jobs.training.system import to_unit

        fps = self.fps / self.stride if self.args.task == "interpolate" else self.fps
        pictures = torch.from_numpy(read(self.args.video, frames, fps, size))
        return to_unit(pictures.to(self.system.device)).permute(3, 0, 1, 2)[None]


class Cascade:
    """Video LDM end to end (Blattmann et al. 2023, fig. 5); models with the same autoencoder."""

    def __init__(self, args: argparse.Namespace):
        from jobs.training.system import load_trained

        self.args = args
        folders = [args.keyframes, args.interpolator] + ([args.upsampler] if args.upsampler else [])
        self.makers = [Maker(load_trained(f, args.ema, args.device), args) for f in folders]
        keys, between = self.makers[:2]
        if keys.system.recipe.autoencoder != between.system.recipe.autoencoder:
            raise ValueError(
                "--keyframes and --interpolator have different autoencoders, so their latents differ"
            )
        sides = [m.system.shape(1)[3:] for m in (keys, between)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"--keyframes makes latents of {sides[0][1]}×{sides[0][0]}, --interpolator was trained at "
                f"{sides[1][1]}×{sides[1][0]}: train them at one size"
            )
        if len(self.makers) > 2 and not self.makers[2].system.recipe.tasks.upsampling:
            raise ValueError("--upsampler was not trained for super-resolution (tasks.upsampling)")
        self.fps = keys.fps * between.stride**args.times

    def __call__(self, prompt: str, seed: int) -> Tensor:
        from models.diffusion.generate import cascade, interpolate

        keys, between = self.makers[0], self.makers[1]
        told = between.system.condition([prompt])
        window = between.system.shape(1)[2]

        def first() -> Tensor:
            """Key frames, as the interpolator's normaliser has them."""
            raw = keys.system.normalizer.inverse(keys.latents(prompt, seed))
            return between.system.normalizer(raw)

        draw = between.draw(seed)
        step = partial(interpolate, draw, factor=between.stride, window=window, condition=told)
        sharpen = partial(self._sharpen, prompt=prompt, seed=seed) if len(self.makers) > 2 else None
        return cascade(first, step, between.system.decode, sharpen, times=self.args.times)

    def _sharpen(self, video: Tensor, prompt: str, seed: int) -> Tensor:
        """uint8 [1, T, H, W, 3] → larger, in blocks as long as the upsampler was trained at."""
        import torch

        from jobs.training.system import enlarged, to_unit
        from models.diffusion.generate import upsample

        system, draw = self.makers[2].system, self.makers[2].draw(seed)
        told = system.condition([prompt])
        factor, block = system.recipe.tasks.upsampling, system.bucket.frames
        pixels = to_unit(video.to(system.device)).permute(0, 4, 1, 2, 3)  # 1 3 T H W
        parts = []
        for start in range(0, pixels.shape[2], block):
            piece = pixels[:, :, start : start + block]
            whole = torch.cat([piece, piece[:, :, -1:].expand(-1, -1, block - piece.shape[2], -1, -1)], dim=2)
            drawn = system.decode(upsample(draw, system.mean(enlarged(whole, factor)), told, level=0.0))
            parts.append(drawn[:, : piece.shape[2]])
        return torch.cat(parts, dim=1)


# ---------------------------------------------------------------- files


def read(path: Path, frames: int, fps: float, size: tuple[int, int]) -> Any:
    """The first frames of a video, or a picture so often, uint8 [T, H, W, 3]. Raises BrokenSample, OSError."""
    import numpy as np

    if path.suffix.lower() in PICTURES:
        from PIL import Image, ImageOps

        with Image.open(path) as picture:
            fitted = ImageOps.fit(picture.convert("RGB"), (size[1], size[0]), Image.Resampling.BICUBIC)
        return np.stack([np.asarray(fitted)] * frames)
    from pipeline.shards.reader import BrokenSample, decode

    try:
        return decode(path.read_bytes(), frames, fps, size, 0.0)
    except BrokenSample as e:
        raise BrokenSample(f"--video {path}: {e}") from e


def write(out: Path, videos: dict[str, Tensor], fps: float) -> None:
    """DIR/<number>-<prompt>.mp4, its prompt in .txt for clipmill eval --clip, and DIR/sheet.png."""
    from jobs.training.monitor import contact_sheet

    out.mkdir(parents=True, exist_ok=True)
    for name, video in videos.items():
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
        encode(out / f"{slug}.mp4", video, fps)
        (out / f"{slug}.txt").write_text(name.partition(" ")[2] + "\n", encoding="utf-8")
    contact_sheet(videos).save(out / "sheet.png")
    print(f"{len(videos)} videos and sheet.png: {out}")


def encode(path: Path, video: Tensor, fps: float) -> None:
    """uint8 [T, H, W, 3] as H.264 with the settings of the mill's clips, every frame once. Raises FFmpegError."""
    from pipeline.io.ffmpeg import encode_rgb
    from pipeline.recipe import Cut
    from pipeline.split.encode import encoder

    height, width = video.shape[1:3]
    colours = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    options = [str(x) for k, v in encoder(Cut(), fps).items() for x in (f"-{k}", v)]
    output = ["-pix_fmt", colours, *options, "-movflags", "+faststart", "-y", "-f", "mp4", str(path)]
    encode_rgb(video.contiguous().numpy().tobytes(), width, height, fps, output, stall_s=120)


if __name__ == "__main__":
    raise SystemExit(main())
