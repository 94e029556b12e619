"""A source's bytes as a local file: in place, downloaded, or copied out of a tar.

    with localised(source) as local:
        decode(local.path)

A local file is used where it lies. Everything else is fetched once a node into a scratch folder and
stays there for the next stage, until `release` or, two hours later, the sweep. A scratch file is locked as
long as it is used, so that workers share one download and none loses a file it reads; it appears under
its name only when complete, so that a killed worker leaves nothing that could be taken for a video.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.faults import (
    MOMENTARY,
    Fault,
    SourceFault,
    StoreError,
    TransientFault,
    kind_of,
    sentence,
)
from pipeline.record import Source
from pipeline.sources import network
from pipeline.sources.http import HttpFile, get
from pipeline.sources.names import (
    CHUNK,
    LIMITS,
    OBJECTS,
    YOUTUBE,
    Limits,
    object_store,
    one_line,
    path_of,
    place_of,
)
from pipeline.sources.signed import redacted
from pipeline.sources.youtube import download

READ_AHEAD = 1 << 16  # bytes asked of a remote file at least, when seeking in it
KEEP_S = 2 * 3600.0  # a scratch file nobody has used for so long is swept
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # the scratch disk's fault


@dataclass(frozen=True)
class Localised:
    """A local regular file and the hex digest of its bytes ('' where no hash was asked for)."""

    path: str
    sha256: str


@contextlib.contextmanager
def localised(source: Source, hash: bool = True, limits: Limits = LIMITS) -> Iterator[Localised]:
    """The source as a local regular file for the length of the block.

    Raises SourceFault (one sentence: which source, what is wrong, what to do) for the source's faults,
    TransientFault for the moment's, WorkerFault without any network, StoreError where the scratch disk is full or
    not writable. Their stage is 'list' or 'fetch'.
    """
    with contextlib.ExitStack() as held:
        with _told(source):
            local = held.enter_context(_localised(source, hash, limits))
        yield local


@contextlib.contextmanager
def _localised(source: Source, hash: bool, limits: Limits) -> Iterator[Localised]:
    if source.problem:
        kind = TransientFault if source.passing else SourceFault
        raise kind(source.problem, stage="list", tried=True)
    path = path_of(source.uri) if source.member is None else None
    if path is not None:
        with _open_regular(path, source.uri) as f:
            digest = _digest(f) if hash else ""
        yield Localised(path, digest)
        return
    with _cached(source, limits) as f:
        yield Localised(f.name, _digest(f) if hash else "")


@contextlib.contextmanager
def _told(source: Source) -> Iterator[None]:
    """Trouble of fetching a source: under its own stage, named after the source, without its secrets."""
    try:
        yield
    except Fault as e:
        e.stage = e.stage or "fetch"
        said = redacted(str(e), source.address)
        if said == str(e):
            raise
        raise type(e)(said, stage=e.stage, tried=e.tried) from None
    except Exception as e:
        said = e.strerror or one_line(e) if isinstance(e, OSError) else sentence(e)
        said = redacted(f"{source.uri}: cannot be read: {said}", source.address)
        raise kind_of(e)(said, stage="fetch") from (e if source.address is None else None)


def release(source: Source) -> None:
    """Delete the source's scratch copy, unless another worker is using it. Local files stay."""
    if source.member is None and path_of(source.uri) is not None:
        return
    _remove(_scratch() / _key(source))


# The scratch folder -------------------------------------------------------------------------------


def _scratch() -> Path:
    """This user's folder for downloads on this node, private and really ours."""
    folder = Path(tempfile.gettempdir()) / f"clipmill-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
    except OSError as e:
        raise StoreError(
            f"cannot use {folder} for downloads: {e.strerror}; set TMPDIR to another disk"
        ) from e
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise StoreError(f"{folder} belongs to somebody else; remove it or set TMPDIR to another folder")
    return folder


def _key(source: Source) -> str:
    return hashlib.sha256(f"{source.uri}\0{source.member}".encode()).hexdigest()[:32]


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[BinaryIO]:
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


@contextlib.contextmanager
def _cached(source: Source, limits: Limits) -> Iterator[io.BufferedReader]:
    """The source's scratch copy, opened and locked against removal; fetched first where it is missing."""
    path = _scratch() / _key(source)
    partial = path.with_name(path.name + ".partial")
    while True:
        with _locked(path, fcntl.LOCK_EX) as lock:
            if not path.exists():
                _sweep_once()
                try:
                    _fetch(source, partial, limits)
                    partial.replace(path)
                except BaseException as e:
                    partial.unlink(missing_ok=True)
                    Path(lock.name).unlink()  # or a million dead links would leave a million locks
                    if isinstance(e, OSError) and e.errno in FULL:
                        raise StoreError(
                            f"cannot download to {path.parent}: {e.strerror}; free some space there or set "
                            "TMPDIR to another disk, then run the same command again"
                        ) from e
                    raise
        with _locked(path, fcntl.LOCK_SH):
            try:
                f = open(path, "rb")  # noqa: SIM115 (closed below)
            except FileNotFoundError:
                continue  # released between the two locks
            with f:
                os.utime(path)
                yield f
                return


