"""What it costs to change a threshold on a finished run, against copying the kept bytes.

    python -m bench.decide_later [--gb 2] [--clip-mb 2] [--repeats 3] [--dir FOLDER]

Makes a run folder of that size (clips of random bytes: nothing is decoded), then takes turns: `clipmill shard`
with another threshold, as a process of its own, and a process that copies the staging tars (shutil.copyfile
and fsync of each, which is how shards are made durable, too), scaled to the bytes that were kept. The old
shards and the old copy both stay until the new ones are written; deleting them is timed for both. Taken
twice: read from the disk, and with everything in the page cache, where only work is left to wait for. CPU is
user + system of the whole process, start of Python included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from pipeline.recipe import parse
from pipeline.record import Caption, Clip, Source, Video, clip_id
from tests.fixtures.run_folder import RECIPE, write_run_json, write_unit

COPY = """
import os, shutil, sys
from pathlib import Path

source, new, old = map(Path, sys.argv[1:])
new.mkdir()
for tar in source.rglob("*.tar"):
    to = new / tar.name
    shutil.copyfile(tar, to)
    with open(to, "rb+") as f:
        os.fsync(f.fileno())
if old.exists():
    shutil.rmtree(old)
new.rename(old)
"""

UNITS = 16


def make_run(root: Path, size: float, clip_bytes: float) -> int:
    """A finished run of `size` bytes of clips; returns how many."""
    rng = np.random.default_rng(0)
    per_unit = max(1, round(size / clip_bytes / UNITS))
    for u in range(UNITS):
        name = f"video {u}.mp4"
        video = Video(Source(f"/videos/{name}", name), "", f"{u:064x}", "h264", 1280, 720, 24.0, 3600.0)
        video.time_base = Fraction(1, 24)
        media = {}
        for c in range(per_unit):
            start, length = c * 400, int(rng.integers(48, 360))
            begin, end = Fraction(start, 24), Fraction(start + length, 24)
            vector = rng.normal(size=1280).astype(np.float32)
            clip = Clip(
                clip_id(video.sha256, name, begin, end),
                start,
                start + length,
                float(begin),
                float(end),
                {n: float(rng.uniform(0.1, 0.4)) for n in ("motion", "sharpness", "text_area", "watermark")},
                [
                    Caption(
                        m, "a sentence about what is seen " * 3, scores={"consensus": float(rng.uniform())}
                    )
                    for m in ("first", "second", "third")
                ],
                {"efficientnet_lite0": vector / np.linalg.norm(vector)},
            )
            media[clip.clip_id] = rng.bytes(int(rng.uniform(0.5, 1.5) * clip_bytes))
            video.clips.append(clip)
        write_unit(root, f"{u:06d}", [video], media)
    write_run_json(root, parse(dict(RECIPE), [], "bench"))
    return per_unit * UNITS


def timed(command: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of a process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, used.ru_utime + used.ru_stime


def chill(run: Path) -> None:
    """Take the staging tars out of the page cache."""
    for tar in (run / "media").iterdir():
        with open(tar, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(run: Path) -> None:
    """Bring the staging tars into the page cache."""
    for tar in (run / "media").iterdir():
        with open(tar, "rb", buffering=0) as f:
            while f.read(8 << 20):
                pass


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*.tar"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="all clips together (default: 2)")
    parser.add_argument(
        "--clip-mb", type=float, default=2.0, help="mean clip: 5 s of 720p at CRF 18 (default: 2)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", help="where to make the run folder (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        run, new, old = (Path(folder) / name for name in ("run", "new", "old"))
        clips = make_run(run, args.gb * 1e9, args.clip_mb * 1e6)
        shard = [sys.executable, "-m", "jobs.cli", "shard", str(run)]
        copy = [sys.executable, "-c", COPY, str(run / "media"), str(new), str(old)]
        timed(shard)
        timed(copy)  # the first of both has nothing to delete
        kept = size_of(run / "shards")
        print(f"{clips:,} clips; kept {kept / 1e9:.2f} GB; medians of {args.repeats}")
        print(f"{'':32} {'wall s':>8} {'CPU s':>8}")
        limit = 2.0
        for name, prepare in {"from the disk": chill, "from the page cache": warm}.items():
            rows = []
            for _ in range(args.repeats):
                limit += 0.125
                prepare(run)
                sharding = timed([*shard, "--set", f"decide.rules.too_short.min={limit}"])
                prepare(run)
                copying = timed(copy)
                share = size_of(run / "shards") / size_of(old)
                rows.append((*sharding, *(share * x for x in copying)))
            wall, cpu, copy_wall, copy_cpu = (statistics.median(c) for c in zip(*rows, strict=True))
            print(f"{name + ': copy':32} {copy_wall:8.2f} {copy_cpu:8.2f}")
            print(f"{name + ': clipmill shard':32} {wall:8.2f} {cpu:8.2f}")
            print(f"{'ratio':32} {wall / copy_wall:8.2f} {cpu / copy_cpu:8.2f}", flush=True)
        again = timed(shard)
        print(f"{'nothing changed: clipmill shard':32} {again[0]:8.2f} {again[1]:8.2f}")


if __name__ == "__main__":
    main()
