"""Connections to a server: through the proxy that the environment names, and each step of them bounded in time.

urllib3 bounds the wait for the next bytes, and gives the time for connecting to the sending of a request too. So a
server that sends its headers a byte a second would be waited for without end, and a clip of many megabytes would fail
on a slow line.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.recipe_schema import RecipeError


def pool(base: str, size: int, timeout_s: float) -> Any:
    """A urllib3.PoolManager, or ProxyManager, of that many connections to `base`. Raises RecipeError for the proxy.

    Args:
        timeout_s: sending a request may take so long, and the headers of an answer too.
    """
    import urllib3
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Bounded:
        sock: Any
        timeout: Any

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            self.sock.settimeout(timeout_s)

        def getresponse(self) -> Any:
            sock = self.sock
            late = threading.Timer(self.timeout, _hang_up, (sock,))
            late.daemon = True
            late.start()
            try:
                return super().getresponse()  # type: ignore[misc]
            finally:
                late.cancel()

    class Http(HTTPConnectionPool):
        ConnectionCls = type("BoundedHTTP", (Bounded, HTTPConnection), {})

    class Https(HTTPSConnectionPool):
        ConnectionCls = type("BoundedHTTPS", (Bounded, HTTPSConnection), {})

    proxy = _proxy(base)
    if proxy is None:
        made = urllib3.PoolManager(maxsize=size)
    else:
        parts = urlsplit(proxy)
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}" if parts.username else None
        headers = urllib3.make_headers(proxy_basic_auth=login) if login else None
        made = urllib3.ProxyManager(proxy, maxsize=size, proxy_headers=headers)
    made.pool_classes_by_scheme = {"http": Http, "https": Https}
    return made


def _proxy(base: str) -> str | None:
    """The URL of the proxy for an address; None where it is reached directly."""
    parts = urlsplit(base)
    found = urllib.request.getproxies()
    proxy = found.get(parts.scheme) or found.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        said = urlsplit(proxy)
        good = said.scheme in ("http", "https") and bool(said.hostname) and said.port != 0
    except ValueError:
        good = False
    if not good:
        # its name and password are nobody's business
        raise RecipeError(
            f"the environment names a proxy for {parts.scheme} ({proxy.rpartition('@')[2]!r}) that is no "
            f"http://HOST:PORT; correct {parts.scheme}_proxy, or name {parts.netloc} in no_proxy"
        )
    return proxy


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # past TLS, whose own would wait for the other side
