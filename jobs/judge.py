"""clipmill judge: does a model that learned the world of 'clipmill toy' draw what the captions say?"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from jobs.judged import Judged
    from pipeline.toy.world import Attributes

Verdict = dict[str, str | bool | None]

EPILOG = """
examples
  clipmill judge toy/model --held-out toy/held_out.txt
  clipmill judge toy/model --n 450 --out toy/judged
  clipmill judge toy/world-model --held-out toy/held_out.txt --clips toy/held-out/run/shards

Captions are drawn from all 450 combinations of count, colour, shape, direction and background, none twice until
all were; with --held-out from those that training saw and from those that it never did, each judged by itself.
Each video is read by rules (pipeline/toy/reader.py); what cannot be read is wrong. What the rules make of true
scenes of the same captions, drawn anew and put through the model's autoencoder, is said first. Intervals are
Wilson's, of 95 %, a video being one trial. A world model is judged by what it writes of videos too: of those true
scenes, or of the clips of another run, --clips, by the captions that they have there. --out keeps the videos, a
contact sheet and judged.json, a line a video.
"""

ATTRIBUTES = ("count", "colour", "shape", "direction", "background")
SIDE = 128  # pixels of a video to look at, at least
SHOWN = 24  # videos on the contact sheet
BATCH = 25  # videos drawn at a time
SEEN, HELD_OUT, EVERY = "combinations seen in training", "combinations held out", "all combinations"


def main(argv: list[str] | None = None) -> int:
    from jobs.training.paths import add_locate, located

    parser = argparse.ArgumentParser(
        prog="clipmill judge",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder that 'clipmill train diffusion' or 'world' wrote"
    )
    parser.add_argument(
        "--n", type=int, default=100, metavar="N", help="videos; with --held-out, of each kind (default: 100)"
    )
    parser.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="captions never trained on: held_out.txt of 'clipmill toy'",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep the videos here, in a new or empty folder"
    )
    parser.add_argument(
        "--clips",
        metavar="SHARDS",
        help="world model: clips whose captions it is to write, in place of true scenes",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of the sampler (default: the recipe's)")
    parser.add_argument("--guidance", type=float, metavar="W", help="by the caption (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ema", type=float, metavar="L", help="σ_rel of the averaged weights (default: the longest)"
    )
    add_locate(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU, where there is one)")
    args = parser.parse_args(argv)

    import numpy as np

    from jobs.judged import load
    from jobs.training.exported import CheckpointError
    from jobs.videos import taken
    from models.hub import MissingModel
    from pipeline.faults import StoreError

    try:
        captions = asked(args.n, args.seed, args.held_out)
        if args.out and taken(args.out):
            raise ValueError(f"--out {args.out}: it is there already; give a new or empty folder")
        judged = load(args, located(args.locate))
        print(trust(judged, [c for some in captions.values() for c in some], args.seed), flush=True)
        verdicts: list[Verdict] = []
        videos: list[np.ndarray] = []
        for kind, some in captions.items():
            videos += (drawn := draw_videos(judged, some, args.seed))
            found = [verdict(v, c) | {"kind": kind} for v, c in zip(drawn, some, strict=True)]
            verdicts += found
            print(f"\n{len(found)} videos of {kind}\n{table(found)}", flush=True)
            if judged.tell is not None and not args.clips:
                scenes = [
                    true_video(np.random.default_rng([args.seed, i, 2]), c, judged)
                    for i, c in enumerate(some)
                ]
                print(
                    f"\nwhat it writes of {len(some)} true scenes of {kind}\n{told(judged, scenes, some)}",
                    flush=True,
                )
        if args.clips and judged.tell is not None:
            scenes, some = judged.clips(args.clips, args.n)
            print(
                f"\nwhat it writes of {len(some)} clips of {args.clips}\n{told(judged, scenes, some)}",
                flush=True,
            )
        if args.out:
            keep(args.out, videos, verdicts, judged.fps)
            print(f"{len(videos)} videos, sheet.png and judged.json in {args.out}")
    except (ValueError, CheckpointError, MissingModel, StoreError, OSError) as e:
        print(f"clipmill judge: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    return 0


def asked(n: int, seed: int, held_out: Path | None) -> dict[str, list[str]]:
    """Kind of combinations → n captions. Raises ValueError and OSError."""
    from pipeline.toy.world import every, parse

    for name, value, least in (("n", n, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{name} {value}: give {least} or more")
    if held_out is None:
        return {EVERY: draw_captions(every(), n, seed)}
    try:
        never = {parse(line) for line in held_out.read_text(encoding="utf-8").splitlines() if line}
    except ValueError as e:  # of bytes that are no text, too
        raise ValueError(f"--held-out {held_out}: {e}") from e
    if not never:
        raise ValueError(f"--held-out {held_out} names no caption: leave it out")
    seen = [attributes for attributes in every() if attributes not in never]
    if not seen:
        raise ValueError(f"--held-out {held_out} names all combinations, so none was seen: leave it out")
    return {SEEN: draw_captions(seen, n, seed), HELD_OUT: draw_captions(never, n, seed)}


def draw_captions(combinations: Iterable[Attributes], n: int, seed: int) -> list[str]:
    """n of their sentences, none twice until all were."""
    import numpy as np

    whole = sorted(attributes.caption() for attributes in combinations)
    order = np.random.default_rng(seed).permutation(len(whole))
    return [whole[i] for i in itertools.islice(itertools.cycle(order), n)]


def trust(judged: Judged, captions: list[str], seed: int) -> str:
    """One sentence: which reader, and how much it gets right of true videos as this model could draw them at best."""
    import numpy as np

    from models.measures.wilson import wilson
    from pipeline.toy.reader import identity

    verdicts = []
    for i, caption in enumerate(captions):
        true = true_video(np.random.default_rng([seed, i, 1]), caption, judged)
        verdicts.append(verdict(judged.through(true), caption))
    right = float(np.mean([bool(v[a]) for v in verdicts for a in ATTRIBUTES]))
    low, high = wilson(right, len(verdicts))
    return (
        f"reader {identity()}: {right:.1%} of the attributes right ({low:.1%} to {high:.1%}) on {len(verdicts)} true "
        "scenes of these captions, drawn anew, through the model's autoencoder"
    )


def true_video(rng: np.random.Generator, caption: str, judged: Judged) -> np.ndarray:
    """A scene of the caption in the model's shape and at its rate."""
    from jobs.judged import RATE

    return scene_of(rng, caption, judged.frames, judged.size, RATE / judged.fps)


