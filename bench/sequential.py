"""What reading shards from an object store costs, clip by clip and neighbours together: requests, MB a second.

    python -m bench.sequential --clips 2048 --latency-ms 20

A server of this machine (SeaweedFS) holds clips of random bytes in tars; nothing is decoded. One process reads an epoch
in order of the trainer's, by full shuffle and by `data.shuffle: shards`. Requests are counted by a proxy before the
server; time is measured without it, each request being held back by a latency as of a store that is not on this
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator

import numpy as np

from pipeline.io.store import Ranges
from pipeline.shards.order import Sequential
from pipeline.shards.reader import ShardReader
from tests.fixtures.object_store import Proxy, environment, serving
from tests.fixtures.packed import write


@contextlib.contextmanager
def held_back(seconds: float) -> Iterator[None]:
    """Every byte range comes so much later."""
    read = Ranges.read

    def late(self: Ranges, name: str, offset: int, size: int, sha256: str | None = None) -> bytes:
        time.sleep(seconds)
        return read(self, name, offset, size, sha256)

    Ranges.read = late  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ranges.read = read  # type: ignore[method-assign]


def epoch(folder: str, sequential: Sequential | None) -> tuple[int, float]:
    """(bytes, seconds) of reading every clip once."""
    reader = ShardReader(folder, decode=False, batch_size=8, sequential=sequential)
    begun = time.perf_counter()
    return sum(len(sample["video"]) for sample in reader), time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2048)
    parser.add_argument("--kb", type=int, default=300, help="of a clip")
    parser.add_argument("--latency-ms", type=float, nargs="+", default=[0.0, 20.0])
    args = parser.parse_args()
    sizes = np.random.default_rng(0).integers(args.kb * 500, args.kb * 1500, args.clips)
    ways = {
        "clip by clip": None,
        "16 together": Sequential(16, 256, 1),
        "64 together": Sequential(64, 256, 1),
    }
    with serving() as server, environment(server.environment()):
        folder = f"{server.bucket()}/shards"
        write(folder, sizes, tars=4)
        print("| | requests | clips a request |" + "".join(f" MB/s at {ms:g} ms |" for ms in args.latency_ms))
        print("|---|---|---|" + "---|" * len(args.latency_ms))
        for name, how in ways.items():
            with Proxy(server.address) as proxy, environment(server.environment(proxy.address)):
                epoch(folder, how)
                requests = sum(".tar" in asked for asked in proxy.requests)
            rates = []
            for ms in args.latency_ms:
                with held_back(ms / 1000):
                    size, seconds = epoch(folder, how)
                rates.append(size / seconds / 1e6)
            told = "".join(f" {rate:,.0f} |" for rate in rates)
            print(f"| {name} | {requests:,} | {args.clips / requests:.1f} |{told}", flush=True)


if __name__ == "__main__":
    main()
