"""CPU-seconds of curation as ratios, side by side in one run.

    .venv/bin/python bench/curate.py [--videos ../shared/videos] [--peers DIR] [--out bench/results/curate.md]

The work: a few sources of several shots each, composed from the real clips of VIDEOS/panda70m (640×360,
H.264 with B-frames), to be split at their cuts and written as clips with the same x264 settings, one thread.

- floor: one ffmpeg decode and one ffmpeg encode of the very clips that clipmill wrote, a process a source;
- clipmill: `clipmill curate` without neural stages (see PLAIN), in this process and on Ray;
- peers, each in its own virtual environment below --peers, skipped with a reason where absent:
  DIR/sd   pip install scenedetect opencv-python-headless imageio-ffmpeg
  DIR/v2d  pip install video2dataset==1.3.0 pyarrow==15.0.2 pandas==2.2.3 \\
               opencv-python-headless==4.10.0.84 webdataset==0.2.86
  DIR/dj   pip install py-data-juicer==1.6.1 "ray[default]" av==13.1.0 scenedetect opencv-python-headless \\
               ffmpeg-python

CPU-seconds are user + system of the whole process tree; peak memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.io import ffmpeg

ROOT = Path(__file__).parent.parent
# clipmill's own settings for 30 frames a second
X264 = ["-preset", "veryfast", "-crf", "18", "-g", "60", "-x264-params", "qpmax=25", "-threads", "1"]
ENCODE = ["-c:v", "libx264", *X264, "-pix_fmt", "yuv420p", "-an"]
FLOOR = "floor: ffmpeg decode + encode of the same clips"
PLAIN = ["--recipe", "embedded", "--set", "shots.detector=content", "--set", "events.embedder.kind=none"]
PLAIN += ["--set", "captions=[]", "--set", "scores.text.enabled=false", "--set", "decide.rules={}"]


@dataclass
class Cost:
    """One run's whole process tree."""

    cpu_s: float
    wall_s: float
    peak_mb: float


def measure(command: list[str], log: Path, env: dict[str, str] | None = None) -> Cost:
    """Run a command to its end. Raises SystemExit with its last words if it fails."""
    start = time.perf_counter()
    with open(log, "ab") as f, Tally() as tally:
        process = subprocess.Popen(command, stdout=f, stderr=f, stdin=subprocess.DEVNULL, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ChildProcessError):
            while True:  # what it left behind has become our child: its time counts too
                os.wait()
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {log.read_text(errors='replace')[-1500:]}")
    return Cost(tally.seconds, time.perf_counter() - start, usage.ru_maxrss / 1024)


class Tally(threading.Thread):
    """CPU-seconds of every process below this one that lives while it is open.

    By looking at /proc ten times a second, for Ray's daemons do not wait for their workers, whose time the
    kernel then adds to nobody's. What a process used in its last moments before it ends is missed, so the
    kernel's own account is taken where that is larger.
    """

    def __enter__(self) -> Tally:
        self.seen: dict[tuple[int, int], int] = {}  # (pid, time of start) → ticks
        self.before = self._account()
        self.closed = threading.Event()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.join()
        polled = sum(self.seen.values()) / os.sysconf("SC_CLK_TCK")
        self.seconds = max(polled, self._account() - self.before)

    def run(self) -> None:
        while not self.closed.wait(0.1):
            found = dict(filter(None, map(self._read, Path("/proc").glob("[0-9]*"))))
            below = {os.getpid()}
            while more := {pid for pid, (parent, _, _) in found.items() if parent in below} - below:
                below |= more
            for pid in below - {os.getpid()}:
                _, begun, ticks = found[pid]
                self.seen[pid, begun] = ticks

    @staticmethod
    def _read(process: Path) -> tuple[int, tuple[int, int, int]] | None:
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            return None
        return int(process.name), (int(fields[1]), int(fields[19]), int(fields[11]) + int(fields[12]))

    @staticmethod
    def _account() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime


def compose(videos: Path, into: Path, sources: int, shots: int, seed: int) -> list[Path]:
    """Sources of `shots` real shots each; hard cuts between them."""
    clips = sorted((videos / "panda70m").glob("*.mp4"))
    random.Random(seed).shuffle(clips)
    made = []
    for i in range(sources):
        parts = clips[i * shots : (i + 1) * shots]
        graph = "".join(f"[{k}:v]fps=30,scale=640:360,setsar=1[v{k}];" for k in range(shots))
        graph += "".join(f"[v{k}]" for k in range(shots)) + f"concat=n={shots}:v=1[v]"
        inputs = [x for p in parts for x in ("-i", str(p))]
        out = into / f"composed_{i}.mp4"
        command = [ffmpeg.find(), "-v", "error", *inputs, "-filter_complex", graph, "-map", "[v]"]
        subprocess.run(
            [*command, "-c:v", "libx264", "-preset", "medium", "-crf", "20", "-y", str(out)], check=True
        )
        made.append(out)
    return made


