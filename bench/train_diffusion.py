"""Step time and memory of training, against the same models in diffusers, in one run.

    .venv/bin/python -m bench.train_diffusion --equal [--precision fp32] [--rounds 15]
    .venv/bin/python -m bench.train_diffusion [--device cuda] [--precision fp32] [--rounds 5]

Pairs of the same shape and the same work: a step is forward, backward and AdamW on random latents with a
mean-squared loss, in bf16 by autocast unless told.

--equal: both sides with the same settings (fused AdamW, kept memory, threads, precision), step about in one process,
a round being a step of each, the first by turns. Of the ratios of the rounds the median and its 95 % interval, by
bootstrap; once of seconds that passed and once of seconds of the processor, which other work on the machine does not
lengthen.

Otherwise each side steps as its trainer does: ours with fused AdamW and,
on a CPU, with memory that is kept from step to step; diffusers' training examples with torch's defaults. Of the
step, what AdamW takes is said; `plain` is ours with torch's defaults too, so the model alone. `compiled` is ours
compiled block by block, as `compute.compile` does. The sides take turns, each round in a process of its own, so
that neither's memory or warm caches help another. MFU is 3 × the operations of the forward pass ÷ (time × peak).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jobs.training.distributed import keep_freed_memory
from jobs.training.parallelize import compile_blocks

WARM = 3  # steps before the first that is timed
SIDES = ("clipmill", "compiled", "plain", "diffusers")
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense FLOP/s


def image_ours(size: str, batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from models.denoisers.dit import PRESETS, build
    from models.diffusion.condition import Condition

    model = build(4, **PRESETS[f"{size}/2"], classes=1000, learn_sigma=True)
    z, level = torch.randn(batch, 4, 1, 32, 32), torch.rand(batch)
    label = torch.randint(0, 1000, (batch,))
    return model, lambda m: m(z.to(DEVICE), level.to(DEVICE), Condition(), label.to(DEVICE))


def image_diffusers(size: str, batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from diffusers import DiTTransformer2DModel

    from models.denoisers.dit import SIZES

    s = SIZES[size]
    model = DiTTransformer2DModel(
        num_attention_heads=s["heads"],
        attention_head_dim=s["dim"] // s["heads"],
        in_channels=4,
        out_channels=8,
        num_layers=s["depth"],
        sample_size=32,
        patch_size=2,
    )
    z, t, label = torch.randn(batch, 4, 32, 32), torch.rand(batch) * 1000, torch.randint(0, 1000, (batch,))
    return model, lambda m: m(z.to(DEVICE), t.to(DEVICE), label.to(DEVICE)).sample


def video_ours(size: str, batch: int, frames: int = 16) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from models.denoisers.dit import PRESETS, build
    from models.diffusion.condition import Condition

    model = build(4, **PRESETS[f"Latte-{size}/2"])
    z, level = torch.randn(batch, 4, frames, 32, 32), torch.rand(batch)
    return model, lambda m: m(z.to(DEVICE), level.to(DEVICE), Condition())


def video_diffusers(
    size: str, batch: int, frames: int = 16
) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from diffusers import LatteTransformer3DModel

    from models.denoisers.dit import SIZES

    s = SIZES[size]
    model = LatteTransformer3DModel(  # its layers are pairs, spatial and temporal
        num_attention_heads=s["heads"],
        attention_head_dim=s["dim"] // s["heads"],
        in_channels=4,
        out_channels=4,
        num_layers=s["depth"] // 2,
        sample_size=32,
        patch_size=2,
        video_length=frames,
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=8,  # asked for: one token of 8, projected and used by no block
    )
    z, t = torch.randn(batch, 4, frames, 32, 32), torch.rand(batch) * 1000
    caption = torch.zeros(batch, 1, 8)
    return model, lambda m: m(z.to(DEVICE), t.to(DEVICE), caption.to(DEVICE)).sample


PAIRS = {
    "image DiT-{size}/2, 256 px": (image_ours, image_diffusers),
    "Latte-{size}/2, 16 frames of 256 px": (video_ours, video_diffusers),
}
DEFAULT_SIZE = dict(zip(PAIRS, ("S", "XS"), strict=True))
DEVICE = "cpu"


def run(pair: str, side: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds a step and of AdamW (medians, after warm-up), peak memory, parameters, operations; in this process."""
    make = PAIRS[pair][side.startswith("diffusers")]
    as_trained = side not in ("plain", "diffusers")
    if as_trained and DEVICE == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    model, forward = make(size_of(pair, args), args.batch)
    model = model.to(DEVICE).train()
    cuda = DEVICE == "cuda"
    uncompiled: list[str] = []
    if side == "compiled":
        compile_blocks(model.blocks, uncompiled)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True if as_trained else None)
    before = most_memory()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    times, updates = [], []
    for i in range(args.steps + WARM):
        start = now()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = forward(model).float().square().mean()
        loss.backward()
        derived = now()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if i >= WARM:
            updates.append(now() - derived)
            times.append(now() - start)
    found = {
        "seconds": statistics.median(times),
        "adamw": statistics.median(updates),
        "memory_mb": torch.cuda.max_memory_allocated() / 1e6 if cuda else most_memory() - before,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward(model)
    return found | {"forward_flops": counter.get_total_flops()}


class Round(NamedTuple):
    """Seconds of a step of each side, that passed and of the processor."""

    ours: float
    theirs: float
    ours_cpu: float
    theirs_cpu: float


def paired(pair: str, args: argparse.Namespace) -> list[Round]:
    """Rounds of a step of each side at equal settings, in this process."""
    if DEVICE == "cpu":
        keep_freed_memory()
    steps = []
    for make in PAIRS[pair]:
        torch.manual_seed(0)
        model, forward = make(size_of(pair, args), args.batch)
        model = model.to(DEVICE).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        steps.append(partial(step, model, forward, optimizer, args.precision))
    rounds = []
    for i in range(args.rounds + WARM):
        seconds, cpu = [0.0, 0.0], [0.0, 0.0]
        for side in (i % 2, 1 - i % 2):
            start, start_cpu = time.perf_counter(), time.process_time()
            steps[side]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            seconds[side], cpu[side] = time.perf_counter() - start, time.process_time() - start_cpu
        if i >= WARM:
            rounds.append(Round(*seconds, *cpu))
    return rounds


def step(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor],
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> None:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
        loss = forward(model).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def interval(ratios: Sequence[float]) -> str:
    """The median, and where 95 % of the medians of so many drawn with replacement lie."""
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return f"{np.median(ratios):.2f} ({low:.2f}…{high:.2f})"


def equal(args: argparse.Namespace) -> str:
    """The table of `--equal`."""
    lines = [
        "| model | clipmill, s a step | diffusers | diffusers ÷ clipmill | of processor seconds | memory MB, clipmill "
        "and diffusers |",
        "|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        rounds = paired(pair, args)
        memory = [alone(pair, side, args)["memory_mb"] for side in ("clipmill", "diffusers as clipmill")]
        name = f"{pair.format(size=size_of(pair, args))}, batch {args.batch}, {args.precision}"
        cells = [
            name,
            f"{statistics.median(r.ours for r in rounds):.3f}",
            f"{statistics.median(r.theirs for r in rounds):.3f}",
            interval([r.theirs / r.ours for r in rounds]),
            interval([r.theirs_cpu / r.ours_cpu for r in rounds]),
            " and ".join(f"{x:,.0f}" for x in memory),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    loads = " ".join(f"{x:.1f}" for x in os.getloadavg())
    return (
        "\n".join([*lines, "", f"{args.rounds} rounds, {torch.get_num_threads()} threads, load {loads}"])
        + "\n"
    )


def size_of(pair: str, args: argparse.Namespace) -> str:
    return args.size or DEFAULT_SIZE[pair]


def most_memory() -> float:
    """MB that this process has had at most; `getrusage` would count what its parent had before it was started."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def mfu(found: dict[str, float]) -> str:
    """Of the device's dense bf16 peak; – where that is not known, as on a CPU."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    peak = next((p for key, p in PEAK_BF16.items() if key in name), None)
    return f"{3 * found['forward_flops'] / found['seconds'] / peak:.1%}" if peak else "–"


def alone(pair: str, side: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.train_diffusion", "--one", pair, side]
    command += ["--size", size_of(pair, args)]
    for name in ("device", "batch", "steps", "precision"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{pair}, {side} failed: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--equal", action="store_true", help="the same settings on both sides, in pairs")
    parser.add_argument("--size", help="of DiT: XS, S, B, L or XL (default: image S, Latte XS)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("PAIR", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    DEVICE = args.device
    if args.one:
        print(json.dumps(run(*args.one, args)))
        return 0
    if args.equal:
        text = equal(args)
        print(text)
        if args.out:
            args.out.write_text(text)
        return 0
    lines = [
        "| model | side | parameters | s a step | of it AdamW | ÷ clipmill | memory MB | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        rounds: dict[str, list[dict[str, float]]] = {s: [] for s in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                rounds[side].append(alone(pair, side, args))
                print(pair, side, rounds[side][-1], file=sys.stderr, flush=True)
        for side, found in rounds.items():
            m = {key: statistics.median(r[key] for r in found) for key in found[0]}
            ratios = [r["seconds"] / o["seconds"] for r, o in zip(found, rounds["clipmill"], strict=True)]
            lines.append(
                f"| {pair.format(size=size_of(pair, args))}, batch {args.batch}, {args.precision} | {side} "
                f"| {m['parameters']:,.0f} | {m['seconds']:.3f} | {m['adamw']:.3f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}…{max(ratios):.2f}) "
                f"| {m['memory_mb']:,.0f} | {mfu(m)} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
