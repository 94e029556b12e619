"""The web application of `clipmill inspect`: the addresses that the page asks, and the page itself.

No path of a client ever reaches a file system: clips, models, rules and the page's own files are looked up by name.
Answers are JSON; an error is {"error": sentence}.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import mimetypes
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from pipeline.faults import StoreError
from pipeline.inspector.answers import WEB, Inspector, NotThere
from pipeline.inspector.guard import Guard
from pipeline.inspector.media import Gone, asked_range
from pipeline.inspector.query import MOST_ROWS, Filters, Wrong
from pipeline.inspector.session import Session

# ---------------------------------------------------------------- the application


def application(inspector: Inspector, token: str | None = None) -> ASGIApp:
    """Args: token: see Guard."""
    session = Session(inspector)

    def api(answer: Callable[[Request], dict[str, Any]]) -> Callable[[Request], Response]:
        @functools.wraps(answer)
        def endpoint(request: Request) -> Response:
            begun = time.perf_counter()
            status, said = _tried(lambda: answer(request))
            ms = round((time.perf_counter() - begun) * 1000, 1)
            return Plain(said | ({"ms": ms} if status == 200 else {}), status)

        return endpoint

    def filters(request: Request) -> Filters:
        return Filters.of(request.query_params.multi_items())

    @api
    def clips(request: Request) -> dict[str, Any]:
        offset, limit = _whole(request, "offset", 0, 1 << 40), _whole(request, "limit", 60, MOST_ROWS)
        return session.inspector.clips(filters(request), offset, limit)

    @api
    def histogram(request: Request) -> dict[str, Any]:
        column = request.query_params.get("column", "")
        return session.inspector.query.histogram(
            column, _whole(request, "bins", 40, 1 << 40), filters(request)
        )

    @api
    def clip(request: Request) -> dict[str, Any]:
        its = session.inspector.of(request.query_params.get("run", ""))
        return its.clip(its.row(request.path_params["id"]))

    @api
    def ab(request: Request) -> dict[str, Any]:
        a, b = _asked(request, "a", "b")
        who = request.query_params.get("who", "")
        return session.inspector.pair(a, b, who, _whole(request, "seed", 0, 1 << 40))

    @api
    def compare(request: Request) -> dict[str, Any]:
        offset, limit = _whole(request, "offset", 0, 1 << 40), _whole(request, "limit", 60, MOST_ROWS)
        return session.inspector.compared(request.query_params.get("change", ""), offset, limit)

    @api
    def frames(request: Request) -> dict[str, Any]:
        its = session.inspector.of(request.query_params.get("run", ""))
        return its.frames(its.row(request.path_params["id"]))

    @api
    def run(request: Request) -> dict[str, Any]:
        opened = session.opened  # before what it is of: seen too old at most
        return session.inspector.run() | {"opened": opened}

    @api
    def edits(request: Request) -> dict[str, Any]:
        said = session.inspector.edits()
        session.renew()
        return said

    @api
    def renew(request: Request) -> dict[str, Any]:
        session.renew()
        return session.state()

    routes = [
        Route("/api/run", run),
        Route("/api/clips", clips),
        Route("/api/histogram", histogram),
        Route("/api/facets", api(lambda request: session.inspector.query.facets(filters(request)))),
        Route("/api/funnel", api(lambda request: {"rules": session.inspector.index.rules})),
        Route("/api/clip/{id}", clip),
        Route("/api/vote", api(lambda request: session.inspector.vote(request.state.json)), methods=["POST"]),
        Route("/api/votes", api(lambda request: session.inspector.voters())),
        Route("/api/export", functools.partial(_export, session)),
        Route("/api/edits", edits, methods=["POST"]),
        Route("/api/state", api(lambda request: session.state())),
        Route("/api/renew", renew, methods=["POST"]),
        Route("/api/warm", api(lambda request: {"text": session.inspector.near.warm()})),
        Route("/api/frames/{id}", frames),
        Route("/api/ab", ab),
        Route("/api/ab", api(lambda request: session.inspector.answer(request.state.json)), methods=["POST"]),
        Route("/api/ab/result", api(lambda request: session.inspector.result(*_asked(request, "a", "b")))),
        Route("/api/compare", compare),
        Route("/media/{id}.mp4", functools.partial(_media, session)),
        Route("/still/{id}/{k:int}.jpg", functools.partial(_still, session)),
        Route("/", _page),
        Route("/{name}", _page),
    ]

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        session.inspector.close()

    missing = {
        404: lambda request, e: Plain({"error": "there is no such page"}, 404),
        500: lambda request, e: Plain(
            {"error": f"the inspector failed: {type(e).__name__}; see where it runs"}, 500
        ),
    }
    return Guard(Starlette(routes=routes, lifespan=life, exception_handlers=missing), token)


class Plain(JSONResponse):
    """JSON as UTF-8; half characters, as file names may have them, are question marks."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def _tried(answer: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    try:
        return 200, answer()
    except Wrong as e:
        return 400, {"error": str(e)}
    except (NotThere, Gone) as e:
        return 404, {"error": str(e)}
    except StoreError as e:
        return 500, {"error": str(e)}


