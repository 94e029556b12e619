"""Who may ask the inspector what: the checks before every request, and the headers behind every answer.

- The Host header names this machine, where only this machine may ask: a page of some other site whose name was made to
  point here (DNS rebinding) sends that name.
- Everywhere else a token is asked for: once in the address, from then on in a cookie that scripts cannot read and
  other sites cannot send.
- What changes something (POST) has a header of its own, which other sites' forms cannot send, and JSON of bounded size.
- Answers run nothing but the inspector's own script, are never taken for another kind than they say, and are shown
  in no other site's frame.
"""

from __future__ import annotations

import json
import secrets
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY = 256 << 10  # bytes of a POST
MOST_QUERY = 16 << 10  # bytes of a query string
COOKIE, HEADER = "clipmill_inspect", "x-clipmill"
HERE = ("localhost", "127.0.0.1", "::1")
POLICY = (
    "default-src 'self'; img-src 'self' data:; media-src 'self'; style-src 'self'; script-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def is_here(host: str) -> bool:
    """A server bound to it is reached from this machine only."""
    return host.strip("[]").lower() in HERE


class Guard:
    """An ASGI application around another.

    Args:
        token: what must be known to ask; none: only what comes to a name of this machine is answered.
    """

    def __init__(self, app: ASGIApp, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope, receive)
        refused = self._refused(request)
        if refused is None and request.method == "POST":
            body = await _body(request)
            if isinstance(body, Response):
                refused = body
            else:
                scope["state"] = dict(scope.get("state") or {}) | {"json": body}
        await (refused or self.app)(scope, receive, guarded)

    def _refused(self, request: Request) -> Response | None:
        host = _name(request.headers.get("host", ""))
        if self.token is None and not is_here(host):
            return _no(403, f"this inspector answers to localhost only, not to {host[:80]!r}")
        if len(request.scope["query_string"]) > MOST_QUERY:
            return _no(400, "the address is too long")
        if self.token is not None and (answer := self._admitted(request, self.token)) is not None:
            return answer
        if request.method not in ("GET", "HEAD", "POST"):
            return _no(405, f"no {request.method[:20]} here")
        if request.method == "POST":
            if request.headers.get(HEADER) != "1":
                return _no(403, "a POST needs the header 'X-Clipmill: 1'")
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return _no(400, "a POST needs 'Content-Type: application/json'")
        return None

    def _admitted(self, request: Request, token: str) -> Response | None:
        def same(said: str | None) -> bool:
            return said is not None and secrets.compare_digest(said.encode(), token.encode())

        if same(request.cookies.get(COOKIE)) or same(
            request.headers.get("authorization", "").removeprefix("Bearer ")
        ):
            return None
        if same(request.query_params.get("token")) and request.method in ("GET", "HEAD"):
            # and out of the address, that it is not passed on with it
            rest = urlencode([(k, v) for k, v in parse_qsl(request.url.query) if k != "token"])
            back = RedirectResponse("/" + request.url.path.lstrip("/") + (f"?{rest}" if rest else ""), 303)
            back.set_cookie(COOKIE, token, httponly=True, samesite="strict", path="/")
            return back
        return _no(401, "open the address that 'clipmill inspect' printed: it has the token")


async def _body(request: Request) -> dict[str, Any] | Response:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BODY:
            return _no(413, f"more than {MOST_BODY >> 10} KiB are not taken")
    try:
        said = json.loads(bytes(data) or b"{}")
    except (ValueError, RecursionError):
        return _no(400, "the body is not JSON")
    return said if isinstance(said, dict) else _no(400, "the body is not a JSON object")


def _no(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status)


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
