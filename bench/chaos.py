"""Kill a run at random moments, resume it, and compare with one that was left alone.

    .venv/bin/python bench/chaos.py SOURCE… [--kills 20] [--seed 0] [--recipe embedded] [--set …]

Every kill is a SIGKILL, at a seeded random moment, of the driver, of one worker process (a Ray worker,
an ffmpeg or a decoder), or of the driver and everything below it. After each kill every published
parquet and tar must be whole. A disturbed folder that reaches its end is compared with the undisturbed
one: sources, clips, scores, captions, embeddings, decisions and the bytes of every shard.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TIMED = {"seconds", "error_at"}  # the columns that may differ between two runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="+")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", default="embedded")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="clipmill-chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jobs.curate", *args.source, "--recipe", args.recipe]
    command += [part for s in args.set for part in ("--set", s)]

    calm = work / "calm"
    start = time.monotonic()
    with open(work / "calm.log", "wb") as log:
        subprocess.run([*command, "--out", str(calm)], check=True, stdout=log, stderr=log)
    length = time.monotonic() - start
    print(f"undisturbed run: {length:.0f} s, {rows(calm, 'clips')} clips", flush=True)

    rng = random.Random(args.seed)
    kills = folder = 0
    hit: dict[str, int] = {}
    while kills < args.kills:
        out = work / f"disturbed-{folder}"
        folder += 1
        while True:
            if kills < args.kills:
                moment, target = rng.uniform(0.05, 0.95) * length, rng.choice(["driver", "worker", "both"])
            else:
                moment, target = float("inf"), "none"
            killed, code = run_and_kill(
                [*command, "--out", str(out)], moment, target, rng, work / f"{out.name}.log"
            )
            if killed:
                kills += 1
                hit[target] = hit.get(target, 0) + 1
                check_whole(out)
                done = rows(out, "videos")
                print(
                    f"kill {kills:2} of {target:6} at {moment:5.1f} s: {done} sources committed", flush=True
                )
            if code == 0:
                break
            if not killed:
                raise SystemExit(f"a run failed by itself (exit {code}); see {out}.log")
        compare(calm, out)
        print(f"{out.name}: equal to the undisturbed run", flush=True)
    left = partial_files(work)
    print(
        f"{kills} kills ({', '.join(f'{n} {t}' for t, n in sorted(hit.items()))}) over {folder} runs: all equal"
    )
    print(f"partial files left under finished runs: {len(left)}")
    if not args.work:
        shutil.rmtree(work)
    return 1 if left else 0


def run_and_kill(
    command: list[str], moment: float, target: str, rng: random.Random, log: Path
) -> tuple[bool, int]:
    """Start the command, kill `target` after `moment` seconds; (was killed, exit code; −9 = the driver was)."""
    with open(log, "ab") as f:
        driver = subprocess.Popen(command, stdout=f, stderr=f)
    try:
        driver.wait(None if moment == float("inf") else moment)
        return False, driver.returncode
    except subprocess.TimeoutExpired:
        pass
    below = descendants(driver.pid)
    workers = [p for p in below if is_worker(p)]
    if target == "worker":
        if not workers:
            target = "driver"
        else:
            kill(rng.choice(workers))
            return True, driver.wait(1800)
    for pid in [driver.pid, *(below if target == "both" else [])]:
        kill(pid)
    return True, driver.wait()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself in between
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, read from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def is_worker(pid: int) -> bool:
    """A Ray worker with an actor or task in it, an ffmpeg, or a decoding child."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return (
        (line.startswith(b"ray::") and b"IDLE" not in line)
        or b"ffmpeg" in line
        or b"pipeline.io.isolate" in line
    )


def check_whole(out: Path) -> None:
    """Whatever carries a final name can be read to its end."""
    for path in out.rglob("*.parquet"):
        if not path.name.startswith("."):
            pq.read_table(path)
    for path in out.rglob("*.tar"):
        if not path.name.startswith(".") and "partial" not in str(path.relative_to(out)):
            with tarfile.open(path) as tar:
                for member in tar:
                    if len(tar.extractfile(member).read()) != member.size:  # type: ignore[union-attr]
                        raise SystemExit(f"{path}: {member.name} is cut short")
            if path.stat().st_size % 512 or path.read_bytes()[-1024:] != bytes(1024):
                raise SystemExit(f"{path}: no end-of-archive mark")


def table(out: Path, folder: str) -> pa.Table:
    files = sorted((out / folder).glob("*.parquet")) if (out / folder).is_dir() else []
    tables = [pq.read_table(f) for f in files]
    return pa.concat_tables(tables) if tables else pa.table({})


def rows(out: Path, folder: str) -> int:
    return table(out, folder).num_rows


def compare(calm: Path, out: Path) -> None:
    """Raise SystemExit at the first difference."""
    for folder, key in (("videos", "source"), ("clips", "clip_id")):
        a, b = (table(d, folder).sort_by(key) for d in (calm, out))
        if a.column_names != b.column_names:
            raise SystemExit(f"{out}/{folder}: other columns")
        for name in a.column_names:
            if name not in TIMED and a[name].to_pylist() != b[name].to_pylist():
                raise SystemExit(f"{out}/{folder}: column {name} differs")
    a, b = (pq.read_table(d / "decisions.parquet") for d in (calm, out))
    if not a.equals(b):
        raise SystemExit(f"{out}: decisions differ")
    a, b = ({str(p.relative_to(d)): sha256(p) for p in (d / "shards").rglob("*.tar")} for d in (calm, out))
    if a != b:
        raise SystemExit(f"{out}: shards differ")


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def partial_files(work: Path) -> list[Path]:
    return [p for d in work.iterdir() if d.is_dir() for p in d.rglob("*") if "partial" in p.name]


if __name__ == "__main__":
    raise SystemExit(main())
