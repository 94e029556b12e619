"""Let every I/O call of a run go wrong in turn, run the same command again, and compare with an undisturbed run.

    python -m bench.faults [--every 1] [--from 1] [--how EIO,ENOSPC,kill,'kill both'] [--s3]

Four small sources through the real local runner, a captioner that writes the clip's id (tests/fixtures/faulty.py).
EIO and ENOSPC are raised by the k-th call; 'kill' is SIGKILL for the process that makes it, 'kill both' for the driver
as well. With --s3 the output is a bucket of a real S3 server behind a proxy: from request k on every answer is a 503
or a reset ('503', 'reset'), or the driver is killed at request k ('kill'). Then videos, clips, captions, decisions,
the index and the bytes of the shards must equal the undisturbed run's, every caption must be its clip's, every clip's
bytes must have their hash, and nothing half-written may lie about. Kinds take turns, unless --all-kinds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fixtures.faulty import Ended, Mill
from tests.fixtures.object_store import Proxy, environment, serving


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only each N-th call")
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="K", help="begin at call K")
    parser.add_argument("--how", help="kinds of fault, with commas between")
    parser.add_argument("--all-kinds", action="store_true", help="each kind at each call, not in turn")
    parser.add_argument("--s3", action="store_true", help="on an object store")
    args = parser.parse_args()
    kinds = (args.how or ("503,reset,kill" if args.s3 else "EIO,ENOSPC,kill,kill both")).split(",")
    start, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="clipmill-faults-") as folder:
        run = on_s3 if args.s3 else on_disk
        counts = Counter[str]()
        for k, how, trouble in run(Path(folder), args.first, args.every, kinds, args.all_kinds):
            counts[how] += 1
            failed += bool(trouble)
            if trouble:
                print(f"{how} at {k}: {trouble}", flush=True)
            if counts.total() % 10 == 0:
                print(
                    f"{counts.total()} faults, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True
                )
    told = ", ".join(f"{n} {how}" for how, n in counts.items())
    print(
        f"{sum(counts.values())} faults ({told}) in {time.monotonic() - start:.0f} s; {failed} ended otherwise"
    )
    return 1 if failed else 0


def points(total: int, first: int, every: int, kinds: list[str], all_kinds: bool):
    """(k, kind) of each fault."""
    for n, k in enumerate(range(first, total + 1, every)):
        for how in kinds if all_kinds else [kinds[n % len(kinds)]]:
            yield k, how


def on_disk(folder: Path, first: int, every: int, kinds: list[str], all_kinds: bool):
    with Mill(folder) as mill:
        calm = mill.run("calm")
        expected, total = mill.outcome("calm"), sum(calm.calls.values())
        print(f"{total} I/O calls: {calm.calls}", flush=True)
        for k, how in points(total, first, every, kinds, all_kinds):
            hurt = mill.run("hurt", k, how)
            yield k, how, trouble(mill, hurt, expected, hurt.met)
            shutil.rmtree(folder / "hurt", ignore_errors=True)


def on_s3(folder: Path, first: int, every: int, kinds: list[str], all_kinds: bool):
    with serving() as server, Proxy(server.address) as proxy:
        where = server.environment(proxy.address)
        with environment(where), Mill(folder, where, server.bucket()) as mill:
            mill.run("calm")
            total = len(proxy.requests)
            expected = mill.outcome("calm")
            print(f"{total} requests", flush=True)
            pids: list[int] = []
            mill.started = pids.append
            for n, (k, how) in enumerate(points(total, first, every, kinds, all_kinds)):
                proxy.at_fault = (lambda: os.kill(pids[-1], signal.SIGKILL)) if how == "kill" else None
                proxy.fail(k, "503" if how == "kill" else how, times=10**6)
                hurt = mill.run(f"hurt{n}")
                met = proxy.requests[k - 1] if proxy.hurt else ""
                proxy.at_fault = None
                proxy.sound()
                yield k, how, trouble(mill, hurt, expected, met, f"hurt{n}")


def trouble(mill: Mill, hurt: Ended, expected: dict, met: str, name: str = "hurt") -> str:
    """What is wrong after the same command was given again; '' where nothing is."""
    if "Traceback" in hurt.said:
        return f"{met}: a traceback: {hurt.said[-600:]}"
    again = mill.run(name)
    if again.status or "Traceback" in again.said:
        return f"{met}: then exit status {again.status}: {again.said[-600:]}"
    try:
        found = mill.outcome(name)
    except AssertionError as e:
        return f"{met}: {e}"
    differs = [key for key in expected if found[key] != expected[key]]
    return f"{met}: {', '.join(differs)} differ" if differs else ""


if __name__ == "__main__":
    raise SystemExit(main())
