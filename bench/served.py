"""Captions a second of the served captioner, at 1 and 16 requests at once, against a plain loop over the same requests.

    python -m bench.served [--clips 128] [--service 0.1] [--rounds 3] [--no-transformers]

The clips are four of each source, with eight frames of 512 × 288. The plain loop sends the same bodies one
after the other over one kept connection (urllib3, the client's own library) and reads the text. The captioner keeps
each answer in a store on disk, with its checks, keys and fsync. Servers:

- ours (`tests/fixtures/chat_server.py`) in a process of its own, which takes SERVICE seconds for every answer, however
  many it is asked at once: what a server that batches looks like from outside;
- `transformers serve` with a tiny Qwen2.5-VL: it answers one after the other, so that nothing is won by asking more.

Each way is timed ROUNDS times, in turn, and the median told, with the range.

    python -m bench.served --sources 60

Whole runs of `curate` over so many sources of 3 s, a clip each, at 16 requests at once of our server: the seconds in
which it was asked anything, and how many requests it had at a time then, by runner.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import urllib3

from pipeline import recipe
from pipeline.caption.captioner import CaptionStage
from pipeline.io.store import Store
from pipeline.record import Video
from tests.fixtures.chat_server import ChatServer
from tests.fixtures.clips import noise, video

FRAMES, EVERY = 8, 4  # of a clip; clips of a source


def sources(clips: int) -> list[Video]:
    """Short sources with pictures of the size that models are shown."""
    found = []
    for n in range(clips // EVERY):
        pictures: list[np.ndarray] = [noise(n * 100 + i, 288, 512) for i in range(FRAMES * EVERY)]
        spans = [(i * FRAMES, (i + 1) * FRAMES) for i in range(EVERY)]
        found.append(video(pictures, spans, name=f"{n}.mp4"))
    return found


def section(url: str, model: str, concurrency: int, tokens: int) -> recipe.Recipe:
    one = {
        "kind": "served",
        "url": url,
        "model": model,
        "name": "m",
        "concurrency": concurrency,
        "frames": FRAMES,
    }
    one |= {"parameters": {"max_tokens": tokens, "temperature": 0}, "batch": 128}
    return recipe.parse({"name": "bench", "captions": [one]}, [], "bench")


def captioned(
    url: str, model: str, concurrency: int, videos: list[Video], tokens: int, again: bool = False
) -> float:
    """Seconds that the captioner takes; `again`: with all answers in the store."""
    with tempfile.TemporaryDirectory() as folder:
        stage = CaptionStage(section(url, model, concurrency, tokens).captions[0], None, Store(folder))
        stage.setup()
        for _ in range(2 if again else 1):
            begin = time.perf_counter()
            stage(videos)
            spent = time.perf_counter() - begin
        said = [c.captions[-1] for v in videos for c in v.clips]
        assert all(c.outcome in ("ok", "truncated") for c in said), said
        return spent


def looped(url: str, model: str, videos: list[Video], tokens: int) -> float:
    """Seconds that a plain loop takes for the same requests."""
    stage = CaptionStage(section(url, model, 1, tokens).captions[0])
    stage.setup()
    bodies: list[dict] = []
    asks = stage.captioner.asks  # type: ignore[attr-defined]
    reply = {"choices": [{"message": {"content": "x"}}]}
    asks.client.ask = lambda body, stop: (
        bodies.append(body) or reply
    )  # what would be sent, without sending it
    stage(videos)
    pool = urllib3.PoolManager()
    begin = time.perf_counter()
    for body in bodies:
        data = json.dumps(body).encode()
        got = pool.request(
            "POST", f"{url}/chat/completions", body=data, headers={"Content-Type": "application/json"}
        )
        assert got.json()["choices"][0]["message"]["content"] is not None
    return time.perf_counter() - begin


def _serve(pipe: multiprocessing.connection.Connection, service_s: float) -> None:
    with ChatServer() as server:
        server.service_s = service_s
        pipe.send(server.url)
        pipe.recv()


@contextlib.contextmanager
def ours(service_s: float) -> Iterator[tuple[str, str]]:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, service_s), daemon=True)
    process.start()
    yield pipe.recv(), "m"
    pipe.send("end")
    process.join()


@contextlib.contextmanager
def transformers_serve() -> Iterator[tuple[str, str]]:
    from tests.fixtures import tiny_vlm

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_vlm.qwen2_5_vl(Path(folder) / "tiny")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            str(model),
            "--device",
            "cpu",
        ]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
        quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=quiet)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit("transformers serve ended") from None
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1", str(model)
        finally:
            process.kill()
            process.wait()


def ways(url: str, model: str, videos: list[Video], tokens: int) -> dict[str, Callable[[], float]]:
    """What is timed: each gives its seconds."""
    return {
        "plain loop": lambda: looped(url, model, videos, tokens),
        "served, concurrency 1": lambda: captioned(url, model, 1, videos, tokens),
        "served, concurrency 16": lambda: captioned(url, model, 16, videos, tokens),
        "again, all from the store": lambda: captioned(url, model, 16, videos, tokens, again=True),
    }


def table(name: str, clips: int, rounds: int, ways: dict[str, Callable[[], float]]) -> None:
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            times[way].append(call())
    loop = statistics.median(times["plain loop"])
    print(f"\n{name}, {clips} clips\n\n| | captions/s | range | × the loop |\n|---|---|---|---|")
    for way, seconds in times.items():
        rate = [clips / s for s in seconds]
        print(
            f"| {way} | {clips / statistics.median(seconds):.1f} | {min(rate):.1f}–{max(rate):.1f} | "
            f"{loop / statistics.median(seconds):.2f} |"
        )


def runs(sources: int, service_s: float) -> None:
    from tests.fixtures import videos

    print(
        "\n| runner | whole run, s | server busy, s | requests at a time, mean | most |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "raw").mkdir()
        for n in range(sources):
            (Path(folder) / f"raw/{n}.mp4").write_bytes(
                videos.made(videos.rotated, frames=90 + n % 7).read_bytes()
            )
        for runner in ("local", "ray"):
            with ChatServer() as server:
                server.service_s = service_s
                one = {"kind": "served", "url": server.url, "model": "m", "concurrency": 16, "frames": FRAMES}
                sets = ["captions=" + json.dumps([one]), "events.min_s=0.1", "decide.rules={}"]
                command = [
                    sys.executable,
                    "-m",
                    "jobs.curate",
                    f"{folder}/raw",
                    "--out",
                    f"{folder}/{runner}",
                ]
                command += ["--recipe", "smoke", "--runner", runner, *(a for s in sets for a in ("--set", s))]
                begin = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                seen, every = [], 0.02
                while process.poll() is None:
                    seen.append(server.running)
                    time.sleep(every)
                spent = time.perf_counter() - begin
                assert process.returncode == 0
                assert sum(server.answered.values()) == sources
                busy = [n for n in seen if n]
                share = spent * len(busy) / len(seen)
                print(
                    f"| {runner} | {spent:.1f} | {share:.1f} | {statistics.mean(busy):.1f} | {server.most} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument(
        "--service", type=float, default=0.1, help="seconds an answer of our own server takes"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--sources", type=int, help="of whole runs; nothing else is timed")
    args = parser.parse_args()
    if args.sources:
        runs(args.sources, args.service)
        return
    servers = {f"our own server, {args.service:g} s an answer": (ours(args.service), 64)}
    if not args.no_transformers:
        servers["transformers serve, tiny Qwen2.5-VL, 8 tokens"] = (transformers_serve(), 8)
    for name, (server, tokens) in servers.items():
        with server as (url, model):
            table(name, args.clips, args.rounds, ways(url, model, sources(args.clips), tokens))


if __name__ == "__main__":
    main()