def floor(run: Path, work: Path, log: Path, apart: bool) -> Cost:
    """One decode and one encode of the frames that the run's clips hold, a process a source.

    Args:
        apart: write the same clips, a file each, rather than one file with all their frames.
    """
    rows = [r for f in sorted((run / "clips").glob("*.parquet")) for r in pq.read_table(f).to_pylist()]
    total = Cost(0, 0, 0)
    for source in sorted({r["source"] for r in rows}):
        ranges = [(r["start_frame"], r["end_frame"]) for r in rows if r["source"] == source]
        command = [ffmpeg.find(), "-v", "error", "-y", "-threads", "1", "-i", source]
        if apart:
            n = range(len(ranges))
            graph = f"[0:v]split={len(ranges)}" + "".join(f"[s{i}]" for i in n)
            trims = [f"[s{i}]trim=start_frame={a}:end_frame={b}[v{i}]" for i, (a, b) in enumerate(ranges)]
            command += ["-filter_complex", ";".join([graph, *trims])]
            for i in n:
                command += [
                    "-map",
                    f"[v{i}]",
                    "-fps_mode",
                    "passthrough",
                    *ENCODE,
                    str(work / f"floor{i}.mp4"),
                ]
        else:
            chosen = "+".join(rf"between(n\,{a}\,{b - 1})" for a, b in ranges)
            command += [
                "-vf",
                f"select={chosen}",
                "-fps_mode",
                "passthrough",
                *ENCODE,
                str(work / "floor.mp4"),
            ]
        cost = measure(command, log)
        total = Cost(total.cpu_s + cost.cpu_s, total.wall_s + cost.wall_s, max(total.peak_mb, cost.peak_mb))
    return total


def decode_only(sources: list[Path], log: Path) -> Cost:
    total = Cost(0, 0, 0)
    for source in sources:
        cost = measure(
            [ffmpeg.find(), "-v", "error", "-threads", "1", "-i", str(source), "-f", "null", "-"], log
        )
        total = Cost(total.cpu_s + cost.cpu_s, total.wall_s + cost.wall_s, max(total.peak_mb, cost.peak_mb))
    return total


def clipmill(sources: Path, out: Path, runner: str, log: Path) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "jobs.curate",
        str(sources),
        *PLAIN,
        "--out",
        str(out),
        "--runner",
        runner,
    ]
    return measure(command, log)


# ---------------------------------------------------------------- peers


FRONT = """#!/bin/bash
# the settings go before the output name or, where that is not last, behind the input
if [[ "${@: -1}" == *.mp4 ]]; then exec FFMPEG "${@:1:$#-1}" SETTINGS "${@: -1}"; fi
args=()
while (($#)); do
  args+=("$1")
  if [[ "$1" == -i ]]; then args+=("$2" SETTINGS); shift; fi
  shift
done
exec FFMPEG "${args[@]}"
"""


def front(folder: Path, settings: list[str]) -> Path:
    """A folder with an `ffmpeg` that runs ours with more settings, for those that have no option for them."""
    folder.mkdir(exist_ok=True)
    script = FRONT.replace("FFMPEG", ffmpeg.find()).replace("SETTINGS", " ".join(settings))
    (folder / "ffmpeg").write_text(script)
    (folder / "ffmpeg").chmod(0o755)
    return folder


def scenedetect(venv: Path, sources: list[Path], work: Path, log: Path) -> Cost:
    """detect-content, then split with the same x264 settings."""
    tools = front(work / "bin", [])
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    total = Cost(0, 0, 0)
    for source in sources:
        command = [str(venv / "bin/scenedetect"), "-q", "-i", str(source), "-o", str(work / "sd")]
        split = ["split-video", "-a", " ".join(ENCODE)]
        cost = measure([*command, "detect-content", "-t", "25", *split], log, env)
        total = Cost(total.cpu_s + cost.cpu_s, total.wall_s + cost.wall_s, max(total.peak_mb, cost.peak_mb))
    return total


V2D = """
subsampling:
  CutDetectionSubsampler:
    cuts_are_clips: true
    args: {cut_detection_mode: all, framerates: null, threshold: 25, min_scene_len: 15}
  ClippingSubsampler:
    args: {min_length: 0.5, max_length: 999999.0, max_length_strategy: all, precision: exact}
reading: {yt_args: {}, timeout: 60, sampler: null}
storage: {number_sample_per_shard: 100, oom_shard_count: 5, captions_are_subtitles: false}
distribution: {processes_count: 1, thread_count: 1, subjob_size: 100, distributor: multiprocessing}
"""


