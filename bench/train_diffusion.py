"""Step time and memory of training, against the same models in diffusers, in one run.

    .venv/bin/python -m bench.train_diffusion [--device cuda] [--rounds 5] [--out bench/results/train_diffusion.md]

Pairs of the same shape, the same parameters and the same work: a step is forward, backward and AdamW on random
latents with a mean-squared loss. Both sides take turns, each round in a process of its own, so that neither's
memory or warm caches help the other. On CUDA both compute in bf16 by autocast, and a third column compiles ours
block by block, as `compute.compile` does; MFU is 3 × the multiply–adds of the forward pass × 2 ÷ (time × peak).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Step = Callable[[], Tensor]
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense FLOP/s


def image_ours(size: str, batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from models.condition import Condition
    from models.dit import PRESETS, build

    model = build(4, **PRESETS[f"{size}/2"], classes=1000, learn_sigma=True)
    z, level = torch.randn(batch, 4, 1, 32, 32), torch.rand(batch)
    label = torch.randint(0, 1000, (batch,))
    return model, lambda m: m(z.to(DEVICE), level.to(DEVICE), Condition(), label.to(DEVICE))


def image_diffusers(size: str, batch: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from diffusers import DiTTransformer2DModel

    from models.dit import SIZES

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
    from models.condition import Condition
    from models.dit import PRESETS, build

    model = build(4, **PRESETS[f"Latte-{size}/2"])
    z, level = torch.randn(batch, 4, frames, 32, 32), torch.rand(batch)
    return model, lambda m: m(z.to(DEVICE), level.to(DEVICE), Condition())


def video_diffusers(
    size: str, batch: int, frames: int = 16
) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    from diffusers import LatteTransformer3DModel

    from models.dit import SIZES

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
DEVICE = "cpu"


def run(make: Callable, size: str, batch: int, steps: int, compiled: bool) -> dict[str, float]:
    """Seconds a step (median, after warm-up), peak memory, parameters and multiply–adds, in this process."""
    torch.manual_seed(0)
    model, forward = make(size, batch)
    model = model.to(DEVICE).train()
    cuda = DEVICE == "cuda"
    if compiled:
        for block in model.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=cuda)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            loss = forward(model).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    times = []
    for i in range(steps + 3):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    found = {
        "seconds": statistics.median(times),
        "memory_mb": torch.cuda.max_memory_allocated() / 1e6
        if cuda
        else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward(model)
    return found | {"forward_flops": counter.get_total_flops()}


def alone(pair: str, side: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.train_diffusion", "--one", pair, side]
    for name in ("device", "size", "batch", "steps"):
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
    parser.add_argument("--size", default="S", help="of DiT: S, B, L or XL (default: S)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("PAIR", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    DEVICE = args.device
    if args.one:
        pair, side = args.one
        make = PAIRS[pair][1 if side == "diffusers" else 0]
        print(json.dumps(run(make, args.size, args.batch, args.steps, side == "compiled")))
        return 0
    lines = [
        "| model | side | parameters | s a step | ÷ ours | memory MB |"
        + (" MFU |" if DEVICE == "cuda" else "")
    ]
    lines.append("|" + "---|" * (7 if DEVICE == "cuda" else 6))
    sides = ["clipmill", "diffusers"] + (["compiled"] if DEVICE == "cuda" else [])
    for pair in PAIRS:
        rounds: dict[str, list[dict[str, float]]] = {s: [] for s in sides}
        for _ in range(args.rounds):
            for side in sides:
                rounds[side].append(alone(pair, side, args))
                print(pair, side, rounds[side][-1], file=sys.stderr, flush=True)
        ours = statistics.median(r["seconds"] for r in rounds["clipmill"])
        for side, found in rounds.items():
            seconds = statistics.median(r["seconds"] for r in found)
            memory = statistics.median(r["memory_mb"] for r in found)
            line = f"| {pair.format(size=args.size)}, batch {args.batch} | {side} | {found[0]['parameters']:,.0f} "
            line += f"| {seconds:.3f} | {seconds / ours:.2f} | {memory:,.0f} |"
            if DEVICE == "cuda":
                name = torch.cuda.get_device_name()
                peak = next((p for key, p in PEAK_BF16.items() if key in name), None)
                flops = 3 * found[0]["forward_flops"]
                line += f" {flops / seconds / peak:.1%} |" if peak else " – |"
            lines.append(line)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
