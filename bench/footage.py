"""Real footage through autoencoder and diffusion: how well it comes back.

python bench/footage.py reconstruct RUN --recipe NAME|FILE [--set autoencoder.path=vae/]
    PSNR and SSIM of the run's clips after the recipe's autoencoder, a window of each
python bench/footage.py overfit MODEL --cache LATENTS
    a model trained on few clips, asked for each by its caption: PSNR to that clip as its latents decode, and
    whether it is nearer to it than to any other
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from jobs.training.data.loader import reader_of
from jobs.training.data.pixels import to_unit
from jobs.training.diffusion.build import build_autoencoder, load_trained
from jobs.training.recipe import load_training
from models.measures.quality import psnr, ssim


def reconstruct(args: argparse.Namespace) -> None:
    recipe = load_training(args.recipe, args.set)
    reader = reader_of(recipe, args.run)
    autoencoder = build_autoencoder(recipe.autoencoder, torch.device("cpu"))
    found = []
    for row in range(len(reader.keys)):
        video = to_unit(torch.from_numpy(reader.sound(row)["video"].copy())[None])
        back = autoencoder.decode(autoencoder.encode(video).mean).clamp(-1, 1)
        found.append((float(psnr(back, video).mean()), float(ssim(back, video).mean())))
    x = np.array(found)
    print(
        f"{len(x)} clips of {'×'.join(map(str, video.shape[2:]))}: {', '.join(map(stated, x.T, ('dB', '')))}"
    )


def stated(values: np.ndarray, unit: str) -> str:
    name, digits = ("PSNR", 1) if unit else ("SSIM", 3)
    spread = ", ".join(f"{x:.{digits}f}" for x in np.percentile(values, (10, 50, 90)))
    return f"{name} mean {values.mean():.{digits}f} {unit} (10 %, 50 %, 90 %: {spread})"


def overfit(args: argparse.Namespace) -> None:
    system = load_trained(args.run, None, "cpu")
    cached = system.recipe.model_copy(
        update={"data": system.recipe.data.model_copy(update={"cache": args.cache})}
    )
    reader = reader_of(cached, "")
    clips = [reader.sound(row) for row in range(len(reader.keys))]
    kept = system.normalizer(torch.from_numpy(np.stack([c["mean"] for c in clips])).float())
    captions = [c["caption"] for c in clips]
    draw = system.draw(seed=args.seed, guidance=args.guidance)
    drawn = to_unit(system.decode(draw(tuple(kept.shape), system.condition(captions)))).permute(0, 4, 1, 2, 3)
    true = to_unit(system.decode(kept)).permute(0, 4, 1, 2, 3)
    table = torch.stack([psnr(x.expand_as(true), true).mean(1) for x in drawn.split(1)])  # [drawn, true]
    own = table.diagonal()
    others = (table - 1e9 * torch.eye(len(table))).max(1).values
    print(f"{len(clips)} clips, each drawn from noise by its caption")
    print(f"  to the clip as its latents decode: PSNR {own.mean():.1f} dB ({own.min():.1f}…{own.max():.1f})")
    print(f"  to the nearest other clip:         PSNR {others.mean():.1f} dB")
    print(f"  nearest is its own: {int((own > others).sum())} of {len(clips)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["reconstruct", "overfit"])
    parser.add_argument("run", metavar="RUN|MODEL")
    parser.add_argument("--recipe")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--cache")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with torch.no_grad():
        {"reconstruct": reconstruct, "overfit": overfit}[args.what](args)


if __name__ == "__main__":
    main()
