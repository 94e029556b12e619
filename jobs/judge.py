"""clipmill judge: does a model that learned the world of 'clipmill toy' draw what the captions say?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from jobs.training.system import System

EPILOG = """
examples
  clipmill judge toy/model
  clipmill judge toy/model --n 450 --out toy/judged

Captions are drawn from all 450 combinations of count, colour, shape, direction and background, none twice.
Each video is read by rules, exactly (pipeline/toy/reader.py); what cannot be read is wrong. --out keeps the
videos, a contact sheet and judged.json, a line a video.
"""

ATTRIBUTES = ("count", "colour", "shape", "direction", "background")
SHOWN = 24  # videos on the contact sheet
BATCH = 25  # videos drawn at a time


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clipmill judge",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder that 'clipmill train diffusion' wrote")
    parser.add_argument(
        "--n", type=int, default=100, metavar="N", help="videos, 1 to 450, one a caption (default: 100)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the videos here")
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the recipe's)")
    parser.add_argument("--guidance", type=float, metavar="W", help="by the caption (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ema", type=float, metavar="L", help="σ_rel of the averaged weights (default: the longest)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    args = parser.parse_args(argv)

    from jobs.training.build import load_trained
    from jobs.training.exported import CheckpointError
    from models.hub import MissingModel

    try:
        if not 1 <= args.n <= 450:
            raise ValueError(f"--n {args.n}: give 1 to 450, of which there is a caption each")
        system = load_trained(args.model, args.ema, args.device)
        captions = draw_captions(args.n, args.seed)
        videos = draw_videos(system, captions, args.seed, args.steps, args.guidance)
    except (ValueError, CheckpointError, MissingModel, OSError) as e:
        print(f"clipmill judge: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    verdicts = [verdict(video, caption) for video, caption in zip(videos, captions, strict=True)]
    print(table(verdicts))
    if args.out:
        keep(args.out, videos, verdicts, system.recipe.data.fps or 8.0)
        print(f"{len(videos)} videos, sheet.png and judged.json in {args.out}")
    return 0


def draw_captions(n: int, seed: int) -> list[str]:
    """n of the sentences of this world, none twice."""
    import numpy as np

    from pipeline.toy.world import every

    whole = [attributes.caption() for attributes in every()]
    return [whole[i] for i in np.random.default_rng(seed).permutation(len(whole))[:n]]


def draw_videos(
    system: System, captions: list[str], seed: int, steps: int | None = None, guidance: float | None = None
) -> list[np.ndarray]:
    """A video a caption, uint8 [T, H, W, 3]. Says on stderr how far it is."""
    from rich.console import Console
    from rich.progress import track

    videos: list[np.ndarray] = []
    starts, run = range(0, len(captions), BATCH), system.recipe.run.but(sample_steps=steps, guidance=guidance)
    for start in track(starts, "drawing", console=Console(stderr=True)):
        some = captions[start : start + BATCH]
        draw = system.draw(run=run, seed=seed + start)
        videos += list(system.decode(draw(system.shape(len(some)), system.condition(some))).cpu().numpy())
    return videos


def verdict(video: np.ndarray, caption: str) -> dict[str, str | bool | None]:
    """What of the caption is right, and what the reader sees."""
    from pipeline.toy.reader import read
    from pipeline.toy.world import parse

    wanted, seen = vars(parse(caption)), vars(read(video).attributes)
    right = {a: wanted[a] == seen[a] for a in ATTRIBUTES}
    return {"caption": caption} | right | {f"{a}_seen": seen[a] for a in ATTRIBUTES}


def table(verdicts: list[dict[str, str | bool | None]]) -> str:
    """Share that is right, of the rest which cannot be read, by attribute."""
    n = len(verdicts)
    lines = ["attribute    right  misread  unreadable"]
    for a in ATTRIBUTES:
        right = sum(bool(v[a]) for v in verdicts) / n
        blank = sum(v[f"{a}_seen"] is None for v in verdicts) / n
        lines.append(f"{a:11}{right:7.1%}{1 - right - blank:9.1%}{blank:12.1%}")
    mean = sum(bool(v[a]) for v in verdicts for a in ATTRIBUTES) / n / len(ATTRIBUTES)
    whole = sum(all(v[a] for a in ATTRIBUTES) for v in verdicts) / n
    return "\n".join([*lines, f"{'mean':11}{mean:7.1%}", f"all five right in {whole:.1%} of {n} videos"])


def keep(
    out: Path, videos: list[np.ndarray], verdicts: list[dict[str, str | bool | None]], fps: float
) -> None:
    """Write the videos, a contact sheet of the first ones, and the verdicts."""
    import torch

    from jobs.training.monitor import contact_sheet, write_mp4

    out.mkdir(parents=True, exist_ok=True)
    named = {str(v["caption"]): torch.from_numpy(video) for v, video in zip(verdicts, videos, strict=True)}
    for i, (caption, video) in enumerate(named.items()):
        write_mp4(out / f"{i:03d} {caption}.mp4", video, fps)
    contact_sheet(dict(list(named.items())[:SHOWN])).save(out / "sheet.png")
    (out / "judged.json").write_text("".join(json.dumps(v) + "\n" for v in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
