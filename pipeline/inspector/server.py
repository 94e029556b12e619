"""The web application of `clipmill inspect`: what the page asks for, and the page itself.

Everything a client names is looked up (a clip's id, a model, a rule, a file of the page): no path of a client ever
reaches a file system. Answers are JSON; an error is {"error": sentence}.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import mimetypes
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from pipeline.caption.text import sentences
from pipeline.decide.rules import CHOSEN, META
from pipeline.faults import StoreError
from pipeline.inspector.guard import Guard
from pipeline.inspector.index import Index, finite
from pipeline.inspector.media import Gone, Media, asked_range
from pipeline.inspector.query import FIXED, MOST_ROWS, Filters, Query, Wrong, summary
from pipeline.inspector.search import Search

WEB = Path(__file__).parent / "web"
log = logging.getLogger("clipmill")

LABELS = {
    "agreement": "agreement of the captions",
    "fit": "fit of the chosen caption",
    "gap": "gap between models",
    "flag_count": "flags",
    "captions": "captions",
    "words": "words of the chosen caption",
    "duration_s": "seconds",
}


class NotThere(Exception):
    """What was asked for does not exist; the message is a sentence."""


class Inspector:
    """A run, and what is known of it besides its columns."""

    def __init__(self, index: Index):
        self.index = index
        self.media = Media(index)
        self.search = Search(index)
        self.query = Query(index, self.search.rows, self._alike, lambda kind: [], lambda: 0)
        self.failed = ""  # why the captions could not be read

    def start(self) -> None:
        """Read captions and words in the background."""
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        try:
            self.index.read_captions()
            self.search.fill()
        except StoreError as e:
            self.failed = str(e)
            log.error("%s", e)

    def close(self) -> None:
        self.search.close()
        self.media.close()

    def _alike(self, asked: int | str) -> np.ndarray:
        raise Wrong("this run has no embeddings to find similar clips by")

    def row(self, clip_id: str) -> int:
        row = self.index.row(clip_id)
        if row is None:
            raise NotThere(f"there is no clip {clip_id[:40]!r} in this run")
        return row

    # ------------------------------------------------------------ answers

    def run(self) -> dict[str, Any]:
        index = self.index
        models = index.models.counts()
        names = dict.fromkeys([*models, *index.model.names])
        return {
            "name": index.store.uri.rstrip("/").rpartition("/")[2],
            "uri": index.store.uri,
            "recipe": index.recipe.get("name"),
            "command": index.info.get("command"),
            "finished": index.info.get("finished"),
            "counts": {
                "clips": len(index),
                "kept": int(np.count_nonzero(index.kept == 1)),
                "undecided": int(np.count_nonzero(index.kept < 0)),
                "sources": len(index.sources.counts()),
                "seconds": round(float(np.nansum(index.numbers["duration_s"], dtype=np.float64)), 3),
            },
            "models": [
                {"name": n, "layer": n in index.layer_models, "clips": models.get(n, 0)} for n in names
            ],
            "columns": self._columns(),
            "flags": [{"name": n, "clips": c} for n, c in index.flags.counts().items()],
            "rules": index.rules,
            "buckets": list(index.buckets.counts()),
            "layers": [{"name": layer.name, "made": layer.made} for layer in index.layered.layers],
            "chooser": index.recipe.get("choose") or {},
            "fit_score": index.fit_score,
            "other": None,
            "reading": {
                "captions": index.captions_read,
                "words": self.search.done,
                "of": len(index),
                "done": index.ready and self.search.done >= len(index),
                "failed": self.failed,
            },
        }

    def _columns(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name, values in self.index.numbers.items():
            some = values[np.isfinite(values)]
            ends = (finite(float(some.min())), finite(float(some.max()))) if len(some) else (None, None)
            label = LABELS.get(name, name.removeprefix("score_").replace("_", " "))
            if name.startswith(CHOSEN):
                label = f"{name.removeprefix(CHOSEN)} of the chosen caption"
            found.append(
                {"name": name, "kind": "number", "min": ends[0], "max": ends[1], "label": label}
                | {"made_of_captions": name in FIXED or name.startswith(CHOSEN)}
            )
        return found

    def clips(self, filters: Filters, offset: int, limit: int) -> dict[str, Any]:
        found = self.query.found(filters)
        rows = []
        for row in found.rows[offset : offset + limit].tolist():
            rows.append(summary(self.index, row) | {"votes": {}})
            if row in found.similarity:
                rows[-1]["similarity"] = finite(found.similarity[row])
        return {"total": len(found.rows), "rows": rows}

    def clip(self, row: int) -> dict[str, Any]:
        index = self.index
        all_ = index.details(row)
        before, after = index.source_neighbours(row)
        original = int(index.original[row])
        fps, start = all_["fps"] or 0.0, all_["start_frame"]
        frames = [f - start for f in all_.get("sample_frames") or []]
        captions = [self._caption(c, row) for c in all_["captions"] or []]
        scores = {n.removeprefix("score_"): v for n, v in all_.items() if n.startswith("score_")}
        return summary(index, row) | {
            "fps": fps,
            "frames": all_["end_frame"] - start,
            "sample_frames": frames,
            "sample_times": [round(f / fps, 6) if fps else 0.0 for f in frames],
            "scores": {n: None if v is None else finite(v) for n, v in scores.items()},
            "text": all_["text"] or [],
            "meta": all_["meta"],
            "captions": captions,
            "rules": self._rules(row, all_, captions),
            "provenance": self._provenance(all_),
            "duplicate_of": None if original < 0 else index.ids[original].as_py(),
            "duplicates": [index.ids[r].as_py() for r in index.copies(row)],
            "neighbours": [],
            "before": None if before is None else index.ids[before].as_py(),
            "after": None if after is None else index.ids[after].as_py(),
            "votes": {},
            "media": {"tar": all_["media_tar"], "offset": all_["media_offset"], "size": all_["media_size"]},
        }

    def _caption(self, caption: dict[str, Any], row: int) -> dict[str, Any]:
        support = {n: [finite(x) for x in v or []] for n, v in caption["support"].items()}
        return {
            "model": caption["model"],
            "layer": caption["model"] in self.index.layer_models,
            "text": caption["text"] or "",
            "raw": caption.get("raw") or "",
            "outcome": caption["outcome"],
            "reason": caption.get("reason") or "",
            "prompt": caption.get("prompt") or "",
            "flags": caption.get("flags") or [],
            "made_from": caption.get("made_from") or [],
            "cost": caption["cost"],
            "scores": {n: None if v is None else finite(v) for n, v in caption["scores"].items()},
            "support": support,
            "sentences": sentences(caption["text"] or ""),
            "chosen": bool(caption["text"]) and caption["model"] == self.index.model[row],
        }

    def _rules(self, row: int, all_: dict[str, Any], captions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What every rule asked of a clip, and what it found."""
        chosen = next((c for c in captions if c["chosen"]), None)
        dropped = set(self.index.dropped.of(row))
        found = []
        for rule in self.index.rules:
            column = rule["column"] or ""
            value = all_.get(column)
            if column.startswith(META):
                value = all_["meta"].get(column.removeprefix(META))
            elif column.startswith(CHOSEN):
                value = chosen["scores"].get(column.removeprefix(CHOSEN)) if chosen else None
            elif column in ("caption", "caption_model"):
                value = chosen["text" if column == "caption" else "model"] if chosen else None
            if isinstance(value, float):
                value = finite(value)
            asked = {k: rule[k] for k in ("name", "column", "min", "max", "words")}
            found.append(asked | {"value": value, "ok": rule["name"] not in dropped})
        return found

    def _provenance(self, all_: dict[str, Any]) -> dict[str, Any]:
        info = self.index.info
        return {
            "source_sha256": all_["source_sha256"],
            "media_sha256": all_["media_sha256"],
            "unit": all_["unit"],
            "start_frame": all_["start_frame"],
            "end_frame": all_["end_frame"],
            "recipe": self.index.recipe.get("name"),
            "measure_key": info.get("measure_key"),
            "versions": info.get("versions") or {},
            "layers": {layer.name: layer.made for layer in self.index.layered.layers},
        }


