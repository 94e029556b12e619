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
import email.utils
import errno
import fcntl
import functools
import hashlib
import http.client
import io
import logging
import os
import random
import re
import shutil
import ssl
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.io.store import StoreError
from pipeline.record import Source
from pipeline.stages import StageError

CHUNK = 1 << 20
READ_AHEAD = 1 << 16  # bytes asked of a remote file at least, when seeking in it
OBJECTS = ("s3://", "gs://", "gcs://")
KEEP_S = 2 * 3600.0  # a scratch file nobody has used for so long is swept
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}  # the scratch disk's fault
RETRY = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers that a later try may better
YOUTUBE = re.compile(r"https?://([\w-]+\.)*(youtube\.com|youtu\.be|youtube-nocookie\.com)(/|$)", re.I)


@dataclass(frozen=True)
class Limits:
    """How patient and how greedy a download is."""

    timeout_s: float = 30.0  # to connect, and between two pieces of data
    total_s: float = 3600.0  # for the whole download, waits included
    max_bytes: int = 64 << 30
    tries: int = 5  # in a row that bring no new byte
    backoff_s: float = 1.0  # wait before the second try; doubled each time
    max_wait_s: float = 120.0  # a server that asks for more is given up
    youtube_height: int = 720  # pixels; Panda-70M's own size


@dataclass(frozen=True)
class Localised:
    """A local regular file and the hex digest of its bytes ('' where no hash was asked for)."""

    path: str
    sha256: str


@contextlib.contextmanager
def localised(source: Source, hash: bool = True, limits: Limits = Limits()) -> Iterator[Localised]:
    """The source as a local regular file for the length of the block.

    Raises StageError (one sentence: which source, what is wrong, what to do) for the source's faults and
    StoreError where the scratch disk is full or not writable.
    """
    if source.problem:
        raise StageError(source.problem)
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


# Names: what stands in Source.uri ------------------------------------------------------------------


def uri_of(path: str) -> str:
    """The uri of a local path: the absolute path; as file:// URL where its bytes are not UTF-8.

    Symbolic links are not resolved. `path_of` is the inverse.
    """
    path = os.path.abspath(path)  # noqa: PTH100 (resolve() would follow links)
    try:
        path.encode()
    except UnicodeEncodeError:  # undecodable bytes, which neither parquet nor JSON can hold
        return "file://" + urllib.parse.quote(os.fsencode(path))
    return path


def path_of(uri: str) -> str | None:
    """The local path of a uri; None for what has to be fetched."""
    if file := re.match("file://(localhost(?=/))?", uri, re.I):
        return os.fsdecode(urllib.parse.unquote_to_bytes(uri[file.end() :]))
    return None if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri) else uri


def member_uri(tar: str, member: str) -> str:
    """'TAR#member': '%', '#' and undecodable bytes of the member as %XX, so that the last '#' parts them."""
    return tar + "#" + re.sub("[%#\udc80-\udcff]", lambda c: f"%{ord(c[0]) & 0xFF:02X}", member)


def tar_of(uri: str) -> str:
    """The uri of the tar that `member_uri` named."""
    return uri.rpartition("#")[0]