def scene_of(
    rng: np.random.Generator, caption: str, frames: int, size: tuple[int, int], step: float
) -> np.ndarray:
    """uint8 [T, height, width, 3] of a scene of the caption, drawn twice as large, as the raw videos are.

    step: frames of the world from one to the next; fewer where the objects would leave the picture.
    """
    from dataclasses import replace

    import cv2
    import numpy as np

    from pipeline.toy.world import LENGTHS, parse, render, scene

    longest = LENGTHS[1]
    whole = min(longest, max(2, round((frames - 1) * step) + 1))
    drawn = scene(rng, parse(caption), (whole, whole))
    stride = min(step, (longest - 1) / max(1, frames - 1))
    x, y = drawn.velocity
    drawn = replace(drawn, frames=frames, velocity=(x * stride, y * stride), pan=drawn.pan * stride)
    large = render(drawn, 2 * max(size))
    return np.stack([cv2.resize(f, size[::-1], interpolation=cv2.INTER_AREA) for f in large])


def draw_videos(judged: Judged, captions: list[str], seed: int) -> list[np.ndarray]:
    """A video a caption, uint8 [T, H, W, 3]. Says on stderr how far it is."""
    from rich.console import Console
    from rich.progress import track

    videos: list[np.ndarray] = []
    starts = range(0, len(captions), BATCH)
    for start in track(starts, "drawing", console=Console(stderr=True)):
        videos += judged.draw(captions[start : start + BATCH], seed + start)
    return videos


def told(judged: Judged, scenes: list[np.ndarray], captions: list[str]) -> str:
    """A table of what the model writes of videos with these captions; a sentence of no world is wrong in all."""
    from pipeline.toy.world import parse, stated

    assert judged.tell is not None
    found: list[Verdict] = []
    for start in range(0, len(scenes), BATCH):
        for said, caption in zip(
            judged.tell(scenes[start : start + BATCH]), captions[start : start + BATCH], strict=True
        ):
            seen, wanted = vars(stated(said)), vars(parse(caption))
            right = {a: wanted[a] == seen[a] for a in ATTRIBUTES}
            found.append({"caption": caption} | right | {f"{a}_seen": seen[a] for a in ATTRIBUTES})
    return table(found)


def verdict(video: np.ndarray, caption: str) -> Verdict:
    """What of the caption is right, and what the reader sees."""
    from pipeline.toy.reader import read
    from pipeline.toy.world import parse

    wanted, seen = vars(parse(caption)), vars(read(video).attributes)
    right = {a: wanted[a] == seen[a] for a in ATTRIBUTES}
    return {"caption": caption} | right | {f"{a}_seen": seen[a] for a in ATTRIBUTES}


def table(verdicts: list[Verdict]) -> str:
    """Share that is right, of the rest which cannot be read, by attribute."""
    from models.measures.wilson import wilson

    n = len(verdicts)
    lines = ["attribute    right        95 %        misread  unreadable"]

    def row(name: str, right: float, rest: str = "") -> str:
        low, high = wilson(right, n)
        return f"{name:11}{right:7.1%}  {low:6.1%} to {high:6.1%}{rest}"

    for a in ATTRIBUTES:
        right = sum(bool(v[a]) for v in verdicts) / n
        blank = sum(v[f"{a}_seen"] is None for v in verdicts) / n
        misread = sum(not v[a] and v[f"{a}_seen"] is not None for v in verdicts) / n
        lines.append(row(a, right, f"{misread:9.1%}{blank:12.1%}"))
    lines.append(row("mean", sum(bool(v[a]) for v in verdicts for a in ATTRIBUTES) / n / len(ATTRIBUTES)))
    lines.append(row("all five", sum(all(v[a] for a in ATTRIBUTES) for v in verdicts) / n))
    return "\n".join(lines)


def keep(out: Path, videos: list[np.ndarray], verdicts: list[Verdict], fps: float) -> None:
    """Write the videos, a contact sheet of the first ones, and the verdicts."""
    from jobs.videos import contact_sheet, write_mp4

    out.mkdir(parents=True, exist_ok=True)
    shown: dict[str, np.ndarray] = {}
    for i, (told, video) in enumerate(zip(verdicts, videos, strict=True)):
        write_mp4(out / f"{i:03d} {told['caption']}.mp4", video, fps, SIDE)
        shown.setdefault(str(told["caption"]), video)
    contact_sheet(dict(list(shown.items())[:SHOWN])).save(out / "sheet.png")
    (out / "judged.json").write_text("".join(json.dumps(v) + "\n" for v in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
