"""Kill runs at random moments, resume them, and compare each with one that was left alone.

    python -m bench.chaos [--kills 60] [--seed 0] [--only local ray cluster s3] [--work DIR] [SOURCE…]

Four settings: the local runner; its own Ray; a Ray cluster of three nodes on this machine, whose stages form five
pools with shares of (pretended) GPUs; the same with its output on a real S3 server. Every kill is a SIGKILL, at a
seeded random moment, of one of TARGETS. After the death of its driver a run is started again by the same command,
until it ends by itself.

After each death of a driver every published parquet and tar must be whole. A disturbed output that reaches its end is
compared with the undisturbed one of the local runner: sources, clips, scores, captions, embeddings, decisions and the
bytes of every shard. The captioner writes the clip's id, so each caption proves that it sits on its clip: in clips/ and
in the shards, whose mp4 must have the sha256 of its row.

Without SOURCE it draws a few small videos, and adds a damaged one and a text.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.io.store import Store

TIMED = {"seconds", "error_at"}  # the columns that may differ between two runs
TARGETS = {
    "local": ["driver", "both", "stages", "ffmpeg", "decoder"],
    "ray": ["driver", "both", "actor", "stages", "ffmpeg", "decoder"],
    "cluster": ["driver", "both", "actor", "stages", "ffmpeg", "decoder", "node", "node"],
}
TARGETS["s3"] = TARGETS["cluster"]
SHARE = {"local": 0.2, "ray": 0.25, "cluster": 0.3, "s3": 0.25}  # of the kills
MOST = 2  # kills of one run that its driver outlives: a source on which three workers die is an error row
RUN_S = 600.0  # a run that takes longer hangs

RECIPE = {
    "name": "chaos",
    "base": "smoke",
    "events": {"embedder": {"kind": "none"}, "min_s": 0.5},
    "decide": {"duplicates": {"enabled": False}},
}
CAPTIONER = """
from pipeline.captions import Captioner

class Id(Captioner):
    name = "id"

    def caption(self, video, clip):
        return clip.clip_id
