"""Files from web servers: whole or by byte range, gone on with where the connection broke."""

from __future__ import annotations

import base64
import email.utils
import functools
import http.client
import io
import random
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from typing import Any, BinaryIO

from pipeline.faults import Fault, SourceFault, TransientFault, one_line
from pipeline.record import Source
from pipeline.sources import network
from pipeline.sources.names import CHUNK, Limits, place_of
from pipeline.sources.signed import clean, redacted
from pipeline.watch import progress

LATER = {408, 425, 429}  # HTTP answers that a later try may better, besides those from 500 on …
NEVER = {501, 505, 506, 510, 511}  # … but for these


class _Again(Exception):
    """An attempt failed in a way that the next may not; `wait` is what the server asked for, seconds."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


def get(source: Source, out: BinaryIO, span: tuple[int, int] | None, limits: Limits) -> int | None:
    """GET the whole file, or a span (offset, size) of it as far as there is one.

    A broken transfer goes on where it broke. Returns the size of the whole file where the server says it.
    Raises SourceFault, TransientFault when the tries are used up, WorkerFault where there is no network.
    """
    deadline = time.monotonic() + limits.total_s
    transfer = _Transfer(source, out, span, limits, deadline)
    failed, best = 0, 0
    while True:
        try:
            transfer.attempt()
            return transfer.size
        except _Again as e:
            failed = failed + 1 if out.tell() <= best else 1
            best = max(best, out.tell())
            if failed >= limits.tries:
                raise transfer.given_up(f"{e}, {failed} times in a row", e) from e
            wait = limits.backoff_s * 2 ** (failed - 1) * random.uniform(0.75, 1.25)
            wait = min(wait, limits.max_wait_s) if e.wait is None else e.wait
            if e.wait is not None and e.wait > limits.max_wait_s:
                raise transfer.given_up(f"{e}, and not before {e.wait:.0f} s", e) from e
            if time.monotonic() + wait > deadline:
                raise transfer.given_up(f"{e}, and {limits.total_s:g} s are over", e) from e
            time.sleep(wait)


class _Transfer:
    """One download: what is already in `out`, and what the server has said of the file."""

    def __init__(
        self,
        source: Source,
        out: BinaryIO,
        span: tuple[int, int] | None,
        limits: Limits,
        deadline: float,
    ):
        self.uri, self.out, self.span, self.limits, self.deadline = source.uri, out, span, limits, deadline
        self.address = place_of(source)
        try:
            self.url, self.login = _ascii_url(self.address)
            self.opener = _opener(source.uri, network.free_hosts(self.address, source.reach))
        except ValueError as e:
            raise SourceFault(f"{self.uri}: not a valid address: {self._said(e)}") from None
        self.size: int | None = None  # of the whole file
        self.total = span[1] if span else None  # bytes to end up with
        self.version = ""  # strong ETag or Last-Modified of the first answer

    def attempt(self) -> None:
        """Ask for what is missing and write it. Raises _Again, SourceFault, TransientFault."""
        try:
            with self.opener.open(self._request(), timeout=self.limits.timeout_s) as answer:
                self._accept(answer)
                self._copy(answer)
        except urllib.error.HTTPError as e:
            with e:
                self._refused(e)
        except http.client.InvalidURL as e:
            raise SourceFault(f"{self.uri}: not a valid address: {self._said(e)}") from None
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
            reason = getattr(e, "reason", e)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise SourceFault(
                    f"{self.uri}: {reason.verify_message}; its certificate is not trusted"
                ) from e
            if isinstance(reason, TimeoutError):
                raise _Again(f"no answer for {self.limits.timeout_s:g} s") from e
            raise _Again(self._said(reason) or type(reason).__name__) from e
        if self.total is not None and self.out.tell() < self.total:
            raise _Again(f"the connection broke after {self.out.tell()} of {self.total} bytes")

    def given_up(self, said: str, e: _Again) -> Fault:
        """What becomes of an attempt that is not repeated."""
        return network.fault_of(self.uri, said, e.__cause__, _proxy(self.url))

    def _said(self, e: object) -> str:
        return redacted(one_line(e), self.address)

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
        request = urllib.request.Request(self.url, headers=headers)
        if self.login:
            request.add_unredirected_header("Authorization", self.login)
        return request

    def _accept(self, answer: http.client.HTTPResponse) -> None:
        """Check that the body is what was asked for; start over where the server sends the whole file."""
        headers = answer.headers
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise SourceFault(
                f"{self.uri}: sent {headers['Content-Encoding']}-encoded although not asked for"
            )
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
            raise SourceFault(
                f"{self.uri}: the server does not send byte ranges; download the tar and give its path"
            )
        else:
            self._restart()
            self.size = self.total = answer.length  # None when the server does not say
        self.version = version
        if (self.total or 0) > self.limits.max_bytes:
            raise SourceFault(
                f"{self.uri}: {self.total} bytes are more than the limit of {self.limits.max_bytes}"
            )

    def _copy(self, answer: http.client.HTTPResponse) -> None:
        # read1 returns what has arrived, so that a trickle cannot hold us beyond the deadline
        while data := answer.read1(CHUNK):
            self.out.write(data)
            progress()
            have = self.out.tell()
            if have > self.limits.max_bytes:
                raise SourceFault(f"{self.uri}: more than the limit of {self.limits.max_bytes} bytes")
            if self.total is not None and have > self.total:
                self._restart()
                raise _Again(f"more than the {self.total} bytes that were announced")
            if time.monotonic() > self.deadline:
                raise TransientFault(
                    f"{self.uri}: {have} bytes in {self.limits.total_s:g} s; the server is too slow, the next "
                    "run tries it again",
                    tried=True,
                )

    def _restart(self) -> None:
        self.out.seek(0)
        self.out.truncate()

    def _refused(self, e: urllib.error.HTTPError) -> None:
        """Turn an HTTP error into _Again or SourceFault."""
        if e.code in LATER or (e.code >= 500 and e.code not in NEVER):
            raise _Again(f"HTTP {e.code} {self._said(e.reason)}", _retry_after(e.headers))
        if e.code == 416 and self.out.tell():  # our range ends behind the file: it has become shorter
            self._restart()
            raise _Again("the file changed while it was read")
        denied = "access denied" + ("; its signature may be too old" if self.address != self.uri else "")
        why = {
            401: denied,
            403: denied,
            404: "not found; the link is dead",
            410: "gone; the link is dead",
        }
        if e.code in range(300, 400):
            raise SourceFault(f"{self.uri}: HTTP {e.code}, redirects in a circle or too often") from None
        raise SourceFault(f"{self.uri}: HTTP {e.code}, {why.get(e.code, self._said(e.reason))}") from None


class HttpFile(io.RawIOBase):
    """A file on a web server, read by byte ranges."""

    def __init__(self, source: Source, limits: Limits):
        self.source, self.limits, self.at = source, limits, 0
        size = get(source, io.BytesIO(), (0, 1), limits)
        if size is None:
            raise SourceFault(
                f"{source.uri}: the server does not say how large it is; download it and give its path"
            )
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
            get(self.source, piece, (self.at, n), self.limits)
            buffer[:n] = piece.getbuffer()
            self.at += n
        return n


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Only on to http(s): a server must not point us at local files. A password goes to its own host only."""

    def __init__(self, uri: str):
        self.uri = uri

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        target = urllib.parse.urljoin(req.full_url, headers.get("Location", ""))
        if not target.lower().startswith(("http://", "https://")):
            raise SourceFault(f"{self.uri}: redirects to {clean(target)}, which is not http(s)")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req: Any, *args: Any) -> Any:
        new = super().redirect_request(req, *args)
        login = req.unredirected_hdrs.get("Authorization")
        if new is not None and login and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", login)
        return new