def _remove(path: Path) -> None:
    """Delete a scratch file, its partial and its lock, unless it is in use."""
    with contextlib.suppress(BlockingIOError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as lock:
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        Path(lock.name).unlink(missing_ok=True)


@functools.cache
def _sweep_once() -> None:
    """What killed runs left behind, at a worker's first download."""
    sweep()


def sweep(older_s: float = KEEP_S) -> None:
    """Delete scratch files that no worker holds and none has touched for `older_s` seconds."""
    before = time.time() - older_s
    for lock in _scratch().glob("*.lock"):
        path = lock.with_suffix("")
        used = []
        for p in (path, lock, path.with_name(path.name + ".partial")):
            with contextlib.suppress(FileNotFoundError):
                used.append(p.stat().st_mtime)
        if used and max(used) < before:
            _remove(path)


# Reading ------------------------------------------------------------------------------------------


def _open_regular(path: str, uri: str) -> io.BufferedReader:
    """Open a regular file, following links; never blocks on a FIFO, never touches a device."""
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            raise SourceFault(
                f"{uri}: not a regular file ({_KINDS.get(stat.S_IFMT(info.st_mode), 'special')})"
            )
        f = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    except ValueError as e:
        raise SourceFault(f"{uri}: not a path: {e}") from e
    except OSError as e:
        if kind_of(e) is not SourceFault:
            raise
        fix = {
            errno.ENOENT: "no such file; check the path",
            errno.ENOTDIR: "no such file; check the path",
            errno.EACCES: "permission denied; make it readable",
            errno.ELOOP: "its symbolic links lead in a circle",
        }
        raise SourceFault(f"{uri}: {fix.get(e.errno or 0, e.strerror)}") from e
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        f.close()
        raise SourceFault(f"{uri}: not a regular file")
    return f


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _digest(f: io.BufferedReader) -> str:
    f.seek(0)
    return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def random_access(source: Source, limits: Limits = LIMITS) -> Iterator[tuple[io.BufferedReader, int]]:
    """A local or remote file to seek in, and its size; what is not read is not transferred.

    Raises SourceFault, TransientFault and WorkerFault, also while it is read.
    """
    address = place_of(source)
    path = path_of(address)
    if path is not None:
        with _disk_faults(source.uri), _open_regular(path, source.uri) as f:
            yield f, os.fstat(f.fileno()).st_size
    elif address.startswith(OBJECTS):
        fs, key = object_store(address, source.reach)
        with _object_faults(source), fs.open_input_file(key) as f:
            yield io.BufferedReader(cast(Any, f), READ_AHEAD), f.size()
    else:
        raw = HttpFile(source, limits)
        yield io.BufferedReader(raw, READ_AHEAD), raw.size


@contextlib.contextmanager
def _disk_faults(uri: str) -> Iterator[None]:
    """Name the file that a disk could not read."""
    try:
        yield
    except OSError as e:
        raise kind_of(e)(f"{uri}: cannot be read: {e.strerror or one_line(e)}") from e


def _fetch(source: Source, to: Path, limits: Limits) -> None:
    """Write the source's bytes to `to`, whole, or raise."""
    address = place_of(source)
    path = path_of(address)
    if YOUTUBE.match(address):
        download(source, to, limits)
        return
    with open(to, "wb") as out:
        if path is not None:
            assert source.member is not None
            with _open_regular(path, source.uri) as f:
                _copy_range(f, out, *source.member, source.uri)
        elif address.startswith(("http://", "https://")):
            get(source, out, source.member, limits)
            if source.member and out.tell() < source.member[1]:
                raise SourceFault(f"{source.uri}: the tar ends inside it; it has changed since it was listed")
        elif address.startswith(OBJECTS):
            _object(source, address, out, limits)
        else:
            raise SourceFault(
                f"{source.uri}: unknown kind of address; use a path, file://, http(s)://, s3:// or gs://"
            )
        out.flush()
        os.fsync(out.fileno())  # or a power cut might leave the name without the bytes


def _copy_range(src: Any, out: BinaryIO, offset: int, size: int, uri: str) -> None:
    src.seek(offset)
    left = size
    while left:
        data = src.read(min(CHUNK, left))
        if not data:
            raise SourceFault(f"{uri}: the file ends {left} bytes early; it has changed since it was listed")
        out.write(data)
        left -= len(data)


def _object(source: Source, address: str, out: BinaryIO, limits: Limits) -> None:
    """From S3 or GCS; pyarrow's client retries by itself."""
    fs, key = object_store(address, source.reach)
    with _object_faults(source), fs.open_input_file(key) as f:
        offset, size = source.member or (0, f.size())
        if size > limits.max_bytes:
            raise SourceFault(f"{source.uri}: {size} bytes are more than the limit of {limits.max_bytes}")
        _copy_range(f, out, offset, size, source.uri)


# pyarrow gives no code: what its sentences say. 'AWS Error SLOW_DOWN during HeadObject operation: … (HTTP status 503)'
PASSING = re.compile(
    r"HTTP status (408|429|5\d\d)|AWS Error (SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|"
    r"REQUEST_TIMEOUT|REQUEST_EXPIRED|NETWORK_CONNECTION)|UNAVAILABLE|DEADLINE_EXCEEDED|curlCode|timed? ?out"
)
NO_HOST = re.compile(r"curlCode: 6\b|resolve host", re.I)
DENIED = re.compile(r"HTTP status 40[13]|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH")


@contextlib.contextmanager
def _object_faults(source: Source) -> Iterator[None]:
    """Say what an object store's exceptions mean for a source."""
    uri = source.uri
    try:
        yield
    except FileNotFoundError as e:
        raise SourceFault(f"{uri}: not found; check the bucket and the key") from e
    except (pa.ArrowException, OSError) as e:
        code = getattr(e, "errno", None)
        if code in FULL:
            raise  # not the source's fault
        said = redacted(one_line(e), source.address)
        if NO_HOST.search(said):
            raise network.fault_of(uri, said, socket.gaierror(socket.EAI_AGAIN, said)) from None
        if PASSING.search(said) or code in MOMENTARY:
            raise TransientFault(f"{uri}: cannot be read now: {said}", tried=True) from None
        why = "access denied; check the credentials" if DENIED.search(said) else "cannot be read"
        raise SourceFault(f"{uri}: {why}: {said}") from None