def _whole(request: Request, name: str, default: int, most: int) -> int:
    said = request.query_params.get(name, str(default))
    if not (said.isascii() and said.isdigit() and len(said) < 15 and int(said) <= most):
        raise Wrong(f"{name}={said[:40]}: a whole number from 0 to {most}")
    return int(said)


def _asked(request: Request, *names: str) -> list[str]:
    """Parameters that there must be. Raises Wrong."""
    found = [request.query_params.get(name, "") for name in names]
    if not all(found):
        raise Wrong(f"{' and '.join(names)} must be given")
    return found


def _export(session: Session, request: Request) -> Response:
    """Lines of JSON as a file."""
    kind = request.query_params.get("kind", "choices")
    status, said = _tried(lambda: {"lines": session.inspector.export(kind)})
    if status != 200:
        return Plain(said, status)

    def lines() -> Iterator[bytes]:
        for line in said["lines"]:
            yield json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

    headers = {"Content-Disposition": f'attachment; filename="{kind}.jsonl"'}
    return StreamingResponse(lines(), 200, headers, "application/x-ndjson")


def _media(session: Session, request: Request) -> Response:
    """A clip's mp4, or the range of it that is asked for."""

    def found() -> dict[str, Any]:
        its = session.inspector.of(request.query_params.get("run", ""))
        return {"media": its.media, "place": its.media.place(its.row(request.path_params["id"]))}

    status, said = _tried(found)
    if status != 200:
        return Plain(said, status)
    place = said["place"]
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=300"}
    try:
        asked = asked_range(request.headers.get("range"), place.size)
    except IndexError:
        return Plain({"error": "no such bytes"}, 416, headers | {"Content-Range": f"bytes */{place.size}"})
    start, end = asked or (0, place.size)
    headers["Content-Length"] = str(end - start)
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{place.size}"
    whole = 200 if asked is None else 206
    if request.method == "HEAD":
        return Response(status_code=whole, headers=headers, media_type="video/mp4")
    blocks = said["media"].blocks(place, start, end)
    status, said = _tried(lambda: {"first": next(blocks)})  # what cannot be read is told, not sent half
    if status != 200:
        return Plain(said, status)
    return StreamingResponse(itertools.chain((said["first"],), blocks), whole, headers, "video/mp4")


def _still(session: Session, request: Request) -> Response:
    """A clip's k-th still."""

    def found() -> dict[str, Any]:
        its = session.inspector.of(request.query_params.get("run", ""))
        return {"jpeg": its.media.still(its.row(request.path_params["id"]), request.path_params["k"])}

    status, said = _tried(found)
    if status != 200:
        return Plain(said, status)
    return Response(said["jpeg"], headers={"Cache-Control": "private, max-age=300"}, media_type="image/jpeg")


def _page(request: Request) -> Response:
    """A file of the page, by its name."""
    name = request.path_params.get("name") or "index.html"
    there = {p.name: p for p in WEB.glob("*") if p.is_file()}
    if name not in there:
        return Plain({"error": "there is no such page"}, 404)
    kind = mimetypes.guess_type(name)[0] or "text/plain"
    kind = "text/javascript" if name.endswith(".js") else kind
    return Response(there[name].read_bytes(), headers={"Cache-Control": "no-cache"}, media_type=kind)
