"""A small network of videos that tells the small world's attributes, as TorchScript: what its selector sees with.

    python bench/selector_eyes.py TOY/run --out eyes.pt [--against TOY/held_out/run]

Trained on the captions of the run's shards (clips of a tenth of the sources left out), 8 frames spread over a clip.
Printed: how often each attribute is right on clips left out, and on those of another run, such as of combinations that
this one never shows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.training.data.held_out import held_out
from pipeline.shards.index import rows_where
from pipeline.shards.reader import ShardReader
from pipeline.toy.questions import VALUES
from pipeline.toy.world import parse

FRAMES, SIDE, BATCH = 8, 48, 64


class Eyes(nn.Module):
    """float [B, 3, T, H, W] in −1…1 → [B, 192]: four convolutions over space and time, mean and maximum."""

    def __init__(self, width: int = 16):
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels, kernel, stride in (
            (width, (1, 5, 5), (1, 2, 2)),
            (2 * width, (3, 3, 3), (1, 2, 2)),
            (4 * width, (3, 3, 3), (2, 2, 2)),
            (6 * width, (3, 3, 3), (1, 1, 1)),
        ):
            padding = tuple(k // 2 for k in kernel)
            layers += [
                nn.Conv3d(before, channels, kernel, stride, padding),
                nn.GroupNorm(4, channels),
                nn.GELU(),
            ]
            before = channels
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape[0], x.shape[2]
        flat = x.transpose(1, 2).flatten(0, 1)
        small = F.interpolate(flat, (48, 48), mode="bilinear", antialias=True, align_corners=False)
        x = self.net(small.view(b, t, 3, 48, 48).transpose(1, 2)).flatten(2)
        return torch.cat([x.mean(2), x.amax(2)], dim=1)


def clips(run: str) -> tuple[Tensor, Tensor, np.ndarray]:
    """uint8 [N, T, H, W, 3], labels int64 [N, 5], and which are of sources that are left out."""
    reader = ShardReader(f"{run}/shards", frames=FRAMES, shuffle=False)
    rows = [reader.read(i) for i in range(len(reader.keys))]
    told = [parse(row["caption"]) for row in rows]
    labels = torch.tensor([[v.index(getattr(a, n)) for n, v in VALUES.items()] for a in told])
    left_out = np.isin(np.arange(len(rows)), rows_where(f"{run}/shards", held_out(f"{run}/shards", 0.1)))
    return torch.from_numpy(np.stack([row["video"] for row in rows])), labels, left_out


def unit(video: Tensor) -> Tensor:
    return video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def right(eyes: nn.Module, head: nn.Module, video: Tensor, labels: Tensor) -> str:
    """How often each attribute is, and all of them."""
    with torch.no_grad():
        found = torch.cat([head(eyes(unit(part))) for part in video.split(BATCH)])
    parts = found.split([len(v) for v in VALUES.values()], dim=1)
    correct = torch.stack([x.argmax(1) for x in parts], dim=1) == labels
    each = ", ".join(f"{n} {x:.1%}" for n, x in zip(VALUES, correct.float().mean(0), strict=True))
    return f"{each}; all {correct.all(1).float().mean():.1%} of {len(labels)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", help="another run, to measure on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    video, labels, left_out = clips(args.run)
    trained = torch.from_numpy(np.flatnonzero(~left_out))
    eyes, head = Eyes(), nn.Linear(192, sum(map(len, VALUES.values())))
    optimizer = torch.optim.AdamW([*eyes.parameters(), *head.parameters()], args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
    start, began = time.process_time(), time.monotonic()
    for step in range(args.steps):
        rows = trained[torch.randint(len(trained), (BATCH,))]
        parts = head(eyes(unit(video[rows]))).split([len(v) for v in VALUES.values()], dim=1)
        loss = torch.stack([F.cross_entropy(x, labels[rows, i]) for i, x in enumerate(parts)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(
                step + 1, f"{loss:.3f}", f"{(time.process_time() - start) / 60:.1f} CPU-minutes", flush=True
            )
            eyes.eval()
            print("left out:", right(eyes, head, video[left_out], labels[left_out]), flush=True)
            torch.jit.script(eyes).save(str(args.out))
            eyes.train()
    spent, wall = (time.process_time() - start) / 60, (time.monotonic() - began) / 60
    print(f"{args.steps} steps of {BATCH}: {spent:.1f} CPU-minutes, {wall:.1f} minutes of wall clock")
    if args.against:
        video, labels, _ = clips(args.against)
        print("other run:", right(eyes, head, video, labels))


if __name__ == "__main__":
    main()
