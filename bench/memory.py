"""How much memory an hour of video takes: the whole of `clipmill curate` on one source of 640 × 360 at 30 fps.

    python bench/memory.py                  # an hour, 10 to 20 minutes on 2 cores
    python bench/memory.py --minutes 10

The source is a minute of moving, noisy pictures with a cut every 20 s, encoded once and repeated by copying its
packets. While the local runner works, the proportional set sizes (PSS: shared pages are divided among their users)
of all its processes are summed ten times a second. Printed is the peak of the sum and what had it: the driver, the
process that runs the stages, the one that decodes, ffmpeg.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import imageio_ffmpeg

MINUTE = [
    f"testsrc2=s=640x360:r=30:d=20,hue=h={hue},noise=alls=14:allf=t" for hue in (0, 120, 240)
]  # samples of it are JPEGs of 29 kB; those of 15 videos of Panda-70M have 34 kB in the mean, 80 at most
SETTINGS = ["shots.detector=content", "cut.preset=ultrafast", "cut.crf=30", "scores.text.enabled=false"]
SETTINGS += ["decide.rules.text_heavy=null"]


def make(path: Path, minutes: int) -> None:
    """A video of so many minutes."""
    exe = imageio_ffmpeg.get_ffmpeg_exe()
    minute = path.with_name("minute.mp4")
    inputs = [a for source in MINUTE for a in ("-f", "lavfi", "-i", source)]
    joined = f"{''.join(f'[{n}]' for n in range(len(MINUTE)))}concat=n={len(MINUTE)}:v=1,format=yuv420p"
    coded = ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "32", "-g", "600"]
    subprocess.run([exe, "-v", "error", *inputs, "-filter_complex", joined, *coded, minute], check=True)
    again = ["-stream_loop", str(minutes - 1), "-i", minute, "-c", "copy"]
    subprocess.run([exe, "-v", "error", *again, path], check=True)


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    try:
        below = [int(c) for f in children for c in f.read_text().split()]
    except OSError:
        below = []
    return [pid, *(p for child in below for p in tree(child))]


def used(pid: int) -> tuple[str, float]:
    """What a process is, and its PSS in MB; 0 where it is gone."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        pss = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except OSError:
        return "", 0.0
    kinds = {"pipeline.io.isolate": "decoder", "pipeline.run.child": "stages", "jobs.cli": "driver"}
    kind = next((name for mark, name in kinds.items() if mark in command), "ffmpeg and others")
    return kind, int(pss[1]) * 1024 / 1e6 if pss else 0.0


def peak_of(command: list[str]) -> tuple[float, Counter[str], float]:
    """Run a command to its end: peak MB of all its processes, who had it then, and seconds."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    most, who = 0.0, Counter[str]()
    done = threading.Event()

    def watch() -> None:
        nonlocal most, who
        while not done.wait(0.1):
            now = Counter[str]()
            for pid in tree(process.pid):
                kind, mb = used(pid)
                now[kind] += mb  # type: ignore[assignment]
            if sum(now.values()) > most:
                most, who = sum(now.values()), now

    thread = threading.Thread(target=watch)
    thread.start()
    status = process.wait()
    done.set()
    thread.join()
    if status:
        raise SystemExit(f"the run failed with status {status}")
    return most, who, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "long.mp4")
        make(video, args.minutes)
        settings = [a for s in SETTINGS for a in ("--set", s)]
        command = [sys.executable, "-m", "jobs.cli", "curate", str(video), "--out", f"{folder}/run"]
        most, who, seconds = peak_of([*command, "--runner", "local", *settings])
    print(f"{args.minutes} min of 640x360 at 30 fps, {seconds:.0f} s: peak {most:,.0f} MB")
    for kind, mb in who.most_common():
        if mb:
            print(f"  {kind:18} {mb:8,.0f} MB")


if __name__ == "__main__":
    main()
