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
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.faults import SourceFault, WorkerFault
from pipeline.record import Source
from pipeline.sources import scratch
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
    tar_of,
)
from pipeline.sources.youtube import download

READ_AHEAD = 1 << 16  # bytes asked of a remote file at least, when seeking in it


@dataclass(frozen=True)
class Localised:
    """A local regular file and the hex digest of its bytes ('' where no hash was asked for)."""

    path: str
    sha256: str


@contextlib.contextmanager
def localised(source: Source, hash: bool = True, limits: Limits = LIMITS) -> Iterator[Localised]:
    """The source as a local regular file for the length of the block.

    Raises SourceFault (one sentence: which source, what is wrong, what to do) for the source's faults and
    WorkerFault where the scratch disk is full or not writable.
    """
    if source.problem:
        raise SourceFault(source.problem)
    path = path_of(source.uri) if source.member is None else None
    if path is not None:
        with _open_regular(path, source.uri) as f:
            digest = _digest(f) if hash else ""
        yield Localised(path, digest)
        return
    with scratch.cached(_key(source), lambda to: _fetch(source, to, limits), source.uri) as f:
        yield Localised(f.name, _digest(f) if hash else "")


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
def random_access(uri: str, limits: Limits = LIMITS) -> Iterator[tuple[io.BufferedReader, int]]:
    """A local or remote file to seek in, and its size; what is not read is not transferred.

    Raises SourceFault, also while it is read.
    """
    path = path_of(uri)
    if path is not None:
        with _open_regular(path, uri) as f:
            yield f, os.fstat(f.fileno()).st_size
    elif uri.startswith(OBJECTS):
        fs, key = object_store(uri)
        with _object_faults(uri), fs.open_input_file(key) as f:
            yield io.BufferedReader(cast(Any, f), READ_AHEAD), f.size()
    else:
        raw = HttpFile(uri, limits)
        yield io.BufferedReader(raw, READ_AHEAD), raw.size


def _fetch(source: Source, to: Path, limits: Limits) -> None:
    """Write the source's bytes to `to`, whole, or raise."""
    uri = source.uri if source.member is None else tar_of(source.uri)
    path = path_of(uri)
    if YOUTUBE.match(uri):
        download(uri, to, replace(limits, max_bytes=min(limits.max_bytes, scratch.limit())))
        scratch.room(to, 0, source.uri)
        return
    with scratch.writer(to, source.uri) as out:
        if path is not None:
            assert source.member is not None
            with _open_regular(path, uri) as f:
                _copy_range(f, out, *source.member, source.uri)
        elif uri.startswith(("http://", "https://")):
            get(uri, out, source.member, limits)
            if source.member and out.tell() < source.member[1]:
                raise SourceFault(f"{source.uri}: the tar ends inside it; it has changed since it was listed")
        elif uri.startswith(OBJECTS):
            _object(source, uri, out, limits)
        else:
            raise SourceFault(
                f"{uri}: unknown kind of address; use a path, file://, http(s)://, s3:// or gs://"
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


def _object(source: Source, uri: str, out: BinaryIO, limits: Limits) -> None:
    """From S3 or GCS; pyarrow's client retries by itself."""
    fs, key = object_store(uri)
    with _object_faults(uri), fs.open_input_file(key) as f:
        offset, size = source.member or (0, f.size())
        if size > limits.max_bytes:
            raise SourceFault(f"{uri}: {size} bytes are more than the limit of {limits.max_bytes}")
        _copy_range(f, out, offset, size, source.uri)


@contextlib.contextmanager
def _object_faults(uri: str) -> Iterator[None]:
    """Say what an object store's exceptions mean for `uri`."""
    try:
        yield
    except FileNotFoundError as e:
        raise SourceFault(f"{uri}: not found; check the bucket and the key") from e
    except (pa.ArrowException, OSError) as e:
        if getattr(e, "errno", None) in scratch.FULL:
            raise  # not the source's fault
        raise SourceFault(f"{uri}: cannot be read: {one_line(e)}") from e
