"""clipmill sample: videos from a trained diffusion or world model, as mp4 files and a contact sheet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from jobs.sampling import Cascade, Drawing, Maker, Options

EPILOG = """
examples
  clipmill sample model/ --prompt "waves on a beach" --n 4
  clipmill sample model/ --task image --video first.png --prompt "the boat sails away"
  clipmill sample model/ --task extend --video start.mp4 --frames 128
  clipmill sample model/ --task interpolate --video slow.mp4
  clipmill sample model/ --task upsample --video small.mp4
  clipmill sample world/ --prompt "waves on a beach" --guidance 3 --top-k 1000
  clipmill sample world/ --task caption --video start.mp4
  clipmill sample --task cascade --keyframes keys/ --interpolator between/ --upsampler sharp/ --prompt "waves"

tasks
  text         caption → video
  image        the first frame is given (a picture, or a video's first frame)
  predict      the first --context latent frames are given
  extend       block after block up to --frames; all of --video is kept, none: it begins from the caption
  interpolate  every frame of the file is a key frame, whatever its rate (the first --frames of them)
  upsample     a small video → the size the model was trained at
  cascade      Video LDM whole: key frames, frames between them twice, and larger pictures
  caption      world model: what it says of --video (of its beginning, as long as it was trained on)

A world model knows text (--frames 1 draws a picture), image, predict, extend and caption; --guidance, --temperature
and --top-k take the place of its recipe's. Frame follows frame, so --frames may be more than it was trained on.

A video is read as the mill reads its sources: upright, cropped as its container says, at the model's rate. A model
that was not trained with known frames is led to them by reconstruction guidance.
"""


class Task(NamedTuple):
    takes: frozenset[str]  # options beside those that every task takes
    needs: frozenset[str] = frozenset()


def _task(takes: str, needs: str = "") -> Task:
    return Task(frozenset(takes.split()), frozenset(needs.split()))


TASKS = {
    "text": _task("frames"),
    "image": _task("video frames", "video"),
    "predict": _task("video frames context", "video"),
    "extend": _task("video frames context", "frames"),
    "interpolate": _task("video frames", "video"),
    "upsample": _task("video frames noise_level", "video"),
    "cascade": _task("keyframes interpolator upsampler times noise_level", "keyframes interpolator"),
}
OWN = frozenset[str]().union(*(task.takes for task in TASKS.values()))  # options that not every task takes
LEAST = {"n": 1, "context": 1, "steps": 1, "frames": 1, "times": 0, "temperature": 0, "top_k": 1}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)

    from jobs.sample_files import new_folder
    from jobs.sample_world import is_world
    from jobs.sample_world import sample as sample_world
    from jobs.training.exported import CheckpointError
    from models.hub import MissingModel
    from pipeline.io.ffmpeg import FFmpegError

    try:
        world = args.model is not None and is_world(args.model)
        if args.model is not None and not world and not (Path(args.model) / "model.safetensors").is_file():
            raise ValueError(
                f"{args.model} holds no model.safetensors: give a folder that clipmill train wrote"
            )
        alone = world and args.video is not None and not args.prompt
        args.task = args.task or ("caption" if alone else "text")
        check_numbers(args)
        if not world:
            check(args)
        with new_folder(args.out, args.replace) as folder:
            (sample_world if world else sample)(args, folder)
    except (ValueError, CheckpointError, MissingModel, FFmpegError, OSError) as e:
        print(f"clipmill sample: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    found = "captions.json" if args.task == "caption" else "videos, sheet.png and samples.json"
    print(f"{found}: {args.out}")
    return 0


def parser() -> argparse.ArgumentParser:
    from jobs.training.paths import add_locate

    found = argparse.ArgumentParser(
        prog="clipmill sample",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder that 'clipmill train diffusion' or 'world' wrote")
    add(
        "--prompt",
        action="append",
        default=[],
        help="a caption, or a structured one as JSON; may be given several times",
    )
    add("--n", type=int, default=1, help="videos a prompt (default: 1)")
    add("--out", type=Path, default=Path("samples"), metavar="DIR", help="a new or empty folder (samples/)")
    add("--replace", action="store_true", help="in place of what an earlier sampling wrote there")
    add(
        "--task",
        choices=[*TASKS, "caption"],
        help="default: text; of a world model with --video alone caption",
    )
    add("--video", type=Path, metavar="FILE", help="what is given: a video or a picture")
    add("--frames", type=int, metavar="N", help="of the result, or to read of --video; see the tasks")
    add("--context", type=int, metavar="K", help="latent frames that are given at a time (2)")
    add("--noise-level", type=float, metavar="L", help="put into small pictures (0; cascade: 0.1)")
    add("--sampler", help="ancestral, ddim, euler, heun, dpmpp_2m … (default: the recipe's)")
    add(
        "--sampler-option",
        action="append",
        default=[],
        metavar="NAME=X",
        help="gamma, corrections, delta of ancestral; eta of ddim",
    )
    add("--steps", type=int, metavar="N", help="of the sampler (default: the recipe's)")
    add("--spacing", choices=["time", "logsnr"], help="in which steps are equal (default: the recipe's)")
    add("--guidance", type=float, metavar="W", help="by the caption (default: the recipe's)")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels that are guided",
    )
    add("--guidance-rescale", type=float, metavar="F", help="how far its gain in contrast is taken back, 0…1")
    add("--temperature", type=float, metavar="T", help="world model: of its draws; 0: the likeliest")
    add("--top-k", type=int, metavar="K", help="world model: it draws among the K likeliest")
    add("--seed", type=int, default=0, help="video i is drawn with seed + i")
    add("--ema", type=float, metavar="L", help="σ_rel of the averaged weights (the longest); 0: the last")
    add_locate(found)
    add("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    add("--keyframes", metavar="MODEL", help="cascade: makes key frames from the caption")
    add("--interpolator", metavar="MODEL", help="cascade: makes the frames between, used --times")
    add("--upsampler", metavar="MODEL", help="cascade: makes larger pictures")
    add("--times", type=int, metavar="N", help="cascade: interpolations (2)")
    return found


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that do not go together."""
    for name in ("temperature", "top_k"):
        if getattr(args, name) is not None:
            raise ValueError(f"{_flag(name)} is for world models: leave it out")
    if args.task not in TASKS:
        raise ValueError(f"--task {args.task} is for world models: of a diffusion model {', '.join(TASKS)}")
    task, given = TASKS[args.task], {name for name in OWN if getattr(args, name) is not None}
    for name in sorted(given - task.takes):
        others = ", ".join(t for t, other in TASKS.items() if name in other.takes)
        raise ValueError(
            f"--task {args.task} has no use for {_flag(name)}: leave it out (it is for {others})"
        )
    for name in sorted(task.needs - given):
        kind = {"video": "FILE", "frames": "N, how long the video is to be"}.get(name, "MODEL")
        raise ValueError(f"--task {args.task} needs {_flag(name)} {kind}")
    if args.task == "cascade":
        if args.model:
            raise ValueError(
                f"--task cascade has no use for {args.model}: it is made of --keyframes and the others"
            )
        if args.noise_level is not None and not args.upsampler:
            raise ValueError("--noise-level is what --upsampler is given: name it too, or leave this out")
    elif not args.model:
        raise ValueError("name the MODEL: a folder that 'clipmill train diffusion' wrote")

    from jobs.training.diffusion.system import LOW_NOISE

    if args.noise_level is not None and not 0 <= args.noise_level <= LOW_NOISE:
        raise ValueError(f"--noise-level {args.noise_level:g}: upsamplers are trained with 0 to {LOW_NOISE}")


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for a file that is not there, or numbers that are too small."""
    if args.video is not None and not args.video.is_file():
        raise ValueError(f"--video {args.video}: no such file")
    for name, least in LEAST.items():
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"{_flag(name)} {value}: give {least} or more")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------- drawing


def sample(args: argparse.Namespace, folder: Path) -> None:
    """Draws every video and writes it into the folder."""
    import torch

    from jobs.sample_files import file_name, said, write_videos
    from pipeline.caption.structured import told

    maker, drawing, used = prepared(args)
    print(said(used), flush=True)
    rows: list[dict[str, Any]] = []
    videos: dict[str, np.ndarray] = {}
    prompts = [told(prompt) for prompt in args.prompt or [""]]
    for prompt in prompts:
        for _ in range(args.n):
            number = len(rows)
            with torch.no_grad():
                video = drawing(prompt, args.seed + number)[0].cpu().numpy()
            name = file_name(number, prompt)
            videos[name] = video
            rows.append(
                {
                    "name": prompt,
                    "file": name,
                    "frames": len(video),
                    "fps": maker.fps,
                    "seed": args.seed + number,
                }
            )
            print(f"{number + 1} of {args.n * len(prompts)}", flush=True)
    write_videos(folder, videos, rows, used, maker.fps)


def prepared(args: argparse.Namespace) -> tuple[Maker | Cascade, Drawing, dict[str, Any]]:
    """What draws, how, and what is really used of every model."""
    from jobs import sampling

    options = sampling.Options(
        args.video,
        args.frames,
        2 if args.context is None else args.context,
        args.noise_level,
        2 if args.times is None else args.times,
        {
            "sampler": args.sampler,
            "sampler_options": sampler_options(args.sampler_option),
            "sample_steps": args.steps,
            "spacing": args.spacing,
            "guidance": args.guidance,
            "guidance_interval": args.guidance_interval,
            "guidance_rescale": args.guidance_rescale,
        },
    )
    used: dict[str, Any] = {"task": args.task, "seed": args.seed}
    if args.task != "cascade":
        maker = load(args.model, args, options)
        tasks = {
            "text": sampling.text,
            "image": sampling.image,
            "predict": sampling.predict,
            "extend": sampling.extended,
            "interpolate": sampling.interpolated,
            "upsample": sampling.upsampled,
        }
        drawing = tasks[args.task](maker)
        return maker, drawing, used | {"models": {args.model: maker.used()}}
    folders = [f for f in (args.keyframes, args.interpolator, args.upsampler) if f]
    makers = [load(folder, args, options) for folder in folders]
    cascade = sampling.Cascade(*makers)
    models = {folder: maker.used() for folder, maker in zip(folders, makers, strict=True)}
    return cascade, cascade, used | {"models": models}


def load(folder: str, args: argparse.Namespace, options: Options) -> Maker:
    from jobs.sampling import Maker
    from jobs.training.diffusion.build import load_trained
    from jobs.training.paths import located

    system = load_trained(folder, args.ema, args.device, located(args.locate))
    return Maker(system, options)


def sampler_options(given: list[str]) -> dict[str, float] | None:
    """NAME=X … → name → x; None where nothing is given. Raises ValueError."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as e:
            raise ValueError(f"--sampler-option {text}: give NAME=NUMBER, such as eta=1") from e
    return found or None


if __name__ == "__main__":
    raise SystemExit(main())