class _Web(urllib.request.AbstractHTTPHandler):
    """HTTP(S) to hosts that may be connected to, see `pipeline.sources.network`."""

    def __init__(self, uri: str, free: frozenset[str] | None):
        super().__init__()
        self.uri, self.free = uri, free

    def http_open(self, req: Any) -> Any:
        return self._open(http.client.HTTPConnection, req)

    def https_open(self, req: Any) -> Any:
        return self._open(http.client.HTTPSConnection, req)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _open(self, kind: Any, req: Any) -> Any:
        host = network.host_of(req.full_url)
        proxied = req.has_proxy() or getattr(req, "_tunnel_host", None)
        if proxied and self.free is not None and host not in self.free and network.named_private(host):
            raise network.refusal(self.uri, host)  # the proxy looks names up: there is no more to check

        def connection(host: str, **options: Any) -> Any:
            if kind is http.client.HTTPSConnection:
                options["context"] = _trusted()
            made = kind(host, **options)
            # where http.client makes its socket; of a proxy the person who set it has decided
            made._create_connection = network.connector(self.uri, None if proxied else self.free)
            return made

        return self.do_open(connection, req)


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The system's certificates, read once."""
    return ssl.create_default_context()


def _opener(uri: str, free: frozenset[str] | None) -> urllib.request.OpenerDirector:
    """HTTP and nothing else: no file, ftp or data handler is registered."""
    opener = urllib.request.OpenerDirector()
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.ProxyHandler(),
        _Web(uri, free),
        _Redirect(uri),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _proxy(url: str) -> str:
    """The host of the proxy that is asked for an address; '' where it is asked itself."""
    proxy = urllib.request.getproxies().get(urllib.parse.urlsplit(url).scheme, "")
    return network.host_of(proxy) if proxy and not urllib.request.proxy_bypass(network.host_of(url)) else ""


def _ascii_url(url: str) -> tuple[str, str]:
    """Spaces and non-ASCII letters escaped, what is already escaped left alone; and the Authorization header.

    Raises ValueError.
    """
    parts = urllib.parse.urlsplit(url)
    user, at, netloc = parts.netloc.rpartition("@")
    login = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
    host = netloc if netloc.isascii() else netloc.encode("idna").decode()
    safe = "/%:=&?~+!$,;'@()*[]"
    path, query = urllib.parse.quote(parts.path, safe), urllib.parse.quote(parts.query, safe)
    escaped = urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
    return escaped, f"Basic {login}" if at else ""


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
