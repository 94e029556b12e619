"""What a selector learns: on real clips with published captions, and in the small world, where one attribute is wrong.

    python bench/selector.py panda RUN [--out bench/results/selector.md]
    python bench/selector.py toy TRAINED/selector.pt HELD_OUT_RUN

*panda*: RUN holds clips with their published captions (captions: [{kind: given}]). Its sources are dealt to FOLDS folds
by the hash of their names; they are written down in bench/results/selector_folds.json. A selector is trained by the
recipe `selector` on all folds but one, and asked about that one: its clips against its captions. The same is asked of
`visual_fit`, which nothing trains. In brackets 95 % intervals, drawing clips with replacement.

*toy*: each clip of HELD_OUT_RUN (`clipmill toy --only-held-out`) has its true caption and the 13 that differ from it by
one attribute; how often the true one is judged the likeliest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.training.loop import train
from jobs.training.recipe import load_training
from jobs.training.selector.task import FILE, build
from models.choosing.chooser import Chooser, evenly, logits
from models.choosing.file import Saved
from models.measures.visual_fit import fits
from models.measures.wilson import wilson
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from pipeline.toy.world import one_off, parse

FOLDS = 5
SPLIT = Path(__file__).parent / "results/selector_folds.json"
FIXED = ["data.workers=0", "optimizer.warmup=10", "run.save_every=1000", "run.sample_every=1000"]
PLAIN = "features.video=[visual_fit]"
SETTINGS = {  # beside the recipe's own
    "`visual_fit`'s features, cosines, 50 steps": [PLAIN, "loss.matching=0", "run.steps=50"],
    "the same, 200 steps": [PLAIN, "loss.matching=0", "run.steps=200"],
    "with EfficientNet-Lite0's features too, 50 steps": ["loss.matching=0", "run.steps=50"],
    "the same, 200 steps, the matching head": ["run.steps=200"],
    "of both, captions as they are, dropout .5, 100 steps": [
        "model={kind: selector, preset: beside, texts: false, dropout: 0.5}",
        "loss.matching=0",
        "run.steps=100",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["panda", "toy"])
    parser.add_argument("where", help="RUN, or a selector.pt")
    parser.add_argument("run", nargs="?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text = toy(args.where, args.run) if args.what == "toy" else panda(args.where)
    print(text)
    if args.out:
        args.out.write_text(text)


# ---------------------------------------------------------------- the small world


def toy(file: str, run: str) -> str:
    chooser = Chooser.load(file)
    reader = ShardReader(f"{run}/shards", frames=chooser.frames, shuffle=False)
    texts: dict[str, Tensor] = {}

    def embedded(captions: list[str]) -> Tensor:
        new = [c for c in captions if c not in texts]
        texts.update(zip(new, torch.from_numpy(chooser.texts(new)) if new else (), strict=True))
        return torch.stack([texts[c] for c in captions])

    right, wrong = 0, Counter[str]()
    for i in range(len(reader.keys)):
        sample = reader.read(i)
        true = parse(sample["caption"])
        rivals = one_off(true)
        captions = [sample["caption"], *(a.caption() for a in rivals)]
        video = torch.from_numpy(chooser.videos(np.stack(evenly(list(sample["video"]), chooser.frames))))
        with torch.no_grad():
            v, t, scale = chooser.model(video[None], embedded(captions)[None])
            best = int(logits(chooser.model, v, t, scale, chooser.saved.head)[0].argmax())
        right += best == 0
        if best:
            other = rivals[best - 1]
            wrong.update(name for name in vars(true) if getattr(other, name) != getattr(true, name))
    n = len(reader.keys)
    low, high = wilson(right / n, n)
    said = ", ".join(f"{name} {count}" for name, count in wrong.most_common()) or "none"
    return f"R@1 of {len(captions)}: {right / n:.4f} [{low:.4f}, {high:.4f}] of {n} clips; wrong: {said}"


# ---------------------------------------------------------------- real clips


def folds(sources: list[str]) -> np.ndarray:
    """Which fold each clip is in: sources by the order of their hashes, dealt in turn."""
    order = sorted(set(sources), key=lambda s: hashlib.sha256(s.encode()).digest())
    fold = {source: i % FOLDS for i, source in enumerate(order)}
    return np.array([fold[s] for s in sources])


def panda(run: str) -> str:
    shards = f"{run}/shards"
    table = read_index(shards, ["clip_id", "source"])
    names = [Path(source).stem.rsplit(".", 1)[0] for source in table["source"].to_pylist()]  # of a video
    fold = folds(names)
    SPLIT.write_text(json.dumps(dict(sorted(zip(names, fold.tolist(), strict=True))), indent=1) + "\n")
    place = {clip: i for i, clip in enumerate(table["clip_id"].to_pylist())}
    rows, n = [], len(names)
    base: np.ndarray | None = None
    kept: dict[str, Path] = {}  # features of each kind, made once
    with tempfile.TemporaryDirectory() as temporary:
        for name, settings in SETTINGS.items():
            recipe = load_training("selector", [*FIXED, *settings])
            start, scores = resource.getrusage(resource.RUSAGE_SELF).ru_utime, np.full((n, n), np.nan)
            plain = scores.copy()
            for number in range(FOLDS):
                out = Path(temporary) / f"{len(rows)}-{number}"
                what = str(recipe.features)
                if what in kept:
                    shutil.copytree(kept[what], out / "features")
                rows_of = partial(np.flatnonzero, fold == number)
                train(
                    recipe, run, out, device="cpu", build=partial(build, held=lambda *_, rows=rows_of: rows())
                )
                kept[what] = out / "features"
                keys, found, fit = asked(out)
                at = np.array([place[key] for key in keys])
                mine = fold[at] == number
                scores[np.ix_(at[mine], at)], plain[np.ix_(at[mine], at)] = found[mine], fit[mine]
            spent = (resource.getrusage(resource.RUSAGE_SELF).ru_utime - start) / 60
            if base is None:
                base = plain
                rows.append(["`visual_fit`, not trained", *figures(base, base, fold), ""])
            rows.append([name, *figures(scores, base, fold), f"{spent:.1f}"])
    head = ["", "AUC", "above", "R@1", "above", "R@5", "CPU-minutes, all folds"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def asked(out: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Clips, and what the selector and `visual_fit` say of all of them and all chosen captions, [n, n]."""
    (kept,) = (out / "features").glob("*.pt")
    told = torch.load(kept, weights_only=True)
    saved = Saved.read(out / FILE)
    number = {text: i for i, text in enumerate(told["words"])}
    texts = told["embedded"][[number[said[0][0]] for said in json.loads(told["said"])]]
    video = told["video"]
    with torch.no_grad():
        v, t, scale = saved.selector()(video, texts)
        found = logits(saved.selector(), v, t[None].expand(len(v), -1, -1), scale, saved.head)
    return told["keys"], found.numpy(), fits(video[:, :384].numpy(), texts.numpy())


def figures(scores: np.ndarray, base: np.ndarray, fold: np.ndarray) -> list[str]:
    """AUC, R@1 and R@5 within each fold, and how far they are above the base's; mean over clips."""

    def each(s: np.ndarray) -> np.ndarray:
        """Of each clip: how often its own caption beats another of its fold (ties half), and whether it is first, among
        the first five; [n, 3]."""
        rows = []
        for i in range(len(s)):
            others = s[i, (fold == fold[i]) & (np.arange(len(s)) != i)]
            above = (others >= s[i, i]).sum()
            rows.append([(others < s[i, i]).mean() + (others == s[i, i]).mean() / 2, above < 1, above < 5])
        return np.array(rows, float)

    mine, theirs = each(scores), each(base)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(mine), len(mine)) for _ in range(2000)]

    def told(x: np.ndarray) -> str:
        low, high = np.quantile([x[d].mean() for d in draws], [0.025, 0.975])
        return f"{x.mean():.3f} [{low:.3f}, {high:.3f}]"

    better = mine - theirs
    return [told(mine[:, 0]), told(better[:, 0]), told(mine[:, 1]), told(better[:, 1]), told(mine[:, 2])]


if __name__ == "__main__":
    main()