"""
SHARES = {  # five pools
    "scores": {"gpus": 0.25},
    "signature": {"cpus": 0.5},
    "caption:id": {"gpus": 0.5},
}


@dataclass
class Setting:
    """Where runs run, and what is killed there."""

    name: str
    out: Callable[[str], str]  # of a run's name
    arguments: list[str] = field(default_factory=list)
    cluster: Any = None  # a ray.cluster_utils.Cluster, whose last nodes may be killed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="*")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--videos", type=int, default=8, help="drawn where no SOURCE is given")
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    args = parser.parse_args(argv)
    work = args.work or Path(tempfile.mkdtemp(prefix="clipmill-chaos-"))
    work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    (work / "id.py").write_text(CAPTIONER)
    recipe = RECIPE | {"captions": [{"kind": "python", "captioner": str(work / "id.py:Id")}]}
    (work / "plain.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    (work / "shares.yaml").write_text(json.dumps(recipe | {"resources": SHARES}))
    sources = args.source or [str(draw(work / "in", args.videos, args.seed))]

    calm = Store(str(work / "calm"))
    run = Run(command(sources, work / "plain.yaml", calm.uri, ["--runner", "local"]), work / "calm.log")
    if code := run.wait(RUN_S):
        raise SystemExit(f"the undisturbed run failed (exit {code}); see {work / 'calm.log'}")
    prove_captions(calm)
    print(f"undisturbed run: {rows(calm, 'videos')} sources, {rows(calm, 'clips')} clips", flush=True)

    rng, kills = random.Random(args.seed), Counter[str]()
    share = sum(SHARE[name] for name in args.only)
    for name in args.only:
        with setting(name, work) as place:
            recipe_file = work / ("shares.yaml" if place.cluster else "plain.yaml")
            quota = round(args.kills * SHARE[name] / share)
            kills += disturb(place, sources, recipe_file, quota, calm, rng, work)
    print(
        f"{kills.total()} kills ({', '.join(f'{n} {t}' for t, n in sorted(kills.items()))}) in "
        f"{time.monotonic() - start:.0f} s: all equal to the undisturbed run, every caption on its clip"
    )
    if not args.work:
        shutil.rmtree(work)
    return 0


def disturb(
    place: Setting,
    sources: list[str],
    recipe: Path,
    quota: int,
    calm: Store,
    rng: random.Random,
    work: Path,
) -> Counter[str]:
    """Runs in one setting, until `quota` kills are done and the last run has ended."""
    hit, outputs = Counter[str](), 0
    length = 0.0  # of an undisturbed run here: unknown at first, so that the first output is left alone
    while hit.total() < quota or not length:
        out = Store(place.out(f"{place.name}-{outputs}"))
        log = work / f"{place.name}-{outputs}.log"
        outputs += 1
        code, start = -1, time.monotonic()
        while code != 0:
            survived = 0
            run = Run(command(sources, recipe, out.uri, place.arguments), log)
            while length and hit.total() < quota and survived < MOST and not run.ended:
                if not run.wait_for(rng.uniform(0.05, 0.8) * length):
                    continue
                target = kill_one(rng.choice(TARGETS[place.name]), run, place, rng)
                if target is None:
                    continue
                hit[f"{place.name} {target}"] += 1
                survived += target not in ("driver", "both")
                print(f"kill {hit.total():2} of {quota} in {place.name}: {target}", flush=True)
            code = run.wait(RUN_S)
            if code == -signal.SIGKILL:
                check_whole(out)
            elif code != 0:
                raise SystemExit(f"a run failed by itself (exit {code}); see {log}")
        length = length or time.monotonic() - start
        compare(calm, out)
        prove_captions(out)
        left = partial_files(out)
        if left:
            raise SystemExit(f"{out.uri}: partial files are left: {left}")
        print(f"{place.name}-{outputs - 1}: equal to the undisturbed run", flush=True)
    return hit


def command(sources: list[str], recipe: Path, out: str, more: list[str]) -> list[str]:
    return [sys.executable, "-m", "jobs.curate", *sources, "--recipe", str(recipe), "--out", out, *more]


# Where it runs -------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(name: str, work: Path) -> Iterator[Setting]:
    """Start what a setting needs, and end it afterwards."""
    with contextlib.ExitStack() as stack:
        if name == "s3":
            from tests.fixtures.object_store import environment, serving

            server = stack.enter_context(serving())
            stack.enter_context(environment(server.environment()))
            bucket = server.bucket()
            place = Setting(name, lambda run: f"{bucket}/{run}")
        else:
            place = Setting(name, lambda run: str(work / run))
        if name == "local":
            place.arguments = ["--runner", "local"]
        if name in ("cluster", "s3"):
            place.cluster = stack.enter_context(cluster())
            place.arguments = ["--address", place.cluster.address]
        yield place


NODE: dict[str, Any] = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 200 << 20}


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """A Ray cluster of three nodes on this machine, with temporary files and ports of its own."""
    # nodes that are lost are told at once, and many processes on few cores are no lost node
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_DEDUP_LOGS": "0"}
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args=NODE | {"include_dashboard": False},
        shutdown_at_exit=True,
    )
    try:
        for _ in range(2):
            made.add_node(**NODE)
        yield made
    finally:
        made.shutdown()


# Runs and kills ------------------------------------------------------------------------------------


class Run:
    """A run of `clipmill curate`."""

    def __init__(self, command: list[str], log: Path):
        with open(log, "ab") as f:
            self.driver = subprocess.Popen(command, stdout=f, stderr=f)

    @property
    def ended(self) -> bool:
        return self.driver.poll() is not None

    def wait_for(self, seconds: float) -> bool:
        """Let it run; False where it ended meanwhile."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.wait(seconds)
        return not self.ended

    def wait(self, seconds: float) -> int:
        """The exit code. Raises SystemExit where it hangs."""
        try:
            return self.driver.wait(seconds)
        except subprocess.TimeoutExpired as e:
            for pid in [self.driver.pid, *descendants(self.driver.pid)]:
                kill(pid)
            raise SystemExit(f"a run hangs: no end after {seconds:.0f} s") from e


def kill_one(target: str, run: Run, place: Setting, rng: random.Random) -> str | None:
    """Kill a target; returns what was killed, None where there is none of it now."""
    if target == "node":
        nodes = list(place.cluster.worker_nodes)
        if len(nodes) < 2:
            return None
        node = rng.choice(nodes)
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        place.cluster.worker_nodes.discard(node)
        place.cluster.add_node(**NODE)
        return target
    if target in ("driver", "both"):
        below = descendants(run.driver.pid) if target == "both" else []
        for pid in [run.driver.pid, *below]:
            kill(pid)
        return target
    for _ in range(100):  # some live for a moment only
        found = [pid for pid in descendants(os.getpid()) if what(pid) == target]
        if found and not run.ended:
            kill(rng.choice(found))
            return target
        if not run.wait_for(0.05):
            break
    return None


