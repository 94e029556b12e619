"""Packed against bucketed micro-batches: tokens a second, and how long ranks wait for the fullest.

    .venv/bin/python -m bench.packing [--rounds 5] [--out bench/results/packing.md]

The buckets of recipe sora with sides a quarter as long, a budget of 2 clips of the longest, and so many clips of each
bucket as below. A step is forward, backward and AdamW of the Sora-like transformer of preset XS on random latents, on
one CPU thread. Each composition that the plan has ('2 of the first bucket and 3 of the third', or so many of one
bucket) is timed `rounds` times in turn, by CPU seconds, so that what else the machine does counts less; medians, each
weighed by how often an epoch has it. `padded`: the compositions of `packed`, every clip filled up to the longest of
its micro-batch. `dense`: packed, with one mask over the whole sequence in place of attention document by document.
`waiting`: of R ranks that take an epoch's micro-batches in a drawn order, the share of time that the mean rank waits
for the slowest of its step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jobs.training.data.packing import Run, pack
from models.attention import choose_kernel
from models.denoisers.sora import PRESETS, build
from models.diffusion.condition import Condition

CHANNELS, TEXT, WORDS = 16, 64, 12
LATENTS = [(1, 16, 16), (5, 8, 8), (9, 6, 10), (9, 10, 6), (17, 6, 10)]  # of 1, 17, 33, 33 and 65 frames
CLIPS = [700, 150, 200, 100, 250]
LENGTHS = [t * h * w for t, h, w in LATENTS]
BUDGET = 2 * max(LENGTHS)
SIDES = ("bucketed", "packed", "dense", "padded")
RANKS = 8


def bucketed() -> list[Run]:
    """As many clips of one bucket as the budget holds; the last of a bucket is filled up from its beginning."""
    runs = []
    for b, (clips, length) in enumerate(zip(CLIPS, LENGTHS, strict=True)):
        size = BUDGET // length
        runs.append(Run(tuple(size if i == b else 0 for i in range(len(LENGTHS))), -(-clips // size)))
    return runs


def batches(run: Run) -> tuple[list[Tensor], list[Tensor], list[Condition]]:
    z = [torch.randn(n, CHANNELS, *s) for n, s in zip(run.samples, LATENTS, strict=True) if n]
    level = [torch.rand(len(x)) for x in z]
    there = torch.arange(WORDS) < torch.randint(4, WORDS + 1, (sum(map(len, z)), 1))
    told = [Condition(text=torch.randn(len(x), WORDS, TEXT)) for x in z]
    masks = there.split([len(x) for x in z])
    return z, level, [Condition(text=c.text, text_mask=m) for c, m in zip(told, masks, strict=True)]


def padded(run: Run) -> tuple[list[Tensor], list[Tensor], list[Condition]]:
    """All clips in one batch of the longest shape."""
    longest = max((length, i) for i, length in enumerate(LENGTHS) if run.samples[i])[1]
    return batches(Run(tuple(sum(run.samples) * (i == longest) for i in range(len(LENGTHS))), 1))


def steps(model: torch.nn.Module, side: str, run: Run) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    z, level, told = padded(run) if side == "padded" else batches(run)

    def step() -> None:
        out = model.packed(z, level, told)  # type: ignore[operator]
        torch.stack(
            [(x - y).square().flatten(1).mean(1).sum() for x, y in zip(out, z, strict=True)]
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def waiting(runs: list[Run], seconds: list[float]) -> float:
    """Mean over many epochs' orders."""
    every = np.repeat(seconds, [run.repeats for run in runs])
    rng, lost = np.random.default_rng(0), []
    for _ in range(50):
        drawn = rng.permutation(every)[: len(every) // RANKS * RANKS].reshape(-1, RANKS)
        lost.append(1 - drawn.mean(1).sum() / drawn.max(1).sum())
    return float(np.mean(lost))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plans = {"bucketed": bucketed()} | dict.fromkeys(SIDES[1:], pack(CLIPS, LENGTHS, BUDGET))
    work: list[tuple[str, int, Callable[[], None]]] = []
    for side in SIDES:
        model = build(CHANNELS, TEXT, **PRESETS["XS"])
        choose_kernel(model, "sdpa" if side == "dense" else "auto")
        work += [(side, i, steps(model, side, run)) for i, run in enumerate(plans[side])]
    taken: dict[tuple[str, int], list[float]] = {(side, i): [] for side, i, _ in work}
    for _ in range(args.rounds + 1):  # the first warms up
        for side, i, step in work:
            begin = time.process_time()
            step()
            taken[side, i].append(time.process_time() - begin)
    rows = []
    clips_s = {}
    for side in SIDES:
        runs = plans[side]
        seconds = [statistics.median(taken[side, i][1:]) for i in range(len(runs))]
        epoch = sum(s * run.repeats for s, run in zip(seconds, runs, strict=True))
        micro = sum(run.repeats for run in runs)
        tokens = sum(run.repeats * np.dot(run.samples, LENGTHS) for run in runs)
        shown = sum(run.repeats * sum(run.samples) for run in runs)
        clips_s[side] = sum(CLIPS) / epoch
        wait = waiting(runs, seconds)
        rows.append(
            f"| {side} | {micro} | {tokens / (micro * BUDGET):.1%} | {shown - sum(CLIPS)} | {tokens / epoch:,.0f} "
            f"| {clips_s[side]:.2f} | {wait:.1%} | {clips_s[side] * (1 - wait):.2f} |"
        )
    table = [
        f"| | micro-batches an epoch | of {BUDGET:,} positions used | clips seen twice | positions a CPU second "
        f"| clips a CPU second | waiting of {RANKS} ranks | clips a second a rank |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    said = "\n".join(table)
    print(said)
    if args.out:
        doc = (__doc__ or "").split("\n\n", 2)[2].strip()
        command = f"`.venv/bin/python -m bench.packing --rounds {args.rounds}`"
        args.out.write_text(
            f"# Packed against bucketed\n\n{command}, torch {torch.__version__}\n\n{doc}\n\n{said}\n"
        )


if __name__ == "__main__":
    main()
