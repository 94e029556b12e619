"""One driver at a time on one output, and no harm from a surviving worker of a dead one.

Every driver gets an **epoch**, one more than the last driver's. It travels with the `Store` to the workers; a store
checks it before each file that it publishes or deletes. A worker whose driver died is thereby stopped as soon as a
successor has begun.

*On disk* the driver holds a flock on DIR/.lock, which the kernel drops when it dies; the file holds the epoch.

*On object stores* it keeps a claim, DIR/.drivers/<epoch>-<id>, which it writes anew every BEAT_S. Who comes:
1. lists the claims, and is refused if one is alive: not given back, and younger than LEASE_S by the server's clock
   (the age is measured against a claim of one's own, so no clock of ours matters);
2. writes a claim with the next epoch;
3. lists again, and withdraws if anyone else claimed in between.
Since a listing shows every write that was finished before it (S3 since 2020, GCS, and the servers we test on), of two
that come at once at least one sees the other: never two go on. This needs no conditional write, which pyarrow does not
have. What remains: a worker that was checked, and then stands still for longer than a lease before it publishes,
publishes late. It writes what it measured of the same source under the same names, so this costs no clip; media of
another content has another name (`pipeline.split.cut`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.faults import StoreError
from pipeline.io.files import Files, fix

BEAT_S = 15.0  # a claim is written anew so often
LEASE_S = 90.0  # after which nobody keeps it
FOLDER = ".drivers"
LOCK = ".lock"


def check(files: Files, epoch: int) -> None:
    """Raise StoreError where a later driver than that of `epoch` has begun."""
    now = (
        _epoch_of(Path(files.root) / LOCK)
        if files.local
        else max((c.epoch for c in _claims(files)), default=0)
    )
    if now > epoch:
        raise StoreError(
            f"{files.uri}: another clipmill has taken over (driver {now}; this one is {epoch}); this one stops, and "
            "what it has finished is kept"
        )


@contextlib.contextmanager
def driving(files: Files) -> Iterator[int]:
    """Be the only driver for the length of a block; gives the epoch. Raises StoreError where another one lives."""
    with _flock(files) if files.local else _claim(files) as epoch:
        yield epoch


# ---------------------------------------------------------------- on disk


@contextlib.contextmanager
def _flock(files: Files) -> Iterator[int]:
    root = Path(files.root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        f = open(root / LOCK, "r+b" if (root / LOCK).exists() else "w+b", buffering=0)  # noqa: SIM115
    except OSError as e:
        # of a folder whose parents are there, or can be made, only a file system without folders says this
        why = "no folder can be made there" if isinstance(e, FileNotFoundError) else e.strerror
        raise StoreError(f"cannot write to {files.root}: {why}; {fix(e.errno)}") from e
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise StoreError(f"{files.root} is in use by another clipmill; wait for it or stop it") from e
        epoch = _epoch_of(root / LOCK) + 1
        f.seek(0)
        try:
            f.write(b"%012d\n" % epoch)
        except OSError as e:
            raise StoreError(f"cannot write to {files.root}: {e.strerror}; {fix(e.errno)}") from e
        yield epoch


def _epoch_of(lock: Path) -> int:
    """0 where nobody has driven yet."""
    try:
        return int(lock.read_bytes() or b"0")
    except FileNotFoundError:
        return 0
    except ValueError as e:
        raise StoreError(f"{lock} is damaged; delete it once no clipmill works on this folder") from e


# ---------------------------------------------------------------- on object stores


@dataclass(frozen=True)
class Claim:
    name: str  # relative to the root
    epoch: int
    written_s: float  # by the server's clock


def _claims(files: Files) -> list[Claim]:
    found = []
    for info in files.below(FOLDER):
        name = info.path[len(files.root) :].lstrip("/")
        if told := re.fullmatch(rf"{re.escape(FOLDER)}/(\d+)-\w+", name):
            found.append(Claim(name, int(told[1]), (info.mtime_ns or 0) / 1e9))
    return sorted(found, key=lambda c: (c.epoch, c.name))


@contextlib.contextmanager
def _claim(files: Files) -> Iterator[int]:
    me = _who()
    probe = f"{FOLDER}/now-{uuid.uuid4().hex[:8]}"  # tells the server's time
    files.put(probe, b"")
    now = (files.info(probe).mtime_ns or 0) / 1e9
    files.delete(probe)
    before = _claims(files)
    for claim in before:
        who = _read(files, claim)
        if not who.get("released") and now - claim.written_s < LEASE_S and not _dead(who, me):
            left = LEASE_S - (now - claim.written_s)
            raise StoreError(
                f"{files.uri} is in use by another clipmill (process {who.get('pid')} on {who.get('host')}, since "
                f"{who.get('since')}); wait for it or stop it; if it is dead, this works in {max(left, 1):.0f} s"
            )
    epoch = max((c.epoch for c in before), default=0) + 1
    mine = f"{FOLDER}/{epoch:08d}-{uuid.uuid4().hex[:8]}"
    files.put(mine, json.dumps(me).encode())
    known = {c.name for c in before} | {mine}
    if any(c.name not in known for c in _claims(files)):
        files.delete(mine)
        raise StoreError(
            f"{files.uri}: another clipmill began at the same moment; run the same command again"
        )
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(files, mine, me, stop), daemon=True)
    beat.start()
    try:
        for claim in before:  # their epochs are below ours, which is what counts from now on
            files.delete(claim.name)
        yield epoch
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(StoreError):  # an unreachable store ends the lease by itself
            files.put(mine, json.dumps(me | {"released": True}).encode())


def _beat(files: Files, mine: str, me: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        with contextlib.suppress(
            StoreError
        ):  # tried again at the next beat; the check before a write decides
            if files.info(mine).is_file:  # gone: a successor took over and cleared it away
                files.put(mine, json.dumps(me).encode())


def _read(files: Files, claim: Claim) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(files.using(claim.name, lambda f: f.read()))
    except (StoreError, ValueError):  # cleared away meanwhile, or unreadable: its age decides
        return {}
    return said


def _who() -> dict[str, Any]:
    from datetime import UTC, datetime

    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")  # two containers may share name and boot, and see other processes
    return {
        "host": host,
        "space": str(space.readlink()) if space.exists() else "",
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _born(pid: int) -> str | None:
    """When a process of this machine began, in ticks since it started; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def _dead(who: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether a driver of this very machine is known to have ended; never true of another machine's."""
    here = all(who.get(key) == me[key] != "" for key in ("host", "boot", "space"))
    return here and me["born"] is not None and _born(int(who.get("pid", 0))) != who.get("born")
