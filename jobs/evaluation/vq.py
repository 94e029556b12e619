"""clipmill eval vq: how well a VQ autoencoder gives clips back, and how many of its codes it uses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jobs.evaluation.numbers import table
from jobs.evaluation.told import told

EPILOG = """
example
  clipmill eval vq codes/ --against run/ --n 200

MODEL is a folder that 'clipmill train vq' wrote. Clips are looked at as it was trained: frames, rate and size of its
longest bucket, from the middle of each. PSNR and SSIM are means over frames and clips; their spread is over clips.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The options of `clipmill eval vq`."""
    parser.add_argument("model", metavar="MODEL", help="folder that 'clipmill train vq' wrote")
    parser.add_argument("--against", required=True, metavar="SHARDS", help="clips: a run or its shards")
    parser.add_argument(
        "--n", type=int, default=256, metavar="N", help="clips, drawn by --seed (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(MODEL/eval.json)")


def run(args: argparse.Namespace) -> int:
    return told(lambda: (evaluate(args), args.out or Path(args.model) / "eval.json"), shown)


def shown(result: dict[str, Any]) -> str:
    """What a reader of the terminal sees."""
    protocol = ", ".join(f"{name} {value}" for name, value in result["protocol"].items())
    lines = [f"{result['model']} against {result['against']}", protocol, "", table(result["numbers"])]
    return "\n".join([*lines, "", *result["notes"]]).rstrip()


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed and written. Raises what `run` catches, one sentence each."""
    import torch

    from jobs.evaluation.looking import drawn, weights_of
    from jobs.training.data.pixels import to_unit
    from jobs.training.exported import load_model
    from jobs.training.world.system import load_vq
    from models.autoencoders.vq import health
    from models.measures.quality import psnr, ssim
    from pipeline.io.store import Store, below
    from pipeline.shards.reader import BrokenSample, ShardReader

    for name, least in (("n", 1), ("seed", 0)):
        if (given := getattr(args, name)) < least:
            raise ValueError(f"--{name} {given}: give {least} or more")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_vq(args.model, "MODEL", device)
    data = load_model(Path(args.model)).recipe["data"]
    bucket = max(data["buckets"], key=lambda b: b["frames"])
    inside = below(args.against, "shards")
    shards = inside if Store(inside).exists("index.parquet") else args.against
    size = (bucket["height"], bucket["width"])
    reader = ShardReader(
        shards, frames=bucket["frames"], fps=data["fps"], size=size, window="center", shuffle=False
    )
    notes: list[str] = []
    ratios: list[float] = []
    alike: list[float] = []
    counts = torch.zeros(model.codes)
    for row in drawn(range(len(reader.keys)), args.n, args.seed):
        try:
            clip = torch.from_numpy(reader.read(row)["video"])
        except BrokenSample as e:
            notes.append(f"A clip cannot be read and is left out: {e}")
            continue
        video = to_unit(clip[None].permute(0, 4, 1, 2, 3).to(device))
        with torch.no_grad():
            made, quantised = model(video)
        made = made.float().clamp(-1, 1)
        ratios.append(float(psnr(made, video).mean()))
        if min(size) >= 11:
            alike.append(float(ssim(made, video).mean()))
        codes = quantised.codes.flatten().cpu()
        counts.index_add_(0, codes, torch.ones(len(codes)))
    if not ratios:
        raise ValueError(f"{shards}: no clip can be read")
    used = health(counts)
    codes_seen = int(counts.sum())
    numbers = [_mean("PSNR, dB", ratios), *([_mean("SSIM", alike)] if alike else [])]
    numbers += [
        {"name": "codes in use, share", "value": used.usage, "n": codes_seen},
        {"name": "perplexity of codes", "value": used.perplexity, "n": codes_seen},
    ]
    protocol = {
        "frames": bucket["frames"],
        "fps": data["fps"],
        "size": f"{size[1]}×{size[0]}",
        "codes": model.codes,
        "clips": len(ratios),
        "seed": args.seed,
        "weights": weights_of(Path(args.model)),
    }
    return {
        "model": args.model,
        "against": args.against,
        "protocol": protocol,
        "numbers": numbers,
        "notes": notes,
    }


def _mean(name: str, values: list[float]) -> dict[str, Any]:
    import statistics

    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"name": name, "value": statistics.fmean(values), "n": len(values), "spread": spread}
