"""What it costs to change a threshold on a finished run, against copying the kept bytes.

    python -m bench.decide_later [--gb 2] [--clip-mb 2] [--repeats 3] [--dir FOLDER]

Makes a run folder of that size (clips of random bytes: nothing is decoded), then takes turns: `clipmill shard`
with another threshold, as a process of its own, and a process that copies the staging tars (shutil.copyfile
and fsync of each, which is how shards are made durable, too), scaled to the bytes that were kept. Both read
from the disk, not from memory. CPU is user + system of the whole process, start of Python included.
"""

from __future__ import annotations

import argparse
import os
import shutil
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

source, target = map(Path, sys.argv[1:])
for tar in source.rglob("*.tar"):
    to = target / tar.name
    shutil.copyfile(tar, to)
    with open(to, "rb+") as f:
        os.fsync(f.fileno())
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
    """Both start from the disk: take the staging tars out of the page cache."""
    for tar in (run / "media").iterdir():
        with open(tar, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0, help="all clips together (default: 2)")
    parser.add_argument(
        "--clip-mb", type=float, default=2.0, help="mean clip: 5 s of 720p at CRF 18 (default: 2)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", help="where to make the run folder (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        run, copy = Path(folder) / "run", Path(folder) / "copy"
        clips = make_run(run, args.gb * 1e9, args.clip_mb * 1e6)
        command = [sys.executable, "-m", "jobs.shard", str(run)]
        rows = []
        for r in range(args.repeats):
            chill(run)
            sharding = timed([*command, "--set", f"decide.rules.too_short.min={2 + 0.25 * (r + 1)}"])
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            chill(run)
            copying = timed([sys.executable, "-c", COPY, str(run / "media"), str(copy)])
            kept = sum(p.stat().st_size for p in (run / "shards").rglob("*.tar"))
            share = kept / sum(p.stat().st_size for p in copy.iterdir())
            rows.append((*sharding, *(share * x for x in copying)))
        again = timed([*command])
        wall, cpu, copy_wall, copy_cpu = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{clips:,} clips; kept {kept / 1e9:.2f} GB; medians of {args.repeats}")
        print(f"{'':24} {'wall s':>8} {'CPU s':>8}")
        print(f"{'copy the kept bytes':24} {copy_wall:8.2f} {copy_cpu:8.2f}")
        print(f"{'clipmill shard':24} {wall:8.2f} {cpu:8.2f}")
        print(f"{'ratio':24} {wall / copy_wall:8.2f} {cpu / copy_cpu:8.2f}")
        print(f"{'… nothing changed':24} {again[0]:8.2f} {again[1]:8.2f}")


if __name__ == "__main__":
    main()
