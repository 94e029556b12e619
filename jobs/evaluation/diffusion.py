"""clipmill eval diffusion: how far generated videos are from real ones, with the protocol of every number."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluation.told import told

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.training.diffusion.recipe import DiffusionRun
    from jobs.training.diffusion.system import System
    from models.measures.features import VideoFeatures

EPILOG = """
examples
  clipmill eval diffusion model/ --against run/shards --n 256
  clipmill eval diffusion samples/ --against run/shards --frames 16 --fps 8 --size 64
  clipmill eval diffusion model/ --against run/shards --features i3d_torchscript.pt
  clipmill eval diffusion model/ --against run/shards --clip ViT-B-32:laion2b_s34b_b79k

The first is the folder that 'clipmill train' wrote, which is sampled with the captions of the real clips, or
a folder of mp4 files. Beside every distance stands that of as many real videos from as many others: what a
perfect model would score. Distances depend on the number of videos, their frames, rate and size, and on the
network: compare numbers of one protocol only. All of it is in eval.json.

feature networks (--features, may be repeated)
  efficientnet-lite0    of single frames, pooled over time; its weights are installed
  clip:MODEL:WEIGHTS    an open_clip image tower, pooled likewise
  vivit:FOLDER          a ViViT that 'clipmill train vivit' wrote
  vivit:FILE            another (models/encoders/vivit.py): torch.save of {"options": …, "weights": …}
  FILE.pt               TorchScript, videos [B, 3, T, H, W] in −1…1 → [B, D]; a distance is called FVD where
                        the file is the I3D network of published FVDs, and nowhere else