def video2dataset(venv: Path, sources: list[Path], work: Path, log: Path) -> Cost:
    """Cut detection and exact clipping; its encoder settings are patched to match by an ffmpeg in front."""
    (work / "v2d.yaml").write_text(V2D)
    (work / "v2d.csv").write_text("url\n" + "".join(f"{s}\n" for s in sources))
    tools = front(work / "v2d-bin", X264)
    env = os.environ | {"PATH": f"{tools}:{venv / 'bin'}:{os.environ['PATH']}"}
    shutil.rmtree(work / "v2d", ignore_errors=True)
    command = [str(venv / "bin/video2dataset"), f"--url_list={work / 'v2d.csv'}", "--url_col=url"]
    command += ["--input_format=csv", "--output_format=webdataset", f"--output_folder={work / 'v2d'}"]
    cost = measure([*command, f"--config={work / 'v2d.yaml'}", '--encode_formats={"video":"mp4"}'], log, env)
    if not any(tar.stat().st_size > 1 << 20 for tar in (work / "v2d").glob("*.tar")):
        raise RuntimeError(
            f"wrote no clips: {log.read_text(errors='replace')[-500:]}"
        )  # it exits with 0 all the same
    return cost


DJ = """
dataset_path: {data}
export_path: {out}
np: 1
process:
  - video_split_by_scene_mapper: {{detector: ContentDetector, threshold: 25, min_scene_len: 15}}
  - video_motion_score_filter: {{min_score: 0.0, sampling_fps: 2}}
"""


def data_juicer(venv: Path, sources: list[Path], work: Path, log: Path) -> Cost:
    """Scene split (its own ffmpeg call, default settings: it has no option for them) and motion score."""
    data, out = work / "dj.jsonl", work / "dj" / "out.jsonl"
    data.write_text(
        "".join(json.dumps({"videos": [str(s)], "text": "<__dj__video>"}) + "\n" for s in sources)
    )
    (work / "dj.yaml").write_text(DJ.format(data=data, out=out))
    tools = front(work / "dj-bin", X264)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return measure([str(venv / "bin/dj-process"), "--config", str(work / "dj.yaml")], log, env)


PEERS = {
    "scenedetect detect-content + split": ("sd", scenedetect),
    "video2dataset cuts + exact": ("v2d", video2dataset),
    "Data-Juicer scene split + motion": ("dj", data_juicer),
}


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children, so that none escapes the account."""
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=Path, default=ROOT.parent / "shared/videos")
    parser.add_argument("--peers", type=Path, help="folder of the peers' virtual environments")
    parser.add_argument("--sources", type=int, default=6)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of clipmill and ffmpeg, for medians; peers run once"
    )
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="clipmill-bench-") as name:
        work = Path(name)
        (work / "in").mkdir()
        log = work / "log.txt"
        sources = compose(args.videos, work / "in", args.sources, args.shots, 0)
        runs: dict[str, list[Cost]] = {}
        skipped: dict[str, str] = {}

        def take(title: str, cost: Cost) -> None:
            runs.setdefault(title, []).append(cost)
            print(f"{title}: {cost.cpu_s:.1f} CPU-s, {cost.wall_s:.1f} s", file=sys.stderr, flush=True)

        for _ in range(args.rounds):
            take("clipmill, one process", clipmill(work / "in", work / "local", "local", log))
            take(FLOOR, floor(work / "local", work, log, apart=True))
            take("the same frames into one file", floor(work / "local", work, log, apart=False))
            take("ffmpeg decode alone", decode_only(sources, log))
        take("clipmill, Ray", clipmill(work / "in", work / "ray", "ray", log))
        for title, (folder, run) in PEERS.items():
            if args.peers is None or not (args.peers / folder / "bin").is_dir():
                skipped[title] = "no virtual environment; see --help"
                continue
            copies = shutil.copytree(work / "in", work / f"in-{folder}")  # some write beside their sources
            try:
                take(title, run(args.peers / folder, sorted(copies.glob("*.mp4")), work, log))
            except RuntimeError as e:
                skipped[title] = f"failed: {str(e)[-300:]}"
        seconds = sum(_seconds(s) for s in sources)
        clips = sum(pq.read_table(f).num_rows for f in (work / "local/clips").glob("*.parquet"))
    text = table(runs, skipped, f"{len(sources)} sources, {seconds:.0f} s of video, {clips} clips")
    print(text)
    if args.out:
        args.out.write_text(text)
    return 0


def _seconds(path: Path) -> float:
    import av

    with av.open(str(path)) as container:
        return (container.duration or 0) / 1e6


def table(runs: dict[str, list[Cost]], skipped: dict[str, str], what: str) -> str:
    base = statistics.median(c.cpu_s for c in runs[FLOOR])
    lines = [
        f"Work: {what}; medians of {max(map(len, runs.values()))} rounds (Ray and peers: one), in one run.",
        "",
        "| run | CPU-s | ÷ floor | wall s | peak MB of a process |",
        "|---|---|---|---|---|",
    ]
    for title, costs in runs.items():
        cpu = statistics.median(c.cpu_s for c in costs)
        wall, peak = statistics.median(c.wall_s for c in costs), max(c.peak_mb for c in costs)
        lines.append(f"| {title} | {cpu:.1f} | {cpu / base:.2f} | {wall:.1f} | {peak:.0f} |")
    lines += [f"| {title} | – | – | – | – {why} |" for title, why in skipped.items() if title not in runs]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
