"""This node's folder of downloads: each fetched once and shared by its workers, bounded, swept.

A scratch file is locked as long as it is used, so that workers share one download and none loses a file it
reads; it appears under its name only when complete, so that a killed worker leaves nothing that could be taken
for a video. All files together stay within `limit`: copies that nobody uses go first, the longest unused one
before the others (a later stage that wants it fetches it again); then a download waits for others to end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.faults import SourceFault, WorkerFault
from pipeline.sources.names import log

VARIABLE = "CLIPMILL_SCRATCH_GB"  # environment: GB of all downloads of this node
SHARE = 0.5  # of what is free on the disk, where the variable says nothing
STEP = 64 << 20  # bytes written between two looks at the others
WAIT_S = 300.0  # for others to make room
KEEP_S = 2 * 3600.0  # a scratch file nobody has used for so long is swept
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # the scratch disk's fault


def folder() -> Path:
    """This user's folder for downloads on this node, private and really ours. Raises WorkerFault."""
    path = Path(tempfile.gettempdir()) / f"clipmill-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        info = path.lstat()
    except OSError as e:
        raise WorkerFault(f"cannot use {path} for downloads: {e.strerror}; set TMPDIR to another disk") from e
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise WorkerFault(f"{path} belongs to somebody else; remove it or set TMPDIR to another folder")
    return path


def limit() -> int:
    """Bytes that all downloads of this node may take. Raises WorkerFault for a variable that is no number."""
    told = os.environ.get(VARIABLE, "")
    if not told:
        return int(SHARE * (shutil.disk_usage(folder()).free + sum(s.st_size for s in _files().values())))
    try:
        gigabytes = float(told)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise WorkerFault(f"{VARIABLE}={told} is no number of gigabytes above 0; correct it, or unset it")
    return int(gigabytes * 1e9)


@contextlib.contextmanager
def cached(key: str, fetch: Callable[[Path], None], name: str) -> Iterator[io.BufferedReader]:
    """The scratch file `key`, opened and locked against removal; where it is missing `fetch` writes it first.

    Args:
        fetch: writes the whole file to the path it is given, through `writer`, or raises.
        name: of the source, for messages.

    Raises WorkerFault where the disk is full, not writable, or taken by others for too long; and what `fetch` raises.
    """
    path = folder() / key
    partial = path.with_name(path.name + ".partial")
    while True:
        with locked(path, fcntl.LOCK_EX) as lock:
            if not path.exists():
                _sweep_once()
                try:
                    room(partial, 0, name)
                    fetch(partial)
                    partial.replace(path)
                except BaseException as e:
                    partial.unlink(missing_ok=True)
                    Path(lock.name).unlink()  # or a million dead links would leave a million locks
                    if isinstance(e, OSError) and e.errno in FULL:
                        raise WorkerFault(
                            f"cannot download to {path.parent}: {e.strerror}; free some space there or set "
                            "TMPDIR to another disk, then run the same command again"
                        ) from e
                    raise
        with locked(path, fcntl.LOCK_SH):
            try:
                f = open(path, "rb")  # noqa: SIM115 (closed below)
            except FileNotFoundError:
                continue  # released between the two locks
            with f:
                os.utime(path)
                yield f
                return


class _Writer(io.BufferedWriter):
    """A new file that asks for room as it grows."""

    def __init__(self, path: Path, name: str):
        super().__init__(io.FileIO(path, "w"))
        self.path, self.source, self.since = path, name, 0

    def write(self, data: object) -> int:
        written = super().write(data)  # type: ignore[arg-type]
        self.since += written
        if self.since >= STEP:
            self.since = 0
            room(self.path, STEP, self.source)
        return written


def writer(path: Path, name: str) -> _Writer:
    """A file to download to. Its `write` raises SourceFault for more than may be held, WorkerFault without room."""
    return _Writer(path, name)


def room(mine: Path, more: int, name: str) -> None:
    """Make room for a download that takes `mine` and wants some bytes more; waits for others if it must."""
    since = time.monotonic()
    while True:
        files, most = _files(), limit()
        own = files[mine].st_size if mine in files else 0
        over = sum(s.st_size for s in files.values()) + more - most
        if over <= 0:
            return
        if own + more > most:
            raise SourceFault(
                f"{name}: is larger than all downloads together may be on this node ({most / 1e9:.3g} GB); set "
                f"{VARIABLE} to more, or TMPDIR to a larger disk"
            )
        for path in sorted(files, key=lambda p: files[p].st_mtime):
            if over > 0 and path.suffix == "" and remove(path):
                over -= files[path].st_size
        if over <= 0:
            return
        if time.monotonic() - since > WAIT_S:
            raise WorkerFault(
                f"no room for downloads in {mine.parent} for {WAIT_S:.0f} s: others take the {most / 1e9:.3g} GB that "
                f"they may together; set {VARIABLE} to more, or TMPDIR to a larger disk"
            )
        if time.monotonic() - since < 1:
            log.warning("%s: waiting for room in %s (%.3g GB, %s)", name, mine.parent, most / 1e9, VARIABLE)
        time.sleep(1)


def _files() -> dict[Path, os.stat_result]:
    found = {}
    for path in folder().iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat()
    return found


@contextlib.contextmanager
def locked(path: Path, how: int) -> Iterator[BinaryIO]:
    """Hold `path`'s lock file. BlockingIOError with LOCK_NB where somebody else holds it."""
    name = path.with_name(path.name + ".lock")
    while True:
        f = open(name, "ab")  # noqa: SIM115 (closed below)
        try:
            fcntl.flock(f, how)
            # whoever removed the file while we waited has left us a lock on nothing
            if os.fstat(f.fileno()).st_nlink:
                yield f
                return
        finally:
            f.close()


def remove(path: Path) -> bool:
    """Delete a scratch file, its partial and its lock, unless it is in use; whether that could be done."""
    try:
        with locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as lock:
            path.unlink(missing_ok=True)
            path.with_name(path.name + ".partial").unlink(missing_ok=True)
            Path(lock.name).unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True


@functools.cache
def _sweep_once() -> None:
    """What killed runs left behind, at a worker's first download."""
    sweep()


def sweep(older_s: float = KEEP_S) -> None:
    """Delete scratch files that no worker holds and none has touched for `older_s` seconds, and torn downloads."""
    before = time.time() - older_s
    for lock in folder().glob("*.lock"):
        path = lock.with_suffix("")
        used = []
        for p in (path, lock):
            with contextlib.suppress(FileNotFoundError):
                used.append(p.stat().st_mtime)
        torn = path.with_name(path.name + ".partial").exists()  # of a dead worker, if nobody holds the lock
        if torn or (used and max(used) < before):
            remove(path)