# ---------------------------------------------------------------- the application


def application(inspector: Inspector, token: str | None = None) -> ASGIApp:
    """Args: token: see Guard."""

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
        return inspector.clips(filters(request), offset, limit)

    @api
    def histogram(request: Request) -> dict[str, Any]:
        column = request.query_params.get("column", "")
        return inspector.query.histogram(column, _whole(request, "bins", 40, 1 << 40), filters(request))

    routes = [
        Route("/api/run", api(lambda request: inspector.run())),
        Route("/api/clips", clips),
        Route("/api/histogram", histogram),
        Route("/api/facets", api(lambda request: inspector.query.facets(filters(request)))),
        Route("/api/funnel", api(lambda request: {"rules": inspector.index.rules})),
        Route(
            "/api/clip/{id}", api(lambda request: inspector.clip(inspector.row(request.path_params["id"])))
        ),
        Route("/media/{id}.mp4", functools.partial(_media, inspector)),
        Route("/still/{id}/{k:int}.jpg", functools.partial(_still, inspector)),
        Route("/", _page),
        Route("/{name}", _page),
    ]

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        inspector.close()

    missing = {404: lambda request, e: Plain({"error": "there is no such page"}, 404)}
    return Guard(Starlette(routes=routes, lifespan=life, exception_handlers=missing), token)


class Plain(JSONResponse):
    """JSON in which no text can be taken for markup, should it ever be shown as such."""

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


def _media(inspector: Inspector, request: Request) -> Response:
    """A clip's mp4, or the range of it that is asked for."""
    status, said = _tried(lambda: {"place": inspector.media.place(inspector.row(request.path_params["id"]))})
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
    status = 200 if asked is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="video/mp4")
    return StreamingResponse(inspector.media.blocks(place, start, end), status, headers, "video/mp4")


def _still(inspector: Inspector, request: Request) -> Response:
    row_of = inspector.row
    params = request.path_params
    status, said = _tried(lambda: {"jpeg": inspector.media.still(row_of(params["id"]), params["k"])})
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