def object_store(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and 'bucket/key' of an s3:// or gs:// uri; the key is taken literally.

    pyarrow's options may follow the key, e.g. '?region=…' or '?endpoint_override=localhost:9000&scheme=http'.
    Raises StageError.
    """
    scheme, rest = uri.split("://", 1)
    place, options = split_options(rest)
    bucket = place.split("/", 1)[0]
    try:
        fs, _ = pafs.FileSystem.from_uri(f"{scheme}://{bucket}{options}")
    except (pa.ArrowException, OSError, ValueError) as e:
        raise StageError(f"{uri}: {_line(e)}; write it as {scheme}://bucket/key") from e
    return fs, place


def split_options(place: str) -> tuple[str, str]:
    """'bucket/key?region=x' → ('bucket/key', '?region=x'); a '?' without 'name=' belongs to the key."""
    found = re.search(r"\?[a-z_]+=.*$", place, re.S)
    return (place[: found.start()], found.group()) if found else (place, "")


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
            raise StageError(
                f"{uri}: not a regular file ({_KINDS.get(stat.S_IFMT(info.st_mode), 'special')})"
            )
        f = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    except ValueError as e:
        raise StageError(f"{uri}: not a path: {e}") from e
    except OSError as e:
        fix = {
            errno.ENOENT: "no such file; check the path",
            errno.ENOTDIR: "no such file; check the path",
            errno.EACCES: "permission denied; make it readable",
            errno.ELOOP: "its symbolic links lead in a circle",
        }
        raise StageError(f"{uri}: {fix.get(e.errno or 0, e.strerror)}") from e
    if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
        f.close()
        raise StageError(f"{uri}: not a regular file")
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
def random_access(uri: str, limits: Limits = Limits()) -> Iterator[tuple[io.BufferedReader, int]]:
    """A local or remote file to seek in, and its size; what is not read is not transferred.

    Raises StageError, also while it is read.
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
        raw = _HttpFile(uri, limits)
        yield io.BufferedReader(raw, READ_AHEAD), raw.size


def _fetch(source: Source, to: Path, limits: Limits) -> None:
    """Write the source's bytes to `to`, whole, or raise."""
    uri = source.uri if source.member is None else tar_of(source.uri)
    path = path_of(uri)
    if YOUTUBE.match(uri):
        _youtube(uri, to, limits)
        return
    with open(to, "wb") as out:
        if path is not None:
            assert source.member is not None
            with _open_regular(path, uri) as f:
                _copy_range(f, out, *source.member, source.uri)
        elif uri.startswith(("http://", "https://")):
            _http(uri, out, source.member, limits)
            if source.member and out.tell() < source.member[1]:
                raise StageError(f"{source.uri}: the tar ends inside it; it has changed since it was listed")
        elif uri.startswith(OBJECTS):
            _object(source, uri, out, limits)
        else:
            raise StageError(
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
            raise StageError(f"{uri}: the file ends {left} bytes early; it has changed since it was listed")
        out.write(data)
        left -= len(data)


def _object(source: Source, uri: str, out: BinaryIO, limits: Limits) -> None:
    """From S3 or GCS; pyarrow's client retries by itself."""
    fs, key = object_store(uri)
    with _object_faults(uri), fs.open_input_file(key) as f:
        offset, size = source.member or (0, f.size())
        if size > limits.max_bytes:
            raise StageError(f"{uri}: {size} bytes are more than the limit of {limits.max_bytes}")
        _copy_range(f, out, offset, size, source.uri)


@contextlib.contextmanager
def _object_faults(uri: str) -> Iterator[None]:
    """Say what an object store's exceptions mean for `uri`."""
    try:
        yield
    except FileNotFoundError as e:
        raise StageError(f"{uri}: not found; check the bucket and the key") from e
    except (pa.ArrowException, OSError) as e:
        if getattr(e, "errno", None) in FULL:
            raise  # not the source's fault
        raise StageError(f"{uri}: cannot be read: {_line(e)}") from e


class _Again(Exception):
    """An attempt failed in a way that the next may not; `wait` is what the server asked for, seconds."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


def _http(uri: str, out: BinaryIO, span: tuple[int, int] | None, limits: Limits) -> int | None:
    """GET the whole file, or a span (offset, size) of it as far as there is one.

    A broken transfer goes on where it broke. Returns the size of the whole file where the server says it.
    Raises StageError.
    """
    deadline = time.monotonic() + limits.total_s
    transfer = _Transfer(uri, out, span, limits, deadline)
    failed, best = 0, 0
    while True:
        try:
            transfer.attempt()
            return transfer.size
        except _Again as e:
            failed = failed + 1 if out.tell() <= best else 1
            best = max(best, out.tell())
            if failed >= limits.tries:
                raise StageError(f"{uri}: {e}, {failed} times in a row; try again later") from e
            wait = limits.backoff_s * 2 ** (failed - 1) * random.uniform(0.75, 1.25)
            wait = min(wait, limits.max_wait_s) if e.wait is None else e.wait
            if e.wait is not None and e.wait > limits.max_wait_s:
                raise StageError(f"{uri}: {e}, and not before {e.wait:.0f} s; try again later") from e
            if time.monotonic() + wait > deadline:
                raise StageError(f"{uri}: {e}, and {limits.total_s:g} s are over; try again later") from e
            time.sleep(wait)


class _Transfer:
    """One download: what is already in `out`, and what the server has said of the file."""

    def __init__(
        self, uri: str, out: BinaryIO, span: tuple[int, int] | None, limits: Limits, deadline: float
    ):
        self.uri, self.out, self.span, self.limits, self.deadline = uri, out, span, limits, deadline
        self.url = _ascii_url(uri)
        self.opener = _opener()
        self.size: int | None = None  # of the whole file
        self.total = span[1] if span else None  # bytes to end up with
        self.version = ""  # strong ETag or Last-Modified of the first answer

    def attempt(self) -> None:
        """Ask for what is missing and write it. Raises _Again or StageError."""
        try:
            with self.opener.open(self._request(), timeout=self.limits.timeout_s) as answer:
                self._accept(answer)
                self._copy(answer)
        except urllib.error.HTTPError as e:
            with e:
                self._refused(e)
        except http.client.InvalidURL as e:
            raise StageError(f"{self.uri}: not a valid address: {_line(e)}") from e
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            reason = getattr(e, "reason", e)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise StageError(
                    f"{self.uri}: {reason.verify_message}; its certificate is not trusted"
                ) from e
            if isinstance(reason, TimeoutError):
                raise _Again(f"no answer for {self.limits.timeout_s:g} s") from e
            raise _Again(_line(reason) or type(reason).__name__) from e
        if self.total is not None and self.out.tell() < self.total:
            raise _Again(f"the connection broke after {self.out.tell()} of {self.total} bytes")

    def _request(self) -> urllib.request.Request:
        headers = {"User-Agent": "clipmill", "Accept": "*/*", "Accept-Encoding": "identity"}
        have = self.out.tell()
        if self.span:
            first, size = self.span
            headers["Range"] = f"bytes={first + have}-{first + size - 1}"
        elif have:
            headers["Range"] = f"bytes={have}-"
        if have and self.version:
            headers["If-Range"] = self.version
        return urllib.request.Request(self.url, headers=headers)

    def _accept(self, answer: http.client.HTTPResponse) -> None:
        """Check that the body is what was asked for; start over where the server sends the whole file."""
        headers = answer.headers
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise StageError(f"{self.uri}: sent {headers['Content-Encoding']}-encoded although not asked for")
        etag = headers.get("ETag", "")
        version = etag if etag.startswith('"') else headers.get("Last-Modified", "")
        if answer.status == 206:
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", "").strip())
            first, length = self.span or (0, None)
            size = None if found is None or found[3] == "*" else int(found[3])
            changed = version != self.version or size != self.size
            if found is None or int(found[1]) != first + self.out.tell() or (self.out.tell() and changed):
                self._restart()
                raise _Again("the file changed while it was read")
            self.size = size
            if size is not None:
                self.total = size - first if length is None else min(length, size - first)
        elif self.span:
            raise StageError(
                f"{self.uri}: the server does not send byte ranges; download the tar and give its path"
            )
        else:
            self._restart()
            self.size = self.total = answer.length  # None when the server does not say
        self.version = version
        if (self.total or 0) > self.limits.max_bytes:
            raise StageError(
                f"{self.uri}: {self.total} bytes are more than the limit of {self.limits.max_bytes}"
            )

    def _copy(self, answer: http.client.HTTPResponse) -> None:
        # read1 returns what has arrived, so that a trickle cannot hold us beyond the deadline
        while data := answer.read1(CHUNK):
            self.out.write(data)
            have = self.out.tell()
            if have > self.limits.max_bytes:
                raise StageError(f"{self.uri}: more than the limit of {self.limits.max_bytes} bytes")
            if self.total is not None and have > self.total:
                self._restart()
                raise _Again(f"more than the {self.total} bytes that were announced")
            if time.monotonic() > self.deadline:
                raise StageError(
                    f"{self.uri}: {have} bytes in {self.limits.total_s:g} s; the server is too slow"
                )

    def _restart(self) -> None:
        self.out.seek(0)
        self.out.truncate()

    def _refused(self, e: urllib.error.HTTPError) -> None:
        """Turn an HTTP error into _Again or StageError."""
        if e.code in RETRY:
            raise _Again(f"HTTP {e.code} {e.reason}", _retry_after(e.headers)) from e
        if e.code == 416 and self.out.tell():  # our range ends behind the file: it has become shorter
            self._restart()
            raise _Again("the file changed while it was read") from e
        why = {
            401: "access denied",
            403: "access denied",
            404: "not found; the link is dead",
            410: "gone; the link is dead",
        }
        if e.code in range(300, 400):
            raise StageError(f"{self.uri}: HTTP {e.code}, redirects in a circle or too often") from e
        raise StageError(f"{self.uri}: HTTP {e.code}, {why.get(e.code, _line(e.reason))}") from e


class _HttpFile(io.RawIOBase):
    """A file on a web server, read by byte ranges."""

    def __init__(self, uri: str, limits: Limits):
        self.uri, self.limits, self.at = uri, limits, 0
        size = _http(uri, io.BytesIO(), (0, 1), limits)
        if size is None:
            raise StageError(f"{uri}: the server does not say how large it is; download it and give its path")
        self.size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        n = max(0, min(len(buffer), self.size - self.at))
        if n:
            piece = io.BytesIO()
            _http(self.uri, piece, (self.at, n), self.limits)
            buffer[:n] = piece.getbuffer()
            self.at += n
        return n


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Only on to http(s): a server must not point us at local files."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urllib.parse.urljoin(req.full_url, headers.get("Location", ""))
        if not target.lower().startswith(("http://", "https://")):
            raise StageError(f"{req.full_url}: redirects to {target}, which is not http(s)")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and nothing else: no file, ftp or data handler is registered."""
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        _Redirect(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _ascii_url(url: str) -> str:
    """Spaces and non-ASCII letters escaped, what is already escaped left alone."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    safe = "/%:=&?~+!$,;'@()*[]"
    path, query = urllib.parse.quote(parts.path, safe), urllib.parse.quote(parts.query, safe)
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


def _retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; None where there is none."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _youtube(uri: str, to: Path, limits: Limits) -> None:
    """Through yt-dlp, best streams up to `youtube_height`, joined as mp4."""
    try:
        import yt_dlp
    except ImportError as e:
        raise StageError(f"{uri}: YouTube videos need yt-dlp; pip install clipmill[youtube]") from e
    from pipeline.io import ffmpeg

    deadline = time.monotonic() + limits.total_s

    def in_time(_: dict[str, Any]) -> None:
        if time.monotonic() > deadline:
            raise StageError(f"{uri}: not downloaded in {limits.total_s:g} s; the server is too slow")

    said = logging.getLogger("clipmill.yt_dlp")
    said.disabled = True  # it says on the terminal what it also raises
    height = f"[height<={limits.youtube_height}]"
    folder = to.with_suffix(".youtube")
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        "paths": {"home": str(folder)},
        "outtmpl": "video.%(ext)s",
        "format": f"bv*{height}+ba/b{height}/bv*+ba/b",
        "merge_output_format": "mp4",
        "ffmpeg_location": ffmpeg.find(),
        "noplaylist": True,
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "logger": said,
        "retries": limits.tries,
        "fragment_retries": limits.tries,
        "socket_timeout": limits.timeout_s,
        "max_filesize": limits.max_bytes,
        "progress_hooks": [in_time],
    }
    try:
        with yt_dlp.YoutubeDL(options) as download:
            download.download([uri])
        files = sorted(folder.glob("video.*"))
        if len(files) != 1:
            raise StageError(f"{uri}: yt-dlp brought no video, or more than {limits.max_bytes} bytes")
        files[0].replace(to)
    except yt_dlp.utils.YoutubeDLError as e:
        raise StageError(f"{uri}: {_line(e).removeprefix('ERROR: ')}") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _line(e: object) -> str:
    return " ".join(str(e).split())
