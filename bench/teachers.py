"""Many teachers, killed and resumed, and one more added later: is a caption lost, swapped or paid for twice?

    python -m bench.teachers LIST [--clips 87] [--kills 3] [--seed 0] [--out bench/results/teachers.md]

LIST is a .csv with the columns path and caption. Captioners: the embedded ones, `given`, tiny checkpoints of the real
classes of two hub families, and a served one (a strict server of ours that counts what it is asked and answers after
50 ms). First all of them and one more in a run that is left alone. Then the run without that one, its process group
killed at random moments and the same command given again until it ends; the videos are moved away, and the one more is
added by `clipmill caption`. Captions, scores, flags, decisions and shard bytes must be the same; the server's log says
what was asked twice, and its tokens must be those of the account.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.io.store import Store
from pipeline.layers import Layered
from tests.fixtures import tiny_vlm
from tests.fixtures.chat_server import ChatServer

RUN_S = 1800.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("list", type=Path)
    parser.add_argument("--clips", type=int, default=87)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the result there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clipmill-teachers-") as folder:
        said = teach(Path(folder), args)
    print(said)
    if args.out:
        args.out.write_text(f"# Many teachers\n\n{(__doc__ or '').strip()}\n\n{said}\n")
    return 0


def teach(work: Path, args: argparse.Namespace) -> str:
    rng = random.Random(args.seed)
    with open(args.list, newline="") as f:
        rows = list(csv.DictReader(f))[: args.clips]
    raw = work / "raw"
    raw.mkdir()
    with open(work / "list.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["path", "caption"])
        for row in rows:
            shutil.copyfile(args.list.parent / row["path"], raw / Path(row["path"]).name)
            out.writerow([f"raw/{Path(row['path']).name}", row["caption"]])
    hub = [tiny_vlm.qwen2_5_vl(work / "qwen"), tiny_vlm.internvl(work / "internvl")]
    late = {
        "kind": "transformers",
        "model": str(tiny_vlm.llava_onevision(work / "onevision")),
        "name": "late",
    }
    late |= {"max_new_tokens": 8, "frames": 4}
    with ChatServer() as calm_server, ChatServer() as server:
        for s in (calm_server, server):
            s.service_s = 0.05
        recipes = {}
        for name, url, more in (
            ("calm", calm_server.url, [late]),
            ("hurt", server.url, []),
            ("late", server.url, [late]),
        ):
            recipes[name] = work / f"{name}.yaml"
            recipes[name].write_text(
                json.dumps(recipe(hub, url) | {"captions": [*captioners(hub, url), *more]})
            )
        finish(
            work,
            ["curate", "list.csv", "--out", "calm", "--recipe", str(recipes["calm"]), "--runner", "local"],
        )
        command = [
            "curate",
            "list.csv",
            "--out",
            "hurt",
            "--recipe",
            str(recipes["hurt"]),
            "--runner",
            "local",
        ]
        marks = sorted(rng.sample(range(2, len(rows) - 1), args.kills))
        in_flight = sum(killed(work, command, server, mark, rng) for mark in marks)
        finish(work, command)
        raw.rename(work / "gone")
        asked_before = sum(server.asked.values())
        start = time.monotonic()
        finish(work, ["caption", "hurt", "--recipe", str(recipes["late"]), "--runner", "local"])
        added_s = time.monotonic() - start
        assert sum(server.asked.values()) == asked_before, "adding a captioner asked the server again"
        calm, hurt = captions(work / "calm"), captions(work / "hurt")
        assert calm == hurt, "captions differ"
        assert shards(work / "calm") == shards(work / "hurt"), "decisions or shards differ"
        twice = [n for n in server.asked.values() if n > 1]
        assert len(twice) <= in_flight, f"{len(twice)} asked twice, {in_flight} in flight at kills"
        cost = [dict(c["cost"]) for row in hurt.values() for c in row if c["model"] == "served"]
        tokens = [int(sum(c[k] for c in cost)) for k in ("prompt_tokens", "completion_tokens")]
        assert twice or tokens == server.tokens, f"the account says {tokens}, the server {server.tokens}"
    teachers = sorted({c["model"] for row in hurt.values() for c in row})
    return (
        f"{len(hurt)} clips, {len(teachers)} captioners ({', '.join(teachers)}), {args.kills} kills: captions, scores, "
        f"flags, decisions and shard bytes equal to the run that was left alone. The server was asked "
        f"{sum(server.asked.values())} times for {len(cost)} captions; {len(twice)} requests twice, of {in_flight} "
        f"that were in flight when a kill came. The account says {tokens[0]:,} prompt and {tokens[1]:,} completion "
        f"tokens, the server, which counts answers to the killed too, {server.tokens[0]:,} and {server.tokens[1]:,}. "
        f"The one added later took {added_s:.0f} s, with the videos gone."
    )


def captioners(hub: list[Path], url: str) -> list[dict[str, Any]]:
    models = [
        {"kind": "transformers", "model": str(m), "name": m.name, "max_new_tokens": 8, "frames": 4}
        for m in hub
    ]
    served = {"kind": "served", "url": url, "model": "m", "name": "served", "frames": 4, "concurrency": 4}
    served |= {"parameters": {"max_tokens": 32}}
    return [{"kind": "plain"}, {"kind": "colour_motion"}, {"kind": "given", "pieces": True}, *models, served]


def recipe(hub: list[Path], url: str) -> dict[str, Any]:
    quick = {
        "events": {"embedder": {"kind": "none"}},
        "decide": {"duplicates": {"enabled": False}, "rules": {}},
    }
    return {"name": "teachers", "base": "smoke", "shots": {"detector": "whole"}, **quick}


def start(work: Path, command: list[str]) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    log = open(work / "log", "ab")  # noqa: SIM115
    job = [sys.executable, "-m", "jobs.cli", *command]
    return subprocess.Popen(job, cwd=work, env=env, stdout=log, stderr=log, start_new_session=True)


def finish(work: Path, command: list[str]) -> None:
    process = start(work, command)
    if process.wait(RUN_S):
        raise SystemExit(f"{' '.join(command)} failed:\n{(work / 'log').read_text()[-3000:]}")


def killed(work: Path, command: list[str], server: ChatServer, mark: int, rng: random.Random) -> int:
    """Kill the run just after the server was asked `mark` times in all; returns how many requests were in flight."""
    process, end = start(work, command), time.monotonic() + RUN_S
    while sum(server.asked.values()) < mark and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    with server.lock:
        running = server.running
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # what the server still does for nobody
    return running + 1  # one may have been sent in between


def captions(out: Path) -> dict[str, list[dict[str, Any]]]:
    clips = Layered(Store(str(out)))
    return {
        r["clip_id"]: r["captions"]
        for n in clips.files
        for r in clips.read(n, ["clip_id", "captions"]).to_pylist()
    }


def shards(out: Path) -> dict[str, Any]:
    store = Store(str(out))
    found: dict[str, Any] = {"decisions": store.read_table("decisions.parquet").to_pylist()}
    for name in store.list("shards", ".tar"):
        found[name] = sorted(names_and_hashes(out / name))
    return found


def names_and_hashes(tar: Path) -> list[tuple[str, str]]:
    """Members but the JSON, which says by which recipe and run they were made."""
    import tarfile

    with tarfile.open(tar) as f:
        members = [(m.name, f.extractfile(m)) for m in f if not m.name.endswith(".json")]
        return [(name, hashlib.sha256(data.read()).hexdigest()) for name, data in members if data is not None]


if __name__ == "__main__":
    raise SystemExit(main())
