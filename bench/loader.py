"""What an index of tens of millions of clips costs a trainer: seconds to start, bytes a process, microseconds a batch.

    python -m bench.loader --rows 71000000

The index is synthetic (71 million rows are as many as Panda-70M has); nothing is decoded. Each start is a process of
its own: the first on a machine, which makes the copy that all others map, one after it, and one that packs. It says how
long opening the index and planning an epoch take, what memory that holds, what each further worker (a fork, as
DataLoader's) adds to it while it looks up batches, and how long a batch's rows take to find, at the first one and in
the middle of a late epoch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.training.data.loader import Loader
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

    def hexes(n: int, length: int) -> pa.Array:
        digits = rng.bytes(n * length // 2).hex().encode()
        ends = np.arange(0, n * length + 1, length, dtype=np.int32)
        return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(ends), pa.py_buffer(digits)])

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
                "clip_id": hexes(n, 20),
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
                "media_sha256": hexes(n, 64),
            }
            out.write_table(pa.table(columns, schema=schema))


def memory(what: str) -> float:
    """MB of this process: 'Anonymous', all that is not mapped from a file; 'Private_Dirty', no other has it, either."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kb = line.split(":")
        if name == what:
            return int(kb.split()[0]) / 1024
    raise KeyError(what)


class Peak:
    """The most that `memory("Anonymous")` was."""

    def __enter__(self) -> Peak:
        self.most, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.2):
            self.most = max(self.most, memory("Anonymous"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def in_worker(loader: Loader, batches: int) -> float:
    """MB of its own that a fork holds after looking up so many batches."""
    read, write_ = os.pipe()
    if not os.fork():
        before = memory("Private_Dirty")
        for number in np.random.default_rng(1).integers(0, 100 * loader.epoch_length, batches).tolist():
            loader.rows(number)
            loader.readers[0].place(number % len(loader.readers[0].keys))
        os.write(write_, str(memory("Private_Dirty") - before).encode())
        os._exit(0)
    os.wait()
    return float(os.read(read, 100))


def start(folder: str, what: str, packed: bool) -> None:
    before = memory("Anonymous")
    with Peak() as peak:
        begun = time.perf_counter()
        reader = ShardReader(folder, fps=16, shapes=SHAPES, decode=False)
        opened = time.perf_counter() - begun
        begun = time.perf_counter()
        loader = Loader(reader, POSITIONS, tokens=34272, packed=packed)
        planned = time.perf_counter() - begun
        begun = time.perf_counter()
        identity = reader.identity()
        identified = time.perf_counter() - begun
    cpu = time.process_time()
    held, rows = memory("Anonymous") - before, len(reader.keys)
    print(
        f"{what}: opened in {opened:.1f} s, planned in {planned:.1f} s, identity {identity[:8]} in {identified:.1f} s "
        f"({cpu:.0f} s of a core in all); "
        f"{loader.epoch_length:,} micro-batches an epoch; {held:,.0f} MB of its own, {held * 1e6 / rows:.1f} bytes a "
        f"clip ({peak.most - before:,.0f} MB at most)"
    )
    for which, number in (
        ("first", 0),
        ("of the 50th epoch", 49 * loader.epoch_length + loader.epoch_length // 2),
    ):
        begun = time.perf_counter()
        loader.rows(number)
        print(f"  rows of the batch {which}: {(time.perf_counter() - begun) * 1e6:.0f} µs")
    print(f"  a worker's own memory after 1,000 batches: {in_worker(loader, 1000):.1f} MB", flush=True)


def alone(call: Callable[[], None]) -> None:
    """In a process of its own."""
    if not os.fork():
        try:
            call()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.wait()
    if status:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=71_000_000)
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="one that was written before")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # for the copy that is mapped
        begun = time.perf_counter()
        if args.index:
            os.link(args.index / "index.parquet", Path(folder) / "index.parquet")
        else:
            alone(partial(write, Path(folder), args.rows))
        size = (Path(folder) / "index.parquet").stat().st_size
        print(
            f"{args.rows:,} rows, {size / 1e9:.2f} GB of parquet, written in {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        alone(partial(start, folder, "the first start", False))
        copy = sum(f.stat().st_size for f in Path(folder).glob("clipmill-index-*/*/*"))
        print(f"  the copy: {copy / 1e9:.2f} GB, {copy / args.rows:.0f} bytes a clip", flush=True)
        alone(partial(start, folder, "the next", False))
        alone(partial(start, folder, "packed", True))


if __name__ == "__main__":
    main()
