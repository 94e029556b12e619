"""Memory of attention by context length: the formula, torch's kernel under a mask, in blocks, and in rings.

    .venv/bin/python -m bench.ring [--lengths 2048 4096 8192 16384 32768 65536] [--out bench/results/ring.md]

Forward and backward of one attention over a causal sequence of packed documents (three eighths, one eighth and a half
of it), 4 heads of 64, float32, one CPU thread a process, gloo between ranks. Every cell is made in fresh processes.
The peak is the kernel's (VmHWM, set back before), the most of the ranks. `attention alone`: how far it lay above the
resident memory with q, k, v and the output's gradient there. `all of it`: above that without them, so that what a
rank's share of the sequence takes is in it. Both have forward and backward, the gradients of q, k, v included.
Dense ways are left out where their scores, or a mask of as many floats, would take more than `--most` MiB. The power
is that of the context which memory grows with, between the two longest: 1 is linear, 2 the square.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.attention import Kernel, Mask, attend
from models.ring_attention import Placement, Ring

HEADS, WIDTH = 4, 64
WAYS: dict[str, tuple[Kernel, int, Placement]] = {  # kernel without a ring, ranks, placement
    "formula": ("plain", 0, "contiguous"),
    "sdpa, dense mask": ("sdpa", 0, "contiguous"),
    "blocks of 512": ("auto", 1, "contiguous"),
    "ring of 2, contiguous": ("auto", 2, "contiguous"),
    "ring of 2, zigzag": ("auto", 2, "zigzag"),
    "ring of 4, contiguous": ("auto", 4, "contiguous"),
    "ring of 4, zigzag": ("auto", 4, "zigzag"),
}


def resident() -> float:
    """MiB of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak() -> float:
    """MiB that were resident at most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(way: str, length: int, rank: int, meeting: str, results: Any) -> None:
    """Puts (MiB of attention alone, MiB of all, CPU seconds) of this rank."""
    torch.set_num_threads(1)
    kernel, ranks, placement = WAYS[way]
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        ring = Ring.of(dist.group.WORLD, placement)  # type: ignore[arg-type]
        ring.join(torch.zeros(2))  # connections are there
    else:
        ring = Ring()

    def step(length: int) -> Callable[[], None]:
        lengths = [3 * length // 8, length // 8, length // 2]
        mask = Mask.documents(lengths).in_order(length)
        mask = ring.mask(mask, length) if ranks else mask
        places = length // max(ranks, 1)
        q, k, v = (torch.randn(1, HEADS, places, WIDTH, requires_grad=True) for _ in range(3))
        gradient = torch.randn(1, HEADS, places, WIDTH)
        return lambda: attend(q, k, v, mask, kernel=kernel).backward(gradient)

    step(64)()  # what is loaded and kept at the first time
    nothing = resident()
    work = step(length)
    before, begin = resident(), time.process_time()
    forget_peak()
    work()
    results.put((peak() - before, peak() - nothing, time.process_time() - begin))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def cell(way: str, length: int) -> tuple[float, float, float]:
    """Of the ranks the most MiB of attention alone and of all, and all their CPU seconds."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Any = spawn.Queue()
        ranks = range(max(WAYS[way][1], 1))
        told = [(way, length, rank, f"{folder}/meeting", results) for rank in ranks]
        processes = [spawn.Process(target=measure, args=args) for args in told]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{way}, {length} places: a rank failed")
        found = [results.get() for _ in processes]
    alone, every, seconds = zip(*found, strict=True)
    return max(alone), max(every), sum(seconds)


def power(values: list[float | None], lengths: list[int]) -> str:
    """Of the context, between the two longest that were measured; – where there are not two."""
    there = [(n, x) for n, x in zip(lengths, values, strict=True) if x]
    if len(there) < 2:
        return "–"
    (a, x), (b, y) = there[-2:]
    return f"{math.log(y / x) / math.log(b / a):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--most", type=int, default=1500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    titles = ("MiB a rank, attention alone", "MiB a rank, all of it", "CPU s, all ranks")
    found: dict[str, list[tuple[float, float, float] | None]] = {}
    for way, (kernel, _, _) in WAYS.items():
        found[way] = []
        for length in args.lengths:
            scores = (HEADS if kernel == "plain" else 1) * length**2 * 4 / 2**20
            found[way].append(None if kernel != "auto" and scores > args.most else cell(way, length))
            print(way, length, found[way][-1], flush=True)
    tables = []
    for i, title in enumerate(titles):
        lines = [f"| {title} | " + " | ".join(f"{n:,}" for n in args.lengths) + " | power |"]
        lines.append("|---|" + "---|" * (len(args.lengths) + 1))
        for way, cells in found.items():
            values = [None if c is None else c[i] for c in cells]
            shown = ["–" if x is None else f"{x:,.0f}" if i < 2 else f"{x:.1f}" for x in values]
            lines.append(f"| {way} | " + " | ".join([*shown, power(values, args.lengths)]) + " |")
        tables.append("\n".join(lines))
    said = "\n\n".join(tables)
    print(f"\n{said}")
    if args.out:
        doc = (__doc__ or "").split("\n\n", 2)[2].strip()
        command = "`.venv/bin/python -m bench.ring`"
        args.out.write_text(
            f"# Memory of attention by context length\n\n{command}, torch {torch.__version__}\n\n{doc}\n\n{said}\n"
        )


if __name__ == "__main__":
    main()