"""

BATCH = 8
CLIP_FRAMES = 8  # of a video that CLIP looks at


def add(parser: argparse.ArgumentParser) -> None:
    """The options of `clipmill eval diffusion`."""
    from jobs.training.paths import add_locate

    parser.add_argument("generated", metavar="MODEL|FOLDER", help="a trained model, or a folder of mp4 files")
    parser.add_argument("--against", required=True, metavar="SHARDS", help="real clips: RUN/shards")
    parser.add_argument("--n", type=int, default=256, help="videos of each kind (default: 256)")
    parser.add_argument("--frames", type=int, help="of a video (default: the model's, or 16)")
    parser.add_argument("--fps", type=float, help="frames a second (default: the model's, or 8)")
    parser.add_argument("--size", metavar="N|WxH", help="pixels (default: the model's, or 64)")
    parser.add_argument("--features", action="append", metavar="NETWORK", help="(efficientnet-lite0)")
    parser.add_argument(
        "--clip", metavar="MODEL:WEIGHTS", help="open_clip model that compares captions and frames"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of clips, and of sampling")
    parser.add_argument("--ema", type=float, metavar="L", help="σ_rel of the averaged weights to sample from")
    add_locate(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the recipe's)")
    parser.add_argument("--guidance", type=float, metavar="W", help="by the caption (default: the recipe's)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU, where there is one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: eval.json in the first folder")


def run(args: argparse.Namespace) -> int:
    return told(lambda: (evaluate(args), args.out or Path(args.generated) / "eval.json"), table)


@dataclass(frozen=True)
class Protocol:
    """What decides a number beside the network it is measured in.

    fps: None spreads the frames over the whole clip. n: videos on either side, as many as of the real ones
    that are compared with each other. sampling: how the model was sampled; None for a folder of videos.
    """

    frames: int
    fps: float | None
    height: int
    width: int
    n: int
    seed: int
    window: str = "middle of the clip"
    sampling: dict[str, Any] | None = None


@dataclass
class Seen:
    """What the networks made of a set of videos, row i of everything being video i.

    features: [N, D] by the network's hash. images: unit CLIP embeddings [frames, d] of each video, where CLIP is asked.
    """

    captions: list[str]
    features: dict[str, Tensor]
    images: list[Any]


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed and written. Raises what `main` catches, one sentence each."""
    import torch

    from models.measures.features import load_features

    check(args)
    folder = Path(args.generated)
    notes: list[str] = []
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    networks = [load_features(name, device) for name in args.features or ["efficientnet-lite0"]]
    scorer = clip_scorer(args.clip, device)
    model: tuple[System, DiffusionRun] | None = None
    if (folder / "model.safetensors").exists():
        *model, protocol = load(args)  # type: ignore[assignment]
    else:
        height, width = sides(args.size or "64")
        protocol = Protocol(args.frames or 16, args.fps or 8.0, height, width, args.n, args.seed)
    real = look(real_videos(args.against, protocol, notes), networks, scorer, 2 * args.n)
    source = sampled(*model, real.captions, protocol) if model else folder_videos(folder, protocol, notes)
    made = look(source, networks, scorer, args.n)
    n = min(len(made.captions), len(real.captions) // 2, args.n)
    if n < 2:
        raise ValueError(
            f"{len(made.captions)} generated and {len(real.captions)} real videos of {protocol.frames} frames are "
            f"too few, give at least 2 and 4 (half of them to compare real with real). {' '.join(notes)}".strip()
        )
    if n < args.n:
        notes.append(
            f"{n} videos on either side, not {args.n}: that takes {args.n} generated and {2 * args.n} real."
        )
    protocol = replace(protocol, n=n)
    numbers = [row for network in networks for row in distances(network, made, real, protocol, notes)]
    if scorer:
        numbers += clip_scores(scorer, args.clip, made, real, protocol, notes)
    return {"generated": str(folder), "against": args.against, "numbers": numbers, "notes": notes}


def look(videos: Iterator[tuple[Tensor, str]], networks: list[VideoFeatures], scorer: Any, most: int) -> Seen:
    """At most so many videos with their captions, in batches, each of which is forgotten once it was seen."""
    import torch

    from pipeline.samples import spread

    seen = Seen([], {}, [])
    features: dict[str, list[Tensor]] = {network.hash: [] for network in networks}
    endless = itertools.islice(videos, most)
    while batch := list(itertools.islice(endless, BATCH)):
        stacked = torch.stack([video for video, _ in batch])
        seen.captions += [caption for _, caption in batch]
        for network in networks:
            features[network.hash].append(network(stacked))
        if scorer:
            seen.images += [scorer.clip.embed(spread(list(video.numpy()), CLIP_FRAMES)) for video in stacked]
    seen.features = {name: torch.cat(parts) for name, parts in features.items() if parts}
    return seen


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that mean nothing, before anything is loaded."""
    folder = Path(args.generated)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give what 'clipmill train' wrote, or a folder of mp4 files")
    if (
        args.n < 2
        or (args.frames is not None and args.frames < 1)
        or (args.fps is not None and args.fps <= 0)
    ):
        raise ValueError("--n must be at least 2, --frames at least 1, and --fps above 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: give 0 or more")
    if (folder / "model.safetensors").exists():
        for name in ("frames", "fps", "size"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name}: a model is measured as it was trained; for anything else write videos with "
                    "'clipmill sample' and give their folder"
                )
    else:
        if next(folder.rglob("*.mp4"), None) is None:
            raise ValueError(f"{folder} holds neither a model (model.safetensors) nor mp4 files")
        sides(args.size or "64")
        for name in ("ema", "steps", "guidance"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: {folder} holds videos, not a model")


def sides(size: str) -> tuple[int, int]:
    """(height, width) of '64' or '96x64' (width × height)."""
    parts = size.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ValueError(f"--size {size}: give one side of a square, or width x height such as 96x64")
    return int(parts[-1]), int(parts[0])


# ---------------------------------------------------------------- videos


def real_videos(against: str, protocol: Protocol, notes: list[str]) -> Iterator[tuple[Tensor, str]]:
    """Clips of the shards and their captions, in an order drawn by the seed, uint8 [T, H, W, 3].

    Clips too short for the protocol are left out, which is noted. Raises StoreError where there are no
    shards, ValueError where all clips are too short.
    """
    import numpy as np
    import pyarrow.compute as pc
    import torch

    from pipeline.io.store import Store, below
    from pipeline.shards.index import read_index
    from pipeline.shards.reader import BrokenSample, ShardReader

    inside = below(against, "shards")
    shards = inside if Store(inside).exists("index.parquet") else against
    index, where = read_index(shards), None
    if protocol.fps and "duration_s" in index.column_names:
        where = pc.field("duration_s") > (protocol.frames - 0.5) / protocol.fps  # durations are rounded
        if short := len(index) - len(index.filter(where)):
            lasts = f"{protocol.frames} frames at {protocol.fps:g} a second"
            notes.append(f"{short:,} of {len(index):,} real clips are shorter than {lasts} and left out.")
            if short == len(index):
                raise ValueError(
                    f"{shards}: all {short:,} clips are shorter than {lasts}: give fewer --frames"
                )
    size = (protocol.height, protocol.width)
    reader = ShardReader(
        shards, frames=protocol.frames, fps=protocol.fps, size=size, window="center", where=where
    )
    order = np.random.default_rng(protocol.seed).permutation(len(reader.keys))
    for row in order.tolist():
        try:
            sample = reader.read(row)
        except BrokenSample as e:
            notes.append(f"A real clip cannot be read and is left out: {e}")
            continue
        yield torch.from_numpy(sample["video"]), sample["caption"]


def folder_videos(folder: Path, protocol: Protocol, notes: list[str]) -> Iterator[tuple[Tensor, str]]:
    """The mp4 files below a folder, by name, and their captions, uint8 [T, H, W, 3].

    Those that are too short or no videos are left out, which is noted. A caption is the `name` of the file in
    samples.json beside it, or the text of NAME.txt; '' where there is neither.
    """
    import torch

    from pipeline.shards.reader import BrokenSample, decode

    for file in sorted(folder.rglob("*.mp4")):
        data = file.read_bytes()
        try:
            if protocol.fps and seconds(data) * protocol.fps <= protocol.frames - 0.5:
                notes.append(f"{file} is shorter than {protocol.frames} frames at {protocol.fps:g} a second.")
                continue
            video = decode(data, protocol.frames, protocol.fps, (protocol.height, protocol.width), 0.5)
        except BrokenSample as e:
            notes.append(f"{file} is no video: {e}")
            continue
        yield torch.from_numpy(video), caption_of(file)


def seconds(mp4: bytes) -> float:
    """Length of a video, from the first frame's begin to the last one's end. Raises BrokenSample."""
    import io

    import av

    from pipeline.shards.reader import BrokenSample

    try:
        with av.open(io.BytesIO(mp4), "r") as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            spans = [(p.pts, p.pts + (p.duration or 0)) for p in container.demux(stream) if p.pts is not None]
            return float((max(e for _, e in spans) - min(s for s, _ in spans)) * stream.time_base)
    except (av.FFmpegError, IndexError, ValueError) as e:
        raise BrokenSample(str(e)) from e


def caption_of(file: Path) -> str:
    listed = file.with_name("samples.json")
    if listed.exists():
        for row in json.loads(listed.read_text(encoding="utf-8")):
            if row["file"] == file.name:
                return row["name"]
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.exists() else ""


def load(args: argparse.Namespace) -> tuple[System, DiffusionRun, Protocol]:
    """The model, how it is sampled, and the protocol of what it makes."""
    from jobs.training.diffusion.build import load_trained
    from jobs.training.paths import located

    system = load_trained(args.generated, args.ema, args.device, located(args.locate))
    run = system.recipe.run.but(sample_steps=args.steps, guidance=args.guidance)
    bucket, fps = system.bucket, system.recipe.data.fps
    sampling = system.drawn_with(run) | {"batch": BATCH, "latents": "×".join(map(str, system.shape(1)[1:]))}
    found = Protocol(bucket.frames, fps, bucket.height, bucket.width, args.n, args.seed, sampling=sampling)
    return system, run, found


def sampled(
    system: System, run: DiffusionRun, captions: list[str], protocol: Protocol
) -> Iterator[tuple[Tensor, str]]:
    """n videos of the captions of the first n real clips (again from the first where those are fewer)."""
    import torch

    wanted = [captions[i % len(captions)] for i in range(protocol.n)]
    for start in range(0, protocol.n, BATCH):
        texts = wanted[start : start + BATCH]
        draw = system.draw(run=run, seed=protocol.seed + start)
        with torch.no_grad():
            videos = system.decode(draw(system.shape(len(texts)), system.condition(texts))).cpu()
        print(f"sampled {start + len(texts)} of {protocol.n}", file=sys.stderr, flush=True)
        yield from zip(videos, texts, strict=True)


# ---------------------------------------------------------------- numbers


def number(
    name: str,
    value: float,
    real: float,
    protocol: Protocol,
    network: str,
    hash: str,
    about: str,
    **more: float,
) -> dict[str, Any]:
    """A row of the table; real: the same of real videos."""
    row: dict[str, Any] = {"name": name, "value": value, "real": real, **more}
    return row | {"protocol": asdict(protocol) | {"network": network, "hash": hash, "features": about}}


def distances(
    network: VideoFeatures, made: Seen, real: Seen, protocol: Protocol, notes: list[str]
) -> list[dict[str, Any]]:
    """Fréchet and kernel distance of n generated to n real videos, and of n other real ones to the same."""
    from models.measures.frechet import frechet_distance, kernel_distance, moments, too_few

    n = protocol.n
    ours, known = made.features[network.hash][:n], real.features[network.hash]
    first, other = known[:n], known[n : 2 * n]
    if said := too_few(n, ours.shape[1]):
        notes.append(f"{network.name}: {said}")
    reference = moments(first)
    common = (protocol, network.name, network.hash, network.about)
    frechet, floor = (frechet_distance(moments(x), reference) for x in (ours, other))
    kernel, kernel_floor = (kernel_distance(x, first) for x in (ours, other))
    return [
        number(network.distance, frechet, floor, *common),
        number("Kernel distance", kernel, kernel_floor, *common),
    ]


def clip_scorer(name: str | None, device: str) -> Any:
    """Raises MissingModel where the weights cannot be had."""
    if name is None:
        return None
    from models.measures.clip_score import ClipScorer
    from models.measures.features import clip_parts

    return ClipScorer(*clip_parts(name), device)


def clip_scores(
    scorer: Any, name: str, made: Seen, real: Seen, protocol: Protocol, notes: list[str]
) -> list[dict[str, Any]]:
    """Mean CLIPScore of videos with their own caption, and with that of another: what chance gives."""
    from models.measures.clip_score import clip_score
    from models.measures.features import weights_hash

    n = protocol.n
    if not all(made.captions[:n]):
        notes.append(
            "No CLIPScore: not all generated videos have captions (samples.json or NAME.txt beside them)."
        )
        return []

    def mean(seen: Seen, shift: int) -> float:
        texts = scorer.embed_text(seen.captions[:n])
        return sum(clip_score(seen.images[i], texts[[(i + shift) % n]]) for i in range(n)) / n

    about = f"{CLIP_FRAMES} frames, 2.5 · max(cos, 0)"
    chance = {"other_caption": mean(made, 1), "real_other_caption": mean(real, 1)}
    common = (protocol, name, weights_hash(scorer.clip.net), about)
    return [number("CLIPScore", mean(made, 0), mean(real, 0), *common) | chance]


def table(result: dict[str, Any]) -> str:
    """What a reader of the terminal sees."""
    p = result["numbers"][0]["protocol"]
    rate = f"{p['fps']:g} a second" if p["fps"] else "spread over the clip"
    lines = [
        f"{result['generated']} against {result['against']}",
        f"{p['n']} videos on either side, {p['frames']} frames, {rate}, {p['width']}×{p['height']}, "
        f"{p['window']}, seed {p['seed']}",
        *([", ".join(f"{k} {v}" for k, v in p["sampling"].items())] if p["sampling"] else []),
        "",
        f"{'':18} {'generated':>11} {'real':>11}  network",
    ]
    for row in result["numbers"]:
        q = row["protocol"]
        lines.append(
            f"{row['name']:18} {row['value']:11.4g} {row['real']:11.4g}  {q['network']} {q['hash']} ({q['features']})"
        )
        if "other_caption" in row:
            lines.append(
                f"{'  other caption':18} {row['other_caption']:11.4g} {row['real_other_caption']:11.4g}"
            )
    return "\n".join([*lines, "", *result["notes"]]).rstrip()
