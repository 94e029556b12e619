"""What an index of tens of millions of clips costs a trainer: seconds to start, bytes a process, microseconds a batch.

    python -m bench.loader --rows 71000000

The index is synthetic (71 million rows are as many as Panda-70M has); nothing is decoded. It says how long opening it
and planning an epoch take, what memory that holds, what each further worker (a fork, as DataLoader's) adds to it while
it looks up batches, and how long a batch's rows take to find, at the first one and in the middle of a late epoch.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.training.data import Loader
from pipeline.shards.reader import ShardReader

SHAPES = [(17, 256, 256), (33, 192, 336), (33, 336, 192), (65, 192, 336)]
POSITIONS = [5120, 9072, 9072, 17136]
PART = 1_000_000


def write(folder: Path, rows: int) -> None:
    """An index as `clipmill shard` writes it, with the columns that readers look at."""
    rng = np.random.default_rng(0)
    schema = pa.schema(
        [("clip_id", pa.string()), ("bucket", pa.string()), ("tar", pa.string())]
        + [(name, pa.int64()) for name in ("offset", "size", "json_offset", "json_size")]
        + [("duration_s", pa.float64()), ("width", pa.int32()), ("height", pa.int32())]
        + [("caption", pa.string()), ("media_sha256", pa.string())]
    )
    digits = np.array([f"{i:04x}" for i in range(1 << 16)])

    def hexes(n: int, words: int) -> pa.Array:
        drawn = digits[rng.integers(0, 1 << 16, (n, words))]
        return pa.array(np.ascontiguousarray(drawn).view(f"<U{4 * words}").ravel())

    with pq.ParquetWriter(folder / "index.parquet", schema, compression="zstd") as out:
        for start in range(0, rows, PART):
            n = min(PART, rows - start)
            at = np.arange(start, start + n)
            wide = rng.random(n) < 0.9
            tars = pa.array(
                [
                    f"16x9_360p_4-8s/16x9_360p_4-8s-{i:06d}.tar"
                    for i in range(start // 1000, (start + n) // 1000 + 1)
                ]
            )
            columns = {
                "clip_id": hexes(n, 5),
                "bucket": pa.array(["16x9_360p_4-8s"]).take(pa.array(np.zeros(n, np.int64))),
                "tar": tars.take(pa.array(at // 1000 - start // 1000)),
                "offset": at % 1000 * 700_000,
                "size": rng.integers(300_000, 700_000, n),
                "json_offset": at % 1000 * 700_000 + 600_000,
                "json_size": rng.integers(1000, 2000, n),
                "duration_s": rng.uniform(2, 20, n),
                "width": np.where(wide, 640, 360).astype(np.int32),
                "height": np.where(wide, 360, 640).astype(np.int32),
                "caption": pa.array(["a caption of about sixty letters, as people write them down"]).take(
                    pa.array(np.zeros(n, np.int64))
                ),
                "media_sha256": hexes(n, 16),
            }
            out.write_table(pa.table(columns, schema=schema))


def memory() -> tuple[float, float]:
    """MB of this process: all that is resident, and what no other process shares."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kb = line.split(":")
        found[name] = int(kb.split()[0]) / 1024
    return found["Rss"], found["Private_Clean"] + found["Private_Dirty"]


def in_worker(loader: Loader, batches: int) -> float:
    """MB of its own that a fork holds after looking up so many batches."""
    read, write_ = os.pipe()
    if not os.fork():
        for number in np.random.default_rng(1).integers(0, 100 * loader.epoch_length, batches).tolist():
            loader.rows(number)
        os.write(write_, str(memory()[1]).encode())
        os._exit(0)
    os.wait()
    return float(os.read(read, 100))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=71_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if not os.fork():  # what writing takes is none of the reader's memory
            write(Path(folder), args.rows)
            os._exit(0)
        os.wait()
        size = (Path(folder) / "index.parquet").stat().st_size
        print(
            f"{args.rows:,} rows, {size / 1e9:.2f} GB of parquet, written in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        before = memory()[0]
        most = 0.0
        for packed in (False, True):
            start = time.perf_counter()
            reader = ShardReader(folder, fps=16, shapes=SHAPES, decode=False)
            opened = time.perf_counter() - start
            start = time.perf_counter()
            loader = Loader(reader, POSITIONS, tokens=34272, packed=packed)
            planned = time.perf_counter() - start
            held = memory()[0] - before
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
            print(
                f"{'packed' if packed else 'buckets'}: opened in {opened:.1f} s, planned in {planned:.1f} s, "
                f"{loader.epoch_length:,} micro-batches an epoch; {held:,.0f} MB, "
                f"{held * 1e6 / args.rows:.0f} bytes a clip ({most:,.0f} MB at most while it was read)",
                flush=True,
            )
            for what, number in (
                ("first", 0),
                ("of the 50th epoch", 49 * loader.epoch_length + loader.epoch_length // 2),
            ):
                start = time.perf_counter()
                loader.rows(number)
                print(f"  rows of the batch {what}: {(time.perf_counter() - start) * 1e6:.0f} µs", flush=True)
            print(
                f"  a worker's own memory after 1,000 batches: {in_worker(loader, 1000):.0f} MB", flush=True
            )
            start = time.perf_counter()
            identity = reader.identity()
            print(f"  identity {identity[:8]} in {time.perf_counter() - start:.1f} s", flush=True)
            del reader, loader


if __name__ == "__main__":
    main()