def what(pid: int) -> str:
    """Which target a process is."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    if line.startswith(b"ray::MapWorker"):
        return "actor"
    if b"pipeline.run.child" in line:
        return "stages"
    if b"pipeline.io.isolate" in line:
        return "decoder"
    return "ffmpeg" if b"ffmpeg" in line.split(b"\0")[0] else ""


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


# What came out -------------------------------------------------------------------------------------


def check_whole(out: Store) -> None:
    """Whatever carries a final name can be read to its end."""
    for name in out.list():
        if name.endswith(".parquet"):
            out.read_table(name)
        elif name.endswith(".tar"):
            data = out.read_bytes(name)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    if content is None or len(content.read()) != member.size:
                        raise SystemExit(f"{out.uri}/{name}: {member.name} is cut short")
            if len(data) % 512 or data[-1024:] != bytes(1024):
                raise SystemExit(f"{out.uri}/{name}: no end-of-archive mark")


def table(out: Store, folder: str) -> pa.Table:
    tables = [out.read_table(name) for name in out.list(folder, ".parquet")]
    return pa.concat_tables(tables) if tables else pa.table({})


def rows(out: Store, folder: str) -> int:
    return table(out, folder).num_rows


def prove_captions(out: Store) -> None:
    """Every caption is the id of its clip, in the rows and in the shards, on the bytes of its row."""
    sha256 = {}
    for row in table(out, "clips").to_pylist():
        sha256[row["clip_id"]] = row["media_sha256"]
        if [c["text"] for c in row["captions"]] != [row["clip_id"]]:
            raise SystemExit(f"{out.uri}: clip {row['clip_id']} has the caption {row['captions']}")
    for (name, member), data in members(out).items():
        key, _, kind = member.partition(".")
        if kind == "txt" and data.decode() != key:
            raise SystemExit(f"{out.uri}/{name}: {key} has the caption {data!r}")
        if kind == "mp4" and hashlib.sha256(data).hexdigest() != sha256[key]:
            raise SystemExit(f"{out.uri}/{name}: {key} has the bytes of another clip")


def compare(calm: Store, out: Store) -> None:
    """Raise SystemExit at the first difference."""
    for folder, key in (("videos", "source"), ("clips", "clip_id")):
        a, b = (table(d, folder).sort_by(key) for d in (calm, out))
        if a.column_names != b.column_names:
            raise SystemExit(f"{out.uri}/{folder}: other columns")
        for name in a.column_names:
            if name not in TIMED and a[name].to_pylist() != b[name].to_pylist():
                pairs = zip(a[key].to_pylist(), a[name].to_pylist(), b[name].to_pylist(), strict=False)
                first = next((p for p in pairs if p[1] != p[2]), "another number of rows")
                raise SystemExit(f"{out.uri}/{folder}: column {name} differs: {first}")
    a, b = (d.read_table("decisions.parquet") for d in (calm, out))
    if not a.equals(b):
        raise SystemExit(f"{out.uri}: decisions differ")
    a, b = (
        {n: hashlib.sha256(d.read_bytes(n)).hexdigest() for n in d.list("shards", ".tar")}
        for d in (calm, out)
    )
    if a != b:
        raise SystemExit(f"{out.uri}: shards differ: {shard_difference(calm, out)}")


def members(out: Store) -> dict[tuple[str, str], bytes]:
    """What is in the shards, by tar and member, in their order."""
    found = {}
    for name in out.list("shards", ".tar"):
        with tarfile.open(fileobj=io.BytesIO(out.read_bytes(name))) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                found[name, member.name] = content.read()
    return found


def shard_difference(calm: Store, out: Store) -> str:
    """The first member that differs."""
    a, b = (members(d) for d in (calm, out))
    if list(a) != list(b):
        return f"members {sorted(a.keys() ^ b.keys()) or 'in another order'}"
    first = next((k for k in a if a[k] != b[k]), None)
    if first is None:
        return "only in their headers"
    return f"{first}: {a[first][:2000]!r} and {b[first][:2000]!r}"


def partial_files(out: Store) -> list[str]:
    return [p.name for p in Path(out.root).rglob("*") if "partial" in p.name] if out.local else []


def draw(folder: Path, count: int, seed: int) -> Path:
    """Small videos of two or three scenes each, a damaged one, and a text that calls itself a video."""
    from pipeline.io import ffmpeg

    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        scenes = rng.sample(["testsrc2", "mandelbrot", "smptebars", "rgbtestsrc", "life"], rng.randint(2, 3))
        inputs = [
            a
            for s in scenes
            for a in ("-f", "lavfi", "-t", f"{rng.uniform(1, 3):.2f}", "-i", f"{s}=s=320x180")
        ]
        joined = "".join(f"[{i}:v]fps=25,format=yuv420p,setsar=1[v{i}];" for i in range(len(scenes)))
        joined += "".join(f"[v{i}]" for i in range(len(scenes))) + f"concat=n={len(scenes)}[v]"
        file = folder / f"{n:02}.mp4"
        ffmpeg.run([ffmpeg.find(), "-y", *inputs, "-filter_complex", joined, "-map", "[v]", str(file)], 60)
    whole = (folder / "00.mp4").read_bytes()
    (folder / "cut_short.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video")
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
