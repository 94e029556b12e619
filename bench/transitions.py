"""Transitions of known place between real shots: how many clips hold their frames, and what trimming costs.

    python bench/transitions.py [VIDEOS] [--detector transnetv2|content]

VIDEOS is a folder of videos of one shot each (default shared/videos/single_shot). Pairs of them are joined by ffmpeg's
xfade over 6 to 30 frames, or cut together; a few get one white frame. A clip is a shot of at least 15 frames; it
holds a transition if it has any frame that mixes both shots.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch

from pipeline.io import ffmpeg
from pipeline.recipe import Shots
from pipeline.split.pictures import THUMB
from pipeline.split.shots import ShotStage
from pipeline.split.transitions import without

ROOT = Path(__file__).parent.parent
KINDS = ("fade", "dissolve", "fadeblack", "fadewhite", "wipeleft", "circleopen", "slideleft")
LENGTHS = (6, 12, 20, 30)  # frames, at 25 a second
HALF = 60  # frames of each of the two shots
SHORTEST = 15  # frames of a clip


def composed(videos: list[Path], folder: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Kind, frames of the transition, and thumbs uint8 [n, 27, 48, 3]."""
    rng = random.Random(0)
    cases = [(kind, n) for kind in KINDS for n in LENGTHS] + [("cut", 0)] * 10 + [("flash", 0)] * 4
    for kind, n in cases:
        names, starts = rng.sample(videos, 2), [rng.uniform(0, 3.5) for _ in range(2)]
        a, b = (
            f"[{i}]scale=256:144,setsar=1,fps=25,trim=start={s}:duration={HALF / 25},setpts=PTS-STARTPTS,settb=1/25,"
            f"format=yuv420p"
            for i, s in enumerate(starts)
        )
        if kind == "cut":
            graph = f"{a}[a];{b}[b];[a][b]concat=n=2:v=1:a=0"
        elif kind == "flash":
            white = (
                "lum='if(eq(N,30),255,lum(X,Y))':cb='if(eq(N,30),128,cb(X,Y))':cr='if(eq(N,30),128,cr(X,Y))'"
            )
            graph = f"{b},nullsink;{a},geq={white}"
        else:
            graph = f"{a}[a];{b}[b];[a][b]xfade=transition={kind}:duration={n / 25}:offset={(HALF - n) / 25}"
        path = folder / "composed.mp4"
        inputs = [arg for name in names for arg in ("-i", str(name))]
        encode = ["-c:v", "libx264", "-crf", "20", "-preset", "veryfast", str(path)]
        subprocess.run(
            [ffmpeg.find(), "-v", "error", "-y", *inputs, "-filter_complex", graph, *encode], check=True
        )
        with av.open(str(path)) as container:
            frames = container.decode(video=0)
            thumbs = [f.reformat(*THUMB, "rgb24", interpolation="BICUBIC").to_ndarray() for f in frames]
        yield kind, n, np.stack(thumbs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("videos", nargs="?", type=Path, default=ROOT / "shared" / "videos" / "single_shot")
    parser.add_argument("--detector", default="transnetv2", choices=["transnetv2", "content"])
    args = parser.parse_args()
    torch.set_num_threads(2)
    videos = []
    for path in sorted(args.videos.glob("*.mp4")):
        with av.open(str(path)) as container:
            if (container.duration or 0) > 6.2e6:
                videos.append(path)
    stage = ShotStage(Shots(detector=args.detector, transitions="trim"))
    stage.setup()
    table: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, n, thumbs in composed(videos, Path(folder)):
            cuts, spans = stage.cuts(thumbs)
            edges = sorted({0, *cuts, len(thumbs)})
            mixed = np.zeros(len(thumbs), bool)
            mixed[HALF - n + 1 : HALF] = n > 0  # xfade shows the first shot alone at its offset
            row = table.setdefault(kind, np.zeros(6, int))
            for at, shots in ((0, list(pairwise(edges))), (2, without(edges, spans))):
                clips = [(a, b) for a, b in shots if b - a >= SHORTEST]
                row[at] += len(clips)
                row[at + 1] += sum(mixed[a:b].any() for a, b in clips)
            kept = np.zeros(len(thumbs), bool)
            for a, b in without(edges, spans):
                kept[a:b] = True
            row[4] += int((~kept & ~mixed).sum())
            row[5] += 1
    print(
        "| joined by | videos | keep: clips | with a transition | trim: clips | with a transition | pure frames lost |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind, (clips, held, trimmed, still, lost, videos_) in table.items():
        print(f"| {kind} | {videos_} | {clips} | {held} | {trimmed} | {still} | {lost} |")
    total = sum(table.values())
    print(f"| all | {total[5]} | {total[0]} | {total[1]} | {total[2]} | {total[3]} | {total[4]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
