"""How fast the inspector answers over a large run: a synthetic one, asked over HTTP as the page asks.

    .venv/bin/python bench/inspector.py [--clips 1000000] [--folder /tmp/clipmill-bench-inspector] [--embedding 0]

Makes a run of that many clips (four captions a clip, made of Zipf-distributed words; no media), starts
`clipmill inspect` on it, and times: until the first page of clips is there (several times), until captions and words
are read, and then filters, sorts, searches and histograms, none asked twice. Prints the figures of
bench/results/inspector.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.recipe import parse  # noqa: E402
from pipeline.tables import CAPTION, DECISION_SCHEMA, VIDEO_SCHEMA, clip_schema  # noqa: E402

MODELS = ["Qwen/Qwen2.5-VL-7B-Instruct", "OpenGVLab/InternVL3-8B", "plain-baseline", "tags-baseline"]
SCORES = ["motion", "sharpness", "exposure", "text_area", "watermark", "stillness", "pan_x", "zoom"]
FLAGS = ["refusal", "loop", "truncated", "person_name", "contradicts_motion"]
RULES = ["too_short", "blurred", "text_heavy", "duplicate"]
WORDS, SENTENCES, UNIT, A_SOURCE = 20_000, 200_000, 2_000, 40


def sentences(rng: np.random.Generator) -> pa.Array:
    """Texts of 8 to 30 words, the k-th word of the vocabulary about 1/k as frequent as the first."""
    syllables = np.array([a + b for a, b in zip("bcdfghjklmnprstvwxyz", "aeiouaeiouaeiouaeiou", strict=True)])
    vocabulary = np.array(
        ["".join(syllables[[i % 20, i // 20 % 20, i // 400 % 20, i // 8000]]) for i in range(WORDS)]
    )
    chance = 1 / np.arange(1, WORDS + 1)
    length = rng.integers(8, 31, SENTENCES)
    drawn = vocabulary[rng.choice(WORDS, int(length.sum()), p=chance / chance.sum())]
    ends = np.cumsum(length)
    return pa.array(
        [" ".join(drawn[e - n : e]).capitalize() + "." for e, n in zip(ends, length, strict=True)]
    )


def make(folder: Path, clips: int, embedding: int) -> None:
    """Write the run, unless it is there."""
    done = folder / "made.json"
    asked = {"clips": clips, "embedding": embedding, "version": 3}
    if done.exists() and json.loads(done.read_text()) == asked:
        return
    rng = np.random.default_rng(0)
    texts = sentences(rng)
    for name in ("clips", "videos"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    decisions = []
    for unit, at in enumerate(range(0, clips, UNIT)):
        n = min(UNIT, clips - at)
        table, decided = unit_tables(rng, texts, unit, n, embedding)
        pq.write_table(table, folder / f"clips/{unit:06d}.parquet", compression="zstd")
        pq.write_table(VIDEO_SCHEMA.empty_table(), folder / f"videos/{unit:06d}.parquet", compression="zstd")
        decisions.append(decided)
    every = pa.concat_tables(decisions).sort_by([("source", "ascending"), ("start_frame", "ascending")])
    every = every.drop_columns(["start_frame"])
    meta = {b"rules": json.dumps(RULES).encode(), b"decide": b'{"rules": {}}'}
    pq.write_table(every.replace_schema_metadata(meta), folder / "decisions.parquet", compression="zstd")
    run = {"recipe": parse({"name": "synthetic"}, [], "bench").model_dump(mode="json"), "measure_key": "x"}
    (folder / "run.json").write_text(json.dumps(run))
    done.write_text(json.dumps(asked))


def unit_tables(
    rng: np.random.Generator, texts: pa.Array, unit: int, n: int, embedding: int
) -> tuple[pa.Table, pa.Table]:
    schema = clip_schema(SCORES, {"bench": embedding} if embedding else {})
    ids = pa.array([rng.bytes(10).hex() for _ in range(n)])
    source = pa.array([f"/videos/{unit * 7919 % 10_007:06d}/{i // A_SOURCE:04d}.mp4" for i in range(n)])
    start = np.arange(n) % A_SOURCE * 10.0
    length = rng.gamma(4, 1.5, n) + 1
    m = len(MODELS)
    said = texts.take(pa.array(rng.integers(0, len(texts), n * m)))
    score = rng.normal(0.3, 0.15, (n * m, 2)).astype(np.float32)
    two = pa.array(np.arange(0, 2 * n * m + 1, 2, dtype=np.int32))
    scores = pa.MapArray.from_arrays(
        two, pa.array(["consensus", "visual_fit"] * (n * m)), pa.array(score.ravel())
    )
    flagged = rng.uniform(size=n * m) < 0.05
    ends = np.concatenate([[0], np.cumsum(flagged)]).astype(np.int32)
    flags = pa.ListArray.from_arrays(
        pa.array(ends), pa.array(rng.choice(FLAGS, int(ends[-1])).tolist(), pa.string())
    )
    known = {
        "model": pa.array(MODELS * n),
        "text": said,
        "outcome": pa.array(["ok"] * (n * m)),
        "scores": scores,
    }
    known |= {"flags": flags, "prompt": pa.array(["Describe the video."] * (n * m))}
    struct = pa.StructArray.from_arrays(
        [known.get(f.name, pa.nulls(n * m, f.type)).cast(f.type) for f in CAPTION], fields=list(CAPTION)
    )
    captions = pa.ListArray.from_arrays(pa.array(np.arange(0, n * m + 1, m, dtype=np.int32)), struct)
    columns = {
        "clip_id": ids,
        "source": source,
        "name": pc_name(source),
        "start_s": start,
        "end_s": start + length,
        "start_frame": (start * 24).astype(np.int64),
        "end_frame": ((start + length) * 24).astype(np.int64),
        "duration_s": length,
        "width": np.full(n, 1280, np.int32),
        "height": np.full(n, 720, np.int32),
        "fps": np.full(n, 24.0),
        "captions": captions,
        "text": pa.array([["EXIT"] if x < 0.1 else [] for x in rng.uniform(size=n)], pa.list_(pa.string())),
        "meta": pa.array(
            [[("title", f"Video {unit} {i // A_SOURCE}")] for i in range(n)],
            pa.map_(pa.string(), pa.string()),
        ),
        "media_tar": pa.array([f"media/{unit:06d}.tar"] * n),
        "media_offset": np.arange(n) * 1_000_000,
        "media_size": np.full(n, 900_000),
        "stills_offset": np.arange(n) * 1_000_000 + 900_000,
        "stills_sizes": pa.array([[12_000] * 8] * n, pa.list_(pa.int32())),
        **{f"score_{s}": rng.gamma(2, 1, n) for s in SCORES},
    }
    if embedding:
        vectors = rng.normal(size=n * embedding).astype(np.float32)
        columns["emb_bench"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors), embedding)
    arrays = [
        pa.nulls(n, f.type) if f.name not in columns
        else columns[f.name].cast(f.type) if isinstance(columns[f.name], (pa.Array, pa.ChunkedArray))
        else pa.array(columns[f.name], f.type)
        for f in schema
    ]  # fmt: skip
    which = rng.integers(0, m, n)
    drop = rng.uniform(size=n) < 0.3
    rule = rng.integers(0, len(RULES), n)
    shard = pa.array(
        [None if d else f"shards/16x9_720p_{4 * (i % 4)}/x-{unit:06d}.tar" for i, d in enumerate(drop)]
    )
    decided = {
        "clip_id": ids,
        "source": source,
        "keep": pa.array(~drop),
        "dropped_by": pa.array(
            [[RULES[r]] if d else [] for r, d in zip(rule, drop, strict=True)], pa.list_(pa.string())
        ),
        "caption": said.take(pa.array(np.arange(n) * m + which)),
        "caption_model": pa.array([MODELS[w] for w in which]),
        "shard": shard,
        "offset": pa.array(np.arange(n) * 1_000_000),
    }
    rows = pa.table(
        [decided[f.name].cast(f.type) if f.name in decided else pa.nulls(n, f.type) for f in DECISION_SCHEMA],
        names=DECISION_SCHEMA.names,
    )
    return pa.table(arrays, schema=schema), rows.append_column(
        "start_frame", pa.array(columns["start_frame"])
    )


def pc_name(source: pa.Array) -> pa.Array:
    import pyarrow.compute as pc

    return pc.utf8_slice_codeunits(source, len("/videos/"))


# ---------------------------------------------------------------- asking


class Server:
    def __init__(self, folder: Path, port: int):
        self.url = f"http://localhost:{port}"
        self.begun = time.perf_counter()
        command = [sys.executable, "-m", "jobs.inspect", str(folder), "--port", str(port)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def get(self, path: str) -> tuple[float, dict]:
        begun = time.perf_counter()
        with urllib.request.urlopen(self.url + path, timeout=300) as answer:
            said = json.loads(answer.read())
        return (time.perf_counter() - begun) * 1000, said

    def since(self) -> float:
        return time.perf_counter() - self.begun

    def wait(self, path: str, ready) -> float:
        """Seconds from the start until an answer is as wanted."""
        while True:
            try:
                if ready(self.get(path)[1]):
                    return self.since()
            except OSError:
                pass
            time.sleep(0.02)

    def busy(self) -> float:
        """Milliseconds that its threads have had a core."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((t / "schedstat").read_text().split()[0]) for t in tasks) / 1e6

    def cpu(self) -> float:
        """Seconds of a core so far, of ended threads too."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> tuple[float, float]:
        """GB now and at most."""
        told = dict(
            line.split(":", 1) for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        )
        return tuple(int(told[k].split()[0]) / 1e6 for k in ("VmRSS", "VmHWM"))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


def questions(rng: np.random.Generator, words: list[str], n: int) -> dict[str, list[str]]:
    """Addresses by kind, n each, no two alike."""

    def low() -> str:
        return f"{rng.uniform(0, 3):.5f}"

    columns = ["agreement", "fit", "gap", "flag_count", "words", *(f"score_{s}" for s in SCORES)]
    column = [columns[i % len(columns)] for i in range(n)]
    names = [("model", MODELS), ("rule", RULES), ("flag", FLAGS), ("has", MODELS)]
    by_name = []
    for i in range(n):
        name, some = names[i % 4]
        by_name.append(f"clips?{name}={quote(some[i // 4 % len(some)])}&range=duration_s:{low()}:&limit=60")
    # every word of a Zipf vocabulary once: the commonest are in most clips
    return {
        "filter: a range": [f"clips?range=score_{SCORES[i % 8]}:{low()}:&limit=60" for i in range(n)],
        "filter: a name and a range": by_name,
        "sort, first time": [f"clips?sort={s}{c}&limit=60" for c in columns for s in ("", "-")][:n],
        "sort and a range": [f"clips?sort={c}&range=duration_s:{low()}:&limit=60" for c in column],
        "random order": [f"clips?sort=random:{i}&limit=60" for i in range(n)],
        "page 500 of a sort": [f"clips?sort=fit&kept=1&offset={30_000 + i}&limit=60" for i in range(n)],
        "search: a word": [f"clips?q={words[i]}&limit=60" for i in range(n)],
        "search: a rare word": [f"clips?q={words[-1 - i]}&limit=60" for i in range(n)],
        "search: two words, sorted": [
            f"clips?q={words[i]}+{words[i + 40]}&sort=-fit&limit=60" for i in range(n)
        ],
        "search: a phrase": [f"clips?q=%22{words[i]}+{words[i + 1]}%22&limit=60" for i in range(n)],
        "histogram": [f"histogram?column={c}&range=duration_s:{low()}:" for c in column],
        "facets": [f"facets?range=duration_s:{low()}:" for i in range(n)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/clipmill-bench-inspector"))
    parser.add_argument(
        "--embedding", type=int, default=0, metavar="D", help="numbers of an embedding, 0: none"
    )
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--starts", type=int, default=7, help="of which the best and the median are printed")
    args = parser.parse_args()
    begun = time.perf_counter()
    make(args.folder, args.clips, args.embedding)
    size = sum(p.stat().st_size for p in args.folder.rglob("*.parquet")) / 1e9
    print(
        f"{args.clips:,} clips, {size:.2f} GB of parquet, made in {time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    found = []
    for _ in range(args.starts):
        server = Server(args.folder, args.port)
        try:
            usable = server.wait("/api/clips?limit=60&kept=1", lambda said: len(said["rows"]) == 60)
            cpu, load = server.cpu(), os.getloadavg()[0]
            run = server.wait("/api/run", lambda said: bool(said["columns"]))
            found.append((usable, run, cpu, server.memory()[0], load))
        finally:
            server.stop()
    print(f"first page of clips, {len(found)} starts; load of the machine beside it")
    for name, values in zip(
        ("s", "s, and the run", "s of a core", "GB", "load"), zip(*found, strict=True), strict=True
    ):
        print(
            f"| {name} | best {min(values):.2f} | median {np.median(values):.2f} | most {max(values):.2f} |"
        )
    server = Server(args.folder, args.port)
    try:
        measures = server.wait(
            "/api/run", lambda said: any(c["name"].startswith("score_") for c in said["columns"])
        )
        captions = server.wait("/api/run", lambda said: said["reading"]["captions"] >= args.clips)
        words = server.wait("/api/run", lambda said: said["reading"]["done"])
        every = server.cpu()
        now, most = server.memory()
        print(f"| measures | {measures:.1f} s |\n| numbers of the captions | {captions:.1f} s |")
        print(
            f"| full text | {words:.1f} s ({every:.1f} s of a core) | {now:.2f} GB, {most:.2f} GB at most |"
        )
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
        ask(server, args)
        print(f"load {os.getloadavg()[0]:.1f}")
    finally:
        server.stop()


def ask(server: Server, args: argparse.Namespace) -> None:
    rng = np.random.default_rng(1)
    syllables = [a + b for a, b in zip("bcdfghjklmnprstvwxyz", "aeiouaeiouaeiouaeiou", strict=True)]
    words = [
        "".join(syllables[k] for k in (i % 20, i // 20 % 20, i // 400 % 20, i // 8000)) for i in range(WORDS)
    ]
    print(
        "\n| | p50 | p95 | most | of a core: p50 | p95 | clips that pass (median) |\n|---|---|---|---|---|---|---|"
    )
    for kind, paths in questions(rng, words, 40).items():
        took, busy, totals = [], [], []
        for path in paths:
            before = server.busy()
            ms, said = server.get(f"/api/{path}")
            took.append(ms)
            busy.append(server.busy() - before)
            totals.append(said.get("total", sum(said.get("counts", []))))
        p50, p95, core50, core95 = (*np.percentile(took, (50, 95)), *np.percentile(busy, (50, 95)))
        line = (
            f"| {kind} | {p50:.0f} ms | {p95:.0f} ms | {max(took):.0f} ms | {core50:.0f} ms | {core95:.0f} ms"
        )
        print(f"{line} | {np.median(totals):,.0f} |", flush=True)
    now, most = server.memory()
    print(f"\nmemory after it: {now:.2f} GB ({most:.2f} GB at most)")


if __name__ == "__main__":
    main()
