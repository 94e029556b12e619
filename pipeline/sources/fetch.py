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
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.faults import SourceFault, StoreError
from pipeline.record import Source
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

    Raises SourceFault (one sentence: which source, what is wrong, what to do) for the source's faults and
    StoreError where the scratch disk is full or not writable.
    """
    if source.problem:
        raise SourceFault(source.problem)
    path = path_of(source.uri) if source.member is None else None
    if path is not None:
        with _open_regular(path, source.uri) as f:
            digest = _digest(f) if hash else ""
        yield Localised(path, digest)
        return
    with _cached(source, limits) as f:
        yield Localised(f.name, _digest(f) if hash else "")


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
        download(uri, to, limits)
        return
    with open(to, "wb") as out:
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
        if getattr(e, "errno", None) in FULL:
            raise  # not the source's fault
        raise SourceFault(f"{uri}: cannot be read: {one_line(e)}") from e
