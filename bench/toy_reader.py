"""How far the reader of the small world can be trusted with shapes, which soft pictures blur into one another.

  python -m bench.toy_reader stands           drawn shapes made soft and noisy: read right, misread, not read
  python -m bench.toy_reader agrees JUDGED …  the videos of `clipmill judge --out`: what a small network makes of
                                              their objects that only ever saw drawn ones

The network takes from the reader where an object is, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import av
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.toy import SIDE, pictures
from pipeline.toy.reader import read, trajectory
from pipeline.toy.world import SHAPES, Attributes, every, parse, scene

CROP = 13
SOFT, NOISY = 1.2, 40  # the most that the network is trained on: pixels, grey levels


def drawn(attributes: Attributes, rng: np.random.Generator, softness: float, noise: int) -> np.ndarray:
    """uint8 [8, 32, 32, 3]"""
    frames = pictures(scene(rng, attributes, (8, 8)))
    if softness:
        frames = np.stack([cv2.GaussianBlur(f, (0, 0), softness) for f in frames])
    return (frames + rng.integers(-noise, noise + 1, frames.shape)).clip(0, 255).astype(np.uint8)


def stands() -> None:
    print(
        "| softness, pixels | noise, grey levels | shape right | misread | not read |\n|---|---|---|---|---|"
    )
    for softness, noise in product((0, 0.6, 1.0, 1.3, 1.6), (0, 10, 40)):
        rng, found = np.random.default_rng(0), Counter[str]()
        for attributes in every():
            seen = read(drawn(attributes, rng, softness, noise)).attributes.shape
            found["none" if seen is None else "right" if seen == attributes.shape else "misread"] += 1
        shares = " | ".join(f"{found[k] / found.total():.1%}" for k in ("right", "misread", "none"))
        print(f"| {softness} | ±{noise} | {shares} |", flush=True)


def crops(frames: np.ndarray) -> list[Tensor]:
    """[T, 1, 13, 13] of each object: how vivid the pixels around its centre are, at most 1 in a frame."""
    vivid = frames.max(3).astype(np.float32) - frames.min(3)
    around = (np.arange(CROP) - CROP // 2).astype(np.float32)
    found = []
    for path in trajectory(frames).transpose(1, 0, 2):
        seen = []
        for frame, (x, y) in zip(vivid, path, strict=True):
            if np.isfinite(x):
                at = np.meshgrid(around + round(x), around + round(y))
                crop = cv2.remap(frame, *(a.astype(np.float32) for a in at), cv2.INTER_NEAREST)
                seen.append(crop / crop.max())
        found.append(torch.from_numpy(np.stack(seen))[:, None])
    return found


def trained(seed: int = 0) -> nn.Module:
    """A network for one crop, by drawn objects of every softness and noise; says how good it is on others."""
    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(2):
        x, y = [], []
        for attributes in [a for a in every() if a.count == "one"] * 8:
            noise = int(rng.integers(0, NOISY + 1))
            for crop in crops(drawn(attributes, rng, rng.uniform(0, SOFT), noise)):
                x.append(crop)
                y += [SHAPES.index(attributes.shape)] * len(crop)
        sets.append((torch.cat(x), torch.tensor(y)))
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(1, 24, 3), nn.GELU(), nn.Conv2d(24, 48, 3, stride=2), nn.GELU()),
        *(nn.Flatten(), nn.Linear(48 * 25, 64), nn.GELU(), nn.Linear(64, len(SHAPES))),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    (x, y), (others, labels) = sets
    for _ in range(1500):
        some = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(network(x[some]), y[some]).backward()
        optimizer.step()
    with torch.no_grad():
        right = (network(others).argmax(1) == labels).float().mean()
    print(f"network: {right:.2%} of {len(labels)} single frames of other drawn objects", file=sys.stderr)
    return network


def agrees(folders: list[Path]) -> None:
    network, table = trained(), Counter[tuple[str, str, str]]()
    for folder in folders:
        verdicts = [json.loads(line) for line in (folder / "judged.json").read_text().splitlines()]
        for verdict, path in zip(verdicts, sorted(folder.glob("*.mp4")), strict=True):
            with av.open(str(path)) as container:
                large = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
            frames = np.stack([cv2.resize(f, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for f in large])
            with torch.no_grad():
                told = {SHAPES[int(network(x).log_softmax(1).sum(0).argmax())] for x in crops(frames)}
            by_network = told.pop() if len(told) == 1 else "none"
            asked = str(parse(verdict["caption"]).shape)
            table[asked, verdict["shape_seen"] or "none", by_network] += 1
    kinds = (*SHAPES, "none")
    print("| caption | reader | videos | network: " + " | ".join(kinds) + " |")
    print("|---" * (3 + len(kinds)) + "|")
    for asked, seen in product(SHAPES, kinds):
        row = [table[asked, seen, k] for k in kinds]
        if sum(row):
            print(f"| {asked} | {seen} | {sum(row)} | " + " | ".join(map(str, row)) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["stands", "agrees"])
    parser.add_argument("folders", nargs="*", type=Path, metavar="JUDGED")
    args = parser.parse_args()
    if args.what == "stands":
        stands()
    else:
        agrees(args.folders)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
