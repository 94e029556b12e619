"""What a feature network notices: distances of real clips to real clips that something was done to.

  python -m bench.feature_networks RUN --features vivit:toy/vivit --features efficientnet-lite0

Half of the clips against the other half: as they are, played backwards, their frames shuffled, held still, mirrored,
made soft, noisy. Of a network that does not notice, a distance is that of the clips as they are.
"""

from __future__ import annotations

import argparse
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.evaluation.diffusion import BATCH, Protocol, real_videos
from models.measures.features import load_features
from models.measures.frechet import frechet_distance, kernel_distance, moments


def shuffled(videos: Tensor) -> Tensor:
    order = torch.randperm(videos.shape[1], generator=torch.Generator().manual_seed(0))
    return videos[:, order]


def soft(videos: Tensor) -> Tensor:
    x = videos.float().permute(0, 1, 4, 2, 3).flatten(0, 1)
    x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1)
    return x.round().to(torch.uint8).unflatten(0, videos.shape[:2]).permute(0, 1, 3, 4, 2)


def noisy(videos: Tensor) -> Tensor:
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    return (videos + 10 * noise).round().clamp(0, 255).to(torch.uint8)


CHANGES = {
    "as they are": lambda v: v,
    "backwards": lambda v: v.flip(1),
    "frames shuffled": shuffled,
    "first frame held": lambda v: v[:, :1].expand_as(v),
    "mirrored": lambda v: v.flip(3),
    "mean of 3×3 pixels": soft,
    "noise of σ 10": noisy,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--features", action="append", required=True)
    parser.add_argument("--n", type=int, default=150, help="clips of each half")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--fps", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    protocol = Protocol(args.frames, args.fps, args.size, args.size, args.n, 0)
    clips = [v for v, _ in itertools.islice(real_videos(args.run, protocol, []), 2 * args.n)]
    n = len(clips) // 2
    one, other = torch.stack(clips[:n]), torch.stack(clips[n : 2 * n])
    print(f"{n} clips against {n}, {args.frames} frames at {args.fps:g} a second, {args.size}×{args.size}")
    print("| network | clips | Fréchet distance | kernel distance |\n|---|---|---|---|")
    for name in args.features:
        network = load_features(name)
        seen = torch.cat([network(batch) for batch in one.split(BATCH)])
        for said, change in CHANGES.items():
            found = torch.cat([network(change(batch)) for batch in other.split(BATCH)])
            far = frechet_distance(moments(seen), moments(found)), kernel_distance(seen, found)
            print(f"| {network.name} {network.hash} | {said} | {far[0]:.4g} | {far[1]:.4g} |", flush=True)


if __name__ == "__main__":
    main()
