"""`clipmill sample` of a world model: videos from captions or from how they begin, captions from videos."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.training.world.recipe import Drawing
    from jobs.training.world.system import WorldSystem

TASKS = {  # options beside those that every task takes
    "text": {"frames"},
    "image": {"video", "frames"},
    "predict": {"video", "frames", "context"},
    "extend": {"video", "frames"},
    "caption": {"video"},
}
ONLY_DIFFUSION = (
    "noise_level",
    "sampler",
    "sampler_option",
    "steps",
    "spacing",
    "guidance_interval",
    "guidance_rescale",
    "keyframes",
    "interpolator",
    "upsampler",
    "times",
)
WRITTEN = "captions.json"


def is_world(folder: str) -> bool:
    """Whether it is a folder that `clipmill train world` wrote."""
    from jobs.training.world.system import last_stage

    try:
        told = json.loads((last_stage(Path(folder)) / "model.json").read_text())
        return bool(told["recipe"]["trains"] == "world")
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads it says why it cannot be
        return False


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that do not go together."""
    if args.task not in TASKS:
        raise ValueError(f"--task {args.task} is for diffusion models: of a world model {', '.join(TASKS)}")
    for name in ONLY_DIFFUSION:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for diffusion models: leave it out")
    for name in ("video", "frames", "context"):
        if getattr(args, name) is not None and name not in TASKS[args.task]:
            others = ", ".join(task for task, takes in TASKS.items() if name in takes)
            raise ValueError(f"--task {args.task} has no use for --{name}: leave it out (it is for {others})")
    if args.task != "text" and args.video is None:
        raise ValueError(f"--task {args.task} needs --video FILE")
    if args.task == "extend" and args.frames is None:
        raise ValueError("--task extend needs --frames N, how long the video is to be")


def sample(args: argparse.Namespace, folder: Path) -> None:
    """Draws, or writes, everything into the folder. Raises ValueError, one sentence."""
    from jobs.training.paths import located
    from jobs.training.world.system import load_world

    check(args)
    system = load_world(args.model, args.ema, args.device, located(args.locate))
    if system.vq is None:
        raise ValueError(f"{args.model} is a model of text alone, without a VQ autoencoder: it draws nothing")
    first, rest = (how(drawing, args) for drawing in (system.recipe.run.first, system.recipe.run.rest))
    used = {
        "task": args.task,
        "seed": args.seed,
        "models": {
            args.model: {
                "step": system.step,
                "ema": system.ema,
                "first": first.model_dump(),
                "rest": rest.model_dump(),
            }
        },
    }
    if args.task == "caption":
        write_captions(args, system, folder, used)
        return
    count = args.frames or system.bucket.frames
    given = beginning(args, system, count) if args.video else None
    draw_videos(args, system, folder, used, count, given, (first, rest))


def how(drawing: Drawing, args: argparse.Namespace) -> Drawing:
    """The recipe's, but for what is asked for."""
    asked = {"guidance": args.guidance, "temperature": args.temperature, "top_k": args.top_k}
    changed = {name: value for name, value in asked.items() if value is not None}
    return type(drawing).model_validate(drawing.model_dump() | changed)


def shown(args: argparse.Namespace, system: WorldSystem, most: int | None = None) -> Tensor:
    """The frames of --video as the model sees them, uint8 [T, 3, H, W]. Raises ValueError."""
    import torch

    from jobs.sampling import PICTURES, picture
    from pipeline.split.opening import DecodeError
    from pipeline.split.shown import read

    size, path = (system.bucket.height, system.bucket.width), args.video
    try:
        if path.suffix.lower() in PICTURES:
            pictures = picture(path, lambda aspect: size)[None]
        else:
            pictures = read(str(path), lambda aspect: size, system.recipe.data.fps, most).pictures
    except DecodeError as e:
        raise ValueError(f"--video {path}: {e}") from e
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def beginning(args: argparse.Namespace, system: WorldSystem, count: int) -> Tensor:
    """Codes [1, n, frame] of the frames that the video begins with. Raises ValueError."""
    assert system.vq is not None
    stride = system.vq.stride[0]
    wanted = {"image": 1, "predict": 1 + ((args.context or 2) - 1) * stride}.get(args.task)
    pixels = shown(args, system, wanted or count)
    if wanted is None:  # all of it, as far as whole codes go
        pixels = pixels[: 1 + (len(pixels) - 1) // stride * stride]
    elif len(pixels) < wanted:
        raise ValueError(
            f"--video {args.video} has {len(pixels)} of the {wanted} frames that are to be given"
        )
    if len(pixels) >= count:
        raise ValueError(
            f"{len(pixels)} frames are given and the video is to have {count}: give more --frames"
        )
    return system.encode(pixels, [len(pixels)])[None]


def draw_videos(
    args: argparse.Namespace,
    system: WorldSystem,
    folder: Path,
    used: dict[str, Any],
    count: int,
    given: Tensor | None,
    hows: Sequence[Drawing],
) -> None:
    from jobs.sample_files import file_name, said, write_videos

    print(said(used), flush=True)
    prompts, fps = [*(args.prompt or [""])], system.recipe.data.fps or 8.0
    rows: list[dict[str, Any]] = []
    videos = {}
    for prompt in prompts:
        for _ in range(args.n):
            seed = args.seed + len(rows)
            parts = [prompt] if prompt else []
            (video,) = system.draw([parts], count, [seed], given, first=hows[0], rest=hows[1])
            name = file_name(len(rows), prompt)
            videos[name] = video.cpu().numpy()
            rows.append({"name": prompt, "file": name, "frames": len(video), "fps": fps, "seed": seed})
            print(f"{len(rows)} of {args.n * len(prompts)}", flush=True)
    write_videos(folder, videos, rows, used, fps)


def write_captions(args: argparse.Namespace, system: WorldSystem, folder: Path, used: dict[str, Any]) -> None:
    """What the model says of --video, after a prompt where one is given."""
    from models.language.generate import TEXT, Sampling

    assert system.vq is not None
    pixels = shown(args, system, system.bucket.frames)
    pixels = pixels[: 1 + (len(pixels) - 1) // system.vq.stride[0] * system.vq.stride[0]]  # in whole codes
    codes = system.encode(pixels, [len(pixels)])
    drawn = Sampling(1.0, args.temperature or 0.0, args.top_k) if args.n > 1 or args.temperature else TEXT
    rows: list[dict[str, Any]] = []
    for prompt in args.prompt or [""]:
        parts = [codes, prompt] if prompt else [codes]
        for _ in range(args.n):
            seed = args.seed + len(rows)
            (text,) = system.tell([parts], how=drawn, seed=seed)
            rows.append({"video": str(args.video), "prompt": prompt, "text": text, "seed": seed})
            print(text, flush=True)
    content = used | {"captions": rows}
    (folder / WRITTEN).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
