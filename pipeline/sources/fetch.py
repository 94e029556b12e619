"""A source's bytes as a local file: in place, downloaded, or copied out of a tar.

    with localised(source) as local:
        decode(local.path)

A local file is used where it lies. Everything else is fetched once a node into a scratch folder
(`pipeline.sources.scratch`) and stays there for the next stage, until `release`, or until others need the room, or,
two hours later, the sweep.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.faults import (
    MOMENTARY,
    Fault,
    SourceFault,
    TransientFault,
    WorkerFault,
    kind_of,
    one_line,
    sentence,
)
from pipeline.record import Source
from pipeline.sources import network, scratch
from pipeline.sources.http import HttpFile, get
from pipeline.sources.names import (
    CHUNK,
    LIMITS,
    OBJECTS,
    YOUTUBE,
    Limits,
    object_store,
    path_of,
    place_of,
    tar_of,
)
from pipeline.sources.signed import redacted
from pipeline.sources.youtube import download
from pipeline.watch import progress

READ_AHEAD = 1 << 16  # bytes asked of a remote file at least, when seeking in it


@dataclass(frozen=True)
class Localised:
    """A local regular file and the hex digest of its bytes ('' where no hash was asked for)."""

    path: str
    sha256: str


@contextlib.contextmanager
def localised(source: Source, hash: bool = True, limits: Limits = LIMITS) -> Iterator[Localised]:
    """The source as a local regular file for the length of the block.

    Raises SourceFault (one sentence: which source, what is wrong, what to do) for the source's faults,
    TransientFault for the moment's, WorkerFault without any network and where the scratch disk is full or not
    writable. Their stage is 'list' or 'fetch'.
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
    with scratch.cached(_key(source), lambda to: _fetch(source, to, limits), source.uri) as f:
        yield Localised(f.name, _digest(f) if hash else "")


def local_path(source: Source) -> str | None:
    """The local file that holds a source's bytes: its own or its tar; None where they are elsewhere."""
    if source.problem:
        return None
    return path_of(source.uri if source.member is None else tar_of(source.uri))


def sha256_of(source: Source) -> str | None:
    """Of a local source's bytes; None where they are elsewhere or cannot be read."""
    path = local_path(source)
    if path is None:
        return None
    try:
        with _open_regular(path, source.uri) as f:
            if source.member is None:
                return _digest(f)
            digest = hashlib.sha256()
            _copy_range(f, digest.update, *source.member, source.uri)
            return digest.hexdigest()
    except (OSError, SourceFault):
        return None


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
    """Delete the source's scratch copy, unless another worker is using it. Local files stay; raises nothing."""
    if source.member is None and path_of(source.uri) is not None:
        return
    with contextlib.suppress(OSError, WorkerFault):
        if (path := scratch.folder() / _key(source)).exists():
            scratch.remove(path)


def _key(source: Source) -> str:
    """Of its scratch file."""
    return hashlib.sha256(f"{source.uri}\0{source.member}".encode()).hexdigest()[:32]


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
        download(source, to, replace(limits, max_bytes=min(limits.max_bytes, scratch.limit())))
        scratch.room(to, 0, source.uri)
        return
    with scratch.writer(to, source.uri) as out:
        if path is not None:
            assert source.member is not None
            with _open_regular(path, source.uri) as f:
                _copy_range(f, out.write, *source.member, source.uri)
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


def _copy_range(src: Any, write: Callable[[bytes], Any], offset: int, size: int, uri: str) -> None:
    src.seek(offset)
    left = size
    while left:
        data = src.read(min(CHUNK, left))
        if not data:
            raise SourceFault(f"{uri}: the file ends {left} bytes early; it has changed since it was listed")
        write(data)
        left -= len(data)
        progress()


def _object(source: Source, address: str, out: BinaryIO, limits: Limits) -> None:
    """From S3 or GCS; pyarrow's client retries by itself."""
    fs, key = object_store(address, source.reach)
    with _object_faults(source), fs.open_input_file(key) as f:
        offset, size = source.member or (0, f.size())
        if size > limits.max_bytes:
            raise SourceFault(f"{source.uri}: {size} bytes are more than the limit of {limits.max_bytes}")
        _copy_range(f, out.write, offset, size, source.uri)


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
        if code in scratch.FULL:
            raise  # not the source's fault
        said = redacted(one_line(e), source.address)
        if NO_HOST.search(said):
            raise network.fault_of(uri, said, socket.gaierror(socket.EAI_AGAIN, said)) from None
        if PASSING.search(said) or code in MOMENTARY:
            raise TransientFault(f"{uri}: cannot be read now: {said}", tried=True) from None
        why = "access denied; check the credentials" if DENIED.search(said) else "cannot be read"
        raise SourceFault(f"{uri}: {why}: {said}") from None
