"""Host memory of each rank while an FSDP training is set up, and how long that takes.

    .venv/bin/python -m bench.sharded [--width 1024] [--depth 12] [--out bench/results/sharded.md]

Two ranks on gloo make a DiT and shard it, then (as a run of its own) do what a resumed run does before it reads its
shards. `whole`: every rank makes all of it from the seed, as up to now. The peak is the most resident memory of the
process (VmHWM) less what it had before the network was made; the network and a shard are given beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from jobs.training.diffusion.task import blocks_of
from jobs.training.distributed import connect
from jobs.training.parallelize import made_on, make, parallelize
from jobs.training.recipe_core import Compute
from models.denoisers import dit

HOW = {
    "whole": "every rank makes all",
    "new": "new: the first makes it, the other gets its shards",
    "resumed": "resumed",
}


def memory(which: str) -> float:
    """MB of this process: VmRSS, now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))


def rank(number: int, port: int, how: str, width: int, depth: int, out: str) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    compute = Compute(parallel="fsdp")
    with connect("cpu") as world:
        place = world.device if how == "whole" else made_on(compute, world, how == "resumed")
        world.gather(None)
        before, start = memory("VmRSS"), time.perf_counter()
        torch.manual_seed(0)
        model = make(partial(dit.build, 16, 768, dim=width, depth=depth, heads=width // 64, patch=2), place)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        parallelize(model, blocks_of(model), optimizer, compute, world, [])
        took = time.perf_counter() - start
        numel = sum(p.numel() for p in model.parameters())
        said = [world.rank, memory("VmHWM") - before, memory("VmRSS") - before, took, numel * 4 / 2**20]
    Path(out, f"{how}-{number}.json").write_text(json.dumps(said))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = ["| | rank | at most, MB | after, MB | seconds |", "|---|---|---|---|---|"]
    whole = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for how, told in HOW.items():
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            given = (port, how, args.width, args.depth, folder)
            spawn = multiprocessing.get_context("spawn")
            ranks = [spawn.Process(target=rank, args=(number, *given)) for number in range(2)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            for number in range(2):
                _, peak, after, took, whole = json.loads(Path(folder, f"{how}-{number}.json").read_text())
                rows.append(f"| {told} | {number} | {peak:,.0f} | {after:,.0f} | {took:.1f} |")
                print(rows[-1], flush=True)
    said = f"The network has {whole:,.0f} MB of weights, a shard {whole / 2:,.0f} MB."
    run = f"`.venv/bin/python -m bench.sharded --width {args.width} --depth {args.depth}`, torch {torch.__version__}"
    head = f"# Setting up FSDP\n\n{run}, two CPU cores that others used too\n"
    if args.out:
        args.out.write_text("\n".join([head, (__doc__ or "").split("\n\n", 2)[2], *rows, "", said]) + "\n")


if __name__ == "__main__":
    main()
